"""A table of the user's with a column of labels: `data=table data.path=mine.csv data.label=kind`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainerkit.data.labelled import LabelledModule, LabelledSets, array_sets, split_classes
from trainerkit.data.loader import ArrayDataset
from trainerkit.data.pair_module import check_fractions
from trainerkit.data.tables import check_finite, mean_and_std, read_table
from trainerkit.errors import UserError


class TableData(LabelledModule):
    """Rows of numbers with a label, in batches `{"x": (B, features), "y": (B,), "index": (B,)}`.

    Each column is scaled by the training rows' mean and deviation. Each label's rows are split in the same shares.

    Args:
        path: a .csv, .parquet or .npz file (`trainerkit.data.tables.read_table`).
        label: name of the label column or array; its values may be text.
        header: whether line 1 of a .csv holds names; None for yes if no cell of it is a number.
        predict_path: what prediction reads instead of `path`: a file with the same columns, without the label.
        val_fraction: share of each class's rows for validation.
        test_fraction: share of each class's rows for the test.
        batch_size: rows a batch and process.
        num_workers: processes that read ahead; 0 is fastest.
        seed: of the split and of the order of the batches.

    Raises:
        ValueError: for an impossible argument.
        trainerkit.errors.UserError: for a file that cannot be used; it names file, row and column.
    """

    def __init__(
        self,
        path: str,
        label: str,
        *,
        header: bool | None = None,
        predict_path: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fractions({"val_fraction": val_fraction, "test_fraction": test_fraction})
        if not label:
            raise ValueError("label=: must be the name of a column")
        self.path = path
        self._label = label
        self._header = header
        self._predict_path = predict_path
        self._fractions = (val_fraction, test_fraction)

    @property
    def features(self) -> int:
        """Columns without the label."""
        return self.shape[0]

    def make_sets(self) -> LabelledSets:
        """Read, check, split and scale."""
        table, labels = read_table(self.path, self._label, self._header)
        check_finite(table, self.path)
        assert labels is not None  # a file without this label has been refused
        names, numbers = np.unique(labels, return_inverse=True)
        classes = [str(name) for name in names]
        if len(classes) < 2:
            raise UserError(f"{self.path}: {self._label} is {classes[0]} in every row; needed are two classes or more.")
        y = numbers.astype(np.int64)
        roles = split_classes(y, self._fractions, self.seed, classes)
        mean, std = map(torch.from_numpy, mean_and_std(table, np.flatnonzero(roles == 0)))
        sets = array_sets({"x": _scaled(table, mean, std), "y": torch.from_numpy(y)}, roles, classes)
        if self._predict_path is None:
            return sets
        other, _ = read_table(self._predict_path, None, self._header)
        check_finite(other, self._predict_path)
        if other.shape[1] != table.shape[1]:
            raise UserError(
                f"{self._predict_path}: has {other.shape[1]} columns; needed are the {table.shape[1]} of {self.path} "
                f"without {self._label}."
            )
        return LabelledSets(**{**vars(sets), "predicted": ArrayDataset({"x": _scaled(other, mean, std)})})


def _scaled(table: Any, mean: Tensor, std: Tensor) -> Tensor:
    return (torch.from_numpy(table.astype(np.float32)) - mean) / std
