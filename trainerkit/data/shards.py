"""Tokens of a text in files that are read through memory maps, written once.

A folder holds one text tokenised by one tokenizer. The work is cut into parts; each has a file of tokens for each
split, and then a small file that says that the part is whole. A killed process loses the part it was at, no more.

    plan.json                         sources, parts and settings
    tokenizer.json                    where the tokenizer is not bytes
    000000.train.bin  …val  …test     uint16, or uint32 for a vocabulary above 65,536
    000000.train.bytes …              uint32, bytes that each token spells, where the tokenizer's table cannot say it
    000000.json                       that the part is whole: tokens, bytes and documents for each split
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainerkit.data.text_files import SPLITS, Source
from trainerkit.data.text_pieces import Piece, Segment, read_segment
from trainerkit.data.tokenizers import Tokenizer
from trainerkit.errors import UserError
from trainerkit.files import replacing, write_json

_BATCH_CHARACTERS = 1 << 20

State = tuple[int, int]  # a file's size in bytes and its time of change in nanoseconds


@dataclass(frozen=True)
class Job:
    """A text, a tokenizer, and the folder for its tokens.

    Args:
        folder: where the shards are.
        sources: the files.
        states: each one's size and time of change when it was hashed.
        parts: the work.
        fractions: shares of validation and test.
        field: of a line of JSON.
        end_of_text: name of the token that separates documents, see `JsonTokenizer`.
    """

    folder: Path
    sources: Sequence[Source]
    states: Sequence[State]
    parts: Sequence[Sequence[Segment]]
    fractions: tuple[float, float]
    field: str
    end_of_text: str | None = None

    def save(self) -> None:
        """Write plan.json, for other processes and for people."""
        content = asdict(self) | {"folder": str(self.folder)}
        content["sources"] = [asdict(source) | {"path": str(source.path)} for source in self.sources]
        write_json(self.folder / "plan.json", content)

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """From plan.json."""
        content: Any = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        return cls(
            folder,
            [Source(Path(source["path"]), source["name"], source["mode"]) for source in content["sources"]],
            [(size, changed) for size, changed in content["states"]],
            [[Segment(**segment) for segment in part] for part in content["parts"]],
            (content["fractions"][0], content["fractions"][1]),
            content["field"],
            content["end_of_text"],
        )

    def pieces(self, part: int) -> Iterator[Piece]:
        """The text of a part.

        Raises:
            UserError: see `read_segment`; and for a file that has changed since it was hashed.
        """
        for segment in self.parts[part]:
            source = self.sources[segment.source]
            yield from read_segment(segment, source, self.fractions, self.field)
            if file_state(source.path) != self.states[segment.source]:
                raise UserError(f"{source.path}: has changed while it was tokenised; run the same command again.")


def file_state(path: Path) -> State:
    """By which a change is noticed."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def counts(folder: Path, part: int, tokenizer: Tokenizer) -> dict[str, list[int]] | None:
    """Tokens, bytes and documents of a part in each split; None if it is not there, or not whole."""
    try:
        found: dict[str, list[int]] = json.loads((folder / f"{part:06}.json").read_text(encoding="utf-8"))
        for split, tokens in zip(SPLITS, found["tokens"], strict=True):
            for kind, dtype in _files(tokenizer).items():
                if _shard(folder, part, split, kind).stat().st_size != tokens * dtype.itemsize:
                    return None
    except (OSError, ValueError):
        return None
    return found


def write_part(job: Job, part: int, tokenizer: Tokenizer) -> None:
    """Tokenise a part and write its files, the one that says so last."""
    kinds = _files(tokenizer)
    totals = {"tokens": [0, 0, 0], "bytes": [0, 0, 0], "documents": [0, 0, 0]}
    spare = [0, 0, 0]  # bytes of pieces without a token, as blanks are to some tokenizers
    last = [0, 0, 0]
    with ExitStack() as stack:
        files = {}
        for split, kind in product(range(3), kinds):
            temporary = stack.enter_context(replacing(_shard(job.folder, part, SPLITS[split], kind)))
            files[split, kind] = stack.enter_context(temporary.open("wb"))
        for split, tokens, sizes, documents in _encoded(job.pieces(part), tokenizer, spare):
            last[split] = int(sizes[-1]) if len(sizes) else last[split]
            for kind, values in (("bin", tokens), ("bytes", sizes)):
                if kind in kinds:
                    values.astype(kinds[kind]).tofile(files[split, kind])
            totals["tokens"][split] += len(tokens)
            totals["bytes"][split] += int(sizes.sum())
            totals["documents"][split] += documents
        for split in range(3):
            if spare[split] and totals["tokens"][split]:  # no token follows: the last one before has them
                files[split, "bytes"].seek(-kinds["bytes"].itemsize, os.SEEK_END)
                files[split, "bytes"].write(np.asarray(last[split] + spare[split], kinds["bytes"]).tobytes())
                totals["bytes"][split] += spare[split]
    write_json(job.folder / f"{part:06}.json", totals)


