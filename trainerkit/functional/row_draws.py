"""Random numbers that depend on seed, epoch and row alone, for a whole batch at once.

A generator per row would cost more than the row. A hash of a counter has no state: row 7 of epoch 3 draws the same in
any batch, order or process, on any device, and nothing moves a global generator.

Source: G. L. Steele, D. Lea, C. H. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64);
normal numbers by G. E. P. Box, M. E. Muller, A note on the generation of random normal deviates, 1958.
"""

import math

import numpy as np
import torch
from torch import Tensor


def row_draws(seed: int, epoch: int, rows: Tensor, count: int, stream: int = 0) -> Tensor:
    """Uniform numbers for each row.

    Args:
        seed: 0 or more.
        epoch: 0 or more.
        rows: row numbers, (…,) int64, 0 or more; the numbers are on their device.
        count: numbers a row.
        stream: what they are for: another stream has others, independent of these.

    Returns:
        (…, count) float32 in [0, 1).
    """
    # Mixed by NumPy, or epoch 1 of seed 0 would be epoch 0 of seed 1.
    key = int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0])
    counter = rows[..., None] * count + torch.arange(1, count + 1, device=rows.device)
    mixed = _mixed(counter * _signed(0x9E3779B97F4A7C15) + _signed(key))
    # 24 bits: what float32 has, so that none is rounded up to 1.
    return _shifted(mixed, 40).float() / (1 << 24)


def row_normals(seed: int, epoch: int, rows: Tensor, count: int, stream: int = 0) -> Tensor:
    """Standard normal numbers for each row, (…, count) float32; arguments as of `row_draws`."""
    u = row_draws(seed, epoch, rows, 2 * count, stream)
    # 1 − u is above 0.
    return (-2 * (1 - u[..., :count]).log()).sqrt() * (2 * math.pi * u[..., count:]).cos()


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64; int64 wraps as uint64 does, which torch does not multiply."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x ≫ bits, with zeros for the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The number that int64 has for the same 64 bits."""
    return word - (1 << 64) if word >= 1 << 63 else word
