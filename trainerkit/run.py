"""The life of a run: config to objects, then fit, validate, test or predict; the only reader of configs."""

import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainerkit.build import build
from trainerkit.callbacks import CrashSafeCheckpoint, EarlyStopping, History, SavePredictions, StopRequested
from trainerkit.errors import UserError
from trainerkit.files import replacing, write_json
from trainerkit.plugins import AllowList
from trainerkit.trainer import Trainer

STAGES = ("fit", "validate", "test", "predict")
CONFIG_VARIABLE = "TRAINERKIT_RESOLVED_CONFIG"
_PARTS = ("task", "data", "optimizer", "scheduler", "trainer", "callbacks", "logger")


def run(cfg: DictConfig, overrides: list[str], allow: AllowList) -> dict[str, float]:
    """Do what a composed config says.

    Args:
        cfg: see `configs/train.yaml`.
        overrides: what the command line said, to be kept beside the results and for the command that goes on.
        allow: decides which targets may be built.

    Returns:
        The metrics of the stage: of fit, the best checkpoint's on the test data where there are any.

    Raises:
        UserError: for anything that the user can put right.
        StopRequested: if a signal stopped the run; the checkpoint is written and the way on is printed.
    """
    _quiet()
    if cfg.stage not in STAGES:
        raise UserError(f"stage={cfg.stage}: must be one of {', '.join(STAGES)}.")
    if not isinstance(cfg.seed, int):
        raise UserError(f"seed={cfg.seed}: must be a whole number.")
    out_dir = Path(str(cfg.out_dir)).expanduser()
    results_path = out_dir / "results.json"
    checkpoint = _checkpoint(cfg, out_dir)
    if cfg.stage == "fit" and checkpoint is not None and _is_finished(results_path, cfg):
        results: dict[str, Any] = json.loads(results_path.read_text(encoding="utf-8"))
        print(f"{out_dir} holds a finished run ({results['stopped']}); nothing was changed.")
        _print_metrics(results["metrics"])
        print("To train on, raise trainer.max_epochs; for a new run, take another out_dir.")
        return dict(results["metrics"])

    seed_everything(cfg.seed, workers=True, verbose=False)
    data, task, trainer = _build_all(cfg, out_dir, allow)
    if trainer.is_global_zero and cfg.stage == "fit":
        _write_facts(cfg, overrides, out_dir, resumed=checkpoint is not None)
    _print_start(cfg, out_dir, checkpoint, trainer)
    with _advice(checkpoint, out_dir, cfg):
        if cfg.stage == "fit":
            return _fit(cfg, overrides, out_dir, trainer, task, data, checkpoint)
        return _evaluate(str(cfg.stage), out_dir, trainer, task, data, checkpoint)


def _build_all(
    cfg: DictConfig, out_dir: Path, allow: AllowList
) -> tuple[LightningDataModule, LightningModule, Trainer]:
    """Build every part, data first: the config may ask it for sizes by `${data_module:…}`."""
    if cfg.get("data") is None:
        raise UserError("data: a run needs data; choose one by data=NAME, see --help.")
    data = build(cfg.data, "data", allow)
    refused: list[UserError] = []

    def ask(name: str) -> Any:
        try:
            return _ask(data, name)
        except UserError as error:
            refused.append(error)  # OmegaConf would wrap it; the data's own words say more
            raise

    OmegaConf.register_new_resolver("data_module", ask, replace=True)
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise refused[0] if refused else UserError(str(error).splitlines()[0]) from error
    parts: dict[str, Any] = {"optimizer": build(cfg.optimizer, "optimizer", allow)}
    if cfg.get("scheduler") is not None:
        parts["scheduler"] = build(cfg.scheduler, "scheduler", allow)
    task = build(cfg.task, "task", allow, **parts)
    callbacks: list[Callback] = [
        build(node, f"callbacks.{name}", allow) for name, node in cfg.callbacks.items() if node is not None
    ]
    loggers = [build(node, f"logger.{name}", allow) for name, node in (cfg.logger or {}).items() if node is not None]
    trainer = build(
        cfg.trainer, "trainer", allow, callbacks=callbacks, logger=loggers or False, default_root_dir=str(out_dir)
    )
    return data, task, trainer


def _ask(data: Any, name: str) -> Any:
    try:
        return getattr(data, name)
    except AttributeError as error:
        raise UserError(f"data: {type(data).__name__} has no {name}, which the task's config asks for.") from error


