"""What a run leaves beside its results: the config as it was, the overrides, the environment."""

import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig, OmegaConf

from trainerkit.files import replacing, write_json

CONFIG_VARIABLE = "TRAINERKIT_RESOLVED_CONFIG"
_LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WriteFacts(Callback):
    """Write config.yaml, overrides.txt and environment.json when training starts.

    Not before: a checkpoint that does not fit must leave the files of the run that it belongs to. The config of a
    resumed run is kept as config.previous.yaml if it was another.
    """

    def __init__(self, cfg: DictConfig, overrides: list[str]) -> None:
        self._config = OmegaConf.to_yaml(cfg)
        self._overrides = "".join(f"{override}\n" for override in overrides)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored by now."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        path = folder / "config.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != self._config:
            path.replace(folder / "config.previous.yaml")
        for name, text in (("config.yaml", self._config), ("overrides.txt", self._overrides)):
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        write_json(folder / "environment.json", environment())


@contextmanager
def leading_children(cfg: DictConfig, trainer: Trainer) -> Iterator[None]:
    """Run with the processes that Lightning starts for other devices, and afterwards be as before.

    They run the same command line, and would resolve a timestamp, or a whole sweep, anew: the resolved config is left
    where they find it. A process that has led others once would take itself for one of them in the next job of a sweep,
    and wait in the old process group, which is why both are undone. If this one fails before it
    has met them, they are ended.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size == 1 or "LOCAL_RANK" in os.environ or not isinstance(launcher, _SubprocessScriptLauncher):
        yield
        return
    before = {name: os.environ.get(name) for name in (*_LAUNCH_VARIABLES, CONFIG_VARIABLE)}
    handle, name = tempfile.mkstemp(prefix="trainerkit-", suffix=".yaml")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(OmegaConf.to_yaml(cfg))
        os.environ[CONFIG_VARIABLE] = name
        with _as_command_line():
            yield
        for process in launcher.procs:
            process.wait()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        if not torch.distributed.is_initialized():
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))  # they would wait half an hour to meet this one
        raise
    finally:
        Path(name).unlink(missing_ok=True)
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value


@contextmanager
def _as_command_line() -> Iterator[None]:
    """Have Lightning start trainerkit for the other devices, whatever program this process is: a launcher's worker,
    which runs a job of a sweep, would start more workers.
    """
    main = sys.modules["__main__"]
    before, main.__spec__ = main.__spec__, find_spec("trainerkit.__main__")
    try:
        yield
    finally:
        main.__spec__ = before


def differences(checkpoint: str, cfg: DictConfig, part: str) -> list[str]:
    """What a part of the config was in the run that wrote a checkpoint, and is now."""
    path = Path(checkpoint).parent.parent / "config.yaml"
    if not path.exists():
        return []
    then, now = (dict(_flat(OmegaConf.select(OmegaConf.load(path), part), part)), dict(_flat(cfg.get(part), part)))
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return [f"{key} was {then.get(key)}, is {now.get(key)}" for key in changed]


def _flat(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, DictConfig):
        for name in map(str, node):
            yield from _flat(node[name], f"{key}.{name}")
    else:
        yield key, node


def environment() -> dict[str, Any]:
    """Versions, commit, device and command, for environment.json."""
    packages = ("trainerkit", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy", "safetensors")
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "commit": _commit(),
        "platform": platform.platform(),
        "device": {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpus": os.cpu_count()},
        "command": sys.argv,
    }


def _commit() -> str | None:
    """The commit of the repository that trainerkit is run from, or None."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
