"""`last.ckpt` and `best.ckpt`, each either the old file or the new one, and a clean stop on Ctrl-C and SIGTERM."""

import math
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from trainerkit.callbacks._trainer import validates, warn_of_monitor
from trainerkit.files import replacing

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(SystemExit):
    """Training was stopped by a signal after a checkpoint was written; the exit code is 128 + the signal's number.

    Attributes:
        signal: the signal's name, e.g. 'SIGINT'.
        path: the checkpoint that was written.
    """

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum).name
        self.path = path


class CrashSafeCheckpoint(Checkpoint):
    """Write `last.ckpt` after each epoch and `best.ckpt` after each validation that is the best so far.

    A file is written beside its name, flushed to disk and renamed: a crash at any moment leaves the old file or the new
    one. On the first SIGINT (Ctrl-C) or SIGTERM the step is finished, `last.ckpt` written, and `StopRequested` ends the
    run; a second signal ends the process at once. A signal during validation waits for its end.

    Args:
        monitor: the metric of `best.ckpt`; None writes no such file.
        mode: 'min' if smaller is better, else 'max'.
        dirname: folder, relative to `trainer.default_root_dir`.
        every_n_epochs: epochs between two writings of `last.ckpt`; it is written after the last epoch anyway.
        stop_on_signal: handle SIGINT and SIGTERM as said above while fitting.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(
        self,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        dirname: str = "checkpoints",
        every_n_epochs: int = 1,
        stop_on_signal: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode}: must be min or max")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs}: must be 1 or more")
        self.monitor = monitor
        self.mode = mode
        self.dirname = dirname
        self.every_n_epochs = every_n_epochs
        self.stop_on_signal = stop_on_signal
        self.best_model_score = math.inf if mode == "min" else -math.inf
        # Under the names by which Lightning and its loggers ask a checkpoint callback.
        self.best_model_path = ""
        self.last_model_path = ""
        self._missing = False  # whether the monitor has not been logged so far
        self._signum: int | None = None
        self._handlers: dict[int, Any] = {}
        self._launcher: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best_model_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value."""
        self.best_model_score = state_dict["best_model_score"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Point at files that are there already, and stand last: the others have to be done when a file is written."""
        if self not in trainer.checkpoint_callbacks:
            # The other namespace's Trainer moves only checkpoints of its own class to the end.
            trainer.callbacks = [*(other for other in trainer.callbacks if other is not self), self]  # type: ignore[attr-defined]
        folder = Path(trainer.default_root_dir) / self.dirname
        self.best_model_path = str(folder / "best.ckpt") if (folder / "best.ckpt").exists() else ""
        self.last_model_path = str(folder / "last.ckpt") if (folder / "last.ckpt").exists() else ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen for signals; after Lightning has put its own handlers in place, so that they come back.

        Where `best.ckpt` is not, as in the new folder of a resumed run, the best value does not count.
        """
        if trainer.global_step == 0:  # a new run: what lies there is another's
            self.best_model_path = self.last_model_path = ""
        if not self.best_model_path:
            self.best_model_score = math.inf if self.mode == "min" else -math.inf
        if self.stop_on_signal and not self._handlers and threading.current_thread() is threading.main_thread():
            self._signum = None
            self._launcher = trainer.strategy.launcher
            self._handlers = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening; a run that failed in the middle of a step has nothing whole to save."""
        self._restore_handlers()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if a signal came: the step is whole, and Lightning calls checkpoints after all other callbacks."""
        # At the last batch the epoch's end comes first, so that the checkpoint has its validation and its record.
        if not trainer.is_last_batch and self._must_stop(trainer):
            self._save_and_stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `best.ckpt` if this is the best; stop if a signal came during a validation in mid-epoch."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._save_if_best(trainer)
        if not trainer.is_last_batch and self._must_stop(trainer, now=True):
            self._save_and_stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `last.ckpt`; stop if a signal came."""
        if not validates(trainer):
            self._save_if_best(trainer)
        epochs = trainer.current_epoch + 1
        if self._must_stop(trainer, now=True):
            self._save_and_stop(trainer)
        over = epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        if epochs % self.every_n_epochs == 0 or over:
            self._save(trainer, "last.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the run validates, and there never was a best."""
        if self._missing and validates(trainer):
            warn_of_monitor(trainer, self, str(self.monitor), "there is no best.ckpt")

    def _save_if_best(self, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(self.monitor or "")
        if value is None:
            self._missing = self.monitor is not None
            return
        self._missing = False
        score = float(value)
        better = score < self.best_model_score if self.mode == "min" else score > self.best_model_score
        # Every rank writes if one does: a metric that was logged without a reduction differs between them.
        if trainer.strategy.reduce_boolean_decision(better, all=False):
            self.best_model_score = score
            self.best_model_path = str(self._save(trainer, "best.ckpt"))

    def _save(self, trainer: Trainer, name: str) -> Path:
        path = Path(trainer.default_root_dir) / self.dirname / name
        if trainer.is_global_zero:
            with replacing(path) as temporary:
                trainer.save_checkpoint(temporary)
        else:
            trainer.save_checkpoint(path)  # every rank takes part in gathering; only the first writes
        if name == "last.ckpt":
            self.last_model_path = str(path)
        return path

    def _save_and_stop(self, trainer: Trainer) -> None:
        path = self._save(trainer, "last.ckpt")
        raise StopRequested(self._signum or signal.SIGTERM, path)

    def _must_stop(self, trainer: Trainer, now: bool = False) -> bool:
        """Whether a signal reached any rank; several ranks ask each other only now and then, for that waits."""
        if trainer.world_size == 1:
            return self._signum is not None
        if not now and trainer.global_step % max(1, trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return False
        return trainer.strategy.reduce_boolean_decision(self._signum is not None, all=False)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            self._restore_handlers()
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self._signum = signum
        # Ctrl-C reaches every process of a terminal; another signal only this one, so it is passed on.
        if signum != signal.SIGINT and type(self._launcher).__name__ == "_SubprocessScriptLauncher":
            self._launcher.kill(signum)
        name = signal.Signals(signum).name
        print(f"\n{name}: finishing this step and saving; once more to stop at once.", file=sys.stderr, flush=True)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
