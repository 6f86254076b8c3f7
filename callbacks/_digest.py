"""Digests of tensors, and nests of values by name."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest(tensor: Tensor) -> bytes:
    """The SHA-256 (32 bytes) of a tensor's dtype, shape and elements; of a DTensor, those of this rank's piece.

    What is on a device is copied to the host for it, and the device waited for.
    """
    tensor = getattr(tensor, "_local_tensor", tensor).detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    found = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    # NumPy has no bfloat16; every tensor has bytes.
    host = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    found.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def digest_of(value: Any) -> bytes:
    """As `digest` for a tensor or an array; a plain value by its `repr`, anything else by its type."""
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).digest()
    return hashlib.sha256(shown(value).encode()).digest()


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, lists, tuples and dataclasses as (dotted name, value); an empty nest is a leaf."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from flat(child, f"{name}.{key}")
    elif isinstance(value, list | tuple) and value:
        for position, child in enumerate(value):
            yield from flat(child, f"{name}.{position}")
    else:
        yield name, value


def shown(value: Any) -> str:
    """A plain value as Python writes it; of anything else its type, since an address says nothing."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | list | tuple | dict | Enum):
        return repr(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, torch.dtype | torch.device | PurePath):
        return str(value)
    kind = value if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
