"""The life of a run: config to objects, then fit, validate, test or predict; the only reader of configs."""

import logging
import math
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainerkit.build import build
from trainerkit.callbacks import (
    CheckpointError,
    CrashSafeCheckpoint,
    EarlyStopping,
    History,
    RankConsensus,
    RanksDiffer,
    SavePredictions,
    StepsDiffer,
    StopRequested,
)
from trainerkit.callbacks.best_weights import load_best_weights
from trainerkit.errors import UserError, first_lines
from trainerkit.extras import missing_in
from trainerkit.facts import WriteFacts, differences, leading_children
from trainerkit.files import write_json
from trainerkit.loading import TRUST_WARNING, read_json, trusting
from trainerkit.plugins import AllowList
from trainerkit.resume import WarnOfOverruled, choose_checkpoint, is_weights
from trainerkit.trainer import Trainer

_Kind = TypeVar("_Kind")
STAGES = ("fit", "validate", "test", "predict")
_WIDEST = 8  # metrics beside each other on the screen; more stand below each other
_LONGEST = 24  # sets of a table on the screen; all are in results.json
# What a run reads, so that `~key` cannot take it away.
_NEEDED = ("stage", "resume", "trust", "seed", "out_dir", "data", "optimizer", "task", "trainer")


def run(cfg: DictConfig, overrides: list[str], allow: AllowList, again: Sequence[str] = ()) -> dict[str, float]:
    """Do what a composed config says.

    Args:
        cfg: see `configs/train.yaml`.
        overrides: what the command line said, to be kept beside the results and for the command that goes on.
        allow: decides which targets may be built.
        again: what a command that goes on needs beside the overrides (`allow=…`, `--config-dir …`).

    Returns:
        The metrics of the stage: of fit, the best checkpoint's on the test data where there are any.

    Raises:
        UserError: for anything that the user can put right.
        StopRequested: if a signal stopped the run; the checkpoint is written and the way on is printed.
    """
    _quiet()
    _check_settings(cfg)
    if cfg.trust and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"trainerkit: warning: {TRUST_WARNING}", file=sys.stderr, flush=True)
    with trusting(cfg.trust):
        return _run(cfg, overrides, allow, again)


def _check_settings(cfg: DictConfig) -> None:
    """Refuse what is wrong at the top level, before anything is looked for or made."""
    values: dict[str, Any] = {}
    for key in _NEEDED:
        try:
            values[key] = cfg[key]
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: {first_lines(error, 1)}.") from error
    if values["trust"] is not True and values["trust"] is not False:
        raise UserError(f"trust={values['trust']}: must be true or false.")
    if values["stage"] not in STAGES:
        raise UserError(f"stage={values['stage']}: must be one of {', '.join(STAGES)}.")
    seed = values["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be a whole number from 0 to 4294967295.")
    for key in ("out_dir", "resume"):
        text = values[key]
        if isinstance(text, DictConfig | ListConfig) or (text is None and key == "out_dir") or "\0" in str(text):
            raise UserError(f"{key}={text}: must be a path.")
        if key == "out_dir" and "://" in str(text):
            raise UserError(
                f"out_dir={text}: must be a folder of this machine; callbacks.crash_safe_checkpoint.dirname={text} "
                "puts the checkpoints there."
            )
        try:
            Path(str(text)).expanduser().exists()
        except (OSError, RuntimeError) as error:  # too long a name; ~user without a home
            raise UserError(f"{key}={text}: cannot be used ({error}).") from error
    for key in ("data", "optimizer", "task", "trainer"):
        if not isinstance(values[key], DictConfig):
            raise UserError(f"{key}={values[key]}: a run needs one; choose by {key}=NAME, see --help.")


def _run(cfg: DictConfig, overrides: list[str], allow: AllowList, again: Sequence[str]) -> dict[str, float]:
    out_dir = Path(str(cfg.out_dir)).expanduser()
    results_path = out_dir / "results.json"
    checkpoint = choose_checkpoint(cfg, out_dir)
    if cfg.stage == "fit" and checkpoint is not None and _is_finished(results_path, cfg):
        results = _results(results_path)
        print(f"{out_dir} holds a finished run ({results['stopped']}); nothing was changed.")
        _print_metrics(results["metrics"])
        print("To train on, raise trainer.max_epochs (and the patience, if that ended it); else take another out_dir.")
        return dict(results["metrics"])

    seed_everything(cfg.seed, workers=True, verbose=False)
    data, task, trainer = _build_all(cfg, overrides, out_dir, allow)
    _check_reader(checkpoint, out_dir, trainer)
    _print_start(cfg, out_dir, checkpoint, trainer)
    with leading_children(cfg, trainer), _advice(checkpoint, cfg):
        if cfg.stage == "fit":
            return _fit(cfg, [*again, *overrides], out_dir, trainer, task, data, checkpoint)
        return _evaluate(cfg, trainer, task, data, checkpoint)


