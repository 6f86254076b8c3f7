"""What the data modules of pairs share: the loaders over their data sets, and the query of a search."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from trainerkit.data.loader import BatchLoader, EpochBatches, ranks_of
from trainerkit.data.pair_dataset import PairBatches, PairDataset
from trainerkit.errors import UserError


@dataclass(frozen=True)
class PairSets:
    """The data sets of a data module.

    Args:
        train: what is trained on; None if there is nothing, as where all rows are for the test.
        mining: the same rows in order, as they are, with their positions as `index`.
        val: a data set per name of `evaluation_names`, or none.
        test: likewise.
        rows: what prediction embeds, and what a query is searched in.
        query: one row, the query; None if there is none.
    """

    train: PairDataset | None
    mining: PairDataset | None
    val: list[PairDataset]
    test: list[PairDataset]
    rows: PairDataset
    query: PairDataset | None


class PairModule(LightningDataModule):
    """Pairs in batches as `PairDataset` gives them.

    Each loader of validation and test is an evaluation set, with its name in `evaluation_names`: the queries of its
    rows are searched among the positives and the negatives of all its rows.

    Args:
        batch_size: pairs a batch and process.
        num_workers: processes that read ahead.
        mined_negatives: how many negatives a row has room for that are mined in training.
        seed: of the order of the batches and of what is left to chance.

    Raises:
        ValueError: for an impossible argument.
    """

    # What a text or a picture has here; a subclass says which there are.
    modalities: list[str]
    channels: int
    image_size: int
    vocab_size: int
    evaluation_names: list[str]
    # What a query with a picture and a text is to a task: 'together' one of both, 'separate' two for the same thing.
    query_mode = "together"
    # By how many pixels a task moves copies of a picture in evaluation, to take the mean of their embeddings.
    eval_shift = 0

    def __init__(self, *, batch_size: int, num_workers: int, mined_negatives: int, seed: int, searches: bool) -> None:
        super().__init__()
        at_least = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0)}
        for name, (number, least) in (at_least | {"mined_negatives": (mined_negatives, 0), "seed": (seed, 0)}).items():
            if number < least:
                raise ValueError(f"{name}={number}: must be {least} or more")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.mined_negatives = mined_negatives
        self.seed = seed
        # What prediction's loaders are.
        self.predict_names = ["query", "corpus"] if searches else ["rows"]
        self._sets: PairSets | None = None

    # What a subclass writes.

    @abstractmethod
    def make_sets(self) -> PairSets:
        """Read what there is; called once."""

    @abstractmethod
    def describe(self, index: int, side: Literal["query", "positive"]) -> str:
        """What a person would call a row's side; `index` is the batch's."""

    # What tasks and callbacks read.

    @property
    def n_classes(self) -> int | None:
        """How many labels the training rows have, if these count from 0; a subclass that knows says so."""
        return None

    @property
    def sets(self) -> PairSets:
        """The data sets; made if they are not there yet."""
        if self._sets is None:
            self._sets = self.make_sets()
        return self._sets

    @property
    def train_dataset(self) -> PairDataset:
        """That of training, which takes mined negatives."""
        return _there(self.sets.train)

    def mining_dataloader(self) -> BatchLoader:
        """The training rows in order, nothing of them left to chance; `index` counts them."""
        return self._in_order(_there(self.sets.mining))

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Read and check what there is."""
        _ = self.sets

    def train_dataloader(self) -> BatchLoader:
        """Shuffled anew each epoch."""
        dataset = self.train_dataset
        batches = PairBatches(dataset, self.batch_size, shuffle=True, seed=self.seed, even=True, **self._world())
        return self._loader(dataset, batches)

    def val_dataloader(self) -> list[BatchLoader]:
        """One per evaluation set."""
        return [self._in_order(dataset) for dataset in self.sets.val]

    def test_dataloader(self) -> list[BatchLoader]:
        """One per evaluation set."""
        return [self._in_order(dataset) for dataset in self.sets.test]

    def predict_dataloader(self) -> list[BatchLoader]:
        """One per name of `predict_names`: all rows in order; before them the query if there is one."""
        query = [] if self.sets.query is None else [self.sets.query]
        return [self._in_order(dataset) for dataset in (*query, self.sets.rows)]

    def _world(self) -> dict[str, int]:
        return ranks_of(self.trainer)

    def _in_order(self, dataset: PairDataset) -> BatchLoader:
        batches = EpochBatches(len(dataset), self.batch_size, shuffle=False, even=False, **self._world())
        return self._loader(dataset, batches)

    def _loader(self, dataset: PairDataset, batches: EpochBatches) -> BatchLoader:
        return BatchLoader(dataset, batches, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())


def _there(dataset: PairDataset | None) -> PairDataset:
    if dataset is None:
        raise UserError("train: no row is there to train on.")
    return dataset


def check_fractions(fractions: dict[str, float]) -> None:
    """Refuse shares that are none, or leave nothing to train on, by a ValueError."""
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}={fraction}: must be from 0 to below 1")
    if sum(fractions.values()) >= 1:
        name, fraction = list(fractions.items())[-1]
        raise ValueError(f"{name}={fraction}: with {_said(fractions, name)} nothing is left to train on")


def _said(fractions: dict[str, Any], without: str) -> str:
    return ", ".join(f"{name}={value}" for name, value in fractions.items() if name != without)
