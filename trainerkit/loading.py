"""Files from anywhere, read without running code from them.

A pickle is a program: unpickling a stranger's checkpoint runs whatever it says. So `torch.load` is only ever called
with `weights_only=True`, which knows tensors and plain Python values, unless the user says `trust=true`. A .safetensors
file holds no code, but lengths and offsets that may lie; they are compared with the file's size before anything else.
"""

import json
import math
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
from torch import Tensor

from trainerkit.errors import UserError, first_lines
from trainerkit.sharded import check_sharded, what_torch_refused

TRUST_WARNING = (
    "trust=true: files are unpickled whole, which runs whatever code their makers put into them, with your rights."
)

_ADVICE = (
    "Loading it would do whatever its maker wanted, with your rights. Ask for the weights as .safetensors; or, if "
    "you trust\nwhoever made this file and how it reached you, add trust=true to the command line."
)

# Set by run.py alone: no config and no constructor can ask for trust.
_TRUST: ContextVar[bool] = ContextVar("trust", default=False)

# What the safetensors library refuses to read as well.
_LARGEST_HEADER = 100_000_000
_MOST_DIMENSIONS = 64  # torch's own limit
# Bits of an element, from https://huggingface.co/docs/safetensors, format.
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Within this context, `read_pickle` may run code from files if `trust` is true."""
    before = _TRUST.set(trust)
    try:
        yield
    finally:
        _TRUST.reset(before)


def read_pickle(path: Path, key: str, map_tensors: bool = False) -> Any:
    """What a file of `torch.save` holds, on the CPU.

    Args:
        path: a .ckpt, .pt or .pth file.
        key: the key that named it, for messages.
        map_tensors: leave tensors on disk until they are used.

    Raises:
        UserError: if it holds anything but tensors and plain values and is not trusted (see `trusting`), or is damaged.
    """
    try:
        is_zip = zipfile.is_zipfile(path)  # else of torch before 1.6
        if is_zip:
            _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused below
            return torch.load(path, map_location="cpu", weights_only=not _TRUST.get(), mmap=is_zip and map_tensors)
    except pickle.UnpicklingError as error:
        raise UserError(f"{key}={path}: {_refusal(path, error)}") from error
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be read ({_reason(error)}).") from error
    except Exception as error:  # zip, pickle and torch raise many kinds for a file that is not what it says
        raise UserError(f"{key}={path}: is damaged, or no file of torch.save ({_reason(error)}).") from error


def check_checkpoint(path: Path, key: str, to_train: bool) -> None:
    """Refuse a checkpoint that holds code, or is none of Lightning's, before anything else is done.

    Args:
        path: the checkpoint; a folder if it is one of `torch.distributed.checkpoint`.
        key: the key that named it, for messages.
        to_train: whether the optimizer and the counters are needed as well.

    Raises:
        UserError: as `read_pickle`.
    """
    if path.is_dir():
        if not _TRUST.get():
            check_sharded(path, key)
        return
    content = read_pickle(path, key, map_tensors=True)
    needed = {"state_dict": Mapping, "epoch": int, "global_step": int, "pytorch-lightning_version": str}
    if to_train:
        needed |= {"loops": Mapping, "callbacks": Mapping, "optimizer_states": list, "lr_schedulers": list}
    found = content if isinstance(content, Mapping) else {}
    wrong = [name for name, kind in needed.items() if not isinstance(found.get(name), kind)]
    if wrong:
        advice = " Weights alone go into task.network.weights where the task has it." if to_train else ""
        raise UserError(f"{key}={path}: is no whole checkpoint of Lightning; it lacks {', '.join(wrong)}.{advice}")


def read_safetensors(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names and tensors of a .safetensors file, on the CPU, and the texts in its header.

    Raises:
        UserError: if the file is not what its header says; nothing of it was read then.
    """
    from safetensors import SafetensorError  # late: callbacks need only torch and lightning
    from safetensors.torch import load_file

    metadata = _checked_header(path, key)
    try:
        return load_file(path), metadata
    except (SafetensorError, ValueError, KeyError) as error:  # a type that torch has not
        raise UserError(f"{key}={path}: cannot be read ({_reason(error)}).") from error


def read_json(path: Path, key: str, *needed: str) -> dict[str, Any]:
    """A JSON file with an object that has the keys `needed`.

    Raises:
        UserError: if it is something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}={path}: is not JSON ({_reason(error)}); it is damaged, remove it.") from error
    if not isinstance(content, dict) or not content.keys() >= set(needed):
        raise UserError(f"{key}={path}: is not what a run writes: needed are {', '.join(needed)}; remove it.")
    return content


def _check_sums(path: Path) -> None:
    """Compare the checksums that the file has of its parts; torch does not, and loads flipped bits."""
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise zipfile.BadZipFile(f"the checksum of {bad} is another")


def _refusal(path: Path, error: Exception) -> str:
    """What torch refused, in our words."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of a file that is no zip, or whose pickle is broken
        names = []
    if not names:
        return f"cannot be read without running code from it ({what_torch_refused(error)}).\n{_ADVICE}"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"holds pickled code, which was not run: {', '.join(names[:3])}{more}.\n{_ADVICE}"


def _checked_header(path: Path, key: str) -> dict[str, str]:
    """The texts in the header of a .safetensors file, after comparing all it says with the file's size."""

    def refuse(problem: str) -> UserError:
        return UserError(
            f"{key}={path}: is not a whole safetensors file: {problem}.\n"
            "It was cut short, damaged, or made to harm; get it anew from where it came."
        )

    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 8:
            raise refuse(f"it has {size} bytes, and the length of its header alone takes 8")
        length = struct.unpack("<Q", file.read(8))[0]
        if length > min(size - 8, _LARGEST_HEADER):
            limit = f"the file {size}" if length > size - 8 else f"{_LARGEST_HEADER} are allowed"
            raise refuse(f"its header claims {length} bytes, {limit}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is not JSON ({_reason(error)})") from error
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("__metadata__ in its header must hold texts")
    problem = _wrong_places(header, size - 8 - length)
    if problem:
        raise refuse(problem)
    return metadata


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{brief(name)} stands there twice")
        found[name] = value
    return found


def _wrong_places(header: dict[str, Any], size: int) -> str | None:
    """What is wrong with the places of the tensors in the `size` bytes after the header."""
    places = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            return f"{brief(name)} has no dtype, shape and data_offsets"
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            return f"{brief(name)} has the unknown dtype {brief(dtype)}"
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            return f"{brief(name)} has an impossible shape or place: {brief(shape)}, {brief(offsets)}"
        if offsets[1] > size:
            return f"{brief(name)} ends at byte {offsets[1]} of the data, which has {size}"
        if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
            length = offsets[1] - offsets[0]
            return f"{brief(name)} of shape {brief(shape)} and dtype {dtype} does not fit into {length} bytes"
        places.append((offsets[0], offsets[1], name))
    end, before = 0, "the beginning"
    for start, stop, name in sorted(places):
        if start != end:
            return f"{brief(name)} {'overlaps' if start < end else 'leaves a gap after'} {before}"
        end, before = stop, brief(name)
    return None if end == size else f"{size - end} bytes at the end belong to no tensor"


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MOST_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _reason(error: BaseException) -> str:
    """The first line of an error, short enough for a screen."""
    name, line = type(error).__name__, first_lines(error, 1)
    return name if line == name else f"{name}: {line.partition('. ')[0].rstrip('.')}"
