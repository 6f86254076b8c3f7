"""Random augmentation that depends on seed, epoch and index alone."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from trainerkit.functional.random import host_state, seed_host, set_host_state


class SeededSamples(Dataset[Any]):
    """A data set whose sample i draws at random as (seed, epoch, i) says, whoever reads it and after whatever.

    Augmentation is then the same for any number of workers, for persistent ones too, and a run resumes in mid-epoch
    without reading what it has seen. Python's, NumPy's and torch's global generators are seeded before each sample;
    in the main process they are put back after it.

    `ExactResume` tells it the epoch. Without that, call `set_epoch` before each epoch, as of a DistributedSampler.

    Args:
        dataset: a map-style data set that draws from the global generators.
        seed: 0 or more.

    Raises:
        ValueError: for a data set that has no indices, or a negative seed.
    """

    seeded_by_index = True

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"dataset={type(dataset).__name__}: must be map-style; an iterable one has no indices")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be 0 or more")
        self.dataset = dataset
        self.seed = seed
        # Shared memory: workers that live on see a new epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose what the samples draw from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Samples of a batch; a DataLoader asks for these."""
        outside = host_state() if get_worker_info() is None else None
        try:
            return [self._sample(index) for index in indices]
        finally:
            if outside is not None:
                set_host_state(outside)

    def _sample(self, index: Any) -> Any:
        entropy = [self.seed, int(self._epoch), operator.index(index) % len(self)]
        seed_host(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
        return self.dataset[index]