def _build_all(
    cfg: DictConfig, overrides: list[str], out_dir: Path, allow: AllowList
) -> tuple[LightningDataModule, LightningModule, Trainer]:
    """Build every part, data first: the config may ask it for sizes by `${data_module:…}`."""
    data = _of_kind(LightningDataModule, build(cfg.data, "data", allow), "data")
    refused: list[UserError] = []

    def ask(name: str) -> Any:
        try:
            value = _ask(data, name)
        except UserError as error:
            refused.append(error)  # OmegaConf would wrap it; the data's own words say more
            raise
        return OmegaConf.create(value) if isinstance(value, list) else value  # what it allows in a config

    OmegaConf.register_new_resolver("data_module", ask, replace=True)
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise (refused[0] if refused else UserError(first_lines(error, 1))) from error
    parts: dict[str, Any] = {"optimizer": build(cfg.optimizer, "optimizer", allow)}
    if cfg.get("scheduler") is not None:
        parts["scheduler"] = build(cfg.scheduler, "scheduler", allow)
    task = _of_kind(LightningModule, build(cfg.task, "task", allow, **parts), "task")
    callbacks: list[Callback] = _build_group(cfg, "callbacks", allow)
    for callback in callbacks:
        if isinstance(callback, RankConsensus) and callback.facts is None:
            callback.facts = _plain(cfg)
    if cfg.stage == "fit":
        optimizer, scheduler = (_plain(cfg.get(part) or OmegaConf.create()) for part in ("optimizer", "scheduler"))
        callbacks += [WriteFacts(cfg, overrides), WarnOfOverruled(optimizer, scheduler)]
    options: dict[str, Any] = {"callbacks": callbacks, "default_root_dir": str(out_dir)}
    options["logger"] = _build_group(cfg, "logger", allow) or False
    # What was not chosen is not there: Lightning would add its own.
    for key, kind in (("enable_progress_bar", ProgressBar), ("enable_checkpointing", Checkpoint)):
        if cfg.trainer.get(key) is None:
            options[key] = any(isinstance(callback, kind) for callback in callbacks)
    node = OmegaConf.masked_copy(cfg.trainer, [key for key in cfg.trainer if key not in options])
    trainer: Any = _of_kind(LightningTrainer, build(node, "trainer", allow, **options), "trainer")
    return data, task, trainer


def _check_reader(checkpoint: str | None, out_dir: Path, trainer: Trainer) -> None:
    """A checkpoint in pieces is read by strategies that hold pieces."""
    reads_pieces = type(trainer.strategy).load_checkpoint is not Strategy.load_checkpoint
    if checkpoint is not None and Path(checkpoint).is_dir() and not reads_pieces:
        raise UserError(
            f"resume={checkpoint}: is a checkpoint in pieces, which needs trainer=fsdp. Whole weights, to evaluate: "
            f"resume={out_dir / 'best_model.safetensors'}."
        )


def _build_group(cfg: DictConfig, group: str, allow: AllowList) -> list[Any]:
    """The objects of a group of named ones; null removes one."""
    nodes = cfg.get(group) or {}
    if not isinstance(nodes, Mapping):
        raise UserError(f"{group}={nodes}: must be names with keys below them; choose by {group}=NAME, see --help.")
    built = []
    for name in nodes:
        node = None if OmegaConf.is_missing(nodes, name) else nodes[name]
        if node is None:
            continue
        key = f"{group}.{name}"
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UserError(f"{key}={node}: must be null to remove it, or keys with a _target_.")
        built.append(build(node, key, allow))
        # By name, since those of the package pytorch_lightning work as well.
        kind = "Logger" if group == "logger" else "Callback"
        if all(base.__name__ != kind for base in type(built[-1]).__mro__):
            raise UserError(f"{key}: must build a {kind}, not a {type(built[-1]).__name__}.")
    return built


