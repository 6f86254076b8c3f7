"""What text files contain, piece by piece: the work in parts, and the reading of a part.

A .txt file, or any other text, is one document. A .jsonl file has one a line. Either may be compressed (.gz, .zst), and
is decompressed as a stream. Bytes are never changed: what the pieces spell is what the files hold.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainerkit.data.text_files import Source, draw_split, is_compressed, is_jsonl
from trainerkit.errors import UserError
from trainerkit.extras import require

_PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class Segment:
    """Bytes `start` to `stop` of a source; None for its end. A document may reach over several segments."""

    source: int
    start: int
    stop: int | None


@dataclass(frozen=True)
class Piece:
    """Consecutive text of one document.

    Args:
        split: 0 trains, 1 validates, 2 tests.
        opens: whether a document begins here.
        text: at least one character, except where a line of JSON has an empty text.
    """

    split: int
    opens: bool
    text: str


def plan_parts(sources: Sequence[Source], part_bytes: int) -> list[list[Segment]]:
    """Cut the work into parts of about `part_bytes`: small files together, large ones at line ends.

    A compressed file is never cut, however large.
    """
    parts: list[list[Segment]] = []
    filled = part_bytes
    for number, source in enumerate(sources):
        for segment, size in _segments(number, source.path, part_bytes):
            if filled >= part_bytes:
                parts.append([])
                filled = 0
            parts[-1].append(segment)
            filled += size
    return parts


def _segments(number: int, path: Path, part_bytes: int) -> Iterator[tuple[Segment, int]]:
    size = path.stat().st_size
    if is_compressed(path) or size <= part_bytes:
        yield Segment(number, 0, None), size
        return
    start = 0
    while start < size:
        stop = _boundary(path, start + part_bytes, size)
        yield Segment(number, start, None if stop == size else stop), stop - start
        start = stop


def read_segment(segment: Segment, source: Source, fractions: tuple[float, float], field: str) -> Iterator[Piece]:
    """The text of a segment, piece by piece.

    Args:
        segment: of `source`.
        source: the file.
        fractions: shares of validation and test.
        field: of a line of JSON that holds the text.

    Raises:
        UserError: for a binary file, bytes that are no UTF-8, a broken archive, a line that is no JSON or lacks the
            field; it names the file, and the byte or the line.
    """
    path = source.path
    if is_jsonl(path):
        for position, line in _lines(path, segment.start, segment.stop):
            if position == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                text = _field_of(line, position, path, field)
                key = source.name.encode() if source.mode == "file" else text.encode()
                yield Piece(draw_split(key, fractions), True, text)
    elif source.mode == "file":
        split = draw_split(source.name.encode(), fractions)
        for position, data in _pieces(path, segment.start, segment.stop):
            yield Piece(split, position == 0, _decoded(data, position, path))
    else:
        edges = _edges(path, fractions)
        for split, (start, stop) in enumerate(pairwise(edges)):
            first, last = max(start, segment.start), min(stop, segment.stop or stop)
            for position, data in _pieces(path, first, last) if first < last else ():
                yield Piece(split, position == start, _decoded(data, position, path))


def _edges(path: Path, fractions: tuple[float, float]) -> list[int]:
    """Where a file's beginning, middle and end begin, and where the file ends; all at line ends."""
    size = path.stat().st_size
    if is_compressed(path):
        size = sum(map(len, _chunks(path, 0, None)))
    cuts = (size * (1 - fractions[0] - fractions[1]), size * (1 - fractions[1]))
    return [0, *(_boundary(path, round(cut), size) for cut in cuts), size]


def _boundary(path: Path, place: int, size: int) -> int:
    """The first beginning of a line at or after `place`.

    Where a text has none for long, the first beginning of a character.
    """
    if place <= 0 or place >= size:
        return min(max(place, 0), size)
    read = place - 1
    for chunk in _chunks(path, place - 1, None):
        end = chunk.find(b"\n") + 1
        if end:
            return read + end
        read += len(chunk)
        if not is_jsonl(path) and read >= place + _PIECE_BYTES:
            break
    if is_jsonl(path):
        return size
    ahead = next(_chunks(path, place, place + 4))
    return place + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)


