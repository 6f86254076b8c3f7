"""Two runs byte for byte, and whether the files of a killed run can be read."""

import csv
import hashlib
import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Of a clock, so of no two runs the same: the last name of the path to it.
CLOCKS = ("seconds",)


def differences(whole: Path, other: Path) -> list[str]:
    """Where the folder of a run differs from that of the uninterrupted one: for each file the first difference.

    Compared are all of `last.ckpt` and `best.ckpt` (weights, averages, optimizer, schedule, counters, every callback's
    state), the exported weights, the history, the results and the resolved config, all but seconds. Lightning's
    CSVLogger begins a file in each process and loses what it has not written: each row that there is must be the
    uninterrupted run's. `environment.json` has the commands, `overrides.txt` what they said.
    """
    found = []
    for name in _names(whole) | _names(other):
        ours, theirs = (folder / name for folder in (whole, other))
        if not ours.exists() or not theirs.exists():
            found.append(f"{name}: {'only' if theirs.exists() else 'not'} in the run that was killed")
            continue
        difference = _in_file(ours, theirs, (str(whole), str(other)))
        if difference is not None:
            found.append(f"{name}: {difference}")
    row = _foreign_row(_rows(whole), _rows(other))
    return sorted(found) if row is None else [*sorted(found), f"logs: {row}"]


def _names(folder: Path) -> set[str]:
    """The files to compare."""
    kept = [path for path in folder.iterdir() if path.suffix in (".json", ".yaml", ".safetensors")]
    kept += [folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")]
    names = {str(path.relative_to(folder)) for path in kept if path.exists() and not path.name.startswith(".")}
    # What History keeps of a run that was begun in the folder and had no checkpoint.
    return {name for name in names if name != "environment.json" and not name.endswith(".previous.json")}


def _in_file(ours: Path, theirs: Path, folders: tuple[str, str]) -> str | None:
    if ours.suffix == ".ckpt":
        pair = [torch.load(path, map_location="cpu", weights_only=True) for path in (ours, theirs)]
        return first_difference(*(_without(value, folder) for value, folder in zip(pair, folders, strict=True)))
    if ours.suffix == ".json":
        pair = [json.loads(path.read_text(encoding="utf-8")) for path in (ours, theirs)]
        return first_difference(*pair)
    if ours.suffix == ".safetensors":
        return first_difference(_weights(ours), _weights(theirs))
    return None if ours.read_bytes() == theirs.read_bytes() else "other bytes"


def _weights(path: Path) -> dict[str, Any]:
    """Tensors and facts of a safetensors file; the format writes the facts in an order by chance."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {"facts": file.metadata()} | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _without(value: Any, folder: str) -> Any:
    """The same without the run's folder in paths."""
    if isinstance(value, str):
        return value.replace(folder, "")
    if isinstance(value, OrderedDict) and hasattr(value, "_metadata"):
        found = OrderedDict((key, _without(part, folder)) for key, part in value.items())
        found._metadata = value._metadata  # type: ignore[attr-defined]
        return found
    if isinstance(value, Mapping):
        return {key: _without(part, folder) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without(part, folder) for part in value)
    return value


def first_difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """The first place where two values differ, and both values; None if they are the same to the last bit.

    Types count, and so do the bits of numbers: 0.0 is not -0.0, a NaN is that very NaN. What clocks measured does not.
    """
    if path.rpartition(".")[2] in CLOCKS:
        return None
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return _in_tensors(ours, theirs, path)
    if type(ours) is not type(theirs):
        return f"{path} is {theirs!r} ({type(theirs).__name__}) instead of {ours!r} ({type(ours).__name__})"
    if isinstance(ours, Mapping):
        if missing := [key for key in ours if key not in theirs]:
            return f"{_joined(path, missing[0])} is missing"
        if extra := [key for key in theirs if key not in ours]:
            return f"{_joined(path, extra[0])} is there, and was not"
        pairs: Iterator[tuple[str, Any, Any]] = ((_joined(path, key), ours[key], theirs[key]) for key in ours)
        # A state_dict's versions of its modules, by which they read their tensors.
        if (kept := [getattr(value, "_metadata", None) for value in (ours, theirs)]) != [None, None]:
            pairs = itertools.chain(pairs, [(_joined(path, "_metadata"), kept[0], kept[1])])
    elif isinstance(ours, Sequence) and not isinstance(ours, str | bytes):
        if len(ours) != len(theirs):
            return f"{path} has {len(theirs)} entries instead of {len(ours)}"
        pairs = ((f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
    elif isinstance(ours, float):
        return None if ours.hex() == theirs.hex() else f"{path} is {theirs!r} instead of {ours!r}"
    else:
        return None if ours == theirs else f"{path} is {theirs!r} instead of {ours!r}"
    return next((found for place, a, b in pairs if (found := first_difference(a, b, place)) is not None), None)


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _in_tensors(ours: Tensor, theirs: Tensor, path: str) -> str | None:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        kinds = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (theirs, ours)]
        return f"{path} is {kinds[0]} instead of {kinds[1]}"
    if ours.numel() == 0:
        return None
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (ours, theirs)]
    if torch.equal(*bits):
        return None
    place = int((bits[0] != bits[1]).nonzero()[0]) // ours.element_size()
    values = [tensor.reshape(-1)[place].item() for tensor in (theirs, ours)]
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), ours.shape)]
    return f"{path}{index or ''} is {values[0]!r} instead of {values[1]!r}"


