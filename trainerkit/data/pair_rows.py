"""From columns of a file to rows of pairs, each checked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from trainerkit.data.pair_files import Columns
from trainerkit.data.pair_pictures import PictureSource, digests, problems
from trainerkit.errors import UserError, did_you_mean

Mode = Literal["t2t", "t2i", "i2i", "i2t", "composed"]
OnBad = Literal["error", "skip"]
# What the query and the positive have: texts, pictures.
MODES: dict[str, frozenset[str]] = {
    "t2t": frozenset({"query", "positive"}),
    "t2i": frozenset({"query", "positive_image"}),
    "i2i": frozenset({"query_image", "positive_image"}),
    "i2t": frozenset({"query_image", "positive"}),
    "composed": frozenset({"query", "query_image", "positive_image"}),
}
_PARTS = ("query", "query_image", "positive", "positive_image")
_NEGATIVES = ("negatives", "negatives_image")


@dataclass
class PairRows:
    """Rows of pairs. What the data do not have is None; all else is as long as `places`.

    Args:
        query: texts.
        query_image: pictures.
        positive: texts.
        positive_image: pictures.
        negatives: texts of each row.
        negatives_image: pictures of each row.
        label: of each row, text or a whole number.
        score: of each row.
        query_key: of each row, equal for equal queries: of texts themselves, of pictures a digest of their files.
        positive_key: likewise; a query and a positive of one modality have equal keys if they are equal.
        negatives_key: of each row's negatives, likewise.
        places: what a message calls each row.
        skipped: how many rows were left out, by the reason.
    """

    query: list[str] | None = None
    query_image: list[PictureSource] | None = None
    positive: list[str] | None = None
    positive_image: list[PictureSource] | None = None
    negatives: list[list[str]] | None = None
    negatives_image: list[list[PictureSource]] | None = None
    label: list[str | int] | None = None
    score: list[float] | None = None
    query_key: list[str] = field(default_factory=list)
    positive_key: list[str] = field(default_factory=list)
    negatives_key: list[list[str]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def without(self, bad: dict[int, str], reason: str) -> "PairRows":
        """The other rows; a row leaves as a whole."""
        kept = [row for row in range(len(self)) if row not in bad]
        values = {name: [values[row] for row in kept] for name, values in self._lists().items()}
        return PairRows(**values, skipped=added(self.skipped, {reason: len(bad)} if bad else {}))

    def joined(self, other: "PairRows") -> "PairRows":
        """These rows, then those, which must be of the same kind."""
        ours, theirs = self._lists(), other._lists()
        for name in _NEGATIVES:  # a file without them has none of any row
            if name in ours.keys() ^ theirs.keys():
                ours.setdefault(name, [[] for _ in range(len(self))])
                theirs.setdefault(name, [[] for _ in range(len(other))])
        if ours.keys() != theirs.keys():
            one, two = (", ".join(sorted(lists.keys() - {"places"})) for lists in (ours, theirs))
            raise UserError(f"{other.places[0]}: the file has {two}, the training file {one}; they must have the same.")
        return PairRows(
            **{name: ours[name] + theirs[name] for name in ours}, skipped=added(self.skipped, other.skipped)
        )

    def _lists(self) -> dict[str, list[Any]]:
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "skipped"}
        return {name: values for name, values in named.items() if values}


def added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Counts by their names, of both."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}


def mode_of(columns: Columns, names: dict[str, list[str]], mode: Mode | None) -> Mode:
    """What is searched by what: given, or read from the columns that are there.

    Args:
        columns: of the file.
        names: of the columns, by what they hold.
        mode: given, or None.

    Raises:
        UserError: if the columns do not fit the mode, or fit none.
    """
    there = {part for part in _PARTS if names[part] and set(names[part]) <= set(columns.names)}
    if mode is not None:
        missing = [f"{part}_column={names[part][0] if names[part] else 'null'}" for part in MODES[mode] - there]
        if missing:
            raise UserError(f"{columns.path}: mode={mode} needs {' and '.join(sorted(missing))}; {_has(columns)}")
        return mode
    for name, parts in MODES.items():
        if parts == there:
            return name  # type: ignore[return-value]
    raise UserError(
        f"{columns.path}: of {', '.join(sorted(there)) or 'query and positive'} no mode can be told; say one of "
        f"{', '.join(MODES)}, or which columns hold what (query_column=…, positive_image_column=…). {_has(columns)}"
    )


def pair_rows(
    columns: Columns,
    names: dict[str, list[str]],
    parts: frozenset[str],
    *,
    image_dir: Path | None,
    on_bad_image: OnBad,
    on_empty_text: OnBad,
) -> PairRows:
    """Check each row.

    Args:
        columns: of the file.
        names: of the columns, by what they hold.
        parts: what is to be read of query and positive, one of `MODES`, or a part of it.
        image_dir: where pictures are; None for the file's folder.
        on_bad_image: for a picture that is missing or damaged 'error', or 'skip' to leave out the row and count it.
        on_empty_text: the same for a blank text.

    Raises:
        UserError: for a value of another type, naming file and row; and for what is not to be skipped.
    """
    folder = image_dir if image_dir is not None else columns.path if columns.path.is_dir() else columns.path.parent
    rows = PairRows(places=[columns.place(row) for row in range(len(next(iter(columns.values.values()))))])

    def column(part: str, check: Callable[[Any, str], Any]) -> list[Any]:
        name = names[part][0]
        return [
            check(value, f"{place}, {name}") for value, place in zip(columns.values[name], rows.places, strict=True)
        ]

    def picture(value: Any, place: str) -> PictureSource:
        return _picture(value, place, folder)

    for part in sorted(parts):
        setattr(rows, part, column(part, picture if part.endswith("image") else _text))
    for part in _NEGATIVES:
        there = [name for name in names[part] if name in columns.values]
        wanted = "positive_image" if part.endswith("image") else "positive"
        if there and wanted in parts:
            check = picture if part.endswith("image") else _text
            setattr(rows, part, _lists([columns.values[name] for name in there], rows.places, ", ".join(there), check))
    if names["label"] and names["label"][0] in columns.values:
        rows.label = column("label", _label)
    if names["score"] and names["score"][0] in columns.values:
        rows.score = column("score", _number)

    rows = _dealt_with(rows, _blank(rows), on_empty_text, "a blank text")
    rows = _dealt_with(rows, _unreadable(rows), on_bad_image, "a picture that cannot be read")
    return with_keys(rows)


def with_keys(rows: PairRows) -> PairRows:
    """The same rows with their keys."""
    rows.query_key = _keys(rows.query, rows.query_image)
    rows.positive_key = _keys(rows.positive, rows.positive_image)
    lists: list[list[Any]] = rows.negatives or rows.negatives_image or [[] for _ in range(len(rows))]
    items = [item for each in lists for item in each]
    keys = iter(_keys(items, None) if rows.negatives else _keys(None, items))
    rows.negatives_key = [[next(keys) for _ in each] for each in lists]
    return rows


def _keys(texts: Sequence[str] | None, pictures: Sequence[PictureSource] | None) -> list[str]:
    if pictures is None:
        return [f"text {text}" for text in texts or ()]
    found = digests(pictures)
    if texts is None:
        return [f"picture {digest}" for digest in found]
    return [f"query {digest} {text}" for digest, text in zip(found, texts, strict=True)]


def _dealt_with(rows: PairRows, bad: dict[int, str], what: OnBad, reason: str) -> PairRows:
    if bad and what == "error":
        row, message = min(bad.items())
        key = "on_empty_text" if reason == "a blank text" else "on_bad_image"
        more = f" {len(bad)} rows are like that." if len(bad) > 1 else ""
        raise UserError(f"{rows.places[row]}: {message}{more} {key}=skip leaves such rows out.")
    if len(bad) == len(rows):
        raise UserError(f"{rows.places[0]}: this row and all others have {reason}; nothing is left.")
    return rows.without(bad, reason)


def _blank(rows: PairRows) -> dict[int, str]:
    found: dict[int, str] = {}
    for part in ("query", "positive"):
        for row, text in enumerate(getattr(rows, part) or []):
            if not text.strip():
                found.setdefault(row, f"the {part} is missing or a blank text.")
    for row, texts in enumerate(rows.negatives or []):
        if not all(text.strip() for text in texts):
            found.setdefault(row, "a negative is a blank text.")
    return found


def _unreadable(rows: PairRows) -> dict[int, str]:
    sources: list[PictureSource] = []
    owners: list[int] = []
    for part in ("query_image", "positive_image"):
        sources += getattr(rows, part) or []
        owners += range(len(getattr(rows, part) or []))
    for row, pictures in enumerate(rows.negatives_image or []):
        sources += pictures
        owners += [row] * len(pictures)
    found = problems(sources) if sources else {}
    return {owners[number]: why for number, why in reversed(found.items())}


def _lists(columns: list[list[Any]], places: list[str], name: str, check: Callable[[Any, str], Any]) -> list[list[Any]]:
    found = []
    for place, *values in zip(places, *columns, strict=True):
        # A cell of a .csv that is empty, and a null, stand for no negative.
        each = [one for value in values for one in (value if isinstance(value, list) else [value])]
        found.append([check(value, f"{place}, {name}") for value in each if value is not None and value != ""])
    return found


def _text(value: Any, place: str) -> str:
    value = "" if value is None else value  # both are blank
    if not isinstance(value, str):
        raise UserError(f"{place}: is {_shown(value)}; needed is a text.")
    return value


def _picture(value: Any, place: str, folder: Path) -> PictureSource:
    if isinstance(value, dict):  # as the library `datasets` has pictures
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if value is None or value == "":
        return b""  # which is no picture
    if not isinstance(value, str):
        raise UserError(f"{place}: is {_shown(value)}; needed is the path of a picture.")
    if not value.startswith("~/"):  # another ~ belongs to a name
        return folder / value
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise UserError(f"{place}: is {value[:60]!r}, and there is no home folder.") from error


def _label(value: Any, place: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{place}: is {_shown(value)}; needed is a label, a text or a whole number.")
    return value


def _number(value: Any, place: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    # Batches have float32.
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise UserError(f"{place}: is {_shown(value)}; needed is a finite number.")
    return number


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def _has(columns: Columns) -> str:
    return f"The file has {', '.join(columns.names[:12])}."


def check_names(columns: Columns, names: dict[str, list[str]], defaults: dict[str, list[str]]) -> None:
    """Refuse a column that was named by the user and is not there."""
    for part, given in names.items():
        for name in given if given != defaults[part] else ():
            if name not in columns.names:
                hint = did_you_mean(name, columns.names)
                raise UserError(
                    f"{columns.path}: has no column {name} ({part}_column). {_has(columns)} {hint}".rstrip()
                )
