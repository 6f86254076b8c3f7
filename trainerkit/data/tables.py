"""Tables of numbers from .npy, .npz, .csv and .parquet files, with errors that name file, row and column."""

import csv
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainerkit.errors import UserError, first_lines
from trainerkit.extras import require

SUFFIXES = (".npy", ".npz", ".csv", ".parquet")
_CHUNK_ROWS = 65536

Table = NDArray[Any]


def read_table(path: str | Path, label: str | None = None, header: bool | None = None) -> tuple[Table, Table | None]:
    """Read a two-dimensional table of numbers, a row a sample.

    Args:
        path: a .npy file (memory-mapped), .npz (the first two-dimensional array in it), .csv (comma, semicolon or tab;
            a header is recognised) or .parquet.
        label: the name of the label column (.csv with a header, .parquet) or array (.npz); its values may be text.

        header: whether line 1 of a .csv holds names; None for yes if no cell of it is a number.

    Returns:
        The numbers, (rows, columns), and the labels, (rows,), or None.

    Raises:
        UserError: if the file is missing, empty, ragged, not numeric or of another kind.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: is not of a kind that can be read: {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty.")
    if path.suffix == ".npy" and label is not None:
        raise UserError(f"{path}: a .npy file has no named columns, so no label={label}; use .npz, .csv or .parquet.")
    try:
        if path.suffix == ".npy":
            table, labels = _load_numpy(path), None
        elif path.suffix == ".csv":
            table, labels = _read_csv(path, label, header)
        else:
            table, labels = (_read_npz if path.suffix == ".npz" else _read_parquet)(path, label)
    except UserError:
        raise
    except Exception as error:  # zip, zlib, csv and NumPy raise many kinds for a file that is damaged
        if "Python objects" in str(error) or "Object arrays" in str(error):
            text = "holds Python objects, which are not read because they can run code"
            raise UserError(f"{path}: {text}.") from error
        raise UserError(f"{path}: cannot be read as {path.suffix} ({first_lines(error, 1)}).") from error
    table = _numbers(table, path)
    if labels is not None and labels.shape != (len(table),):
        raise UserError(f"{path}: {label} has shape {labels.shape}; needed is a label for each of {len(table)} rows.")
    return table, labels


def check_finite(table: Table, path: str | Path) -> None:
    """Raise `UserError` naming the first NaN or infinity of a table, which is read in chunks."""
    for start in range(0, len(table), _CHUNK_ROWS):
        bad = ~np.isfinite(table[start : start + _CHUNK_ROWS])
        if bad.any():
            row, column = np.argwhere(bad)[0]
            value = table[start + row, column]
            raise UserError(
                f"{path}: row {start + row}, column {column} (both from 0) is {value}, not a finite number."
            )


def mean_and_std(table: Table, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Each column's mean and population standard deviation over `rows`, read in chunks, summed in float64.

    A constant column gets a deviation of 1, so that dividing by it is harmless.
    """
    total = np.zeros(table.shape[1])
    for part in _chunks(table, rows):
        total += part.sum(0)
    mean = total / len(rows)
    squares = np.zeros(table.shape[1])
    for part in _chunks(table, rows):
        squares += ((part - mean) ** 2).sum(0)
    std = np.sqrt(squares / len(rows))
    return mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)


def _chunks(table: Table, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(rows), _CHUNK_ROWS):
        yield np.asarray(table[rows[start : start + _CHUNK_ROWS]], dtype=np.float64)


def _numbers(table: Table, path: Path) -> Table:
    if not isinstance(table, np.ndarray):
        raise UserError(f"{path}: is no array, but {type(table).__name__}; its content is not what its name says.")
    if table.ndim != 2:
        raise UserError(f"{path}: has shape {table.shape}; needed are two dimensions, (rows, columns).")
    if 0 in table.shape:
        raise UserError(f"{path}: has shape {table.shape}; there must be a row and a column at least.")
    if table.dtype.kind not in "fiu" or table.dtype.itemsize > 8:
        raise UserError(
            f"{path}: holds {table.dtype}; needed are integers or floating-point numbers of at most 64 bits."
        )
    return table


def _load_numpy(path: Path) -> Any:
    # allow_pickle=False: an array of Python objects is a pickle, which can run code.
    return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)