# metrics.csv, of which each process writes one

_Row = dict[str, str]


def _rows(folder: Path) -> list[_Row]:
    rows = []
    for path in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        text = path.read_text(encoding="utf-8")
        whole_lines = text[: text.rfind("\n") + 1].splitlines()  # a process that is killed may leave half of one
        rows += [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(whole_lines)]
    return rows


def _foreign_row(whole: list[_Row], other: list[_Row]) -> str | None:
    """Something logged that the uninterrupted run has not logged at that step.

    What a resumed run says again before its first step (`unfreezing/stage`) has to be what was said last.
    """
    known: dict[str, dict[int, list[str]]] = {}  # the cells of each metric by step, in the order they were written
    for row in whole:
        for name, cell in row.items():
            known.setdefault(name, {}).setdefault(int(row["step"]), []).append(cell)
    for row in other:
        step = int(row["step"])
        for name, cell in row.items():
            cells = known.get(name, {})
            before = max((there for there in cells if there < step), default=None)
            expected = [*cells.get(step, []), *([] if before is None else cells[before][-1:])]
            if name != "step" and cell not in expected:
                return f"{name} is {cell} at step {step} instead of {' or '.join(expected) or 'nothing'}"
    return None


# What a kill leaves


def unreadable(folder: Path) -> list[str]:
    """The files in a run's folder that stand under their final names and are not whole, each with the reason."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if not path.name.startswith(".")):
        try:
            _read(path)
        except FileNotFoundError:
            found.append(f"{path.relative_to(folder)}: a link to nothing")
        except Exception as error:  # whatever a loader says of a broken file
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return found


def _read(path: Path) -> None:
    """Read a file as whoever needs it would; raises if that fails."""
    if path.suffix == ".ckpt" and not path.is_dir():
        torch.load(path, map_location="cpu", weights_only=True)
    elif path.suffix == ".safetensors":
        _weights(path)
    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.parent.name == "checkpoints":
            _verify(path.parent, content["files"])


def _verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold files against a manifest; those that are gone are no checkpoint any more.

    Not by the code that a resume reads it with: a judge does not share the mistakes of what it judges.
    """
    for name, facts in files.items():
        path = folder / name
        if not path.exists():
            continue
        content = path.read_bytes()
        if len(content) != facts["size"] or hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise ValueError(f"{name} is not what the manifest says")


def last_step(folder: Path) -> int:
    """The newest step that a run can go on from, -1 if there is none; `best.ckpt` alone may be of a later one."""
    checkpoints = folder / "checkpoints"
    numbers = [re.match(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*.ckpt")]
    steps = [int(number[1]) for number in numbers if number]
    with suppress(Exception):  # not there, or not readable: `unreadable` says so
        steps.append(int(torch.load(checkpoints / "last.ckpt", map_location="cpu", weights_only=True)["global_step"]))
    return max(steps, default=-1)
