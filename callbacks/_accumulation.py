"""Windows of batches that make one optimizer step: how long they are, and the mean over them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trainerkit.callbacks._parameters import named_parameters
from trainerkit.functional.statistics import as_values, norms

Weight = str | Callable[[Any], Tensor | float]


class Window(int):
    """The length of a window that may begin at any batch of an epoch, in the place of `accumulate_grad_batches`.

    Lightning sets the gradients to zero where `batch_idx % length == 0`, steps where `batches_so_far % length == 0`,
    and divides the loss by the length. With a plain number that is right only if every window of the epoch has the
    same length. This one answers 0 at its own first batch and at its own end. Its end is the next one's beginning, so
    the next may take its place as soon as the step is made.

    Args:
        start: batches of the epoch before the window.
        length: batches in it.
        per_epoch: the optimizer steps in an epoch of so many batches, for `trainer.estimated_stepping_batches`.
    """

    start: int
    per_epoch: Callable[[int], float]

    def __new__(cls, start: int, length: int, per_epoch: Callable[[int], float]) -> "Window":
        window = super().__new__(cls, length)
        window.start = start
        window.per_epoch = per_epoch
        return window

    def __rmod__(self, batches: int) -> int:
        return 0 if batches in (self.start, self.start + int(self)) else 1

    def __rtruediv__(self, batches: int) -> float:
        # 1 / length is somebody's factor for a loss, not an epoch.
        return self.per_epoch(batches) if batches > 1 else batches / int(self)


def steps_at(schedule: Mapping[int, int], position: int) -> int:
    """The window's length at an epoch or optimizer step: that of the largest key up to it, 1 before the first."""
    keys = [key for key in schedule if key <= position]
    return schedule[max(keys)] if keys else 1


def planned_steps(batches: int, epochs: int, schedule: Mapping[int, int], by: str) -> int:
    """How many optimizer steps a run has; a window ends with its epoch.

    Args:
        batches: of an epoch.
        epochs: of the run.
        schedule: lengths of windows from these positions on.
        by: what the positions are, 'epoch' or 'step', both from 0.
    """
    step = 0
    for epoch in range(epochs):
        left = batches
        while left > 0:
            length = steps_at(schedule, epoch if by == "epoch" else step)
            until = min((key for key in schedule if key > step), default=math.inf) if by == "step" else math.inf
            made = int(min(math.ceil(left / length), until - step))
            step += made
            left -= made * length
    return step


def rows_of(batch: Any) -> int:
    """The length of the first dimension of the first tensor in a batch.

    Raises:
        ValueError: if there is no such tensor.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError(f"batch={type(batch).__name__}: must be a tensor, or a dict, list or tuple with tensors in it")


def amount(batch: Any, weight: Weight | None) -> Tensor | float:
    """What a batch counts for: its rows, the sum of one of its fields, or what a function says of it.

    Args:
        batch: any batch.
        weight: None or 'rows' for its rows; another name for a key or an attribute; or a function of the batch.

    Raises:
        ValueError: if the batch has no field of that name.
    """
    if weight is None or weight == "rows":
        return float(rows_of(batch))
    value = weight(batch) if callable(weight) else _field(batch, weight)
    return value.detach().sum(dtype=torch.float32) if isinstance(value, Tensor) else float(value)


def _field(batch: Any, name: str) -> Any:
    if isinstance(batch, Mapping):
        if name in batch:
            return batch[name]
        raise ValueError(f"weight={name}: is not in the batch, which has {', '.join(map(str, batch))}")
    if hasattr(batch, name):
        return getattr(batch, name)
    raise ValueError(f"weight={name}: a batch of type {type(batch).__name__} has no such attribute")


def loss_scale(trainer: Trainer, device: torch.device) -> Tensor | float:
    """What the loss is multiplied by before its backward: the gradient scaler's factor, a tensor; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))


def sum_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The sum over all processes, a new tensor."""
    values = values.clone()
    if trainer.world_size > 1:
        torch.distributed.all_reduce(values)
    return values


def gradients(trainer: Trainer) -> list[Tensor]:
    """The gradients that the optimizer will use."""
    groups = trainer.optimizers[0].param_groups
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, 0-dimensional float32."""
    norm: Tensor = torch.linalg.vector_norm(norms([as_values(tensor) for tensor in tensors]))
    return norm.float()


