"""Spectra, or any fixed-length one-dimensional signals, from a table of the user's: `data=spectra data.path=mine.npy`.

A row is a spectrum, a column a band. A .npy file stays on disk and is read batch by batch through a memory map.
"""

from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from trainerkit.data.loader import ArrayDataset, Batch, BatchLoader, EpochBatches, ranks_of
from trainerkit.data.tables import Table, check_finite, mean_and_std, read_table

Split = Literal["train", "val", "test"]
FitLength = Literal["exact", "pad", "crop"]
Normalize = Literal["zscore", "snv", "none"]


def snv(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Standard normal variate: each spectrum minus its mean, over its sample standard deviation.

    Args:
        x: spectra, (…, bands).
        eps: smallest deviation that is divided by, so that a constant spectrum becomes zeros.

    Source: R. J. Barnes, M. S. Dhanoa, S. J. Lister, Applied Spectroscopy 43(5), 1989.
    """
    centred = x - x.mean(-1, keepdim=True)
    return centred / x.std(-1, keepdim=True).clamp_min(eps)


def fit_length(x: Tensor, length: int) -> Tensor:
    """Crop spectra (…, bands) to `length` at the end, or pad them there with their last value."""
    missing = length - x.shape[-1]
    if missing <= 0:
        return x[..., :length]
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)


class SpectraData(LightningDataModule):
    """Spectra from a table, split, normalised and given out as `{"x": (B, seq_len), "index": (B,)[, "y": (B,)]}`.

    Args:
        path: a .npy, .npz, .csv or .parquet file.
        label: name of the label column or array; becomes `y`, class numbers in the order of the sorted labels.
        header: whether line 1 of a .csv holds names; None for yes if no cell of it is a number.
        seq_len: length of a spectrum as the network sees it; None takes the file's.
        fit_length: what to do where the file's length is another: 'exact' refuses, 'pad' repeats the last band,
            'crop' leaves out the last bands.
        normalize: 'zscore' scales each band by the training rows' mean and deviation, 'snv' each spectrum by its own,
            'none' leaves the numbers.
        split: 'random' rows, or contiguous 'blocks' of `block_size` rows where neighbours resemble each other.
        block_size: rows of a block.
        val_fraction: share of the rows for validation.
        test_fraction: share of the rows for the test.
        batch_size: spectra a batch and process.
        num_workers: processes that read ahead.
        seed: of the split and of the order of the batches.

    Raises:
        ValueError: for an impossible argument.
        trainerkit.errors.UserError: for a file that cannot be used; it names file, row and column.
    """

    def __init__(
        self,
        path: str,
        *,
        label: str | None = None,
        header: bool | None = None,
        seq_len: int | None = None,
        fit_length: FitLength = "exact",
        normalize: Normalize = "zscore",
        split: Literal["random", "blocks"] = "random",
        block_size: int = 100,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_choice("fit_length", fit_length, ("exact", "pad", "crop"))
        _check_choice("normalize", normalize, ("zscore", "snv", "none"))
        _check_choice("split", split, ("random", "blocks"))
        for name, fraction in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
            if not 0 <= fraction < 1:
                raise ValueError(f"{name}={fraction}: must be from 0 to below 1")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"test_fraction={test_fraction}: with val_fraction={val_fraction} nothing is left to train on"
            )
        for name, number in {"batch_size": batch_size, "block_size": block_size}.items():
            if number < 1:
                raise ValueError(f"{name}={number}: must be 1 or more")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be 0 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: must be 0 or more")
        if seq_len is not None and seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: must be 1 or more, or null to take the file's")
        self.path = path
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._label = label
        self._header = header
        self._seq_len = seq_len
        self._fit_length = fit_length
        self._normalize = normalize
        self._split = split
        self._block_size = block_size
        self._fractions = (val_fraction, test_fraction)
        self._table: Table | None = None
        self._datasets: dict[str, ArrayDataset] = {}

    # What a subclass for another source of spectra writes anew.

    def load(self) -> tuple[Table, Table | None]:
        """The numbers, (rows, bands), and the labels, (rows,), or None."""
        return read_table(self.path, self._label, self._header)

    def roles(self, rows: int) -> NDArray[np.int64]:
        """Each row's part, (rows,): 0 to train, 1 to validate, 2 to test."""
        block = np.arange(rows) // (self._block_size if self._split == "blocks" else 1)
        return split_blocks(block, self._fractions, self.seed)

    # What tasks and callbacks read.

    @property
    def seq_len(self) -> int:
        """Length of a spectrum as the network sees it; reads the file if it was not given."""
        return self._seq_len if self._seq_len is not None else int(self._loaded()[0].shape[1])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in `y`; empty without labels."""
        self.setup("test")
        return self._classes

    def rows(self, split: Split, limit: int | None = None) -> Batch:
        """A split as one batch, as the network sees it, thinned out evenly to `limit` rows; for baselines."""
        self.setup("test")
        dataset = self._datasets[split]
        count = len(dataset) if limit is None else min(limit, len(dataset))
        return dataset[torch.linspace(0, len(dataset) - 1, count, dtype=torch.float64).round().long()]

    def has(self, split: Split) -> bool:
        """Whether a split has any row."""
        self.setup("test")
        return split in self._datasets

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Load, check, split and normalise, once."""
        if self._datasets:
            return
        table, labels = self._loaded()
        check_finite(table, self.path)
        self._check_length(table.shape[1])
        roles = self.roles(len(table))
        arrays: dict[str, Any] = {"x": table}
        self._classes: list[str] = []
        if labels is not None:
            names, numbers = np.unique(labels, return_inverse=True)
            self._classes = [str(name) for name in names]
            arrays["y"] = torch.from_numpy(numbers.astype(np.int64))
        transform = self._make_transform(table, roles)
        if not isinstance(table, np.memmap):
            # In memory the whole table is transformed once instead of batch by batch.
            arrays["x"] = transform({"x": torch.from_numpy(table.astype(np.float32))})["x"]
            transform = None
        for number, name in enumerate(("train", "val", "test")):
            rows = torch.from_numpy(np.flatnonzero(roles == number))
            if len(rows):
                self._datasets[name] = ArrayDataset(arrays, rows, transform)
        self._datasets["all"] = ArrayDataset(arrays, None, transform)
        if "train" not in self._datasets:
            raise ValueError(f"val_fraction={self._fractions[0]}: of {len(table)} rows none is left to train on")

    def train_dataloader(self) -> BatchLoader:
        """Shuffled anew each epoch."""
        return self._loader("train", shuffle=True, even=True)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """In the order of the rows; empty without validation rows."""
        return self._loader("val") if "val" in self._datasets else []

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """In the order of the rows; empty without test rows."""
        return self._loader("test") if "test" in self._datasets else []

    def predict_dataloader(self) -> BatchLoader:
        """Every row of the table, in order."""
        return self._loader("all")

    def _loaded(self) -> tuple[Table, Table | None]:
        if self._table is None:
            self._table, self._labels = self.load()
        return self._table, self._labels

    def _loader(self, name: str, *, shuffle: bool = False, even: bool = False) -> BatchLoader:
        dataset = self._datasets[name]
        ranks = ranks_of(self.trainer)
        batches = EpochBatches(len(dataset), self.batch_size, shuffle=shuffle, seed=self.seed, even=even, **ranks)
        return BatchLoader(dataset, batches, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def _check_length(self, bands: int) -> None:
        if self._seq_len is None or self._seq_len == bands:
            return
        way = "pad" if self._seq_len > bands else "crop"
        if self._fit_length == "exact":
            raise ValueError(
                f"seq_len={self._seq_len}: the data have {bands} bands; take fit_length={way}, or seq_len={bands}"
            )
        if self._fit_length != way:
            raise ValueError(f"fit_length={self._fit_length}: to get from {bands} bands to {self._seq_len} takes {way}")

    def _make_transform(self, table: Table, roles: NDArray[np.int64]) -> Any:
        mean = std = None
        if self._normalize == "zscore":
            mean, std = map(torch.from_numpy, mean_and_std(table, np.flatnonzero(roles == 0)))
        return _Transform(self._normalize, mean, std, self.seq_len)


class _Transform:
    """What turns rows of the file into what the network sees; a class, so that worker processes can have it."""

    def __init__(self, normalize: Normalize, mean: Tensor | None, std: Tensor | None, length: int) -> None:
        self.normalize = normalize
        self.mean = mean
        self.std = std
        self.length = length

    def __call__(self, batch: Batch) -> Batch:
        x = batch["x"].float()
        if self.normalize == "snv":
            x = snv(x)
        elif self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        return {**batch, "x": fit_length(x, self.length)}


def split_blocks(block: NDArray[np.int64], fractions: tuple[float, float], seed: int) -> NDArray[np.int64]:
    """Give whole blocks of rows to validation and test, so that neighbours are never on both sides.

    Args:
        block: each row's block, (rows,).
        fractions: of the blocks, for validation and test; a fraction above 0 gets one block at least.
        seed: of the draw.

    Returns:
        (rows,) with 0 to train, 1 to validate, 2 to test.
    """
    blocks, member = np.unique(block, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(blocks))
    n_val, n_test = (max(1, round(fraction * len(blocks))) if fraction > 0 else 0 for fraction in fractions)
    role = np.zeros(len(blocks), dtype=np.int64)
    role[order[:n_val]] = 1
    role[order[n_val : n_val + n_test]] = 2
    return role[member]


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value}: must be one of {', '.join(allowed)}")