def _of_kind(kind: type[_Kind], built: Any, key: str) -> _Kind:
    if not isinstance(built, kind):
        raise UserError(f"{key}: must build a {kind.__name__}, not a {type(built).__name__}.")
    return built


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


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
    checkpoint: str | None,
) -> dict[str, float]:
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=not cfg.trust)
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
    checkpoints = [c for c in trainer.callbacks if isinstance(c, CrashSafeCheckpoint)]
    best = next((c.best_model_path for c in checkpoints), "")
    last = next((c.last_model_path for c in checkpoints), "")
    if (best or last) and _can_test(task, data):
        trainer.test(task, datamodule=data, ckpt_path=best or last, verbose=False, weights_only=not cfg.trust)
        metrics |= _metrics(trainer)
    if trainer.is_global_zero:
        limits = {"max_epochs": cfg.trainer.max_epochs, "max_steps": cfg.trainer.max_steps}
        whole = epochs == cfg.trainer.max_epochs or trainer.global_step == cfg.trainer.max_steps
        length = f"{trainer.global_step} steps" if trainer.max_steps > 0 else f"{epochs} epochs"
        reason = f"{length}, {stopped or ('the whole length' if whole else 'cut short')}"
        finished = bool(whole or stopped)
        content = {"stopped": reason, "finished": finished, "limits": limits, "metrics": metrics}
        content["best"] = _best(trainer)
        write_json(out_dir / "results.json", content)
        print(f"\nTrained for {reason}.")
        _print_metrics(metrics)
        _print_files(out_dir)
    return metrics


def _evaluate(
    cfg: DictConfig, trainer: Trainer, task: LightningModule, data: LightningDataModule, checkpoint: str | None
) -> dict[str, float]:
    if checkpoint is not None and is_weights(checkpoint):
        load_best_weights(checkpoint, task)
        checkpoint = None
    options: dict[str, Any] = {"datamodule": data, "ckpt_path": checkpoint, "weights_only": not cfg.trust}
    if cfg.stage == "predict":
        trainer.predict(task, return_predictions=False, **options)
        for callback in trainer.callbacks:
            if isinstance(callback, SavePredictions):
                _say(trainer, "\n".join(["Wrote", *(f"  {path}" for path in callback.paths)]))
        return {}
    evaluate = trainer.validate if cfg.stage == "validate" else trainer.test
    evaluate(task, verbose=False, **options)
    metrics = _metrics(trainer)
    if trainer.is_global_zero:
        _print_metrics(metrics)
    return metrics


def _results(path: Path) -> dict[str, Any]:
    return read_json(path, "out_dir", "stopped", "finished", "limits", "metrics")


def _is_finished(results_path: Path, cfg: DictConfig) -> bool:
    if not results_path.exists():
        return False
    results = _results(results_path)
    if not results["finished"]:
        return False
    return bool(results["limits"] == {"max_epochs": cfg.trainer.max_epochs, "max_steps": cfg.trainer.max_steps})


@contextmanager
def _advice(checkpoint: str | None, cfg: DictConfig) -> Iterator[None]:
    """Turn what the user can put right, and only that, into a `UserError`; a bug keeps its traceback."""
    try:
        yield
    except StopRequested:
        raise
    except SystemExit as stop:  # how Lightning ends on Ctrl-C
        print("\ntrainerkit: stopped; checkpoints that were written before are whole.", file=sys.stderr)
        raise SystemExit(130) from stop
    except ValueError as error:
        # 'name=value: what is allowed' is how all constructors and callbacks here say it.
        if re.match(r"[\w.]+=", str(error)):
            raise UserError(str(error)) from error
        raise
    except (CheckpointError, MisconfigurationException, RanksDiffer, StepsDiffer) as error:
        raise UserError(str(error)) from error
    except ModuleNotFoundError as error:  # of a callback that looks for its package when the run starts
        raise missing_in(error, "This run") from error
    except UserError:
        raise
    except Exception as error:
        if checkpoint is None or not _was_restoring(error):
            raise
        if "Error(s) in loading" not in str(error):
            reason = f"{type(error).__name__}: {first_lines(error, 1)}"
            raise UserError(
                f"resume={checkpoint}: cannot be restored into this run ({reason}).\n"
                "It was made by another task, with other callbacks, or changed since."
            ) from error
        lines = differences(checkpoint, cfg, "task") or [str(error).splitlines()[1].strip()]
        listing = "\n".join(f"  {line}" for line in lines)
        raise UserError(
            f"{checkpoint} does not fit this config.\n{listing}\nGive it the values it was trained with."
        ) from error


