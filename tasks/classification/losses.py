"""Losses of a classifier, each a mean over the rows of a batch, so that processes' means average to that of all rows.

Shapes: B rows, K classes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainerkit.functional.cross_entropy import cross_entropy


def classification_loss(
    logits: Tensor,
    y: Tensor,
    other: Tensor | None = None,
    share: float | Tensor = 1.0,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Mean over the rows of λ·w_y·l(z, y) + (1−λ)·w_y'·l(z, y'), with l the (smoothed, focal) cross-entropy.

    Args:
        logits: z, (B, K).
        y: classes, (B,) int64.
        other: y', (B,), classes of what each row was mixed with; None for none.
        share: λ, of the row itself; one number, or (B,).
        class_weights: w, (K,); None for 1 each. The sum is divided by B, not by the weights' sum.
        label_smoothing: ε, from 0 to below 1; see `trainerkit.functional.cross_entropy`, as for the next.
        focal_gamma: γ, 0 or more.

    Returns:
        A scalar.
    """
    weights = None if class_weights is None else class_weights[y]
    if other is not None:
        ours = torch.as_tensor(share, dtype=torch.float32, device=logits.device).expand(len(y))
        # Each row stands twice, so that the mean is over 2B.
        logits, y, weights = logits.repeat(2, 1), torch.cat([y, other]), 2 * torch.cat([ours, 1 - ours])
        if class_weights is not None:
            weights = weights * class_weights[y]
    loss, _ = cross_entropy(logits, y, row_weights=weights, label_smoothing=label_smoothing, focal_gamma=focal_gamma)
    return loss


def mixed(x: Tensor, order: Tensor, share: float | Tensor) -> Tensor:
    """λx + (1−λ)x[order]: mixup's inputs.

    Args:
        x: (B, …).
        order: which row each is mixed with, (B,).
        share: λ.

    Source: H. Zhang et al., 'mixup: Beyond empirical risk minimization', ICLR 2018, arXiv:1710.09412.
    """
    return share * x + (1 - share) * x[order]


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """N / (K·n_k), (K,): classes of n_k rows count the same in the sum over all N, and the mean weight of a row is 1.

    Raises:
        ValueError: for a class without a row.
    """
    n = torch.tensor(list(counts), dtype=torch.float64)
    if not len(n) or n.min() <= 0:
        raise ValueError(f"class_counts={list(counts)}: must be 1 or more each, for class_weights=balanced")
    return (n.sum() / (len(n) * n)).float()


def given_weights(weights: Sequence[float] | Mapping[str, float], classes: Sequence[str]) -> Tensor:
    """Weights in the order of the classes, (K,).

    Args:
        weights: one for each class; or by name, where the others have 1.
        classes: names.

    Raises:
        ValueError: for another number of them, a name that is no class, or a weight below 0.
    """
    if isinstance(weights, Mapping):
        named = {str(name): weight for name, weight in weights.items()}  # YAML takes the name 3 for a number
        unknown = [name for name in named if name not in classes]
        if unknown:
            raise ValueError(f"class_weights={named}: {unknown[0]} is no class; they are {', '.join(classes)}")
        weights = [named.get(name, 1.0) for name in classes]
    if len(weights) != len(classes):
        raise ValueError(f"class_weights={list(weights)}: must be {len(classes)} numbers, one for each class")
    if any(not 0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ValueError(f"class_weights={list(weights)}: must be 0 or more, and one of them above 0")
    return torch.tensor(list(weights), dtype=torch.float32)
