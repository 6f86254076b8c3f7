"""What the layers give out in training: mean, deviation, dead units, saturation.

mean, std    of all elements
dead         the fraction of units that are exactly 0 in the whole batch
saturated    the fraction of elements in the outermost part of a bounded function's range (Tanh, Sigmoid, …)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from trainerkit.callbacks._parameters import as_patterns, is_built, match, plain_name
from trainerkit.callbacks._trainer import is_stepping, log_metrics, refuse_sharded, step_number
from trainerkit.functional.statistics import mean_and_squares, pooled_moments

# Functions that have an end on both sides, and where their ends are.
RANGES: dict[type[nn.Module], tuple[float, float]] = {
    nn.Tanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
}
# Without these hooks the inside of an attention would be silent: its output layer is never called as a module.
_WHOLE = (nn.MultiheadAttention,)
# Whose three-dimensional outputs have their channels in the middle.
_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d)


def observable(module: nn.Module, prefix: str = "", leaves_only: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose outputs can be seen from outside, by their plain names.

    A module wrapped by `torch.compile` is seen as a whole: a hook inside would be compiled into the graph, or ignored.
    One that was compiled in place (`module.compile()`) cannot be seen at all.

    Args:
        module: whose children are looked at; a child that stands in two places is given once.
        prefix: the module's own name with a dot.
        leaves_only: only those that have no child to be seen.
    """
    for path, child in _children(module, prefix, set()):
        if not leaves_only or isinstance(child, _WHOLE) or _is_wrapper(child) or not list(child.children()):
            yield path, child


