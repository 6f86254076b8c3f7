"""The records of `StepHashes`: what a step left, as hashes, in a file of JSON lines.

Two kinds of line: `{"names": [...]}` says what the hashes of the lines below it are of; `{"step": 7, "epoch": 0,
"content": …, "parts": …, "chain": …}` is a step. `content` is a hash (32 hexadecimal digits) of everything in the step,
`parts` the first 8 digits of each part's own, one after the other, by which a difference is named; `chain` is a hash of
the chain so far and `content`, so that two equal chains are two equal histories.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

START = "0" * 32  # the chain before the first record
_DIGITS = 8  # of a part

Difference = tuple[str, str, str, int]
"""The first part that differs, its hash on either side, and how many parts differ."""


@dataclass(frozen=True)
class Record:
    """What a step left.

    Attributes:
        step: optimizer steps so far; 0 is before the first.
        epoch: from 0.
        names: of the parts, causes before consequences.
        content: hash of all parts.
        parts: a short hash of each part.
        chain: hash of all records up to this one.
        line: its line in the file, from 1; 0 if it is in none.
    """

    step: int
    epoch: int
    names: tuple[str, ...]
    content: str
    parts: tuple[str, ...]
    chain: str
    line: int = 0

    def as_line(self) -> str:
        """The record as it stands in a file, below its names."""
        return _line({
            "step": self.step, "epoch": self.epoch, "content": self.content, "parts": "".join(self.parts),
            "chain": self.chain,
        })  # fmt: skip

    def names_line(self) -> str:
        """What stands in a file before the first record that has these names."""
        return _line({"names": self.names})


def make_record(step: int, epoch: int, digests: Mapping[str, bytes], chain: str) -> Record:
    """The record of a step.

    Args:
        step: optimizer steps so far.
        epoch: from 0.
        digests: for each part, by name, its hash.
        chain: that of the record before, or `START`.
    """
    names = tuple(digests)
    content = hashlib.sha256("\n".join(names).encode() + b"\n" + b"".join(digests.values())).hexdigest()[:32]
    parts = tuple(found.hex()[:_DIGITS] for found in digests.values())
    return Record(step, epoch, names, content, parts, hashlib.sha256((chain + content).encode()).hexdigest()[:32])


def first_difference(one: Record, other: Record) -> Difference | None:
    """The first part in which two records of a step differ.

    Returns:
        Its name, its hash in the one and in the other ('not there' where it has no such part), and how many parts
        differ in all; None where the records are equal.
    """
    if one.content == other.content:
        return None
    a, b = (dict(zip(record.names, record.parts, strict=True)) for record in (one, other))
    found = [(n, a.get(n, "not there"), b.get(n, "not there")) for n in {**a, **b} if a.get(n) != b.get(n)]
    if not found:  # in digits that a short hash leaves out: once in 4e9
        return "a part whose short hash is the same", one.content, other.content, 1
    return (*found[0], len(found))


def read_records(path: Path) -> dict[int, Record]:
    """The records of a file by step.

    A record replaces an earlier one of the same step and all that followed it: they are of a history that was left. A
    last line without its end, as a killed process leaves it, is not read.

    Raises:
        ValueError: for a line that is no record.
    """
    records: dict[int, Record] = {}
    names: tuple[str, ...] = ()
    for number, text in enumerate(whole_part(path).decode("utf-8", "replace").splitlines(), 1):
        try:
            found = json.loads(text)
            if "names" in found:
                names = tuple(found["names"])
                continue
            digits = found["parts"]
            parts = tuple(digits[i : i + _DIGITS] for i in range(0, len(digits), _DIGITS))
            record = Record(found["step"], found["epoch"], names, found["content"], parts, found["chain"], number)
            if len(parts) != len(names):
                raise ValueError(f"{len(parts)} hashes of {len(names)} parts")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"path={path}: line {number} is no record of StepHashes ({error})") from error
        for step in [step for step in records if step >= record.step]:
            del records[step]
        records[record.step] = record
    return records


def whole_part(path: Path) -> bytes:
    """The file's content up to the end of its last whole line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def rank_files(folder: Path) -> dict[str, Path]:
    """The record files of a folder, by name."""
    return {path.name: path for path in sorted(folder.glob("rank*.jsonl"))}


def compare_folders(one: Path, other: Path) -> tuple[int, list[str]]:
    """Compare the records of two runs.

    Returns:
        How many steps both have, over all ranks, and for each rank that differs, a sentence about the first difference.

    Raises:
        ValueError: for a file that is no record file, or where nothing can be compared.
    """
    files, others = rank_files(one), rank_files(other)
    if not set(files) & set(others):
        raise ValueError(f"folder={other}: must have record files of the ranks in {one}: {', '.join(files) or 'none'}")
    steps, found = 0, []
    if set(files) != set(others):
        found.append(f"the runs have other ranks: {', '.join(files)} in {one}, {', '.join(others)} in {other}")
    for name in [name for name in files if name in others]:
        a, b = read_records(files[name]), read_records(others[name])
        shared = [step for step in a if step in b]
        if not shared:
            raise ValueError(f"folder={other}: must have records of the steps in {files[name]}; {name} shares none")
        difference = next(((step, d) for step in shared if (d := first_difference(a[step], b[step]))), None)
        if difference is not None:
            step, parts = difference
            found.append(describe(step, parts, f"{files[name]}:{a[step].line}", f"{others[name]}:{b[step].line}"))
        steps += sum(step > 0 for step in shared)
    return steps, found


def describe(step: int, difference: Difference, one: str, other: str) -> str:
    """A sentence about the first difference.

    Args:
        step: the optimizer step.
        difference: of `first_difference`.
        one: where the first value is.
        other: where the other is.
    """
    name, a, b, count = difference
    when = "before the first step" if step == 0 else f"step {step}"
    more = f"; {count - 1} more parts of this step differ" if count > 1 else ""
    return f"{when}: {name} is {a} in {one}, {b} in {other}{more}"


def _line(content: Mapping[str, object]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"