def _pieces(path: Path, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Positions and bytes; a piece ends with a line where that is possible, else with a character."""
    position, rest = start, b""
    for chunk in _chunks(path, start, stop):
        data = rest + chunk
        end = data.rfind(b"\n") + 1 or _whole_characters(data)
        rest = data[end:]
        if end:
            yield position, data[:end]
            position += end
    if rest:
        yield position, rest


def _whole_characters(data: bytes) -> int:
    """The length of UTF-8 without a character that was cut at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0xC0:  # the first of a character of 2, 3 or 4 bytes
            whole = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if back < whole else len(data)
    return len(data)


def _lines(path: Path, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    position = start
    begun: list[bytes] = []  # chunks of one line: joined once, or a long line would be copied with each
    for chunk in _chunks(path, start, stop):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            whole = b"".join([*begun, line])
            begun = []
            yield position, whole
            position += len(whole) + 1
        begun.append(rest)
    if last := b"".join(begun):
        yield position, last


def _chunks(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    """The content from `start` to `stop`, decompressed as it is read."""
    left = None if stop is None else stop - start
    try:
        for chunk in _zstandard(path, start) if path.suffix.lower() == ".zst" else _plain(path, start):
            yield chunk if left is None else chunk[:left]
            left = None if left is None else left - len(chunk)
            if left is not None and left <= 0:
                return
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def _plain(path: Path, start: int) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_PIECE_BYTES):
            yield chunk


def _zstandard(path: Path, start: int) -> Iterator[bytes]:
    """By hand: the library's own reader takes a file that was cut off for one that ends there."""
    zstandard = require("zstandard", str(path))
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # the largest, by `zstd --long=31`
    frame = decompressor.decompressobj()
    skip = start
    with path.open("rb") as file:
        while data := file.read(_PIECE_BYTES):
            while data:
                if frame.eof:
                    frame = decompressor.decompressobj()
                try:
                    chunk = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise UserError(f"{path}: cannot be read ({error}).") from error
                data = frame.unused_data if frame.eof else b""
                if chunk[skip:]:
                    yield chunk[skip:]
                skip = max(0, skip - len(chunk))
    if not frame.eof:
        raise UserError(f"{path}: cannot be read (it ends in the middle of a frame).")


def _field_of(line: bytes, position: int, path: Path, field: str) -> str:
    def wrong(reason: str) -> UserError:
        return UserError(f"{path}: line {_line_number(path, position)} {reason}.")

    try:
        content: Any = json.loads(_decoded(line, position, path))
    except (ValueError, RecursionError) as error:
        raise wrong(f"is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise wrong(f"is a {type(content).__name__}; needed is an object with the field {field!r}")
    if field not in content:
        raise wrong(f"has no field {field!r}; it has {', '.join(map(repr, content)) or 'none'}; choose by field=NAME")
    text = content[field]
    if not isinstance(text, str):
        raise wrong(f"has a {type(text).__name__} in the field {field!r}; needed is text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise wrong(f"has half a character (a lone surrogate) in the field {field!r}") from error
    return text


def _line_number(path: Path, position: int) -> int:
    """Counted only when it is needed: a segment of a large file begins anywhere."""
    return 1 + sum(chunk.count(b"\n") for chunk in _chunks(path, 0, position))


def _decoded(data: bytes, position: int, path: Path) -> str:
    if b"\0" in data:
        _refuse_utf16(path)
        raise UserError(f"{path}: is a binary file, not text (byte {position + data.index(0)} is zero).")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse_utf16(path)
        raise UserError(
            f"{path}: byte {position + error.start} is no UTF-8 ({error.reason}). "
            "Convert the file first: iconv -f LATIN1 -t UTF-8"
        ) from error


def _refuse_utf16(path: Path) -> None:
    if next(_chunks(path, 0, 2), b"") in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path}: is UTF-16, needed is UTF-8. Convert the file first: iconv -f UTF-16 -t UTF-8")
