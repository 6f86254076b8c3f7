"""Embeddings of a data set's rows on disk, so that a frozen encoder sees each row once, not once an epoch.

One file for each place (side and modalities) and width, `query-image-384.float16`: a row whose picture and text are two
queries has a record in each of two files. Record i is row i's:

    the embedding | fingerprint of the row's input, 8 bytes | CRC-32 of both, 4 bytes

A record counts if its checksum fits and its fingerprint is that of the input at hand. So a write that was cut off by
SIGKILL or a power failure is a record that does not count; rows that were never written are holes, which do not either;
and a row whose picture or text is another now is embedded anew. Nothing has to be locked: processes write whole records
at places of their own, and two that write the same row write the same.
"""

import zlib
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainerkit.errors import UserError

CacheDtype = Literal["float16", "float32"]
_FINGERPRINT_BYTES, _CHECKSUM_BYTES = 8, 4
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = -7046029254386353131  # 2⁶⁴ divided by the golden ratio, as a signed number: spreads neighbours
_ROWS_AT_ONCE = 64  # whose numbers are held as int64


def fingerprint(inputs: dict[str, Tensor]) -> Tensor:
    """(B,) int64: a hash of each row of an encoder's inputs, computed where they are.

    Σ bits(x_p) · (odd number of place p), modulo 2⁶⁴. Not proof against malice. Zeros at the end, the padding of
    texts, do not change it, and masks count as the text they cover.
    """
    length = len(next(iter(inputs.values())))
    device = next(iter(inputs.values())).device
    found = torch.zeros(length, dtype=torch.int64, device=device)
    for number, name in enumerate(sorted(inputs)):
        values = inputs[name].reshape(length, -1)
        bits = values.contiguous().view(_BITS[values.element_size()])
        places = torch.arange(1, bits.shape[1] + 1, device=device) * 2 + 1
        # Mixed: with the places alone 3·x₁ + 5·x₂ would be the same for many pairs of small numbers.
        odd = _mixed(places * _GOLDEN + number) | 1
        sums = [(part * odd).sum(1) for part in bits.split(_ROWS_AT_ONCE)]
        found = found * 31 + (torch.cat(sums) if sums else found)
    return found


class EmbeddingCache:
    """Embeddings by place and row, in the folder's files; format at the top.

    Args:
        folder: made if it is not there; several processes may share it.
        dtype: 'float16' or 'float32', as what numbers are kept.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, dtype: CacheDtype = "float16") -> None:
        self.folder = Path(folder)
        self.dtype = np.dtype(dtype)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error

    def read(
        self, place: str, rows: Sequence[int], fingerprints: Sequence[int]
    ) -> tuple[list[bool], np.ndarray | None]:
        """Which rows are there with these fingerprints, and the embeddings of those alone, in their order.

        Returns:
            A bool for each row, and (number there, D), or None where none is.
        """
        known = self._found(place)
        if known is None:
            return [False] * len(rows), None
        path, width = known
        size = self._record_bytes(width)
        found, embeddings = [], []
        with FileIO(path) as file:
            for row, expected in zip(rows, fingerprints, strict=True):
                file.seek(row * size)
                record = file.read(size)
                body, checksum = record[:-_CHECKSUM_BYTES], record[-_CHECKSUM_BYTES:]
                there = len(record) == size and body[-_FINGERPRINT_BYTES:] == _bytes(expected)
                found.append(there and checksum == _checksum(body))
                if found[-1]:
                    embeddings.append(np.frombuffer(body, self.dtype, width))
        return found, np.stack(embeddings) if embeddings else None

    def write(self, place: str, rows: Sequence[int], fingerprints: Sequence[int], embeddings: np.ndarray) -> np.ndarray:
        """Keep embeddings (B, D) of rows; gives them back as `read` will.

        Raises:
            UserError: if the files cannot be written.
        """
        embeddings = np.ascontiguousarray(embeddings, self.dtype)
        width = embeddings.shape[1]
        path = self.folder / f"{place}-{width}.{self.dtype.name}"
        try:
            path.touch()
            with FileIO(path, "r+") as file:
                for row, known_by, embedding in zip(rows, fingerprints, embeddings, strict=True):
                    body = embedding.tobytes() + _bytes(known_by)
                    file.seek(row * self._record_bytes(width))
                    file.write(body + _checksum(body))
        except OSError as error:
            raise self._cannot_write(error) from error
        return embeddings

    def _found(self, place: str) -> tuple[Path, int] | None:
        """The file of a place and its width; one encoder has one."""
        for path in self.folder.glob(f"{place}-*.{self.dtype.name}"):
            return path, int(path.stem.removeprefix(f"{place}-"))
        return None

    def _record_bytes(self, width: int) -> int:
        return width * self.dtype.itemsize + _FINGERPRINT_BYTES + _CHECKSUM_BYTES

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cache_dir: {self.folder} cannot be written ({error.strerror or error}).")


def _mixed(numbers: Tensor) -> Tensor:
    """A bijection of int64 that leaves no pattern (Stafford's mix 13, with arithmetic shifts)."""
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return numbers ^ (numbers >> 31)


def _bytes(number: int) -> bytes:
    return number.to_bytes(_FINGERPRINT_BYTES, "little", signed=True)


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little")
