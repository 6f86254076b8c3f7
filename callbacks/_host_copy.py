"""A checkpoint written behind the training: one copy to the host's memory, the rest in a thread."""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies nested containers of tensors to the host, into the memory of the copy before it where it fits.

    Tensors that share memory share it in the copy too, so that a file of it is as large as one of the original. New
    memory costs as much again as the copying: the system hands it out page by page.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def of(self, content: Any) -> Any:
        """Copy everything that can change: containers, and tensors of any device; valid until the next call."""
        old, self._buffers = self._buffers, []
        copied = _copied(content, {}, old, self._buffers)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies from a device are asked for, then awaited together
        return copied


def _copied(content: Any, storages: dict[int, Tensor], old: list[Tensor], new: list[Tensor]) -> Any:
    if isinstance(content, Tensor):
        return _copied_tensor(content.detach(), storages, old, new)
    if isinstance(content, dict):
        copied = content.copy()
        # What an OrderedDict knows of itself is not copied by it: the `_metadata` of a state_dict.
        if hasattr(content, "__dict__"):
            vars(copied).update(copy.deepcopy(vars(content)))
        for key, value in content.items():
            copied[key] = _copied(value, storages, old, new)
        return copied
    if isinstance(content, list):
        return [_copied(value, storages, old, new) for value in content]
    if type(content) is tuple:
        return tuple(_copied(value, storages, old, new) for value in content)
    return copy.deepcopy(content)


def _copied_tensor(tensor: Tensor, storages: dict[int, Tensor], old: list[Tensor], new: list[Tensor]) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized or type(tensor) is not Tensor:
        return tensor.cpu().clone()
    if tensor.is_conj() or tensor.is_neg():  # bits that the memory does not have
        tensor = tensor.resolve_conj().resolve_neg()
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in storages:
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        place = len(new)
        fits = place < len(old) and old[place].numel() == flat.numel()
        pinned = tensor.device.type == "cuda"
        target = old[place] if fits else torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=pinned)
        storages[key] = target.copy_(flat, non_blocking=pinned)
        new.append(target)
    copied = torch.empty(0, dtype=tensor.dtype)
    return copied.set_(storages[key].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class Behind:
    """One piece of work at a time in a thread; what it raises is kept until it is asked for."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; what was begun before must be finished."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work = self._thread.submit(work)

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            Exception: what the work raised.
        """
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def close(self) -> None:
        """End the thread, after its work."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
