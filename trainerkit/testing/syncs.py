"""Counts what makes the host wait for the device."""

from types import TracebackType
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Each needs a value on the host: on a GPU, everything that was issued has to finish first.
_CALLS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "is_nonzero", "equal",
    "allclose", "unique", "masked_select",
}  # fmt: skip
_OPERATORS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal"}


class SyncCounter:
    """Counts, between the first callback's `on_train_batch_start` and the last one's `on_train_batch_end`.

    The first batch of a run does not count: what is done once may wait for the device.
    In Python and below it: `float(tensor)` is seen as a call, an `.item()` inside torch's C++ as an operator. Where the
    tensors are on CUDA, torch's own sync debug mode raises as well.
    """

    def __init__(self) -> None:
        self.count = 0
        self.active = False
        self._modes: tuple[Any, ...] = (_Functions(self), _Operators(self))

    def __enter__(self) -> "SyncCounter":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, at)
        self.active = False

    def opening(self) -> Callback:
        """The callback that stands first, and makes the witness at the end close what it opens."""
        return _Opens(self)

    def switch(self, active: bool) -> None:
        """Begin or cease to count."""
        self.active = active
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if active else "default")


class _Opens(Callback):
    def __init__(self, counter: SyncCounter) -> None:
        self.counter = counter

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.callbacks[-1].after_batch = lambda: self.counter.switch(False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.counter.switch(trainer.fit_loop.epoch_loop.total_batch_idx > 0)


class _Functions(TorchFunctionMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.counter.active or getattr(func, "__name__", "") not in _CALLS:
            return func(*args, **(kwargs or {}))
        self.counter.count += 1
        self.counter.active = False  # the operator below it is the same copy
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.active = True


class _Operators(TorchDispatchMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counter.active and func.overloadpacket.__name__ in _OPERATORS:
            self.counter.count += 1
        return func(*args, **(kwargs or {}))
