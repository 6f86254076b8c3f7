"""Squared error over the hidden positions."""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "batch_mean"]


def masked_sse(x_recon: Tensor, x: Tensor, mask: Tensor, *, reduction: Reduction = "batch_mean") -> Tensor:
    """Squared error over the positions where `mask` is True.

    Args:
        x_recon: reconstruction, (B, L).
        x: target, (B, L). What stands where `mask` is False, NaN included, changes neither value nor gradients.
        mask: True where the error counts, (B, L) bool.
        reduction: 'sum' of all, 'mean' over the counted positions, or 'batch_mean': the sum over B.

    Returns:
        A scalar in float32 or wider; 0, with a gradient of zeros, if nothing is counted.

    Raises:
        ValueError: for another reduction.
    """
    wide = x_recon if x_recon.dtype == torch.float64 else x_recon.float()
    # where() instead of x[mask]: the size of x[mask] is known on the device only, and asking for it waits for it.
    squares = torch.where(mask, wide - x, 0.0).square().sum()
    if reduction == "sum":
        return squares
    if reduction == "mean":
        return squares / mask.sum().clamp_min(1)
    if reduction == "batch_mean":
        return squares / max(1, len(x))
    raise ValueError(f"reduction={reduction}: must be one of mean, sum, batch_mean")


def masked_mse(x_recon: Tensor, x: Tensor, mask: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """`masked_sse` with the mean over the counted positions as its default."""
    return masked_sse(x_recon, x, mask, reduction=reduction)
