"""`python -m trainerkit replay RUN [OTHER]`: do two runs have the same steps, or does a run give them again?

What is compared is what `trainerkit.callbacks.StepHashes` recorded. Exit code: 0 if all is equal, 1 if something
differs, 2 if it could not be found out.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from trainerkit.callbacks import StepHashes
from trainerkit.callbacks._step_records import compare_folders, rank_files, read_records
from trainerkit.errors import UserError, first_lines
from trainerkit.facts import CONFIG_VARIABLE
from trainerkit.plugins import AllowList
from trainerkit.run import run

_FROM_START = "--from-start"
_TRUST = "trust=true"


def replay(arguments: Sequence[str], allow: AllowList) -> bool:
    """Compare two recorded runs, or train one again in a temporary folder and compare each step.

    Args:
        arguments: the folder of a run, or of two; `--from-start` begins anew instead of at a checkpoint; `trust=true`
            lets the files that the run's config names run code. What that config says of trust does not count.
        allow: decides which targets of the run's config may be built.

    Returns:
        Whether anything differs.

    Raises:
        UserError: if it cannot be found out, and why.
    """
    flags = {argument for argument in arguments if argument.startswith(("-", "trust="))}
    folders = [Path(argument).expanduser() for argument in arguments if argument not in flags]
    if unknown := sorted(flags - {_FROM_START, _TRUST}):
        raise UserError(f"{unknown[0]}: there is no such flag; replay has {_FROM_START} and {_TRUST}.")
    if not 1 <= len(folders) <= 2:
        raise UserError("replay: needs the folder of a run, or of two: python -m trainerkit replay RUN [OTHER]")
    if len(folders) == 1:
        return _train_again(folders[0], _FROM_START in flags, _TRUST in flags, allow)
    try:
        steps, differences = compare_folders(*map(_records_of, folders))
    except ValueError as error:
        raise UserError(str(error)) from error
    return _report(steps, differences)


class Again(StepHashes):
    """Compares with the records of another folder, and ends the run after the last of them.

    Args:
        reference: the folder with the records.
        on_difference: of the recorded run; here the first difference ends it anyway.
        every_n_steps: as `StepHashes`.
        dirname: as `StepHashes`.

    Raises:
        Replayed: in fit, at the first difference or at the end.
    """

    def __init__(
        self,
        reference: str,
        on_difference: Literal["raise", "warn"] = "raise",
        every_n_steps: int = 1,
        dirname: str = "step_hashes",
    ) -> None:
        super().__init__(on_difference, every_n_steps, dirname)
        self.reference = Path(reference)
        self._steps = 0

    @property
    def state_key(self) -> str:
        """That of the callback whose place it takes."""
        return StepHashes.__qualname__

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Where no step can be compared, do not train."""
        super().on_train_start(trainer, pl_module)
        if self._compare_until <= self._step:
            raise Replayed(0, [])

    def _reference(self) -> Path:
        return self.reference / self._path.name

    def _compared(self, trainer: Trainer, differences: list[str]) -> None:
        self._steps += self._step > 0
        if differences or self._step >= self._compare_until:
            raise Replayed(self._steps, differences)


class Replayed(Exception):
    """The end of a run that was trained again.

    Attributes:
        steps: how many steps were compared.
        differences: sentences about the first difference, one for each rank that has one.
    """

    def __init__(self, steps: int, differences: list[str]) -> None:
        super().__init__(steps, differences)
        self.steps = steps
        self.differences = differences


def _train_again(folder: Path, from_start: bool, trust: bool, allow: AllowList) -> bool:
    if os.environ.get("LOCAL_RANK", "0") != "0" and CONFIG_VARIABLE in os.environ:
        # In a process that Lightning started for another device; the first one reports.
        cfg = OmegaConf.load(os.environ[CONFIG_VARIABLE])
        assert isinstance(cfg, DictConfig)
        _run(cfg, allow)
        return False
    with tempfile.TemporaryDirectory(prefix="trainerkit-replay-") as out_dir:
        cfg = _config(folder, from_start, out_dir)
        cfg.trust = trust  # the folder may be a stranger's, and is not asked
        ended = _run(cfg, allow)
    if ended is None:
        raise UserError(f"{folder}: trained again, the run ended before its last recorded step; was it longer before?")
    return _report(ended.steps, ended.differences)


