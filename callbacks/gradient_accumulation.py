"""Gradient accumulation that is exact: windows of any length, the tail, a resume, and batches of unequal weight.

A window is the batches between two optimizer steps. Its gradient is the mean over them, g = Σ nᵢ·gᵢ / Σ nᵢ, with nᵢ = 1
or what a batch counts for. Windows of fixed length, by a schedule, or as long as the gradient asks for; or each batch
in parts that fit into memory.

Source of the noise scale: S. McCandlish, J. Kaplan, D. Amodei et al., 'An Empirical Model of Large-Batch Training',
2018.
"""

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from trainerkit.callbacks._accumulation import (
    Weight,
    Window,
    WindowMean,
    gradients,
    planned_steps,
    rows_of,
    steps_at,
)
from trainerkit.callbacks._adaptive_window import AdaptiveWindow
from trainerkit.callbacks._memory_target import MemoryTarget, can_measure
from trainerkit.callbacks._micro_batches import MicroBatches
from trainerkit.callbacks._trainer import is_stepping, log_metrics, refuse_sharded, step_number


class GradientAccumulation(Callback):
    """Make one optimizer step from several batches, or run one batch in several parts.

    The window changes only between optimizer steps, ends with its epoch, and its gradient is the exact mean over its
    batches however many there are. A checkpoint from inside a window holds the gradient so far.

    Args:
        mode: 'fixed': windows of `steps` batches. 'adaptive': windows of `min_steps` to `max_steps` batches, chosen
            `by` what the gradients say. 'dynamic': windows as in 'fixed', and each batch in as many parts as it takes
            to stay below `target_memory_mb`, one after the other; an allocation that fails doubles the parts and
            begins the batch anew. The loss must then be a mean over the rows of the batch.
        steps: batches in a window; or a schedule `{0: 1, 4: 2}`: that many from this epoch or optimizer step on,
            counted from 0. None for the Trainer's `accumulate_grad_batches`.
        steps_by: what the keys of a schedule are, 'epoch' or 'step'.
        min_steps: the shortest window of 'adaptive', and the first.
        max_steps: its longest.
        by: 'gradient_norm': longer while the norm is below its running average. 'noise_scale': as many batches as the
            gradient noise scale has samples; `min_steps` must be 2 or more.
        decay: of the running averages of 'adaptive', 0 to below 1.
        target_memory_mb: of 'dynamic', in MiB: peak allocated on CUDA, peak resident on the CPU; None splits only after
            a failed allocation.
        weight: what a batch counts for. None: each the same. 'rows': its rows. Another name: the sum of this key (or
            attribute) of the batch, a mask of tokens say. Or a function of the batch.

    Raises:
        ValueError: for a value that is not possible; in `setup` for manual optimization, for a Trainer that accumulates
            otherwise, and for sharded parameters (only unweighted 'fixed' works on them).
    """

    def __init__(
        self,
        mode: Literal["fixed", "adaptive", "dynamic"] = "fixed",
        steps: int | Mapping[int, int] | None = None,
        steps_by: Literal["epoch", "step"] = "epoch",
        min_steps: int = 1,
        max_steps: int = 8,
        by: Literal["gradient_norm", "noise_scale"] = "gradient_norm",
        decay: float = 0.9,
        target_memory_mb: float | None = None,
        weight: Weight | None = None,
    ) -> None:
        if mode not in ("fixed", "adaptive", "dynamic"):
            raise ValueError(f"mode={mode}: must be fixed, adaptive or dynamic")
        if steps is not None and mode == "adaptive":
            raise ValueError(f"steps={steps}: must be null with mode=adaptive, which has min_steps and max_steps")
        if steps_by not in ("epoch", "step"):
            raise ValueError(f"steps_by={steps_by}: must be epoch or step")
        if by not in ("gradient_norm", "noise_scale"):
            raise ValueError(f"by={by}: must be gradient_norm or noise_scale")
        least = 2 if mode == "adaptive" and by == "noise_scale" else 1
        if min_steps < least:
            reason = " with by=noise_scale: one batch alone does not tell noise from gradient" if least == 2 else ""
            raise ValueError(f"min_steps={min_steps}: must be {least} or more{reason}")
        if max_steps < min_steps:
            raise ValueError(f"max_steps={max_steps}: must be min_steps={min_steps} or more")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: must be from 0 to below 1")
        if target_memory_mb is not None and (mode != "dynamic" or target_memory_mb <= 0):
            raise ValueError(f"target_memory_mb={target_memory_mb}: must be above 0, and null unless mode=dynamic")
        if weight is not None and not (callable(weight) or (isinstance(weight, str) and weight)):
            raise ValueError(f"weight={weight!r}: must be 'rows', a name in the batch, a function of it, or null")
        self.mode = mode
        self.steps = None if steps is None else _as_schedule(steps)
        self.steps_by = steps_by
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.by = by
        self.decay = decay
        self.target_memory_mb = target_memory_mb
        self.weight = weight
        self._original: int | None = None  # the Trainer's own number while ours is in its place
        self._window = Window(0, 1, float)
        self._batch: Any = None
        self._counted = False  # whether this batch is in the mean
        self._mean = WindowMean(weight, sized=mode == "adaptive" and by == "noise_scale")
        self._restored: dict[str, Any] = {}
        self._adaptive = AdaptiveWindow(min_steps, max_steps, by, decay)
        self._parts = MicroBatches(weight)
        self._memory = MemoryTarget(self._parts, target_memory_mb)

    # The start and the end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; then take the place of the Trainer's number, which estimates of steps read."""
        if stage != "fit":
            return
        self._refuse(trainer, pl_module)
        self._original = trainer.accumulate_grad_batches
        self._mean.unit, self._restored, self._parts.number = None, {}, 1
        self._adaptive.reset()
        self._begin(trainer, 0)

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "automatic_optimization=False: GradientAccumulation works with automatic optimization only;"
                " a module that optimizes by hand accumulates by hand"
            )
        if (
            self.mode != "fixed"
            or self.weight is not None
            or type(trainer.strategy).__name__ != "ModelParallelStrategy"
        ):
            refuse_sharded(trainer, self)
        own = trainer.accumulate_grad_batches
        others = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
        if "GradientAccumulationScheduler" in others:
            raise ValueError("GradientAccumulation must not stand beside Lightning's GradientAccumulationScheduler")
        if own != 1 and (self.mode == "adaptive" or self.steps not in (None, {0: own})):
            raise ValueError(f"accumulate_grad_batches={own}: must be 1 in the Trainer if the callback sets another")
        if self.mode == "dynamic":
            self._refuse_parts(trainer, pl_module)

    def _refuse_parts(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        if self.target_memory_mb is not None and not can_measure(device):
            raise ValueError(
                f"target_memory_mb={self.target_memory_mb}: must be null on this {device.type}, where no peak can be"
                " measured; it can on CUDA and on the CPU under Linux"
            )
        if not type(pl_module).backward.__module__.startswith(("lightning.pytorch.", "pytorch_lightning.")):
            raise ValueError("mode=dynamic: must not meet a module with a backward of its own, for it is not called")
        if trainer.world_size > 1 and any(type(m).__name__ == "SyncBatchNorm" for m in pl_module.modules()):
            raise ValueError("mode=dynamic: must not meet SyncBatchNorm, whose processes would wait for each other")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on inside the window of the checkpoint, or begin one at the batch that comes next."""
        device = trainer.strategy.root_device
        restored, self._restored = self._restored, {}
        if "unit" in restored:
            self._mean.unit = restored["unit"].to(device)
        self._adaptive.start(device)
        # As Lightning counts a moment later: a batch that a checkpoint saw begun and not ended is run again.
        loop = trainer.fit_loop.epoch_loop
        done = loop.batch_progress.current.completed + int(loop.restarted_on_train_batch_end)
        self._begin(trainer, done)
        window = restored.get("window")
        if window is not None and window["at"] == done:
            self._set_window(trainer, window["start"], window["length"])
            self._mean.restore(window, pl_module)
        if self.mode == "dynamic":
            self._memory.start(device)
            self._parts.attach(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A window begins with the epoch."""
        self._begin(trainer, 0)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back what belongs to trainer and module."""
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give back what belongs to trainer and module."""
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        self._parts.detach()
        self._batch = None
        original, self._original = self._original, None
        if original is not None:
            trainer.accumulate_grad_batches = original

    # The window

    def _begin(self, trainer: Trainer, start: int) -> None:
        self._mean.begin(start)
        if self.mode == "adaptive":
            length = self._adaptive.length
        else:
            length = steps_at(
                self._schedule, trainer.current_epoch if self.steps_by == "epoch" else trainer.global_step
            )
        left = trainer.num_training_batches - start  # infinite before the loader is there, or if it has no length
        self._set_window(trainer, start, int(min(length, left)) if left > 0 else length)

    def _set_window(self, trainer: Trainer, start: int, length: int) -> None:
        self._window = Window(start, length, lambda batches: self._steps_of_epoch(trainer, batches))
        trainer.accumulate_grad_batches = self._window

    @property
    def _schedule(self) -> Mapping[int, int]:
        if self.mode == "adaptive":
            return {0: self.min_steps}  # for estimates: no more steps than that are made
        return {0: self._original or 1} if self.steps is None else self.steps

    def _steps_of_epoch(self, trainer: Trainer, batches: int) -> float:
        epochs = max(trainer.max_epochs or 1, 1)
        return planned_steps(batches, epochs, self._schedule, self.steps_by) / epochs

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch until its size is asked for."""
        self._batch, self._counted = batch, False
        if self.mode == "dynamic":
            self._memory.before_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Count the batch, and multiply its gradient by what it counts for."""
        again, self._counted = self._counted, True  # some optimizers evaluate a batch several times
        self._mean.count(trainer, loss, self._batch, again)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradient has this batch now. Before a step make it the mean: whoever looks at it next sees that."""
        self._mean.at = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if is_stepping(trainer, pl_module):
            self._mean.finish(trainer)
        else:
            self._mean.measure(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradient; choose the next window from the one before."""
        if not self._counted:  # the batch had no loss, and the gradient has still to become the mean
            self._mean.finish(trainer)
        if self.mode == "adaptive":
            self._adaptive.look(trainer)
            self._adaptive.measure(trainer, gradients(trainer), self._mean.first, self._mean.size)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step, begin the next window."""
        self._batch = None
        if self.mode == "dynamic":
            self._memory.after_batch(trainer, rows_of(batch))
        if is_stepping(trainer, pl_module):
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every > 0 and step_number(trainer) % every == 0:
                log_metrics(trainer, {"accumulation/steps": float(self._mean.seen), **self._found()})
            self._begin(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Its peak is not that of a training step."""
        self._memory.forget_peak()

    def _found(self) -> dict[str, float]:
        """What there is to be logged beside the length of the window."""
        return self._adaptive.found | (self._memory.found() if self.mode == "dynamic" else {})

    # The checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Parts of a batch, the unit of weights, and what the next windows are chosen from."""
        state: dict[str, Any] = {"parts": self._parts.number}
        if self.mode == "adaptive":
            state["adaptive"] = self._adaptive.state_dict()
        if self._mean.unit is not None:
            state["unit"] = self._mean.unit
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._restored = state_dict
        self._parts.number = state_dict["parts"]
        if "adaptive" in state_dict:
            self._adaptive.load_state_dict(state_dict["adaptive"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Inside a window, add the gradient so far."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None and self._is_inside(trainer):
            where = {"start": self._window.start, "length": int(self._window)}
            state["window"] = where | self._mean.state(trainer, pl_module)

    def _is_inside(self, trainer: Trainer) -> bool:
        """Whether the gradient is that of a begun window, whole and up to a known batch."""
        loop, at = trainer.fit_loop.epoch_loop, self._mean.at
        ended = at == loop.batch_progress.current.ready and (
            at % self._window == 0 or loop._num_ready_batches_reached()
        )
        sharded = type(trainer.strategy).__name__ == "ModelParallelStrategy"
        # After an exception other processes may be elsewhere, and no sum over them would come to an end.
        alone = trainer.world_size > 1 and self._original is None
        return self._mean.seen > 0 and at > 0 and not (ended or sharded or alone)


def _as_schedule(steps: int | Mapping[int, int]) -> dict[int, int]:
    schedule = {0: steps} if isinstance(steps, int) else dict(steps)
    whole = all(type(number) is int for pair in schedule.items() for number in pair)
    if not schedule or not whole or min(schedule) < 0 or min(schedule.values()) < 1:
        raise ValueError(f"steps={steps}: must be 1 or more, or such numbers by epoch or step like {{0: 1, 4: 2}}")
    return schedule
