"""Columns of pairs from .jsonl, .csv, .tsv, .parquet and folders that the library `datasets` saved."""

import csv
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainerkit.errors import UserError, first_lines
from trainerkit.extras import require

_LONGEST_CELL = 2**27  # characters
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Some columns of a file.

    Args:
        path: of the file.
        names: of all columns that it has.
        values: of those that were wanted and are there, each as long as the file has rows.
        lines: where each row ends in a text file, from 1; None where there are no lines, and rows count from 0.
    """

    path: Path
    names: list[str]
    values: dict[str, list[Any]]
    lines: list[int] | None

    def place(self, row: int) -> str:
        """What a message calls a row."""
        return f"{self.path}: row {row} (from 0)" if self.lines is None else f"{self.path}: line {self.lines[row]}"


def read_columns(path: str | Path, wanted: Collection[str]) -> Columns:
    """Read some columns of a file, as they are.

    Args:
        path: of a file with one of `SUFFIXES`, or of a folder that `Dataset.save_to_disk` wrote.
        wanted: names; those that the file lacks are left out.

    Returns:
        At least one row. A row of .jsonl that lacks a field has None there.

    Raises:
        UserError: if there is no such file, it is of another kind, or damaged; it names the line.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            columns = _read_saved(path, wanted)
        elif not path.is_file():
            raise UserError(f"{path}: there is no such file.")
        elif path.suffix in (".jsonl", ".ndjson"):
            columns = _read_jsonl(path, wanted)
        elif path.suffix in (".csv", ".tsv"):
            columns = _read_csv(path, wanted)
        elif path.suffix == ".parquet":
            columns = _read_parquet(path, wanted)
        else:
            raise UserError(f"{path}: is not of a kind that can be read: {', '.join(SUFFIXES)}, or a saved folder.")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({first_lines(error, 1)}); save it in that encoding.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_lines(error, 1)}).") from error
    if columns.values and not any(map(len, columns.values.values())):
        raise UserError(f"{path}: has no rows.")
    return columns


def _read_jsonl(path: Path, wanted: Collection[str]) -> Columns:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    # Not splitlines(), which also cuts at characters that stand within a line of JSON.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is no JSON ({error}).") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is {type(row).__name__}, not an object with fields.")
            rows.append(row)
            lines.append(number)
    if not rows:
        raise UserError(f"{path}: has no rows.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Columns(path, names, {name: [row.get(name) for row in rows] for name in names if name in wanted}, lines)


def _read_csv(path: Path, wanted: Collection[str]) -> Columns:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))  # else 131,072, and texts are longer
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        rows, lines = [], []
        try:
            names = next(reader, [])
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    where = f"{path}: line {reader.line_num}"
                    raise UserError(f"{where} has {len(row)} columns, line 1 has {len(names)}.")
                rows.append(row)
                lines.append(reader.line_num)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num} is damaged ({error}).") from error
    _check_once(path, names)
    if path.suffix == ".csv" and len(names) == 1 and ";" in names[0]:
        raise UserError(f"{path}: line 1 has semicolons between the columns; needed are commas, or tabs in a .tsv.")
    places = {name: place for place, name in enumerate(names) if name in wanted}
    return Columns(path, names, {name: [row[place] for row in rows] for name, place in places.items()}, lines)


def _read_parquet(path: Path, wanted: Collection[str]) -> Columns:
    parquet = require("pyarrow.parquet", f"{path}")
    try:
        names = parquet.read_schema(path).names
        _check_once(path, names)
        table = parquet.read_table(path, columns=[name for name in names if name in wanted])
    except UserError:
        raise
    except Exception as error:  # pyarrow's errors share no public base but Exception
        raise UserError(f"{path}: cannot be read as parquet ({first_lines(error, 1)}).") from error
    return Columns(path, names, table.to_pydict(), None)


def _read_saved(path: Path, wanted: Collection[str]) -> Columns:
    """A folder of Arrow streams, and `state.json`, which says in what order; the library itself is not needed."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
        raise UserError(f"{path}: has the splits {splits}; give one of their folders (data.path, data.val_path, …).")
    if not (path / "state.json").is_file():
        raise UserError(f"{path}: is a folder without state.json; needed is a file, or what save_to_disk wrote.")
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'}: is damaged ({first_lines(error, 1)}).") from error
    if state.get("_indices_files"):
        raise UserError(f"{path}: is a selection of rows; save it again after flatten_indices().")
    arrow = require("pyarrow", f"{path}")
    tables = []
    for file in files:
        try:
            with arrow.memory_map(str(path / file)) as source:
                tables.append(arrow.ipc.open_stream(source).read_all())
        except Exception as error:  # as above
            raise UserError(f"{path / file}: is damaged ({first_lines(error, 1)}).") from error
    table = arrow.concat_tables(tables)
    names = table.column_names
    _check_once(path, names)
    return Columns(path, names, table.select([name for name in names if name in wanted]).to_pydict(), None)


def _check_once(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names a column twice: {', '.join(names)}.")