def scale_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors by one factor, in place; a 0-dimensional tensor is not copied to the host."""
    if not isinstance(factor, Tensor):
        torch._foreach_mul_(list(tensors), factor)
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device))


class WindowMean:
    """Makes the gradient that a window has added up the mean over its batches.

    Args:
        weight: what a batch counts for, nᵢ; None for each the same.
        sized: keep the sizes of batches even so, and measure the first one's gradient.

    Attributes:
        seen: batches that are in the gradient.
        at: batches of the epoch up to the last one in it; −1 while a backward pass is on its way.
        size: Σ nᵢ in this process, 0-dimensional; None where it is not needed.
        first: |g|² of the window's first batch in this process, and its size, (2,).
        unit: nᵢ are counted in it, their mean in the window before: float16 gradients times tokens would overflow.
    """

    def __init__(self, weight: Weight | None, sized: bool) -> None:
        self.weight = weight
        self.sized = sized
        self.unit: Tensor | None = None
        self.begin(0)

    def begin(self, at: int) -> None:
        """A window without a batch."""
        self.seen, self.at = 0, at
        self.size: Tensor | None = None
        self.first: Tensor | None = None

    def count(self, trainer: Trainer, loss: Tensor, batch: Any, again: bool) -> None:
        """A batch comes into the gradient, `again` in the place of itself; let its loss weigh nᵢ."""
        self.seen += not again
        self.at = -1
        if not self.sized and not self._weighs(trainer):
            return
        size = amount(batch, self.weight)
        # Filled, for a number that is copied to a device is waited for.
        size = size.to(loss.device) if isinstance(size, Tensor) else torch.full((), size, device=loss.device)
        if not again:
            self.size = size if self.size is None else self.size + size
        if self._weighs(trainer):
            share = size / self._unit(trainer, size)
            loss.register_hook(lambda gradient: (gradient * share).to(gradient.dtype))

    def _weighs(self, trainer: Trainer) -> bool:
        return self.weight is not None and (trainer.accumulate_grad_batches > 1 or trainer.world_size > 1)

    def _unit(self, trainer: Trainer, size: Tensor) -> Tensor:
        if self.unit is None:
            mean = sum_over_ranks(trainer, size) / trainer.world_size
            self.unit = torch.where(mean > 0, mean, torch.ones_like(mean))
        return self.unit

    def finish(self, trainer: Trainer) -> None:
        """Before the step: what was divided by the window's length is to be the mean of what came."""
        length = int(trainer.accumulate_grad_batches)
        if self.size is not None and self._weighs(trainer):
            size = sum_over_ranks(trainer, self.size)
            unit = self._unit(trainer, size)
            factor = trainer.world_size * length * unit / size
            scale_(gradients(trainer), torch.where(size > 0, factor, torch.zeros_like(factor)))
            self.unit = torch.where(size > 0, size / (trainer.world_size * self.seen), unit)
        elif self.seen not in (0, length):  # the loader did not say that it would end, or batches had no loss
            scale_(gradients(trainer), length / self.seen)

    def measure(self, trainer: Trainer) -> None:
        """Inside a window: measure the gradient of its first batch, which over processes is not reduced yet."""
        if self.size is None or not self.sized or self.seen != 1:
            return
        found = gradients(trainer)
        if found:
            # p.grad = g · scale of the loss · nᵢ/unit / length
            factor = int(trainer.accumulate_grad_batches) / loss_scale(trainer, found[0].device)
            if self._weighs(trainer):
                factor = factor * self._unit(trainer, self.size) / self.size
            self.first = torch.stack([(total_norm(found) * factor).square(), self.size])

    def state(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The window so far; over several processes the mean of theirs, from which each of them can go on."""
        state: dict[str, Any] = {"seen": self.seen, "at": self.at, "gradients": _gradient_so_far(trainer, pl_module)}
        for name, value in (("size", self.size), ("first", self.first)):
            if value is not None:
                state[name] = sum_over_ranks(trainer, value) / trainer.world_size
        return state

    def restore(self, state: dict[str, Any], pl_module: LightningModule) -> None:
        """Go on inside a window."""
        self.seen, self.at = state["seen"], state["at"]
        self.size, self.first = (
            state[name].to(pl_module.device) if name in state else None for name in ("size", "first")
        )
        for name, parameter in named_parameters(pl_module).items():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter)


def _gradient_so_far(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    named = {name: p for name, p in named_parameters(pl_module).items() if p.requires_grad}
    ranks = trainer.world_size
    if ranks == 1:
        return {name: p.grad.detach().clone() for name, p in named.items() if p.grad is not None}
    there = torch.tensor([p.grad is not None for p in named.values()], dtype=torch.int32, device=pl_module.device)
    torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX)
    found = {}
    for (name, parameter), anywhere in zip(named.items(), there.tolist(), strict=True):
        if anywhere:
            own = parameter.grad
            found[name] = torch.zeros_like(parameter.data) if own is None else own.detach().clone()
            torch.distributed.all_reduce(found[name])
            found[name] /= ranks
    return found
