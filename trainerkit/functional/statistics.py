"""Norms and moments of many tensors: measured where the tensors are, put together on the host.

A measurement of n tensors is one small vector on their device. Nothing here waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_LARGE = 2**16  # numbers, from which on it pays to divide a tensor among threads
_SMALL = 2**13  # numbers, up to which a copy costs less than a call


def as_values(tensor: Tensor) -> Tensor:
    """The numbers to be measured: those stored of a sparse tensor, complex ones as pairs of reals."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def copied(tensor: Tensor) -> Tensor:
    """A copy, of half precision in float32, from which small differences can be taken."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().to(torch.float32 if half else tensor.dtype, copy=True)


def stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Small tensors of one shape as one, on the first one's device."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


class NormPlan:
    """How the norms of many tensors are made, worked out from their devices, types and shapes.

    On the CPU `torch._foreach_norm` takes one tensor after the other, in one thread. A dot product of a large one takes
    all threads, and small ones of one shape are copied together and reduced at once, in a third of the time. Elsewhere
    it is one `torch._foreach_norm` for each device and type.

    Args:
        tensors: n of any shape, dense and real.
        order: 2 for the root of the sum of squares, 1 for the sum of absolute values.
    """

    def __init__(self, tensors: Sequence[Tensor], order: float = 2.0) -> None:
        self.order = order
        self._parts: list[tuple[_Way, list[int]]] = []
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place, tensor in enumerate(tensors):
            kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
        for (device, dtype), places in kinds.items():
            if dtype in (torch.float16, torch.bfloat16):
                self._parts.append((_each_in_float32, places))
            elif device.type == "cpu":
                self._parts += _cpu_parts(tensors, places, order)
            else:
                self._parts.append((_each, places))
        self._order = [place for _, places in self._parts for place in places]
        self._back = torch.tensor(self._order).argsort()  # on the CPU: a copy to another device would wait for it
        self._is_in_order = self._order == list(range(len(tensors)))

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norms (n,) of tensors like those that the plan was made for, on the first one's device."""
        device = tensors[0].device
        found = torch.cat(
            [way([tensors[place] for place in places], self.order).to(device) for way, places in self._parts]
        )
        if self._is_in_order:
            return found
        if device.type == "cpu":
            return found.index_select(0, self._back)
        scalars = dict(zip(self._order, found.unbind(), strict=True))
        return torch.stack([scalars[place] for place in range(len(tensors))])


@torch.inference_mode()  # a tenth cheaper than no_grad where tensors are many and small
def norms(tensors: Sequence[Tensor], order: float = 2.0, plan: NormPlan | None = None) -> Tensor:
    """The norm of each tensor.

    Args:
        tensors: n of any shape, dense and real; half precision is summed in float32.
        order: 2 for the root of the sum of squares, 1 for the sum of absolute values.
        plan: of tensors like these, whose order then counts; None makes one.

    Returns:
        (n,), on the first one's device.
    """
    if not tensors:
        return torch.zeros(0)
    return (NormPlan(tensors, order) if plan is None else plan)(tensors)


_Way = Callable[[list[Tensor], float], Tensor]


def _each(tensors: list[Tensor], order: float) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, order))


def _each_in_float32(tensors: list[Tensor], order: float) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, order, torch.float32))


def _dots(tensors: list[Tensor], order: float) -> Tensor:
    flat = [tensor.reshape(-1) for tensor in tensors]
    return torch.stack([torch.dot(values, values) for values in flat]).sqrt_()


def _together(tensors: list[Tensor], order: float) -> Tensor:
    rows = torch.stack(tensors).view(len(tensors), -1)
    found: Tensor = torch.linalg.vector_norm(rows, order, 1)
    return found


def _cpu_parts(tensors: Sequence[Tensor], places: list[int], order: float) -> list[tuple[_Way, list[int]]]:
    by_shape: dict[torch.Size, list[int]] = {}
    for place in places:
        by_shape.setdefault(tensors[place].shape, []).append(place)
    parts: list[tuple[_Way, list[int]]] = []
    large, others = [], []
    for shape, alike in by_shape.items():
        if shape.numel() >= _LARGE and order == 2:
            large += alike
        elif shape.numel() <= _SMALL and len(alike) > 2:
            parts.append((_together, alike))
        else:
            others += alike
    return [*parts, *((way, alike) for way, alike in ((_dots, large), (_each, others)) if alike)]


@torch.inference_mode()
def mean_and_squares(tensor: Tensor) -> Tensor:
    """The mean, and the sum of squared distances from it; half precision in float32.

    Two passes, since E[x²] − E[x]² loses all digits where the mean is large against the deviation.

    Args:
        tensor: of any shape, real, not empty.

    Returns:
        (2,).
    """
    values = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    mean = values.mean()
    return torch.stack([mean, torch.linalg.vector_norm(values - mean).square()])


@torch.inference_mode()
def histogram(values: Tensor, bins: int = 64) -> Tensor:
    """How often the values fall into each of equal bins between the smallest and the largest.

    Returns:
        (4 + bins,): smallest, largest, sum, sum of squares, and the counts.
    """
    values = values.flatten().float()
    low, high = torch.aminmax(values)
    place = (values - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny) * bins
    counts = torch.zeros(bins, dtype=torch.int32, device=values.device)
    counts.scatter_add_(0, place.long().clamp_(0, bins - 1), torch.ones_like(place, dtype=torch.int32))
    return torch.cat([torch.stack([low, high, values.sum(), values.square().sum()]), counts.float()])


def pooled_moments(counts: Array, means: Array, squares: Array, groups: Array, number: int) -> tuple[Array, Array]:
    """Mean and standard deviation of the union of parts, from those of the parts.

    S = Σ Sᵢ + nᵢ·(mᵢ − m)², with m the mean of all: T. F. Chan, G. H. Golub, R. J. LeVeque, *Updating formulae and a
    pairwise algorithm for computing sample variances*, 1979. The deviation is that of a population, √(S/n).

    Args:
        counts: nᵢ, (n,).
        means: mᵢ, (n,).
        squares: Sᵢ, sums of squared distances from mᵢ, (n,).
        groups: which union each part belongs to, (n,), integers.
        number: of unions.

    Returns:
        Means and deviations, (number,) each; NaN for a union of nothing.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.bincount(groups, counts, number)
        mean = np.bincount(groups, counts * means, number) / total
        scatter = np.bincount(groups, squares + counts * (means - mean[groups]) ** 2, number)
        return mean, np.sqrt(scatter / total)
