"""How much memory a run takes: of the device since the last log step, of the processes now and at their peak.

torch's allocators count what they hand out, so that no device is waited for; what the process holds is read from the
operating system.
"""

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer

from trainerkit.callbacks._trainer import is_stepping, log_metrics, step_number

_MIB = 2**20


class MemoryMonitor(Callback):
    """Log memory in MiB every `every_n_steps` optimizer steps.

    Args:
        every_n_steps: optimizer steps between two measurements; the device's peaks are those in between.
        warn_after: warn once when the process, or what is allocated on the device, has grown from each of this many
            measurements to the next, as it does when something is kept that should not be; None never warns.

    Logged, the largest over all ranks, and where there are several also their sum (`memory/process_mib_sum`, …):

    - `memory/process_mib`, `memory/process_peak_mib`: resident memory of the training process now, and its peak since
      the process began. Worker processes of a loader are not in it.
    - `memory/allocated_peak_mib`, `memory/reserved_peak_mib` (CUDA, XPU): the most that tensors took, and that torch's
      allocator held for them, since the last measurement. torch's peak statistics are reset by it.
    - `memory/allocated_mib`, `memory/reserved_mib` (CUDA, XPU; MPS, which has no peaks): now.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(self, every_n_steps: int = 50, warn_after: int | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be 1 or more")
        if warn_after is not None and warn_after < 2:
            raise ValueError(f"warn_after={warn_after}: must be 2 or more, or null never to warn")
        self.every_n_steps = every_n_steps
        self.warn_after = warn_after
        self._seen: dict[str, list[float]] = {}  # of each rank's own, newest last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first peak is from here on."""
        self._seen = {"process": [], "allocated": []}
        reset_device_peaks(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log after each `every_n_steps`-th step."""
        if is_stepping(trainer, pl_module) and step_number(trainer) % self.every_n_steps == 0:
            device = trainer.strategy.root_device
            measured = process_memory() | device_memory(device)
            reset_device_peaks(device)
            log_metrics(trainer, _over_ranks(trainer, measured))
            if self.warn_after is not None:
                self._warn_if_growing(measured, self.warn_after)

    def _warn_if_growing(self, measured: Mapping[str, int], times: int) -> None:
        for name, seen in self._seen.items():
            if name not in measured:
                continue
            seen.append(measured[name])
            if len(seen) > times + 1:
                del seen[0]
            if grows(seen, times):
                growth = (seen[-1] - seen[0]) / _MIB
                rank_zero_warn(
                    f"MemoryMonitor: {name} memory has grown {times} times in a row, by {growth:.1f} MiB in all; "
                    "is something kept, like a loss with its graph?"
                )
                self._seen = {}  # once is enough


def grows(values: Sequence[float], times: int) -> bool:
    """Whether each of the last `times` values is larger than the one before it."""
    last = values[-times - 1 :]
    return len(last) == times + 1 and all(a < b for a, b in itertools.pairwise(last))


def process_memory() -> dict[str, int]:
    """Bytes of resident memory of this process: `process` now, `process_peak` since it began.

    On Linux from /proc; elsewhere the peak alone, which `getrusage` knows; on Windows nothing.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        found = {"process": lines.get("VmRSS"), "process_peak": lines.get("VmHWM")}
        return {name: int(text.split()[0]) * 1024 for name, text in found.items() if text is not None}
    if os.name == "nt":
        return {}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_peak": peak if sys.platform == "darwin" else peak * 1024}  # macOS counts in bytes


def device_memory(device: torch.device) -> dict[str, int]:
    """Bytes that torch's allocator knows of: `allocated`, `reserved`, `…_peak` where it has peaks; none on the CPU."""
    if device.type == "mps":
        return {"allocated": torch.mps.current_allocated_memory(), "reserved": torch.mps.driver_allocated_memory()}
    memory: Any = getattr(torch, device.type, None)
    if not hasattr(memory, "max_memory_reserved"):
        return {}
    return {
        "allocated": memory.memory_allocated(device),
        "reserved": memory.memory_reserved(device),
        "allocated_peak": memory.max_memory_allocated(device),
        "reserved_peak": memory.max_memory_reserved(device),
    }


def reset_device_peaks(device: torch.device) -> None:
    """Let the device's peaks begin anew, where it has some."""
    reset = getattr(getattr(torch, device.type, None), "reset_peak_memory_stats", None)
    if reset is not None:
        reset(device)


def _over_ranks(trainer: Trainer, measured: Mapping[str, int]) -> dict[str, float]:
    """In MiB, the largest and the sum over all ranks, by one gathering."""
    own = {f"memory/{name}_mib": value / _MIB for name, value in measured.items()}
    if trainer.world_size == 1:
        return own
    ranks = torch.zeros(trainer.world_size, len(own), dtype=torch.float64)
    ranks[trainer.global_rank] = torch.tensor(list(own.values()), dtype=torch.float64)
    ranks = trainer.strategy.reduce(ranks.to(trainer.strategy.root_device), reduce_op="sum")
    largest, sums = torch.stack([ranks.amax(0), ranks.sum(0)]).tolist()
    names = list(own)
    return dict(zip(names, largest, strict=True)) | {f"{n}_sum": v for n, v in zip(names, sums, strict=True)}
