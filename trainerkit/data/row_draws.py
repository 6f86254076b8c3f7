"""Random numbers that depend on seed, epoch and row alone, for a whole batch at once.

A generator per row would cost more than the row. A hash of a counter has no state: row 7 of epoch 3 draws the same in
any batch, order or process, and nothing moves a global generator.

Source: G. L. Steele, D. Lea, C. H. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def row_draws(seed: int, epoch: int, rows: Tensor, count: int, stream: int = 0) -> Tensor:
    """Uniform numbers for each row.

    Args:
        seed: 0 or more.
        epoch: 0 or more.
        rows: row numbers, (…,) int64, 0 or more.
        count: numbers a row.
        stream: what they are for: another stream has others, independent of these.

    Returns:
        (…, count) float32 in [0, 1).
    """
    # Mixed by NumPy, or epoch 1 of seed 0 would be epoch 0 of seed 1.
    key = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)
    counter: NDArray[Any] = rows[..., None].numpy().astype(np.uint64)
    counter = counter * np.uint64(count) + np.arange(count, dtype=np.uint64)
    mixed = _mixed(np.asarray(key + (counter + np.uint64(1)) * _GOLDEN, np.uint64))
    # 24 bits: what float32 has, so that none is rounded up to 1.
    return torch.from_numpy((mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24))


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
