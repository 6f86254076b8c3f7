"""Folders that `torch.distributed.checkpoint` writes, checked for code before torch unpickles them.

torch reads such a folder's `.metadata` by `pickle.load`, and what is no tensor by `torch.load(weights_only=False)`;
neither can be told otherwise. So the same bytes are read here first by readers that know plain values only. What passes
these calls nothing else when torch reads it.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from trainerkit.errors import UserError, first_lines

# What the metadata of a sound folder are made of (torch 2.6 to 2.13).
_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    _METADATA: {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def check_sharded(folder: Path, key: str) -> None:
    """Refuse a folder that holds code, or leads out of itself.

    Args:
        folder: of a checkpoint in several files.
        key: the key that named it, for messages.

    Raises:
        UserError: if it does, or is damaged.
    """
    for path in sorted(folder.rglob("*")):
        try:
            if path.name.endswith(".metadata"):
                _check_values(folder, _Metadata(io.BytesIO(path.read_bytes())).load())
            elif path.suffix in (".pt", ".ckpt"):
                torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle and torch raise many kinds for a file that is not what it says
            raise UserError(
                f"{key}={folder}: {path.name} cannot be read without running code from it, or is damaged "
                f"({what_torch_refused(error)}).\nIf you trust whoever made it, add trust=true to the command line."
            ) from error


def what_torch_refused(error: Exception) -> str:
    """The point of torch's long message about `weights_only`; another error's first line."""
    message = str(error)
    name = re.search(r"GLOBAL (\w\S+)", message)
    if name:
        return name[1]
    reason = message.partition("WeightsUnpickler error:")[2].strip()
    return (reason.splitlines()[0] if reason else first_lines(error, 1)).rstrip(".")


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _KNOWN.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _check_values(folder: Path, metadata: Any) -> None:
    """Read every value that is no tensor, as torch will, but plain."""
    for index, place in metadata.storage_data.items():
        path = folder / place.relative_path
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{place.relative_path} leads out of the folder")
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
            with path.open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
