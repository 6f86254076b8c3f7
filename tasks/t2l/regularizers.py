"""What is asked of predicted adapters whatever their targets: consistency C and sparsity S.

Layers that are added in the course of training count by their share g_l from 0 to 1; a layer that is not there yet
counts for nothing, and neither value jumps where a share begins to grow.

B: tasks, L: layers, n: layers of one type; A (B, n, r, in), B (B, n, out, r).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainerkit.adapter_layout import AdapterLayout, Factors


def consistency(layout: AdapterLayout, factors: Factors, shares: Tensor | None = None) -> Tensor:
    """C: the variance across the layers of a type, mean over its numbers, tasks and types; a scalar.

    The variance is the mean square of the distance from the layers' mean, 0 for a single layer.

    Args:
        layout: of the factors.
        factors: (B, n, …) for each key.
        shares: g (L,), how much each layer counts; None for all alike.
    """
    values = []
    counts = []
    for t, share in zip(layout.types, _by_type(layout, shares), strict=True):
        pair = factors[f"A/{t.label}"], factors[f"B/{t.label}"]
        numbers = sum(part[0, 0].numel() for part in pair) * len(pair[0])
        # Where the mean is, the sum of squares has no slope in it: no gradient has to pass through the mean.
        if share is None:
            varied = [_squares(part, part.detach().mean(1, keepdim=True)) / len(t.names) for part in pair]
        else:
            each = (share / share.sum().clamp_min(1e-12))[:, None, None]
            means = [(part.detach() * each).sum(1, keepdim=True) for part in pair]
            varied = [((part - mean).square() * each).sum() for part, mean in zip(pair, means, strict=True)]
            counts.append(share.mean())
        values.append((varied[0] + varied[1]) / numbers)
    if shares is None:
        return torch.stack(values).mean()
    weights = torch.stack(counts)
    return (torch.stack(values) * weights).sum() / weights.sum().clamp_min(1e-12)


def sparsity(layout: AdapterLayout, factors: Factors, shares: Tensor | None = None) -> Tensor:
    """S: the mean of |·| over all numbers of the factors; a scalar.

    Args:
        layout: of the factors.
        factors: (B, n, …) for each key.
        shares: g (L,), how much each layer's numbers count; None for all alike.
    """
    total: Tensor | float = 0.0
    numbers: Tensor | float = 0.0
    for t, share in zip(layout.types, _by_type(layout, shares), strict=True):
        for part in (factors[f"A/{t.label}"], factors[f"B/{t.label}"]):
            each = part.abs().sum((0, 2, 3))
            total = total + (each.sum() if share is None else (each * share).sum())
            counted = len(t.names) if share is None else share.sum()
            numbers = numbers + counted * len(part) * part[0, 0].numel()
    assert isinstance(total, Tensor)
    return total / (numbers.clamp_min(1e-12) if isinstance(numbers, Tensor) else numbers)


def _squares(x: Tensor, centre: Tensor) -> Tensor:
    return F.mse_loss(x, centre.expand_as(x), reduction="sum")


def _by_type(layout: AdapterLayout, shares: Tensor | None) -> list[Tensor | None]:
    counts = [len(t.names) for t in layout.types]
    return [None] * len(counts) if shares is None else list(shares.split(counts))
