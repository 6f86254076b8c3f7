"""Examples of each adapter's task: `examples.safetensors` in its folder, with `inputs` (M, …) and `targets` (M, …).

Shapes: B adapters of a batch, M examples of a task, S of them drawn.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainerkit.data.loader import Batch
from trainerkit.errors import UserError
from trainerkit.functional.row_draws import row_draws
from trainerkit.loading import read_safetensors

EXAMPLES = "examples.safetensors"
_SMALL = 2**30  # bytes that 'auto' keeps in memory


def draw_examples(counts: Tensor, rows: Tensor, size: int, seed: int, epoch: int, stream: int) -> Tensor:
    """Positions of examples of each row, drawn without repetition, the same for (seed, epoch, row, stream).

    Args:
        counts: examples of each row, (B,), none below `size`.
        rows: by which is drawn, (B,).
        size: positions a row, S.
        seed: of the draws.
        epoch: of the training.
        stream: as in `row_draws`.

    Returns:
        (B, S) int64.
    """
    most = int(counts.max())
    draws = row_draws(seed, epoch, rows, most, stream)
    drawn = draws.masked_fill(torch.arange(most) >= counts[:, None], 2.0)
    return drawn.sort(dim=1, stable=True).indices[:, :size]


class ExampleFiles:
    """The examples of all adapters of a library.

    Args:
        folders: of the adapters.
        key: what named them, for messages.
        size: examples that a batch has of each adapter's task, S.
        in_memory: whether all are kept there; 'auto' if they take less than 1 GiB.

    Raises:
        UserError: if an adapter has none, or too few, or they have another shape or type than those of the first.
    """

    def __init__(self, folders: Sequence[Path], key: str, size: int, in_memory: bool | str = "auto") -> None:
        self._files = [folder / EXAMPLES for folder in folders]
        self._key = key
        self.size = size
        counts = []
        bytes_ = 0
        first: dict[str, Tensor] = {}
        for file in self._files:
            found = self._mapped(file)
            first = first or found
            for name, tensor in found.items():
                if tensor.shape[1:] != first[name].shape[1:] or tensor.dtype != first[name].dtype:
                    there = f"{self._files[0]} {tuple(first[name].shape[1:])} {first[name].dtype}"
                    problem = f"{name} of shape {tuple(tensor.shape[1:])} {tensor.dtype} for each example, {there}"
                    raise UserError(f"{key}={file}: has {problem}; they must be alike.")
                bytes_ += tensor.numel() * tensor.element_size()
            counts.append(len(found["inputs"]))
        self.counts = torch.tensor(counts)
        self.in_memory = bytes_ < _SMALL if in_memory == "auto" else bool(in_memory)
        self._starts = self.counts.cumsum(0) - self.counts
        self._packed: dict[str, Tensor] | None = None

    def load(self) -> None:
        """Read all that is kept in memory."""
        if self.in_memory and self._packed is None:
            read = [self._read(row) for row in range(len(self._files))]
            self._packed = {name: torch.cat([one[name] for one in read]) for name in ("inputs", "targets")}

    def take(self, rows: Tensor, positions: Tensor) -> Batch:
        """`inputs` (B, S, …) and `targets` (B, S, …) at these positions (B, S) of these adapters' examples (B,)."""
        self.load()
        if self._packed is not None:
            places = self._starts[rows][:, None] + positions
            return {name: packed[places] for name, packed in self._packed.items()}
        read = [self._read(row, taken) for row, taken in zip(rows.tolist(), positions, strict=True)]
        return {name: torch.stack([one[name] for one in read]) for name in ("inputs", "targets")}

    def _read(self, row: int, positions: Tensor | None = None) -> dict[str, Tensor]:
        found = self._mapped(self._files[row])
        if len(found["inputs"]) != self.counts[row]:
            raise UserError(f"{self._key}={self._files[row]}: was exchanged while it was in use.")
        taken = {name: tensor.clone() if positions is None else tensor[positions] for name, tensor in found.items()}
        for name, tensor in taken.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{self._key}={self._files[row]}: {name} has numbers that are not finite.")
        return taken

    def _mapped(self, file: Path) -> dict[str, Tensor]:
        """Without reading a number."""
        if not file.is_file():
            raise UserError(
                f"{self._key}={file.parent}: has no {EXAMPLES}, and examples_per_task={self.size} asks for them."
            )
        tensors, _ = read_safetensors(file, self._key)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        pair = [shapes.get(name) for name in ("inputs", "targets")]
        if len(shapes) != 2 or not all(pair) or pair[0][0] != pair[1][0]:  # type: ignore[index]
            raise UserError(f"{self._key}={file}: has {shapes}: must be inputs (M, …) and targets (M, …).")
        if len(tensors["inputs"]) < self.size:
            few = f"has {len(tensors['inputs'])} examples, and examples_per_task={self.size} asks for more"
            raise UserError(f"{self._key}={file}: {few}.")
        return tensors