def _read_npz(path: Path, label: str | None) -> tuple[Table, Table | None]:
    archive = _load_numpy(path)
    if isinstance(archive, np.ndarray):
        raise UserError(f"{path}: is a .npy file; rename it.")
    with archive:
        if label is not None and label not in archive:
            raise UserError(f"{path}: has no array {label}; it has {', '.join(archive)}.")
        members = {name: archive[name] for name in archive}
        arrays = {name: array for name, array in members.items() if isinstance(array, np.ndarray)}
        tables = [array for name, array in arrays.items() if name != label and array.ndim == 2]
        labels = arrays.get(label) if label is not None else None
        if not tables:
            raise UserError(f"{path}: has no two-dimensional array; it has {', '.join(archive)}.")
        return tables[0], labels


def _read_parquet(path: Path, label: str | None) -> tuple[Table, Table | None]:
    parquet = require("pyarrow.parquet", f"{path}")
    try:
        frame = parquet.read_table(path)
    except Exception as error:  # pyarrow's errors share no public base but Exception
        raise UserError(f"{path}: cannot be read as parquet ({error}).") from error
    if label is not None and label not in frame.column_names:
        raise UserError(f"{path}: has no column {label}; it has {', '.join(frame.column_names[:10])}, …")
    columns = []
    for name in frame.column_names:
        if name == label:
            continue
        values = frame[name].to_numpy()
        if values.dtype.kind not in "fiu":
            raise UserError(f"{path}: column {name} holds {frame[name].type}; needed are numbers (or label={name}).")
        columns.append(values)
    if not columns:
        raise UserError(f"{path}: has no column of numbers.")
    labels = frame[label].to_numpy() if label is not None else None
    return np.stack(columns, axis=1), labels


def _read_csv(path: Path, label: str | None, header: bool | None) -> tuple[Table, Table | None]:
    first = _first_row(path)
    if not first:
        raise UserError(f"{path}: line 1 is empty; needed are numbers or names.")
    delimiter = max(",;\t", key=first.count)
    cells = next(csv.reader([first], delimiter=delimiter))
    numbers = [_is_number(cell) for cell in cells]
    if header is None and any(numbers) and not all(numbers):
        wrong = numbers.index(False)
        raise UserError(
            f"{path}: line 1, column {wrong + 1} is {cells[wrong]!r}, not a number. "
            "If line 1 holds names, say header=true (data.header=true)."
        )
    header = not any(numbers) if header is None else header
    if label is not None and (not header or label not in cells):
        raise UserError(f"{path}: has no column {label}; its first row is {', '.join(cells[:10])}.")
    skip = cells.index(label) if label is not None else None
    columns = [column for column in range(len(cells)) if column != skip]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without rows, which is an error below
            table = np.loadtxt(
                path, delimiter=delimiter, skiprows=int(header), usecols=columns, ndmin=2, dtype=np.float32,
                comments=None, encoding="utf-8-sig",
            )  # fmt: skip
    except ValueError as error:
        raise UserError(_bad_cell(path, delimiter, header, len(cells), skip) or f"{path}: {error}") from error
    if len(table) == 0:
        raise UserError(f"{path}: has a header and no rows.")
    message = _ragged(path, delimiter, len(cells))
    if message:
        raise UserError(message)
    if skip is None:
        return table, None
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        next(rows)
        return table, np.array([row[skip] for row in rows if row])


def _first_row(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.readline().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not a text file ({error}).") from error


def _bad_cell(path: Path, delimiter: str, header: bool, width: int, skip: int | None) -> str | None:
    """The first row of the wrong length or cell that is no number, for the message; rows count as in an editor."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line, row in enumerate(csv.reader(file, delimiter=delimiter), start=1):
            if not row or (header and line == 1):
                continue
            if len(row) != width:
                return f"{path}: line {line} has {len(row)} columns, line 1 has {width}."
            for column, cell in enumerate(row, start=1):
                if column - 1 != skip and not _is_number(cell):
                    return f"{path}: line {line}, column {column} is {cell!r}, not a number."
    return None


def _ragged(path: Path, delimiter: str, width: int) -> str | None:
    """NumPy reads only the columns it is asked for, so a row that is too long must be looked for."""
    with path.open(encoding="utf-8", newline="") as file:
        for line, text in enumerate(file, start=1):
            if text.strip() and text.count(delimiter) != width - 1 and '"' not in text:
                return f"{path}: line {line} has {text.count(delimiter) + 1} columns, line 1 has {width}."
    return None


def _is_number(cell: str) -> bool:
    try:
        return math.isnan(float(cell)) or True
    except ValueError:
        return False
