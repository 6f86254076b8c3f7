"""What the data modules of labelled rows share: parts with the same mix of classes, and the loaders over them."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from trainerkit.data.loader import ArrayDataset, Batch, BatchLoader, EpochBatches, ranks_of
from trainerkit.errors import UserError

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class LabelledSets:
    """What a data module of labelled rows has read.

    Args:
        parts: the data sets that have rows, of train, val and test; their length is that of their rows.
        predicted: what prediction gives out, in order.
        shape: of one `x`.
        classes: names of the numbers in `y`; none where nothing is labelled.
        counts: rows of each class in training.
    """

    parts: dict[str, Dataset[Batch]]
    predicted: Dataset[Batch]
    shape: tuple[int, ...]
    classes: list[str]
    counts: list[int]


class LabelledModule(LightningDataModule):
    """Rows in batches `{"x": (B, *shape) float32, "y": (B,) int64, "index": (B,) int64}`.

    Args:
        batch_size: rows a batch and process.
        num_workers: processes that read ahead.
        seed: of the order of the batches.

    Raises:
        ValueError: for an impossible argument.
    """

    def __init__(self, *, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        for name, number, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("seed", seed, 0)):
            if number < least:
                raise ValueError(f"{name}={number}: must be {least} or more")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._sets: LabelledSets | None = None

    # What a subclass writes.

    @abstractmethod
    def make_sets(self) -> LabelledSets:
        """Read and split what there is; called once."""

    # What tasks and callbacks read.

    @property
    def sets(self) -> LabelledSets:
        """The data sets; made if they are not there yet."""
        if self._sets is None:
            self._sets = self.make_sets()
        return self._sets

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one `x`: (channels, height, width) or (features,)."""
        return self.sets.shape

    @property
    def classes(self) -> list[str]:
        """Names of the numbers in `y`; empty where nothing is labelled."""
        return self.sets.classes

    @property
    def n_classes(self) -> int:
        """How many there are."""
        return len(self.classes)

    @property
    def class_counts(self) -> list[int]:
        """Rows of each class in training."""
        return self.sets.counts

    def rows(self, part: Part, limit: int | None = None) -> Batch:
        """A part as one batch, thinned out evenly to `limit` rows; for baselines.

        Raises:
            UserError: if the part has no row.
        """
        if part not in self.sets.parts:
            raise UserError(f"{part}: has no row.")
        dataset: Any = self.sets.parts[part]
        count = len(dataset) if limit is None else min(limit, len(dataset))
        found: Batch = dataset[torch.linspace(0, len(dataset) - 1, count, dtype=torch.float64).round().long()]
        return found

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Read, check and split, once."""
        _ = self.sets

    def train_dataloader(self) -> BatchLoader:
        """Shuffled anew each epoch."""
        return self._loader(self.sets.parts["train"], is_training=True)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """In the order of the rows; empty without validation rows."""
        return self._loader(self.sets.parts["val"]) if "val" in self.sets.parts else []

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """In the order of the rows; empty without test rows."""
        return self._loader(self.sets.parts["test"]) if "test" in self.sets.parts else []

    def predict_dataloader(self) -> BatchLoader:
        """Every row in order."""
        return self._loader(self.sets.predicted)

    def _loader(self, dataset: Dataset[Batch], *, is_training: bool = False) -> BatchLoader:
        length = len(dataset)  # type: ignore[arg-type]
        ranks = ranks_of(self.trainer)
        batches = EpochBatches(length, self.batch_size, shuffle=is_training, seed=self.seed, even=is_training, **ranks)
        return BatchLoader(dataset, batches, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())


class PictureModule(LabelledModule):
    """Labelled pictures: `x` is (B, channels, image_size, image_size) in 0..1."""

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """Side of a picture."""
        return self.shape[-1]


def split_classes(
    y: NDArray[np.int64], fractions: tuple[float, float], seed: int, names: list[str]
) -> NDArray[np.int64]:
    """Draw validation and test from each class, so that all parts have the same mix.

    Args:
        y: each row's class, (rows,).
        fractions: of each class's rows, for validation and test; a fraction above 0 gets one row at least.
        seed: of the draw.
        names: of the classes, for the message.

    Returns:
        (rows,) with 0 to train, 1 to validate, 2 to test.

    Raises:
        UserError: for a class with too few rows to have one in each part.
    """
    roles = np.zeros(len(y), dtype=np.int64)
    for number, name in enumerate(names):
        rows = np.random.default_rng([seed, number]).permutation(np.flatnonzero(y == number))
        n_val, n_test = (max(1, round(fraction * len(rows))) if fraction > 0 else 0 for fraction in fractions)
        if len(rows) <= n_val + n_test:
            needed = 1 + sum(fraction > 0 for fraction in fractions)
            raise UserError(f"class {name}: has {len(rows)} rows; needed are {needed} or more, one for each part.")
        roles[rows[:n_val]] = 1
        roles[rows[n_val : n_val + n_test]] = 2
    return roles


def array_sets(arrays: dict[str, Tensor], roles: NDArray[np.int64], classes: list[str]) -> LabelledSets:
    """The parts of rows in memory.

    Args:
        arrays: `x`, (rows, …), and `y`, (rows,), if there are classes.
        roles: as `split_classes` gives them.
        classes: names of the numbers in `y`.
    """
    rows = {name: torch.from_numpy(np.flatnonzero(roles == role)) for role, name in enumerate(("train", "val", "test"))}
    return LabelledSets(
        parts={name: ArrayDataset(arrays, part) for name, part in rows.items() if len(part)},
        predicted=ArrayDataset(arrays),
        shape=tuple(arrays["x"].shape[1:]),
        classes=classes,
        counts=counts_of(arrays["y"][rows["train"]], classes) if classes else [],
    )


def counts_of(y: Tensor, classes: list[str]) -> list[int]:
    """Rows of each class."""
    counts: list[int] = y.bincount(minlength=len(classes)).tolist()
    return counts
