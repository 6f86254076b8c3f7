"""From one vector a token to one a row; what is padding counts for nothing.

Shapes: B rows, T tokens, F width. A mask is (B, T) bool, true where there is a token, on whichever side the padding
stands; None for no padding. A row without any token becomes zeros.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "cls", "last", "max", "none"]


def mean_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of the tokens, (B, T, F) to (B, F)."""
    if mask is None:
        return hidden.mean(1)
    return masked(hidden, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def cls_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The first token, where BERT and ViT have their [CLS], (B, T, F) to (B, F)."""
    return hidden[:, 0] if mask is None else _picked(hidden, mask, mask.int().argmax(1))


def last_token_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last token, the one that has seen all others in a causal model, (B, T, F) to (B, F)."""
    if mask is None:
        return hidden[:, -1]
    return _picked(hidden, mask, mask.shape[1] - 1 - mask.flip(1).int().argmax(1))


def max_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The largest value of each feature over the tokens, (B, T, F) to (B, F)."""
    if mask is None:
        return hidden.amax(1)
    largest = hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
    return largest.masked_fill(~mask.any(1)[:, None], 0.0)


def masked(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """All tokens, (B, T, F) as it was, with zeros for padding: what late interaction takes."""
    return hidden if mask is None else hidden.masked_fill(~mask[..., None], 0.0)


POOLINGS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "mean": mean_pool, "cls": cls_pool, "last": last_token_pool, "max": max_pool, "none": masked,
}  # fmt: skip


def _picked(hidden: Tensor, mask: Tensor, columns: Tensor) -> Tensor:
    """The token at one column of each row."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, columns].masked_fill(~mask.any(1)[:, None], 0.0)
