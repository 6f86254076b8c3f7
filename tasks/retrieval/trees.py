"""Batches as trees whose leaves have rows first: how many, a part of them, and parts put together again."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def entries(inputs: Any, name: str = "inputs") -> Iterator[tuple[str, Any]]:
    """The tensors and lists of a tree of dicts, tuples and None, with the way to them.

    A list has an entry for each row, whatever that is: a text, a list of numbers, a tensor.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(inputs, Mapping | tuple):
        for key, value in inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs):
            yield from entries(value, f"{name}[{key!r}]")
    elif isinstance(inputs, list) or (isinstance(inputs, Tensor) and inputs.ndim):
        yield name, inputs
    elif inputs is not None:
        raise ValueError(f"{name}={inputs!r}: must be a tensor or a list with rows first, or None")


def number_of_rows(inputs: Any) -> int:
    """How many rows every tensor and list of a tree has.

    Raises:
        ValueError: if there is none, or they differ.
    """
    lengths = [(name, len(value)) for name, value in entries(inputs)]
    if not lengths:
        raise ValueError("inputs: must hold a tensor or a list with rows first")
    first, rows = lengths[0]
    for name, length in lengths:
        if length != rows:
            raise ValueError(f"{name}: has {length} rows, and {first} has {rows}; must have as many")
    return rows


def part(inputs: Any, rows: slice) -> Any:
    """The same tree with these rows alone."""
    if isinstance(inputs, Mapping):
        return type(inputs)({key: part(value, rows) for key, value in inputs.items()})  # type: ignore[call-arg]
    if isinstance(inputs, tuple):
        parts = [part(value, rows) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else tuple(parts)
    return None if inputs is None else inputs[rows]


def concatenated(pieces: Sequence[Tensor]) -> Tensor:
    """The rows (B₁, …), (B₂, …) … of all pieces; zeros fill up the end where another dimension is shorter."""
    largest = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    return torch.cat([padded(piece, [len(piece), *largest]) for piece in pieces])


def padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros at the end of each dimension that is shorter than in `shape`."""
    missing = [wanted - there for wanted, there in zip(shape, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    return F.pad(tensor, list(chain.from_iterable((0, number) for number in reversed(missing))))
