"""What a masked autoencoder must beat: reconstructions that need no network.

All take signals whose hidden positions are to be filled in, and give reconstructions of the whole (N, L).
Shapes: N signals, L length, P patches, V visible ones.
"""

import numpy as np
import torch
from torch import Tensor

from trainerkit.tasks.mae.losses import masked_mse
from trainerkit.tasks.mae.masking import hidden_positions

_BATCH = 512
_MOST_NUMBERS = 2**26  # in one of the covariance matrices of a batch: half a gigabyte


def mean_fill(train: Tensor, x: Tensor) -> Tensor:
    """The training signals' mean at every position."""
    return train.mean(0).expand_as(x)


def linear_interpolation(x: Tensor, hidden: Tensor) -> Tensor:
    """A straight line between the nearest visible positions; beyond the ends, the nearest visible value.

    Args:
        x: signals, (N, L).
        hidden: True where hidden, (N, L) bool.
    """
    places = np.arange(x.shape[1])
    filled = [np.interp(places, places[seen], row[seen]) for row, seen in zip(x.numpy(), ~hidden.numpy(), strict=True)]
    return torch.from_numpy(np.stack(filled)).to(x.dtype)


def gaussian_conditional(train: Tensor, x: Tensor, visible: Tensor, n_patches: int, ridge: float = 1e-6) -> Tensor:
    """The mean of the hidden positions given the visible ones under a Gaussian fitted to the training signals.

    E[x_h | x_v] = μ_h + Σ_hv (Σ_vv + λI)⁻¹ (x_v − μ_v): no linear reconstruction has a smaller squared error.
    Computed in float64.

    Args:
        train: training signals, (M, L).
        x: signals, (N, L).
        visible: indices of the visible patches, (N, V).
        n_patches: P.
        ridge: λ, for bands that are copies of each other.
    """
    mean = train.double().mean(0)
    covariance = torch.cov(train.double().T)
    patch_size = x.shape[1] // n_patches
    seen = (visible[:, :, None] * patch_size + torch.arange(patch_size)).flatten(1)
    identity = ridge * torch.eye(seen.shape[1], dtype=torch.float64)
    parts = []
    batch = max(1, min(_BATCH, _MOST_NUMBERS // (seen.shape[1] * x.shape[1])))
    for start in range(0, len(x), batch):
        index = seen[start : start + batch]
        offset = (x[start : start + batch].double() - mean).gather(1, index)
        among_seen = covariance[index[:, :, None], index[:, None, :]] + identity
        weights = torch.linalg.solve(among_seen, offset[:, :, None])
        parts.append(mean + (covariance[index].mT @ weights)[:, :, 0])
    return torch.cat(parts).to(x.dtype)


def reconstruction_errors(train: Tensor, x: Tensor, visible: Tensor, n_patches: int) -> dict[str, float]:
    """Masked mean squared error of each baseline on the same signals and masks."""
    hidden = hidden_positions(visible, n_patches, x.shape[1] // n_patches)
    fills = {
        "mean_fill": mean_fill(train, x),
        "linear_interpolation": linear_interpolation(x, hidden),
        "gaussian_conditional": gaussian_conditional(train, x, visible, n_patches),
    }
    return {name: masked_mse(fill, x, hidden).item() for name, fill in fills.items()}
