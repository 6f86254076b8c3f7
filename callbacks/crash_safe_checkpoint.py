"""Checkpoints that survive a crash at any moment, and a clean stop on Ctrl-C, SIGTERM and SIGUSR1."""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from trainerkit.callbacks._checkpoint_files import CheckpointFolder, checkpoint_folder
from trainerkit.callbacks._host_copy import Behind, HostCopy
from trainerkit.callbacks._stop_signals import StopRequested, StopSignals
from trainerkit.callbacks._trainer import is_stepping, of_every_rank, step_number, validates, warn_of_monitor


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those written before are whole."""


class CrashSafeCheckpoint(Checkpoint):
    """Write checkpoints of which the newest whole one is always found again, and stop cleanly on a signal.

    A checkpoint is staged in the same folder, flushed to disk and renamed, then gets a manifest with size and SHA-256;
    `last.ckpt` and `best.ckpt` are links to complete ones. `CrashSafeCheckpoint.latest(folder)` gives the newest that
    verifies. On the first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 the step is finished, a checkpoint written, and
    `StopRequested` ends the run; a second signal ends the process at once.

    Args:
        monitor: the metric of `best.ckpt`; None writes no such link.
        mode: 'min' if smaller is better, else 'max'.
        dirname: folder, relative to `trainer.default_root_dir`; either may be a URL that fsspec knows.
        save_every: optimizer steps between checkpoints within an epoch; None for none.
        save_every_minutes: minutes between checkpoints within an epoch; None for none.
        every_n_epochs: epochs between checkpoints at their end; the last epoch's end has one anyway.
        keep_checkpoints: how many of the newest are kept; the best one besides.
        asynchronous: copy the checkpoint to the host's memory and write it in a thread; refused for sharded ones.
        on_failure: what a checkpoint that cannot be written does to the run: 'stop' it, or 'continue' with a warning.
        stop_on_signal: handle signals as said above while fitting.
        requeue_code: exit code after SIGTERM and SIGUSR1, by which schedulers know a job to start again; 75 is
            EX_TEMPFAIL of sysexits.h. After SIGINT it is 130.

    Raises:
        ValueError: for a value that is not possible; in `setup` for an asynchronous sharded checkpoint, DeepSpeed, and
            Lightning's AsyncCheckpointIO.
        CheckpointError: if a checkpoint cannot be written, from the start of fit on.
    """

    def __init__(
        self,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        dirname: str = "checkpoints",
        save_every: int | None = 1000,
        save_every_minutes: float | None = None,
        every_n_epochs: int = 1,
        keep_checkpoints: int = 3,
        asynchronous: bool = False,
        on_failure: Literal["stop", "continue"] = "stop",
        stop_on_signal: bool = True,
        requeue_code: int = 75,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode}: must be min or max")
        if save_every is not None and save_every < 1:
            raise ValueError(f"save_every={save_every}: must be 1 or more steps, or null")
        if save_every_minutes is not None and not save_every_minutes > 0:
            raise ValueError(f"save_every_minutes={save_every_minutes}: must be above 0, or null")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs}: must be 1 or more")
        if keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints={keep_checkpoints}: must be 1 or more")
        if on_failure not in ("stop", "continue"):
            raise ValueError(f"on_failure={on_failure}: must be stop or continue")
        if not 1 <= requeue_code <= 255:
            raise ValueError(f"requeue_code={requeue_code}: must be from 1 to 255")
        self.monitor = monitor
        self.mode = mode
        self.dirname = dirname
        self.save_every = save_every
        self.save_every_minutes = save_every_minutes
        self.every_n_epochs = every_n_epochs
        self.keep_checkpoints = keep_checkpoints
        self.asynchronous = asynchronous
        self.on_failure = on_failure
        self.stop_on_signal = stop_on_signal
        self.requeue_code = requeue_code
        self.best_model_score = math.inf if mode == "min" else -math.inf
        # Under the names by which Lightning and its loggers ask a checkpoint callback.
        self.best_model_path = ""
        self.last_model_path = ""
        self._folder = CheckpointFolder(dirname)
        self._missing = False  # whether the monitor has not been logged so far
        self._is_best = False  # whether the validation at this epoch's end was the best
        # What is being written: its name, its links, the best score with it.
        self._pending: tuple[str, Sequence[str], float] | None = None
        self._sure_score = self.best_model_score  # that of best.ckpt
        self._cause: BaseException | None = None  # of the error that is being told
        self._saved_step: int | None = None  # of this run's last checkpoint, or before its first step
        self._saved_time = 0.0
        self._copy, self._behind = HostCopy(), Behind()
        self._signals = StopSignals()

    @staticmethod
    def latest(folder: str | Path) -> str | None:
        """The newest checkpoint in a folder or at a URL whose content is what was written, or None.

        Warns of each newer one that it skipped, and why.
        """
        found = CheckpointFolder(folder)
        path, skipped = found.newest()
        for reason in [*skipped, *(f"{name}: has no manifest" for name in found.unfinished(path))]:
            rank_zero_warn(f"skipped {reason}")
        return path

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best_model_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value."""
        self.best_model_score = state_dict["best_model_score"]

    # The start and the end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Point at files that are there already, and stand last: the others have to be done when a file is written."""
        if self not in trainer.checkpoint_callbacks:
            # The other namespace's Trainer moves only checkpoints of its own class to the end.
            trainer.callbacks = [*(other for other in trainer.callbacks if other is not self), self]  # type: ignore[attr-defined]
        self._folder = checkpoint_folder(trainer.default_root_dir, self.dirname)
        self.best_model_path, self.last_model_path = self._folder.linked("best"), self._folder.linked("last")
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._refuse(trainer)
            error = self._error_of(self._folder.try_out) if trainer.is_global_zero else None
            self._settle(trainer, error, "checkpoints")

    def _refuse(self, trainer: Trainer) -> None:
        """Say what cannot work while it is cheap."""
        writer = type(trainer.strategy.checkpoint_io).__name__
        if self.asynchronous and _writes_shards(trainer):
            raise ValueError("asynchronous=True: must be False for sharded checkpoints, which all ranks write")
        if writer == "AsyncCheckpointIO":
            raise ValueError(f"plugins={writer}: hides when a file is complete; take asynchronous=True instead")
        if type(trainer.strategy).__name__ == "DeepSpeedStrategy":
            raise ValueError("strategy=DeepSpeedStrategy: must be another one; it writes checkpoints of its own kind")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen for signals; after Lightning has put its own handlers in place, so that they come back.

        Where `best.ckpt` is not, as in the new folder of a resumed run, the best value does not count.
        """
        if trainer.global_step == 0:  # a new run: what lies there is another's
            self.best_model_path = self.last_model_path = ""
        if not self.best_model_path:
            self.best_model_score = math.inf if self.mode == "min" else -math.inf
        self._is_best, self._pending, self._sure_score = False, None, self.best_model_score
        # What Lightning counts is one step short here where it resumes within an epoch: the first batch knows.
        self._saved_step, self._saved_time = None, time.monotonic()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._begin(trainer)
        if self.stop_on_signal:
            self._signals.attach(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if error := self._error_of(self._folder.clear):
            rank_zero_warn(f"{self._folder}: what a killed process left could not be removed: {error}")
        with suppress(OSError):  # what is wrong is found out, and said, by writing
            if self._folder.begin(resumed=trainer.global_step > 0):
                rank_zero_warn(
                    f"{self._folder} holds checkpoints of another run, which stay; the newest will be this one's. "
                    "To go on from them, give the path to fit: ckpt_path=CrashSafeCheckpoint.latest(folder)"
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for what is being written; answer a signal that came since; say if there never was a best.

        Here, for at its teardown Lightning has given the signals back already.
        """
        self._finish_behind(trainer)
        if signum := self._signal(trainer):
            self._stop(trainer, signum)
        self._signals.detach()
        if self._missing and validates(trainer):
            warn_of_monitor(trainer, self, str(self.monitor), "there is no best.ckpt")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening; leave no file that waits to be written over, also where nothing was left to train."""
        self._leave()
        if stage == "fit" and trainer.is_global_zero and (error := self._error_of(self._folder.clear)):
            rank_zero_warn(f"{self._folder}: {error}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening; a run that failed in the middle of a step has nothing whole to save."""
        self._leave()

    def _leave(self) -> None:
        self._signals.detach()
        if (error := self._error_of(self._behind.finish)) is not None:
            rank_zero_warn(f"{self._folder}: {error}")
        self._behind.close()

    # When

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if a signal came: the step is whole, and Lightning calls checkpoints after all other callbacks.

        At the last batch the epoch's end comes first, so that the checkpoint has its validation and its record; within
        an accumulation window gradients would be lost; a validation that is due would be skipped by the resumed run.
        """
        loop = trainer.fit_loop
        if trainer.is_last_batch or not is_stepping(trainer, pl_module):
            return
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            self._save_if_due(trainer, step_number(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Within an epoch save if this is the best, or if it is time to; else leave it to the epoch's end."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        best = self._is_better(trainer)
        if trainer.is_last_batch:
            self._is_best |= best
        elif is_stepping(trainer, pl_module):
            self._save_if_due(trainer, step_number(trainer), best)
        elif best:  # what the window has accumulated is not in it: nothing to resume from
            self._save(trainer, step_number(trainer) - 1, ["best"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of every n-th epoch and of the last, and if its validation was the best."""
        best = self._is_best or (not validates(trainer) and self._is_better(trainer))
        self._is_best = False
        epochs = trainer.current_epoch + 1
        over = epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        wanted = best or over or epochs % self.every_n_epochs == 0
        self._save_if_due(trainer, step_number(trainer) - 1, best, wanted, now=True)

    def _save_if_due(
        self, trainer: Trainer, step: int, best: bool = False, wanted: bool = False, now: bool = False
    ) -> None:
        """Save if a signal came, if it is time to, or if it is `wanted` or the best.

        Several ranks ask each other about signals and the clock only now and then, for that waits.
        """
        asks = now or trainer.world_size == 1 or step % max(1, trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        signum = self._signal(trainer) if asks else 0
        if self._saved_step is None:
            self._saved_step = step - 1
        if not (best or wanted or signum):
            every, minutes = self.save_every, self.save_every_minutes
            wanted = every is not None and step // every > self._saved_step // every
            if minutes is not None and asks and not wanted:
                wanted = self._any_rank(trainer, time.monotonic() - self._saved_time >= 60 * minutes)
        saved = (best or wanted or signum) and self._save(trainer, step, ["last", "best"] if best else ["last"])
        if signum:
            self._stop(trainer, signum, bool(saved))

    def _signal(self, trainer: Trainer) -> int:
        """The signal that any rank has received, the same on all; 0 if there was none."""
        mine = self._signals.received or 0
        if trainer.world_size == 1:
            return mine
        found = torch.tensor(mine, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(found, reduce_op="max"))

    def _any_rank(self, trainer: Trainer, decision: bool) -> bool:
        return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision

    def _is_better(self, trainer: Trainer) -> bool:
        if self.monitor is None:
            return False
        value = trainer.callback_metrics.get(self.monitor)
        self._missing = value is None
        score = math.nan if value is None else float(value)  # which is not better than anything
        better = score < self.best_model_score if self.mode == "min" else score > self.best_model_score
        # Every rank writes if one does: a metric that was logged without a reduction differs between them.
        better = self._any_rank(trainer, better)
        if better and not math.isnan(score):
            self.best_model_score = score
        return better

    # Writing

    def _save(self, trainer: Trainer, step: int, links: Sequence[str]) -> bool:
        """Write a checkpoint, and have these links mean it; all ranks take part, and learn of a failure."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        best = self.best_model_score
        self._finish_behind(trainer)
        if "best" in links:
            self.best_model_score = best  # also where the one before failed, which put it back
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self._saved_step, self._saved_time = step, time.monotonic()
        name = trainer.strategy.broadcast(self._folder.new_name(step) if trainer.is_global_zero else "")
        facts = {
            "step": step,
            "epoch": trainer.current_epoch,
            "monitor": self.monitor,
            "score": self.best_model_score if "best" in links else None,
            "resumable": "last" in links,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
        }
        self._pending = name, links, self.best_model_score
        if self.asynchronous:
            if trainer.is_global_zero:
                content = self._copy.of(checkpoint)
                self._behind.start(lambda: self._write(trainer, content, name, facts, links))
            return True
        error = None
        if _writes_shards(trainer):
            error = self._write_shards(trainer, checkpoint, name, facts, links)
        elif trainer.is_global_zero:
            error = self._error_of(lambda: self._write(trainer, checkpoint, name, facts, links))
        return self._take_over(trainer, error, name)

    def _finish_behind(self, trainer: Trainer) -> bool:
        """Wait for what is being written, if anything is; whether nothing went wrong."""
        if self._pending is None:
            return True
        return self._take_over(trainer, self._error_of(self._behind.finish), self._pending[0])

    def _take_over(self, trainer: Trainer, error: str | None, what: str) -> bool:
        """Make paths and score those of what was written, or of what was written before that."""
        assert self._pending is not None
        (name, links, score), self._pending = self._pending, None
        now, self.best_model_score = self.best_model_score, self._sure_score
        if not self._settle(trainer, error, what):
            return False
        self._sure_score, self.best_model_score = score, now
        for link in links:
            setattr(self, f"{link}_model_path", self._folder.place(link, name))
        return True

    def _write(
        self, trainer: Trainer, checkpoint: dict[str, Any], name: str, facts: Mapping[str, Any], links: Sequence[str]
    ) -> None:
        try:
            if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
                files = self._folder.write(checkpoint, name)
            else:  # a plugin of the user's
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, self._folder.staged(name))
                files = self._folder.measure(name)
            self._folder.commit(name, files, facts)
        except BaseException:
            self._folder.discard(name)
            raise
        self._link(name, links)

    def _write_shards(
        self, trainer: Trainer, checkpoint: dict[str, Any], name: str, facts: Mapping[str, Any], links: Sequence[str]
    ) -> str | None:
        """Each rank writes its part through torch.distributed.checkpoint, and measures it."""

        def write() -> None:
            trainer.strategy.save_checkpoint(checkpoint, self._folder.staged(name))
            files.update(self._folder.measure(name, trainer.global_rank))

        files: dict[str, Any] = {}
        error = self._error_of(write)
        parts = of_every_rank(trainer, (error, files))
        error = next((found for found, _ in parts if found is not None), None)
        if trainer.is_global_zero:
            joined = {key: value for _, part in parts for key, value in part.items()}
            error = error or self._error_of(lambda: self._folder.commit(name, joined, facts))
            if error is None:
                return self._error_of(lambda: self._link(name, links))
            self._folder.discard(name)
        return error

    def _link(self, name: str, links: Sequence[str]) -> None:
        for link in links:
            self._folder.point(link, name)
        try:
            self._folder.prune(self.keep_checkpoints)
        except OSError as error:  # what was to be written is written
            rank_zero_warn(f"{self._folder}: an old checkpoint could not be removed: {error}")

    def _error_of(self, work: Callable[[], object]) -> str | None:
        """Do it, and give what went wrong as a sentence, which other ranks can be told.

        Whatever it is: a rank that raises alone leaves the others waiting. torch's CheckpointException is no Exception.
        """
        try:
            work()
        except (KeyboardInterrupt, SystemExit):
            raise
        except OSError as error:
            self._cause = error
            return f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        except BaseException as error:
            self._cause = error
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return None

    def _settle(self, trainer: Trainer, error: str | None, what: str) -> bool:
        """Whether there was no error on the first rank; else the run stops or goes on, as was chosen."""
        error = trainer.strategy.broadcast(error) if trainer.world_size > 1 else error
        cause, self._cause = self._cause, None
        if error is None:
            return True
        whole = "; what was written before is whole" if self.last_model_path else ""
        message = f"{self._folder}: {what} could not be written: {error}{whole}"
        if self.on_failure == "stop":
            raise CheckpointError(
                f"{message}.\nMake room, or take another folder (out_dir, dirname); on_failure=continue trains on."
            ) from cause
        rank_zero_warn(message)
        return False

    def _stop(self, trainer: Trainer, signum: int, saved: bool = True) -> None:
        """End the run after its last checkpoint; or have it requeued, and go on until SLURM ends it."""
        if not (self._finish_behind(trainer) and saved) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise CheckpointError(
                f"{self._folder}: stopped by {signal.Signals(signum).name}, and nothing could be saved; the newest "
                f"checkpoint is {self.last_model_path or 'none'}."
            )
        if not self._signals.requeue(signum):
            code = 128 + signum if signum == signal.SIGINT else self.requeue_code
            raise StopRequested(signum, self.last_model_path, code)


def _writes_shards(trainer: Trainer) -> bool:
    """Whether a checkpoint is a folder to which each rank writes its part."""
    strategy = trainer.strategy
    return bool(getattr(strategy, "_save_distributed_checkpoint", False)) or (
        getattr(strategy, "_state_dict_type", "") == "sharded"
    )
