"""Rows that batches and processes give: put together, each once, in the order of their numbers."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, …) one after the other; of (B, T, D) the shorter ones get vectors of zeros, which are padding."""
    if parts[0].ndim == 3:
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
    return torch.cat(list(parts))


def of_all_ranks(rows: Tensor) -> Tensor:
    """The rows (B, …) of all processes in the order of their ranks, on the host; each may have another number of them.

    A process without rows need not know of what shape those of the others are: it sends any tensor without rows.
    Without a process group it gives them back as they are.
    """
    rows = rows.detach().cpu()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    gathered: list[Tensor] = [rows] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, rows)
    return joined([part for part in gathered if len(part)] or gathered[:1])


def first_of_each(numbers: Tensor) -> Tensor:
    """Where each number of (B,) stands first, (U,), in ascending order of the numbers."""
    ordered, order = numbers.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


def on_host(embeddings: Tensor) -> Tensor:
    """A copy without its graph, on the host, in float32 or float64."""
    return embeddings.detach().to("cpu", torch.promote_types(embeddings.dtype, torch.float32), copy=True)


class PredictedRows:
    """Collects what `predict_step` returns: `index` (B,) and `embedding` (B, D) or (B, T, D)."""

    def __init__(self) -> None:
        self._index: list[Tensor] = []
        self._embedding: list[Tensor] = []

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        """Take a batch to the host.

        Raises:
            ValueError: if one of the two is missing.
        """
        missing = [name for name in ("index", "embedding") if name not in outputs]
        if missing:
            raise ValueError(f"predict_step: must return a dict of tensors with '{missing[0]}', got {sorted(outputs)}")
        self._index.append(outputs["index"].cpu())
        self._embedding.append(on_host(outputs["embedding"]))

    def of_all_ranks(self) -> tuple[Tensor, Tensor]:
        """Index and embeddings of all processes, each row once, in the order of `index`; every process has to call it.

        Raises:
            ValueError: in all of them, if none was given a row.
        """
        mine = [joined(parts) if parts else torch.empty(0) for parts in (self._index, self._embedding)]
        index, embedding = map(of_all_ranks, mine)
        if not len(index):
            raise ValueError("rows=0: nothing was predicted")
        once = first_of_each(index)
        return index[once], embedding[once]