def _encoded(
    pieces: Iterator[Piece], tokenizer: Tokenizer, spare: list[int]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], int]]:
    """Split, tokens, the bytes that they spell, and how many documents begin, for each piece.

    Bytes of a piece without a token are the next token's of its split; `spare` has those that still wait for one.
    """
    for batch in _batches(pieces):
        for piece, (ids, sizes) in zip(batch, tokenizer.encode_many([piece.text for piece in batch]), strict=True):
            expected = len(piece.text.encode())
            if sizes is None:
                assert tokenizer.token_bytes is not None
                sizes = tokenizer.token_bytes[ids]
            if (len(ids) or tokenizer.token_bytes is not None) and int(sizes.sum()) != expected:
                raise UserError(
                    f"tokenizer: of {expected} bytes of text its tokens spell {int(sizes.sum())} "
                    f"(the text begins {piece.text[:40]!r}); take another one."
                )
            if len(ids):
                sizes = np.append(sizes[0] + spare[piece.split], sizes[1:])
                spare[piece.split] = 0
            else:
                spare[piece.split] += expected
            opening = [tokenizer.end_of_text] if piece.opens else []
            yield (
                piece.split,
                np.concatenate([np.asarray(opening, np.int64), ids]),
                np.concatenate([np.zeros(len(opening), np.int64), sizes]),
                int(piece.opens),
            )


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def open_split(folder: Path, parts: int, split: int, tokenizer: Tokenizer) -> "TokenStream":
    """The tokens of a split, over all parts."""
    kinds = _files(tokenizer)
    paths = [_shard(folder, part, SPLITS[split], "bin") for part in range(parts)]
    sizes = [_shard(folder, part, SPLITS[split], "bytes") for part in range(parts)] if "bytes" in kinds else None
    return TokenStream(paths, kinds["bin"], tokenizer.end_of_text, tokenizer.token_bytes, sizes)


class TokenStream:
    """Tokens in files one after the other, read as if they were one array, through memory maps.

    Args:
        paths: of the files; those without content are left out.
        dtype: of the tokens.
        end_of_text: what follows the last token.
        token_bytes: how many bytes each token spells, (vocab_size,); None if `byte_paths` say it.
        byte_paths: files of uint32 beside those of the tokens.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        dtype: np.dtype[Any],
        end_of_text: int,
        token_bytes: NDArray[np.int64] | None,
        byte_paths: Sequence[Path] | None,
    ) -> None:
        self.end_of_text = end_of_text
        self._tokens = _Arrays(paths, dtype)
        self._token_bytes = token_bytes
        self._sizes = None if byte_paths is None else _Arrays(byte_paths, np.dtype(np.uint32))

    def __len__(self) -> int:
        return self._tokens.length

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """`count` tokens from `start` on, filled up with ends of text after the last, (count,)."""
        return self._tokens.read(start, count, self.end_of_text)

    def sizes(self, start: int, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many bytes the tokens from `start` on spell, (len(tokens),)."""
        if self._sizes is not None:
            return self._sizes.read(start, len(tokens), 0)
        assert self._token_bytes is not None
        return self._token_bytes[tokens]


class _Arrays:
    """Memory-mapped files as one array; what is pickled for a worker is their paths."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[Any]) -> None:
        self._paths = [path for path in paths if path.stat().st_size]
        self._dtype = dtype
        self._ends = np.cumsum([path.stat().st_size // dtype.itemsize for path in self._paths], dtype=np.int64)
        self._maps: dict[int, NDArray[Any]] = {}
        self.length = int(self._ends[-1]) if self._paths else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def read(self, start: int, count: int, fill: int) -> NDArray[np.int64]:
        out = np.full(count, fill, np.int64)
        number = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < count and number < len(self._paths):
            first = int(self._ends[number - 1]) if number else 0
            part = self._map(number)[start + done - first : start + count - first]
            out[done : done + len(part)] = part
            done += len(part)
            number += 1
        return out

    def _map(self, number: int) -> NDArray[Any]:
        if number not in self._maps:
            self._maps[number] = np.memmap(self._paths[number], dtype=self._dtype, mode="r")
        return self._maps[number]


def _files(tokenizer: Tokenizer) -> dict[str, np.dtype[Any]]:
    """The kinds of files of a part and split, and what is in them."""
    files: dict[str, np.dtype[Any]] = {"bin": np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)}
    return files if tokenizer.token_bytes is not None else {**files, "bytes": np.dtype(np.uint32)}


def _shard(folder: Path, part: int, split: str, kind: str) -> Path:
    return folder / f"{part:06}.{split}.{kind}"
