"""How many parts of a batch keep the peak of memory under a target: measured, without a wait for the device."""

from pathlib import Path

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Trainer

from trainerkit.callbacks._adaptive_window import LateNumbers
from trainerkit.callbacks._micro_batches import MicroBatches, free_memory

_MB = 2**20
_CLEAR_REFS = Path("/proc/self/clear_refs")


def can_measure(device: torch.device) -> bool:
    """Whether the peak over a step can be measured: on CUDA, and on the CPU under Linux."""
    return device.type == "cuda" or (device.type == "cpu" and _CLEAR_REFS.exists())


def reset_peak(device: torch.device) -> None:
    """Begin to measure the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    free_memory()
    _CLEAR_REFS.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory since `reset_peak`: allocated by torch on CUDA, resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class MemoryTarget:
    """Doubles the parts of a batch until a step's peak is below a target; all processes have as many.

    The peak is that since the number last changed: it is not reset at each step, for others may watch it too.

    Args:
        parts: whose number is set.
        target_mb: MiB; None keeps to agreeing with the other processes.
    """

    def __init__(self, parts: MicroBatches, target_mb: float | None) -> None:
        self.parts = parts
        self.target_mb = target_mb
        self._device = torch.device("cpu")
        self._most: LateNumbers | None = None  # parts of the process that had the most at the last batch
        self._measuring = 0  # the number of parts that the peak belongs to; 0 for none
        self._peak_mb = 0.0
        self._warned = False

    def start(self, device: torch.device) -> None:
        """Training begins."""
        self._device = device
        self._most = LateNumbers(1, device)
        self.forget_peak()

    def forget_peak(self) -> None:
        """What was measured was not a training step."""
        self._measuring = 0

    def before_batch(self) -> None:
        """Take over what the processes agreed on."""
        most = None if self._most is None else self._most.take()
        if most is not None:
            self.parts.number = max(self.parts.number, round(most[0]))
        if self.target_mb is not None and self._measuring != self.parts.number:
            self._measuring = self.parts.number
            reset_peak(self._device)

    def after_batch(self, trainer: Trainer, rows: int) -> None:
        """Compare the peak with the target, and tell the other processes."""
        # After a failed allocation the peak is that of the attempt which failed.
        if self.target_mb is not None and self._measuring == self.parts.number:
            self._peak_mb = peak_bytes(self._device) / _MB
            if self._peak_mb > self.target_mb:
                self._split(rows)
        if trainer.world_size > 1 and self._most is not None:
            number = torch.full((1,), float(self.parts.number), device=self._device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self._most.put(number)

    def _split(self, rows: int) -> None:
        if self.parts.number < rows:
            self.parts.number = min(2 * self.parts.number, rows)
        elif not self._warned:
            self._warned = True
            rank_zero_warn(f"target_memory_mb={self.target_mb}: one row at a time still takes {self._peak_mb:.0f} MiB")

    def found(self) -> dict[str, float]:
        """What there is to be logged."""
        found = {"accumulation/micro_batches": float(self.parts.number)}
        if self.target_mb is not None:
            found["accumulation/peak_memory_mb"] = self._peak_mb
        return found