def _was_restoring(error: Exception) -> bool:
    """Whether an error comes out of reading a checkpoint or of handing its parts out."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        frame.filename.endswith("checkpoint_connector.py") or frame.name in ("load_best_weights", "_load_state_dicts")
        for frame in frames
    )


def _can_test(task: LightningModule, data: LightningDataModule) -> bool:
    """Whether there are a test step and test data."""
    if not is_overridden("test_step", task) or not is_overridden("test_dataloader", data):
        return False
    loader = data.test_dataloader()
    return loader is not None and (not hasattr(loader, "__len__") or len(loader) > 0)


def _metrics(trainer: Trainer) -> dict[str, float]:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_step")}
    # The statistics of single layers (parameters/norm/LAYER) are for the loggers: they would hide the results.
    stages = ("train/", "val/", "test/")
    return {name: value for name, value in metrics.items() if name.count("/") < 2 or name.startswith(stages)}


def _history_metrics(trainer: Trainer) -> dict[str, float]:
    """The last epoch's losses, also where a run was resumed after its last epoch and no epoch was left."""
    for callback in trainer.callbacks:
        if isinstance(callback, History) and callback.records:
            record = callback.records[-1]
            found = {callback.train_metric: record["train_loss"], callback.val_metric: record["val_loss"]}
            return {name: value for name, value in found.items() if value is not None}
    return {}


def _best(trainer: Trainer) -> dict[str, float]:
    """The value that the best checkpoint was chosen by."""
    checkpoints = [callback for callback in trainer.callbacks if isinstance(callback, CrashSafeCheckpoint)]
    return {c.monitor: c.best_model_score for c in checkpoints if c.monitor and math.isfinite(c.best_model_score)}


def _command(overrides: list[str], out_dir: Path) -> str:
    kept = [override for override in overrides if not override.startswith(("out_dir=", "resume="))]
    return " ".join(["python -m trainerkit", *map(shlex.quote, kept), f"out_dir={shlex.quote(str(out_dir))}"])


def _print_start(cfg: DictConfig, out_dir: Path, checkpoint: str | None, trainer: Trainer) -> None:
    device = trainer.strategy.root_device
    start = f"from {checkpoint}" if checkpoint else "from the start" if cfg.stage == "fit" else "with initial weights"
    _say(trainer, f"trainerkit: {cfg.stage} {start}, on {device}, {trainer.precision}, in {out_dir}")


def _print_metrics(metrics: dict[str, float]) -> None:
    """A line each; of metrics of several sets, `stage/set/what`, a table for the sets that have the same."""
    plain = {name: value for name, value in metrics.items() if name.count("/") != 2}
    width = max(map(len, plain), default=0)
    print("\nResults")
    for name, value in sorted(plain.items()):
        print(f"  {name:<{width}}  {value:.5g}")
    of_set: dict[str, list[str]] = {}
    for name in metrics.keys() - plain.keys():
        of_set.setdefault(name.rpartition("/")[0], []).append(name.rpartition("/")[2])
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(of_set, key=_by_number):
        alike.setdefault(tuple(sorted(of_set[name], key=_by_number)), []).append(name)
    for columns, every in alike.items():
        sets = every[:_LONGEST]
        table = [["", *columns], *([name, *(f"{metrics[f'{name}/{what}']:.5g}" for what in columns)] for name in sets)]
        _print_table(table if len(columns) <= _WIDEST else [list(row) for row in zip(*table, strict=True)])
        if len(every) > len(sets):
            print(f"  and {len(every) - len(sets)} more in results.json")


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(f"  {row[0]:<{widths[0]}}  {'  '.join(cells)}")


def _by_number(name: str) -> list[Any]:
    """To sort recall@5 before recall@10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


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
    # Of the two steps in which what FSDP2 and tensor parallelism both cut is gathered for a file.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*treespec.*",
        ".*litlogger.*",
        ".*It is recommended to use .*sync_dist=True.*",  # a Task's means are over all processes already
    ):
        warnings.filterwarnings("ignore", message=message)
