"""Batches of arrays in one indexing each, in an order that depends on seed and epoch alone.

torch's default loader asks a map-style data set for one sample at a time and stacks them. Where the data are arrays, in
memory or memory-mapped, one fancy index per batch does the same. The order is a permutation drawn from (seed, epoch):
it moves no global random state, is the same for any number of processes, and a run resumes in the middle of an epoch
by skipping ahead in O(1).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = dict[str, Tensor]
Source = Tensor | NDArray[Any]


def ranks_of(trainer: Any) -> dict[str, int]:
    """`num_replicas` and `rank` of `EpochBatches`, or nothing without a Trainer.

    They count the groups that see different batches: under tensor parallelism fewer than processes.
    """
    if trainer is None:
        return {}
    alone = {"num_replicas": trainer.world_size, "rank": trainer.global_rank}
    return dict(getattr(trainer.strategy, "distributed_sampler_kwargs", alone))


class ArrayDataset(Dataset[Batch]):
    """Rows of named arrays; indexing with a tensor of positions gives a whole batch.

    Args:
        arrays: tensors or NumPy arrays (memory-mapped ones too) with the same number of rows.
        rows: which rows belong to this data set, (n,) int64; None for all.
        transform: applied to each batch.

    A batch holds one tensor per array, and `index`: the row numbers in the arrays, (B,) int64.

    Raises:
        ValueError: if the arrays differ in length, or there is no row.
    """

    def __init__(
        self,
        arrays: Mapping[str, Source],
        rows: Tensor | None = None,
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays={lengths}: must all have the same number of rows")
        self.arrays = dict(arrays)
        self.rows = torch.arange(next(iter(lengths.values()))) if rows is None else rows
        self.transform = transform
        if len(self.rows) == 0:
            raise ValueError("rows=0: a data set needs at least one row")

    @property
    def seeded_by_index(self) -> bool:
        """Whether a row is the same whenever it is read; ExactResume asks."""
        return self.transform is None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | int) -> Batch:
        rows = self.rows[index]
        batch = {name: _take(array, rows) for name, array in self.arrays.items()}
        batch["index"] = rows
        return batch if self.transform is None else self.transform(batch)


def _take(array: Source, rows: Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array[rows]
    taken = np.asarray(array[rows.numpy()])
    return (
        torch.from_numpy(taken)
        if taken.dtype.isnative
        else torch.from_numpy(taken.astype(taken.dtype.newbyteorder("=")))
    )


class EpochBatches(Sampler[Tensor]):
    """Positions of one epoch in batches, this process's share of them.

    Batch k of all processes together is batch k of a single process with the summed batch size.

    Args:
        length: samples in the data set.
        batch_size: samples a batch and process.
        shuffle: draw a new permutation each epoch, from (seed, epoch); False keeps the order of the rows.
        seed: of the permutations.
        even: repeat a few samples so that every process has the same number of batches, as training needs; for
            evaluation False, where each sample counts once, and a process with one sample less takes its last batch in
            two if it would have one batch less: processes with sharded parameters wait for each other in each. Only a
            process that has no two samples to part gives one again, alone in a last batch: with a batch size of 1, or
            hardly more samples than processes.
        num_replicas: number of processes.
        rank: of this process.

    Raises:
        ValueError: for a batch size below 1.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        even: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be 1 or more")
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.even = even
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self._resume: tuple[int, int] = (0, 0)  # an epoch, and the batches to skip, once, at its beginning

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls it before each epoch."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batches: int) -> None:
        """Skip so many batches if the next iteration is that of this epoch."""
        self._resume = (epoch, batches)

    @property
    def settings(self) -> dict[str, int]:
        """What the order depends on: a run that stands in mid-epoch goes on with these."""
        return {"batch_size": self.batch_size, "length": self.length, "seed": self.seed}

    @property
    def start(self) -> int:
        """Batches that the next iteration skips."""
        return self._resume[1] if self._resume[0] == self.epoch else 0

    def __iter__(self) -> Iterator[Tensor]:
        start = self.start
        self._resume = (0, 0)
        order = self._order()
        mine = order[self.rank :: self.num_replicas]
        is_short = len(self) > -(-len(mine) // self.batch_size)
        in_two = is_short and len(mine) > 1 and self.batch_size > 1
        for position in range(start * self.batch_size, len(mine), self.batch_size):
            batch = mine[position : position + self.batch_size]
            if in_two and position + self.batch_size == len(mine):
                yield from (batch[:-1], batch[-1:])
            else:
                yield batch
        if is_short and not in_two:
            yield order[self.rank % self.length :][:1]

    def __len__(self) -> int:
        return -(-self.length // (self.num_replicas * self.batch_size))

    def _order(self) -> Tensor:
        if self.shuffle:
            # Seed and epoch are mixed, or epoch 1 of seed 0 would be epoch 0 of seed 1.
            mixed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0] >> 1)
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(mixed))
        else:
            order = torch.arange(self.length)
        if not self.even:
            return order
        rounds = -(-self.length // self.num_replicas)
        # Again and again from its beginning where there are more processes than samples.
        return order.repeat(-(-rounds * self.num_replicas // self.length))[: rounds * self.num_replicas]


class BatchLoader:
    """A loader over `EpochBatches` that knows its position, so that a checkpoint in mid-epoch can be resumed.

    Lightning saves and restores `state_dict()` of the training loader with the loop's counters. Not a subclass of
    DataLoader, which Lightning would take apart to put other samplers in.

    Args:
        dataset: takes a tensor of positions.
        batches: the order.
        num_workers: processes that read ahead; 0 is fastest for data in memory.
        pin_memory: have the workers' batches copied to pinned memory, for CUDA.

    Raises:
        ValueError: on resuming in mid-epoch with other `EpochBatches.settings`.
    """

    def __init__(
        self, dataset: Dataset[Batch], batches: EpochBatches, *, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.dataset = dataset
        self.sampler = batches  # by this name Lightning finds it, to set the epoch
        self.batch_sampler = None  # Lightning looks there as well
        self.num_workers = num_workers
        self._given = 0
        self._loader: Iterable[Batch] = _Here(dataset, batches)
        if num_workers > 0:
            # With a generator of its own it draws its workers' base seed from there, not from the global state.
            self._loader = DataLoader(
                dataset,
                sampler=batches,
                batch_size=None,
                num_workers=num_workers,
                pin_memory=pin_memory,
                collate_fn=_as_it_is,
                generator=torch.Generator().manual_seed(batches.seed),
                persistent_workers=True,
            )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator starts at its first next(): after Lightning has set the sampler's epoch, workers or not.
        self._given = self.sampler.start
        batches = iter(self._loader)
        if isinstance(self._loader, DataLoader) and self._loader.generator is not None:
            # Workers draw from it once, whenever they start: a resumed run must not be told by that.
            self._loader.generator.manual_seed(self.sampler.seed)
        for batch in batches:
            self._given += 1
            yield batch

    @property
    def _iterator(self) -> Any:
        """That of the workers. By this name Lightning stops them when fit ends, which takes seconds a worker later."""
        return getattr(self._loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        if isinstance(self._loader, DataLoader):
            self._loader._iterator = iterator

    def state_dict(self) -> dict[str, int]:
        """Batches given in this epoch, 0 once it is over."""
        return {"epoch": self.sampler.epoch, "batches": self._given % len(self), **self.sampler.settings}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration after the batches that were given before."""
        for name, now in self.sampler.settings.items() if state["batches"] else ():
            before = state.get(name, now)
            if before != now:
                raise ValueError(
                    f"{name}={now}: the checkpoint stands in the middle of an epoch with {name}={before}; resume with "
                    "that, or from the end of an epoch"
                )
        # An epoch that `limit_train_batches` cut short is over; its position is not the next one's.
        self.sampler.resume_at(state["epoch"], state["batches"])


class _Here:
    """What a DataLoader without workers does with batches of positions, without its cost per batch."""

    def __init__(self, dataset: Dataset[Batch], batches: EpochBatches) -> None:
        self.dataset = dataset
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        for positions in self.batches:
            yield self.dataset[positions]


def _as_it_is(batch: Any) -> Any:
    return batch
