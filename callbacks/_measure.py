"""What measuring a run takes: a stopwatch, a counter of operations, sums over ranks."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def leading_dimension(batch: Any) -> int | None:
    """The first dimension of the first tensor in nested dicts and sequences; None if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    parts: Any = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        parts = batch
    return next((size for size in map(leading_dimension, parts) if size is not None), None)


class Stopwatch:
    """Seconds in all, and those of them that were waited; every method may be called again without harm."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = self.waited = 0.0
        self._clock = clock
        self._since: float | None = None
        self._waiting_since: float | None = None

    @property
    def running(self) -> bool:
        return self._since is not None

    def start(self) -> None:
        if self._since is None:
            self._since = self._clock()

    def wait(self) -> None:
        if self._waiting_since is None:
            self._waiting_since = self._clock()

    def go_on(self) -> None:
        """The waiting is over."""
        if self._waiting_since is not None:
            self.waited += self._clock() - self._waiting_since
            self._waiting_since = None

    def read(self) -> None:
        """Bring `seconds` up to now."""
        if self._since is not None:
            now = self._clock()
            self.seconds += now - self._since
            self._since = now

    def stop(self) -> None:
        self.go_on()
        self.read()
        self._since = None

    def reset(self) -> None:
        """From zero, running on."""
        self.read()
        self.seconds = self.waited = 0.0


class FlopCounter:
    """Counts the floating-point operations of everything that runs until `stop`."""

    def __init__(self) -> None:
        # torch.compile gives a function up for good when it first meets it under a counter.
        self._stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None
        self._counter = FlopCounterMode(display=False)
        self._counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        self._counter.__enter__()

    def stop(self) -> int:
        self._counter.__exit__(None, None, None)
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
        return self._counter.get_total_flops()


class _NoModules:
    """In place of the counter's own tracker, whose hooks on all modules only serve a table by module."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *arguments: object) -> None: ...


def synchronize(trainer: Trainer) -> None:
    """Wait for what was issued to the device."""
    device = trainer.strategy.root_device
    if device.type in ("cuda", "xpu", "mps"):
        torch.accelerator.synchronize(device)


def sum_over_ranks(trainer: Trainer, values: Sequence[float | Tensor]) -> list[float]:
    """Sums over the ranks by one reduction and one copy to the host; plain numbers of one process as they are."""
    if trainer.world_size == 1 and not any(isinstance(value, Tensor) for value in values):
        return [float(value) for value in values]
    device = trainer.strategy.root_device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    packed = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values], dtype=dtype, device=device)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            packed[index] = value
    packed = trainer.strategy.reduce(packed, reduce_op="sum")
    return [float(value) for value in packed.tolist()]
