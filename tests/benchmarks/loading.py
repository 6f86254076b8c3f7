"""Batches a second from memory and from a memory map: `python -m tests.benchmarks.loading`.

100,000 rows of 200 bands in shuffled batches: trainerkit's loader beside torch's DataLoader over a TensorDataset.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.turns import measure, table
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches

ROWS, BANDS = 100_000, 200
X = torch.randn(ROWS, BANDS)


def per_batch(loader) -> float:
    start = time.perf_counter()
    batches = sum(1 for _ in loader)
    return (time.perf_counter() - start) / batches


def torchs(batch_size: int):
    return lambda folder: per_batch(DataLoader(TensorDataset(X), batch_size=batch_size, shuffle=True))


def ours(batch_size: int, mapped: bool):
    def run(folder: Path) -> float:
        array = X
        if mapped:
            np.save(folder / "x.npy", X.numpy())
            array = np.load(folder / "x.npy", mmap_mode="r")
        return per_batch(BatchLoader(ArrayDataset({"x": array}), EpochBatches(ROWS, batch_size, shuffle=True)))

    return run


def main(rounds: int = 3) -> None:
    for batch_size in (128, 1024):
        contenders = {
            "trainerkit, in memory": ours(batch_size, False),
            "trainerkit, memory-mapped": ours(batch_size, True),
            "TensorDataset, default collate": torchs(batch_size),
        }
        medians = measure(contenders, rounds)
        table(f"A batch of {batch_size} rows of {BANDS} bands", medians, "trainerkit, in memory")
        for name, seconds in medians.items():
            print(f"  {name}: {1 / seconds:,.0f} batches a second")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