def _children(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if id(child) in seen or getattr(child, "_compiled_call_impl", None) is not None:
            continue
        seen.add(id(child))
        path = plain_name(prefix + name)
        yield path, child
        if not (_is_wrapper(child) or isinstance(child, _WHOLE)):
            yield from _children(child, f"{path}.", seen)


def _is_wrapper(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod")


def first_tensor(output: Any) -> Tensor | None:
    """An output's first floating-point tensor, in tuples, lists and dicts too; None if there is none with elements.

    A single number (the output of a loss or metric module) is none either.
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.ndim > 0 and output.numel() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def limits_of(module: nn.Module) -> tuple[float, float] | None:
    """The ends of a function's range, if it has two."""
    return next((limits for kind, limits in RANGES.items() if isinstance(module, kind)), None)


def unit_dimension(module: nn.Module, output: Tensor) -> int:
    """The dimension of an output that counts its units.

    The second of images and of what 1-D convolutions and their norms give; the last of all else, as in (N, T, D).
    """
    return 1 if output.ndim > 3 or (output.ndim == 3 and isinstance(module, _CHANNELS_FIRST)) else output.ndim - 1


@torch.no_grad()
def activation_columns(output: Tensor, limits: tuple[float, float] | None, saturation: float) -> Tensor:
    """Mean, sum of squared distances from it, and the number of saturated elements of an output: (3,).

    Args:
        output: of any shape.
        limits: the ends of the function's range, mapped to −1 and 1; None if it has none.
        saturation: what absolute value counts as saturated on that scale.
    """
    moments = mean_and_squares(output)
    if limits is None:
        return torch.cat([moments, moments.new_zeros(1)])
    low, high = limits
    scaled = (2 * output.float() - (low + high)) / (high - low)
    return torch.cat([moments, (scaled.abs() > saturation).sum().to(moments)[None]])


@torch.no_grad()
def alive_units(output: Tensor, dimension: int) -> Tensor:
    """Which units are anything but 0 anywhere: booleans, (units,)."""
    others = [d for d in range(output.ndim) if d != dimension]
    return (output != 0).any(dim=others) if others else output != 0


@dataclass
class _Seen:
    """What one module gave out in this window, on its device."""

    module: nn.Module
    counts: list[int] = field(default_factory=list)  # elements of each call
    columns: list[Tensor] = field(default_factory=list)
    alive: dict[int, Tensor] = field(default_factory=dict)  # by number of units


# The same on the host: elements of each call, its columns, units that lived by number of units.
_Host = tuple[list[int], list[list[float]], dict[int, list[bool]]]


class ActivationStats(Callback):
    """Log mean and deviation of what modules give out in training, and how much of it is dead or saturated.

    - Forward hooks exist only during the steps that measure. With accumulated gradients those are all batches of the
      window, and the numbers are those of the window as one batch; under DDP, of all processes' batches as one.
    - A module that is called several times is pooled over its calls; of an output that is a tuple, list or dict the
      first floating-point tensor counts.
    - A unit is a feature, (N, …, D), or a channel of an image, (N, C, H, W). Dead means exactly 0 everywhere.
    - Functions that are no modules (`F.relu`) cannot be seen, nor what is inside a compiled module: that is seen as a
      whole.

    Args:
        modules: pattern or patterns for the names of modules; those that are never called give nothing.
        every_n_steps: optimizer steps between measurements.
        leaves_only: leave out modules that are made of others.
        saturation: above which absolute value an element is saturated, where the range of the function (Tanh, Softsign,
            Sigmoid, Hardsigmoid) is mapped to −1 to 1; above 0 and below 1.
        prefix: what metric names begin with.

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters, for a pattern that matches
            nothing, and for a LightningModule that was compiled as a whole.
    """

    def __init__(
        self,
        modules: str | Sequence[str] = "*",
        every_n_steps: int = 500,
        leaves_only: bool = True,
        saturation: float = 0.99,
        prefix: str = "activations",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be 1 or more")
        if not 0 < saturation < 1:
            raise ValueError(f"saturation={saturation}: must be above 0 and below 1")
        if not prefix:
            raise ValueError(f"prefix={prefix!r}: must be a name")
        self.modules = as_patterns(modules, "modules")
        self.every_n_steps = every_n_steps
        self.leaves_only = leaves_only
        self.saturation = saturation
        self.prefix = prefix
        self._seen: dict[str, _Seen] = {}
        self._handles: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work while it is cheap."""
        if stage != "fit":
            return
        refuse_sharded(trainer, self)
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise ValueError(
                "ActivationStats cannot look into a LightningModule that was compiled as a whole; "
                "compile its networks instead"
            )
        if is_built(pl_module):
            self._chosen(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether there is anything to see."""
        self._chosen(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to look, at the first batch of a window that is measured."""
        if step_number(trainer) % self.every_n_steps == 0 and not self._handles:
            for name, module in self._chosen(pl_module).items():
                self._seen[name] = _Seen(module)
                self._handles.append(module.register_forward_hook(self._hook(trainer, self._seen[name])))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report, at the end of the window."""
        if self._handles and is_stepping(trainer, pl_module):
            seen = self._seen
            self._stop()
            self._report(trainer, seen)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look no further."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look no further."""
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}

    def _chosen(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        found = dict(observable(pl_module, leaves_only=self.leaves_only))
        return {name: found[name] for name in match(found, self.modules, "modules", "module")}

    def _hook(self, trainer: Trainer, seen: _Seen) -> Any:
        limits = limits_of(seen.module)

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or not trainer.training:  # a validation may come in the middle of a window
                return
            tensor = tensor.detach()
            seen.counts.append(tensor.numel())
            seen.columns.append(activation_columns(tensor, limits, self.saturation))
            alive = alive_units(tensor, unit_dimension(module, tensor))
            before = seen.alive.get(len(alive))
            seen.alive[len(alive)] = alive if before is None else before | alive

        return hook

    def _report(self, trainer: Trainer, seen: Mapping[str, _Seen]) -> None:
        found = _to_host({name: one for name, one in seen.items() if one.counts})
        everywhere = [found]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            everywhere = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everywhere, found)
        metrics: dict[str, float] = {}
        for name, one in seen.items():
            parts = [part[name] for part in everywhere if name in part]
            if parts:
                values = activation_statistics(parts, bounded=limits_of(one.module) is not None)
                metrics |= {f"{self.prefix}/{key}/{name}": value for key, value in values.items()}
        if metrics:
            log_metrics(trainer, metrics)


def activation_statistics(parts: Sequence[_Host], bounded: bool) -> dict[str, float]:
    """Mean, std, dead, and saturated where it has a meaning, of all calls of all processes."""
    counts = np.array([count for part in parts for count in part[0]], dtype=float)
    columns = np.array([column for part in parts for column in part[1]])
    together = np.zeros(len(counts), dtype=int)
    mean, std = pooled_moments(counts, columns[:, 0], columns[:, 1], together, 1)
    units = {width for part in parts for width in part[2]}
    alive = [np.any([part[2][width] for part in parts if width in part[2]], axis=0) for width in units]
    result = {"mean": float(mean[0]), "std": float(std[0]), "dead": float(1 - np.concatenate(alive).mean())}
    if bounded:
        result["saturated"] = float(columns[:, 2].sum() / counts.sum())
    return result


def _to_host(seen: Mapping[str, _Seen]) -> dict[str, _Host]:
    """Everything in one copy."""
    tensors = [tensor for one in seen.values() for tensor in (*one.columns, *one.alive.values())]
    if not tensors:
        return {}
    device = tensors[0].device
    values = torch.cat([tensor.to(device) for tensor in tensors]).tolist()
    start = 0

    def take(number: int) -> list[float]:
        nonlocal start
        start += number
        return values[start - number : start]

    result: dict[str, _Host] = {}
    for name, one in seen.items():
        columns = [take(len(column)) for column in one.columns]
        result[name] = one.counts, columns, {width: [v > 0 for v in take(width)] for width in one.alive}
    return result