def _fit(
    cfg: DictConfig,
    overrides: list[str],
    out_dir: Path,
    trainer: Trainer,
    task: LightningModule,
    data: LightningDataModule,
    checkpoint: Path | None,
) -> dict[str, float]:
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
    except StopRequested as stop:
        step = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        _say(
            trainer,
            f"\nStopped by {stop.signal} in {step}; saved {stop.path}\nTo go on:\n  {_command(overrides, out_dir)}",
        )
        raise
    epochs = trainer.current_epoch
    stopped = next((c.reason for c in trainer.callbacks if isinstance(c, EarlyStopping) and c.reason), None)
    metrics = _history_metrics(trainer) | _metrics(trainer)
    best = next((c.best_model_path for c in trainer.callbacks if isinstance(c, CrashSafeCheckpoint)), "")
    if best and trainer.datamodule is not None and _has_test_data(data):
        try:
            trainer.test(task, datamodule=data, ckpt_path=best, verbose=False)
        except SystemExit:  # how Lightning ends on Ctrl-C
            _say(trainer, f"\nTrained, and stopped while testing. To test:\n  {_command(overrides, out_dir)}")
            raise
        metrics |= _metrics(trainer)
    if trainer.is_global_zero:
        limits = {"max_epochs": cfg.trainer.max_epochs, "max_steps": cfg.trainer.max_steps}
        reason = f"{epochs} epochs, {stopped or 'the whole length'}"
        write_json(out_dir / "results.json", {"stopped": reason, "limits": limits, "metrics": metrics})
        print(f"\nTrained for {reason}.")
        _print_metrics(metrics)
        _print_files(out_dir)
    return metrics


def _evaluate(
    stage: str,
    out_dir: Path,
    trainer: Trainer,
    task: LightningModule,
    data: LightningDataModule,
    checkpoint: Path | None,
) -> dict[str, float]:
    if stage == "predict":
        trainer.predict(task, datamodule=data, ckpt_path=checkpoint, return_predictions=False)
        for callback in trainer.callbacks:
            if isinstance(callback, SavePredictions):
                _say(trainer, "\n".join(["Wrote", *(f"  {path}" for path in callback.paths)]))
        return {}
    evaluate = trainer.validate if stage == "validate" else trainer.test
    evaluate(task, datamodule=data, ckpt_path=checkpoint, verbose=False)
    metrics = _metrics(trainer)
    if trainer.is_global_zero:
        _print_metrics(metrics)
    return metrics


def _checkpoint(cfg: DictConfig, out_dir: Path) -> Path | None:
    """The checkpoint to begin from: `resume=auto` looks into `out_dir`, for last.ckpt to fit, else for best.ckpt."""
    name = "last.ckpt" if cfg.stage == "fit" else "best.ckpt"
    found = out_dir / "checkpoints" / name
    if cfg.resume is None:
        if cfg.stage == "fit" and found.exists():
            raise UserError(
                f"resume=null: {out_dir} already holds a run, which would be overwritten.\n"
                "Take resume=auto to continue it, or another out_dir."
            )
        return None
    if cfg.resume == "auto":
        if found.exists():
            return found
        if cfg.stage != "fit" and not OmegaConf.select(cfg, "task.network.weights"):
            raise UserError(
                f"stage={cfg.stage} needs trained weights, and {found} is not there.\n"
                "Name the folder of a run (out_dir=…), a checkpoint (resume=PATH), or take the task's initial weights "
                "(resume=null)."
            )
        return None
    path = Path(str(cfg.resume)).expanduser()
    if not path.is_file():
        raise UserError(f"resume={cfg.resume}: there is no such file; must be auto, null or the path of a checkpoint.")
    return path


def _is_finished(results_path: Path, cfg: DictConfig) -> bool:
    if not results_path.exists():
        return False
    limits = json.loads(results_path.read_text(encoding="utf-8"))["limits"]
    return bool(limits == {"max_epochs": cfg.trainer.max_epochs, "max_steps": cfg.trainer.max_steps})


