"""What several callbacks ask of a Trainer of either namespace (`lightning.pytorch`, `pytorch_lightning`)."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

# By name, since each namespace has classes of its own.
_IN_PIECES = "ModelParallelStrategy"  # each parameter is a DTensor
_SHARDED = ("FSDPStrategy", _IN_PIECES, "DeepSpeedStrategy")


def validates(trainer: Trainer) -> bool:
    """Whether this fit has validation batches; `trainer.enable_validation` is True for an empty loader too.

    Lightning reads the loader before the first validation; in epochs before that (`check_val_every_n_epoch`) there are
    no numbers, and it is taken to have some.
    """
    return trainer.enable_validation and (not trainer.num_val_batches or sum(trainer.num_val_batches) > 0)


def step_number(trainer: Trainer) -> int:
    """The number, from 1, of the optimizer step that this batch belongs to, and continued by a resume.

    Several optimizers that step in one batch (manual optimization) count once, as they do on a logger's axis;
    `trainer.global_step` counts each of them.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped + 1


def is_stepping(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether this batch ends its accumulation window; with manual optimization every batch does."""
    return not pl_module.automatic_optimization or not trainer.fit_loop._should_accumulate()


def of_every_rank(trainer: Trainer, value: Any) -> list[Any]:
    """What each process has; every process has to ask."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def log_metrics(trainer: Trainer, metrics: Mapping[str, float], step: int | None = None) -> None:
    """Hand numbers to every logger there is, at the step of Lightning's own metrics of this batch, or at another.

    They also go to `trainer.callback_metrics`, where other callbacks find what they monitor. Cheaper than `self.log`,
    which takes 0.4 ms a value.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped if step is None else step
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    # One tensor and its parts: a tensor made for each of a hundred values takes a third of a millisecond.
    values = torch.from_numpy(np.fromiter(metrics.values(), float, len(metrics))).unbind()
    # What `trainer.callback_metrics` gives; asking for that collects all of Lightning's own metrics first.
    trainer._logger_connector._callback_metrics.update(zip(metrics, values, strict=True))


def warn_of_monitor(trainer: Trainer, callback: Callback, monitor: str, therefore: str) -> None:
    """Say that a metric was never logged, what follows, and the nearest that were."""
    near = difflib.get_close_matches(monitor, trainer.callback_metrics, n=8, cutoff=0)
    rank_zero_warn(
        f"{type(callback).__name__}: monitor={monitor} was never logged, so {therefore}; "
        f"the nearest that were logged are: {', '.join(near) or 'none at all'}"
    )


def is_sharded(trainer: Trainer) -> bool:
    """Whether the strategy holds parameters as pieces of tensors."""
    return any(kind.__name__ in _SHARDED for kind in type(trainer.strategy).__mro__)


def is_in_pieces(trainer: Trainer) -> bool:
    """Whether these pieces are DTensors: FSDP2 and tensor parallelism."""
    return any(kind.__name__ == _IN_PIECES for kind in type(trainer.strategy).__mro__)


def refuse_sharded(trainer: Trainer, callback: Callback, takes_pieces: bool = False) -> None:
    """Refuse strategies whose parameters are pieces of tensors.

    Args:
        trainer: knows the strategy.
        callback: is named in the error.
        takes_pieces: whether the callback works on DTensors (`callbacks/_sharded.py`).

    Raises:
        ValueError: for FSDP, ModelParallel (FSDP2, tensor parallel) and DeepSpeed.
    """
    if is_sharded(trainer) and not (takes_pieces and is_in_pieces(trainer)):
        strategy = type(trainer.strategy).__name__
        raise ValueError(
            f"strategy={strategy}: {type(callback).__name__} does not work on sharded parameters; use DDP or one device"
        )


class StepHooks:
    """Calls a function right after each optimizer step that was made, under automatic and manual optimization alike.

    Lightning has no such hook, and its counters advance for a step that the gradient scaler skipped as well. These are
    hooks on the optimizers themselves: a skipped step calls nothing, nor does one without any gradient (by which a
    callback skips one), and each optimizer's steps are told apart.

    What changes weights attaches in `on_fit_start`, what reads them in `on_train_start`: hooks run in the order in
    which they were attached, so readers see the final weights in whatever order the callbacks stand.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def attach(self, trainer: Trainer, after_step: Callable[[int, Optimizer], None]) -> None:
        """Call `after_step(index, optimizer)`, the index being that in `trainer.optimizers`."""
        self.detach()
        for index, optimizer in enumerate(trainer.optimizers):

            def hook(optimizer: Optimizer, args: Any, kwargs: Any, index: int = index) -> None:
                if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                    after_step(index, optimizer)

            self._handles.append(optimizer.register_step_post_hook(hook))

    @property
    def attached(self) -> bool:
        """Whether the optimizers are followed now."""
        return bool(self._handles)

    def detach(self) -> None:
        """Remove the hooks; in `teardown` and `on_exception`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
