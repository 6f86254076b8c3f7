"""What a run begins from: the newest whole checkpoint of its folder, one that was named, or nothing."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from trainerkit.callbacks._checkpoint_files import CheckpointFolder, checkpoint_folder, fault_of
from trainerkit.errors import UserError
from trainerkit.loading import check_checkpoint


def choose_checkpoint(cfg: DictConfig, out_dir: Path) -> str | None:
    """The path or URL to begin from: `resume=auto` takes the newest whole one to fit, else the best one.

    Raises:
        UserError: if there is none where one is needed, it is not whole, or it would run code.
    """
    try:
        path = _choose(cfg, out_dir)
    except OSError as error:
        raise UserError(f"out_dir={cfg.out_dir}: {error.strerror} ({error.filename}).") from error
    if path is not None and "://" not in path and not is_weights(path):
        check_checkpoint(Path(path), "resume", to_train=cfg.stage == "fit")
    return path


def is_weights(path: str) -> bool:
    """Whether a file is one that `BestWeights` writes, not a checkpoint."""
    return path.endswith((".safetensors", ".safetensors.index.json"))


def _choose(cfg: DictConfig, out_dir: Path) -> str | None:
    fits = cfg.stage == "fit"
    folder = checkpoint_folder(out_dir, _dirname(cfg))
    if cfg.resume is None:
        if fits and folder.newest()[0] is not None:
            raise UserError(
                f"resume=null: {out_dir} already holds a run, which would be overwritten.\n"
                "Take resume=auto to continue it, or another out_dir."
            )
        return None
    if cfg.resume == "auto":
        return _newest(folder) if fits else _best(cfg, folder)
    return _named(str(cfg.resume), folder, out_dir, fits)


def _dirname(cfg: DictConfig) -> str:
    """Where this config's checkpoints are, whatever name they have among the callbacks."""
    callbacks = cfg.get("callbacks")
    for name in callbacks if isinstance(callbacks, DictConfig) else ():
        node = None if OmegaConf.is_missing(callbacks, name) else callbacks[name]
        if isinstance(node, DictConfig) and str(node.get("_target_")).endswith(".CrashSafeCheckpoint"):
            return str(node.get("dirname") or "checkpoints")
    return "checkpoints"


def _newest(folder: CheckpointFolder) -> str | None:
    path, skipped = folder.newest()
    for reason in [*skipped, *(f"{name}: was not finished" for name in folder.unfinished(path))]:
        print(f"trainerkit: skipped {folder.locate(reason)}", file=sys.stderr)
    if skipped and path is None:
        raise UserError(f"{folder} holds no whole checkpoint.\nTake another out_dir, or remove them to begin anew.")
    return path


def _best(cfg: DictConfig, folder: CheckpointFolder) -> str | None:
    path = folder.linked("best")
    if path and (fault := folder.fault("best.ckpt")) is not None:
        raise UserError(f"{path}: {fault}; name another checkpoint (resume=PATH).")
    if not path and not OmegaConf.select(cfg, "task.network.weights"):
        raise UserError(
            f"stage={cfg.stage} needs trained weights, and {folder.locate('best.ckpt')} is not there.\n"
            "Name the folder of a run (out_dir=…), a checkpoint (resume=PATH), or take the task's initial weights "
            "(resume=null)."
        )
    return path or None


def _named(given: str, folder: CheckpointFolder, out_dir: Path, fits: bool) -> str:
    path = given if "://" in given else str(Path(given).expanduser())
    if "://" not in path and not Path(path).exists():
        raise UserError(f"resume={given}: there is no such file; must be auto, null or the path of a checkpoint.")
    if (fault := fault_of(path)) is not None:
        raise UserError(f"resume={given}: {fault}; take another, or resume=auto for the newest whole one.")
    if fits and is_weights(path):
        raise UserError(
            f"resume={path}: holds weights alone; training goes on from a checkpoint with its optimizer and counters.\n"
            "To start from these weights, take task.network.weights where the task has it."
        )
    elsewhere = folder.path is None or Path(path).resolve().parent != folder.path.resolve()
    if fits and elsewhere and folder.newest()[0] is not None:
        raise UserError(
            f"resume={path}: {out_dir} holds another run, which would be overwritten; take another out_dir."
        )
    return path


def overruled(
    given: Mapping[str, Any], made: Sequence[Mapping[str, Any]], restored: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """The arguments that a restored state has put other values in place of.

    Args:
        given: arguments of an optimizer or a schedule; None stands for whatever it takes itself.
        made: what was made of them: the optimizer's groups, the schedule's attributes.
        restored: the same once the state is loaded.

    Returns:
        By name the value that was given, which is nowhere any more, and the one in its place.
    """
    found = {}
    for name, value in given.items():
        # A schedule moves lr, and keeps beside it what it began with.
        key = "initial_lr" if name == "lr" and all("initial_lr" in group for group in (*made, *restored)) else name
        before, after = ([_plain(group.get(key)) for group in groups] for groups in (made, restored))
        if value is not None and value in before and value not in after and before.index(value) < len(after):
            found[name] = value, after[before.index(value)]
    return found


class WarnOfOverruled(Callback):
    """Say which of the optimizer's and the schedule's arguments a resumed run does not take.

    Args:
        optimizer: arguments by name, as the config has them.
        scheduler: the same of the schedule.
    """

    def __init__(self, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        self._given = {"optimizer": optimizer, "scheduler": {k: v for k, v in scheduler.items() if k != "last_epoch"}}
        self._made: dict[str, list[dict[str, Any]]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was made; nothing is restored yet."""
        self._made = _states(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with what was restored."""
        if trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        restored = _states(trainer)
        lines = [
            f"  {part}.{name}={value}: stays {kept}"
            for part, given in self._given.items()
            for name, (value, kept) in overruled(given, self._made[part], restored[part]).items()
        ]
        if lines:
            print(
                "\n".join([
                    "trainerkit: warning: a resumed run goes on with its checkpoint's optimizer and schedule:",
                    *lines,
                    "For another value begin a run of its own (out_dir=…) from the weights, where the task takes them:",
                    f"  task.network.weights={Path(trainer.default_root_dir) / 'best_model.safetensors'}",
                ]),
                file=sys.stderr,
                flush=True,
            )  # fmt: skip


def _states(trainer: Trainer) -> dict[str, list[dict[str, Any]]]:
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    schedules = [vars(config.scheduler) for config in trainer.lr_scheduler_configs]
    return {
        "optimizer": [{name: value for name, value in group.items() if name != "params"} for group in groups],
        "scheduler": [dict(schedule) for schedule in schedules],
    }


def _plain(value: Any) -> Any:
    """As a config has it."""
    return list(value) if isinstance(value, tuple) else value