class _advice:
    """Turns what a checkpoint that does not fit raises into an error that says what differs."""

    def __init__(self, checkpoint: Path | None, out_dir: Path, cfg: DictConfig) -> None:
        self.checkpoint, self.out_dir, self.cfg = checkpoint, out_dir, cfg

    def __enter__(self) -> None:
        self.before = _saved_config(self.checkpoint)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError | SystemExit | KeyboardInterrupt):
            return
        if isinstance(error, ValueError) and error.args:
            raise UserError(str(error)) from error
        if self.checkpoint is not None and isinstance(error, RuntimeError) and "Error(s) in loading" in str(error):
            lines = "\n".join(f"  {line}" for line in _differences(self.before, self.cfg, "task"))
            raise UserError(
                f"{self.checkpoint} does not fit this config.\n"
                f"{lines or '  ' + str(error).splitlines()[1].strip()}\nGive it the values it was trained with."
            ) from error


def _saved_config(checkpoint: Path | None) -> Any:
    path = checkpoint.parent.parent / "config.previous.yaml" if checkpoint else None
    if path is None or not path.exists():
        path = checkpoint.parent.parent / "config.yaml" if checkpoint else None
    return OmegaConf.load(path) if path is not None and path.exists() else None


def _differences(before: Any, now: DictConfig, part: str) -> Iterator[str]:
    """What a part of the config was, and is."""
    if before is None:
        return
    then, new = dict(_flat(before.get(part), part)), dict(_flat(now.get(part), part))
    for key in then.keys() | new.keys():
        if then.get(key) != new.get(key):
            yield f"{key} was {then.get(key)}, is {new.get(key)}"


def _flat(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, DictConfig):
        for name in map(str, node):
            yield from _flat(node[name], f"{key}.{name}")
    else:
        yield key, node


def _write_facts(cfg: DictConfig, overrides: list[str], out_dir: Path, resumed: bool) -> None:
    """config.yaml, overrides.txt, environment.json; the config of a resumed run is kept if it was another."""
    path = out_dir / "config.yaml"
    text = OmegaConf.to_yaml(cfg)
    if resumed and path.exists() and path.read_text(encoding="utf-8") != text:
        path.replace(out_dir / "config.previous.yaml")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with replacing(out_dir / "overrides.txt") as temporary:
        temporary.write_text("".join(f"{override}\n" for override in overrides), encoding="utf-8")
    write_json(out_dir / "environment.json", _environment())
    # Processes that Lightning starts for other devices run the same command line; they take this config instead.
    os.environ[CONFIG_VARIABLE] = str(path.resolve())


def _environment() -> dict[str, Any]:
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


def _has_test_data(data: LightningDataModule) -> bool:
    loader = data.test_dataloader()
    return bool(loader is not None and len(loader))


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_step")}


def _history_metrics(trainer: Trainer) -> dict[str, float]:
    """The last epoch's losses, also where a run was resumed after its last epoch and no epoch was left."""
    for callback in trainer.callbacks:
        if isinstance(callback, History) and callback.records:
            record = callback.records[-1]
            found = {callback.train_metric: record["train_loss"], callback.val_metric: record["val_loss"]}
            return {name: value for name, value in found.items() if value is not None}
    return {}


def _command(overrides: list[str], out_dir: Path) -> str:
    kept = [override for override in overrides if not override.startswith(("out_dir=", "resume="))]
    return " ".join(["python -m trainerkit", *map(_quoted, kept), f"out_dir={_quoted(str(out_dir))}"])


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _print_start(cfg: DictConfig, out_dir: Path, checkpoint: Path | None, trainer: Trainer) -> None:
    device = trainer.strategy.root_device
    start = f"from {checkpoint}" if checkpoint else "from the start" if cfg.stage == "fit" else "with initial weights"
    _say(trainer, f"trainerkit: {cfg.stage} {start}, on {device}, {trainer.precision}, in {out_dir}")


def _print_metrics(metrics: dict[str, float]) -> None:
    width = max(map(len, metrics), default=0)
    print("\nResults")
    for name, value in sorted(metrics.items()):
        print(f"  {name:<{width}}  {value:.5g}")


def _print_files(out_dir: Path) -> None:
    print(f"\nFiles in {out_dir}")
    for path in sorted(out_dir.rglob("*")):
        if path.is_file():
            print(f"  {path.relative_to(out_dir)}")


def _say(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(text, flush=True)


def _quiet() -> None:
    """Leave out advertisements, device lines and advice about choices that were made on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*treespec.*",
        ".*litlogger.*",
    ):
        warnings.filterwarnings("ignore", message=message)
