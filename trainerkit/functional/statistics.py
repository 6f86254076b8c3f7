"""Norms and moments of many tensors: measured where the tensors are, put together on the host.

A measurement of n tensors is one small vector on their device. Nothing here waits for the device.
"""

from collections.abc import Sequence
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


def are_uniform(tensors: Sequence[Tensor]) -> bool:
    """Whether all are real, of one device and of one type that sums are made in."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    return len(kinds) == 1 and next(iter(kinds))[1] in (torch.float32, torch.float64)


@torch.inference_mode()  # a tenth cheaper than no_grad where tensors are many and small
def norms(tensors: Sequence[Tensor], order: float = 2.0, uniform: bool = False) -> Tensor:
    """The norm of each tensor, in one `torch._foreach_norm` for each device and type.

    Args:
        tensors: n of any shape, dense and real; half precision is summed in float32.
        order: 2 for the root of the sum of squares, 1 for the sum of absolute values.
        uniform: that `are_uniform` has been seen to hold, which saves looking at each.

    Returns:
        (n,), on the first one's device.
    """
    if not tensors:
        return torch.zeros(0)
    if uniform or are_uniform(tensors):
        return _norms_of_one_kind(list(tensors), order)
    kinds = [(tensor.device, tensor.dtype) for tensor in tensors]
    found: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        wide = torch.float32 if kind[1] in (torch.float16, torch.bfloat16) else None
        of_kind = torch._foreach_norm([tensors[place] for place in places], order, wide)
        found |= zip(places, of_kind, strict=True)
    return stacked([found[place] for place in range(len(tensors))])


def _norms_of_one_kind(tensors: list[Tensor], order: float) -> Tensor:
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, order))
    # On the CPU `_foreach_norm` takes one tensor after the other, in one thread. A dot product of a large one takes
    # all threads, and small ones of one shape are copied together and reduced at once, in a third of the time.
    by_shape: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_shape.setdefault(tensor.shape, []).append(place)
    found, places, large, others = [], [], [], []
    for shape, alike in by_shape.items():
        if shape.numel() >= _LARGE and order == 2:
            large += alike
        elif shape.numel() <= _SMALL and len(alike) > 2:
            rows = torch.stack([tensors[place] for place in alike]).view(len(alike), -1)
            found.append(torch.linalg.vector_norm(rows, order, 1))
            places += alike
        else:
            others += alike
    if large:
        flat = [tensors[place].reshape(-1) for place in large]
        found.append(torch.stack([torch.dot(values, values) for values in flat]).sqrt_())
        places += large
    if others:
        found.append(torch.stack(torch._foreach_norm([tensors[place] for place in others], order)))
        places += others
    joined = torch.cat(found)
    return torch.empty_like(joined).index_copy_(0, torch.tensor(places), joined)


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
