"""What a run begins from: the newest whole checkpoint of its folder, one that was named, or nothing."""

import sys
from pathlib import Path

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
