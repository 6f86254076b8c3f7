"""Rows of different lengths as one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Rows (N, P) int64, shorter ones filled up on the left, and their own lengths (N,)."""
    longest = max(map(len, rows))
    padded = [[filler] * (longest - len(row)) + list(row) for row in rows]
    return torch.tensor(padded), torch.tensor([len(row) for row in rows])