def _run(cfg: DictConfig, allow: AllowList) -> Replayed | None:
    try:
        run(cfg, [], allow)
    except Replayed as ended:
        return ended
    return None


def _config(folder: Path, from_start: bool, out_dir: str) -> DictConfig:
    """The run's own config, but for where it writes, from where it begins and what it compares with."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.yaml, so it cannot be trained again; name two runs to compare them.")
    config = _read(path)
    found, node = _recorder(config.get("callbacks"))
    if found is None:
        raise UserError(f"{folder}: was trained without step_hashes; train it with callbacks=[default,step_hashes].")
    records = _records_of(folder, str(node.get("dirname", "step_hashes")))
    checkpoint = None if from_start else _checkpoint(folder, records)
    cfg: DictConfig = OmegaConf.create(_moved(config, str(config.get("out_dir")), out_dir))
    cfg.callbacks[found].update({"_target_": f"{Again.__module__}.{Again.__qualname__}", "reference": str(records)})
    start = None if config.get("resume") == "auto" else config.get("resume")
    cfg.resume = start if checkpoint is None else str(checkpoint)
    return cfg


def _read(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read ({first_lines(error, 1)}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold a run's config, as names and values.")
    return {str(key): value for key, value in config.items()}


def _recorder(callbacks: Any) -> tuple[str | None, dict[str, Any]]:
    """The name and the arguments of the callback that recorded the steps, or None."""
    for name, node in callbacks.items() if isinstance(callbacks, dict) else ():
        if isinstance(node, dict) and str(node.get("_target_")).endswith(".StepHashes"):
            return str(name), node
    return None, {}


def _records_of(folder: Path, dirname: str = "step_hashes") -> Path:
    """Where a run's records are: in `dirname` of its folder, or in the folder itself."""
    for place in (folder / dirname, folder):
        if rank_files(place):
            return place
    raise UserError(f"{folder}: has no records of steps; train with callbacks=[default,step_hashes] to have them.")


def _checkpoint(folder: Path, records: Path) -> Path | None:
    """The oldest checkpoint after which there are records, or None."""
    try:
        last = max((step for file in rank_files(records).values() for step in read_records(file)), default=0)
    except ValueError as error:
        raise UserError(str(error)) from error
    steps = {path: _step_of(path) for path in sorted((folder / "checkpoints").glob("[!.]*.ckpt")) if path.is_file()}
    usable = {path: step for path, step in steps.items() if step is not None and step < last}
    return min(usable, key=lambda path: usable[path], default=None)


def _step_of(path: Path) -> int | None:
    """After which recorded step a checkpoint was saved; None where it does not say so or cannot be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["callbacks"][StepHashes.__qualname__]["ranks"][0]["step"])
    except (OSError, RuntimeError, EOFError, UnpicklingError, LookupError, TypeError, ValueError):
        return None


def _moved(node: Any, before: str, now: str) -> Any:
    """The config with each path in one folder put into another: nothing of the first run is written to."""
    if isinstance(node, dict):
        return {key: _moved(value, before, now) for key, value in node.items()}
    if isinstance(node, list):
        return [_moved(value, before, now) for value in node]
    if isinstance(node, str) and (node == before or node.startswith(f"{before}/")):
        return now + node[len(before) :]
    return node


def _report(steps: int, differences: Sequence[str]) -> bool:
    if not steps and not differences:
        raise UserError("replay: there is no step of which there are two records.")
    print("\n".join(differences) if differences else f"{steps} steps equal")
    return bool(differences)
