"""Adapters in batches, each with the embedding of one of its descriptions.

Shapes: B adapters of a batch, E numbers of an embedding.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainerkit.data.loader import Batch, EpochBatches
from trainerkit.data.lora_examples import ExampleFiles, draw_examples
from trainerkit.data.lora_folders import AdapterFolders
from trainerkit.functional.row_draws import row_draws

# What a random number is for.
_DESCRIPTION, _EXAMPLES = range(2)


class LoraDataset(Dataset[Batch]):
    """Adapters; indexing with a tensor of positions gives a whole batch.

    A batch has `index` (B,): numbers of adapters; `task` (B, E): the embedding of one of its descriptions; the factors
    `A/LABEL` (B, n, r, in) and `B/LABEL` (B, n, out, r) for each module type; and, with `examples`, `inputs` (B, S, …)
    and `targets` (B, S, …).

    Args:
        folders: the adapters.
        tasks: embeddings of all descriptions, (N, E).
        items: of each position an adapter's number and the descriptions of it that one is drawn from.
        examples: of their tasks; None for none.
        seed: of what is left to chance, which is the same for (seed, epoch, adapter), whoever reads it.
        drawn: whether examples are drawn; else the first are taken.

    Raises:
        ValueError: if there is no item, or one without description.
    """

    seeded_by_index = True  # ExactResume asks

    def __init__(
        self,
        folders: AdapterFolders,
        tasks: Tensor,
        items: Sequence[tuple[int, Sequence[int]]],
        *,
        examples: ExampleFiles | None = None,
        seed: int = 0,
        drawn: bool = True,
    ) -> None:
        if not items or not all(lines for _, lines in items):
            raise ValueError("items: there must be one or more, each with a description")
        self.folders = folders
        self.tasks = tasks
        self.examples = examples
        self.seed = seed
        self.drawn = drawn
        self.rows = torch.tensor([row for row, _ in items])
        self._lines = torch.tensor([line for _, lines in items for line in lines])
        self._counts = torch.tensor([len(lines) for _, lines in items])
        self._starts = self._counts.cumsum(0) - self._counts
        # Shared memory: workers that live on see a new epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose what is drawn from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Tensor) -> Batch:
        rows, epoch = self.rows[positions], int(self._epoch)
        draws = row_draws(self.seed, epoch, rows, 1, _DESCRIPTION)[:, 0]
        # In double precision: in single, 3 times the largest number below 1 is 3.
        chosen = self._starts[positions] + (draws.double() * self._counts[positions]).long()
        batch = {"index": rows, "task": self.tasks[self._lines[chosen]], **self.folders.factors(rows)}
        if self.examples is not None:
            size = self.examples.size
            places = torch.arange(size).expand(len(rows), size)
            if self.drawn:
                places = draw_examples(self.examples.counts[rows], rows, size, self.seed, epoch, _EXAMPLES)
            batch |= self.examples.take(rows, places)
        return batch


class LoraBatches(EpochBatches):
    """`EpochBatches` that tell their data set the epoch as well: what is left to chance is drawn anew in each."""

    def __init__(self, dataset: LoraDataset, batch_size: int, *, seed: int, world: Mapping[str, int]) -> None:
        super().__init__(len(dataset), batch_size, shuffle=True, seed=seed, even=True, **world)
        self._dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation and the draws."""
        super().set_epoch(epoch)
        self._dataset.set_epoch(epoch)
