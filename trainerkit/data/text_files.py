"""Text of the user's: which files it is in, and what trains, validates or tests."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

from trainerkit.errors import UserError

Mode = Literal["file", "cut", "document"]
SplitBy = Literal["auto", "files", "within"]
SPLITS = ("train", "val", "test")

# What is taken from a folder; a file that is named itself, or by a pattern, may be called anything.
_TEXT = (
    ".txt .text .md .rst .tex .jsonl .ndjson .html .xml .csv .tsv .log .srt .css .toml .yaml .yml .ini .cfg .sql .sh"
)
_CODE = ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .hs .ml"
TEXT_SUFFIXES = frozenset(f"{_TEXT} {_CODE}".split())
_JSONL = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst")
_FEW_FILES = 60  # of fewer, one in a hundred draws leaves a tenth without any
# What a run's folder has: it holds what the run wrote, samples of text among it.
_RUN = ("config.yaml", "overrides.txt")


@dataclass(frozen=True)
class Source:
    """A file.

    Args:
        path: where it is.
        name: what the split is drawn from: its path below the folder or pattern that was given.
        mode: 'file': the whole of it is in one split, by its name; 'cut': its beginning trains, then comes what
            validates, then what tests; 'document': each of its documents is in a split, by its text.
    """

    path: Path
    name: str
    mode: Mode


def find_sources(paths: Sequence[str], split: SplitBy) -> list[Source]:
    """The files that paths, folders and patterns (`**/*.txt`) stand for, sorted by name.

    Args:
        paths: of a folder, files with a known suffix are taken (`TEXT_SUFFIXES`), but no hidden ones and none in the
            folder of a run.
        split: 'files': every file is in one split, by its name. 'within': every file gives text to each split: by
            document where there are many in it (.jsonl), else cut at line ends. 'auto': 'files' if there are 60 files
            without lines of JSON, or more; 'within' if there are fewer. Lines of JSON are drawn one by one with 'auto'.

    Raises:
        UserError: for a path that is not there, a folder or pattern without any text.
    """
    found: dict[Path, str] = {}
    for path in paths:
        for file, name in _files_of(path):
            found.setdefault(file, name)
    plain = sum(not is_jsonl(file) for file in found)
    by_name = split == "files" or (split == "auto" and plain >= _FEW_FILES)

    def mode(file: Path) -> Mode:
        if is_jsonl(file):
            return "file" if split == "files" else "document"
        return "file" if by_name else "cut"

    return [Source(file, name, mode(file)) for file, name in sorted(found.items(), key=lambda item: (item[1], item[0]))]


def _files_of(given: str) -> list[tuple[Path, str]]:
    path = Path(given).expanduser()
    if path.is_dir():
        runs = {file.parent for file in path.rglob(_RUN[1]) if (file.parent / _RUN[0]).is_file()}
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not _is_hidden(file.relative_to(path)) and runs.isdisjoint(file.parents)
        ]
        taken = [file for file in files if _suffix(file) in TEXT_SUFFIXES]
        if not taken:
            there = ", ".join(
                f"{count} {kind or '(none)'}" for kind, count in Counter(map(_suffix, files)).most_common(5)
            )
            there = f"; by suffix there are {there}; a pattern takes any, path='{given}/**/*'" if files else ""
            there += "; what runs wrote is left out" if runs else ""
            raise UserError(
                f"path={given}: the folder has no text in it (.txt, .md, .jsonl, .py, …, also .gz, .zst){there}."
            )
        return [(file.absolute(), file.relative_to(path).as_posix()) for file in taken]
    if path.is_file():
        return [(path.absolute(), path.name)]
    if not has_magic(given):
        raise UserError(f"path={given}: there is no such file or folder.")
    root = Path(*_before_magic(path))
    matches = [Path(match) for match in glob(str(path), recursive=True) if Path(match).is_file()]
    if not matches:
        raise UserError(f"path={given}: no file matches this pattern.")
    return [(match.absolute(), match.relative_to(root).as_posix()) for match in matches]


def _before_magic(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts[:-1]:
        if has_magic(part):
            break
        parts.append(part)
    return parts


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suffix(path: Path) -> str:
    """The suffix, without that of the compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSED else suffix


def is_jsonl(path: Path) -> bool:
    """Whether a line is a document."""
    return _suffix(path) in _JSONL


def is_compressed(path: Path) -> bool:
    """Whether it has to be read from its beginning."""
    return path.suffix.lower() in _COMPRESSED


def draw_split(key: bytes, fractions: tuple[float, float]) -> int:
    """Which split a name or a document belongs to, from its hash alone: adding others moves none.

    Args:
        key: what is hashed (MD5).
        fractions: shares of validation and test.

    Returns:
        0 to train, 1 to validate, 2 to test.
    """
    number = int(hashlib.md5(key, usedforsecurity=False).hexdigest(), 16)
    # The last decimal digit first: a share of a tenth is then `number % 10 == 0`, as others split.
    place = int(f"{number % 10**9:09}"[::-1]) / 10**9
    if place < fractions[0]:
        return 1
    return 2 if place >= 1 - fractions[1] else 0
