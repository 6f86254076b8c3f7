"""Memory and time of a language model's loss: `python -m tests.benchmarks.cross_entropy`.

Forward and backward of the output layer and its loss, `linear_cross_entropy` beside `F.cross_entropy(hidden @ weight.T)`,
against the length of the sequence and the vocabulary; batches of 4, width 128, float32; one thread, and its seconds on the
processor, which other work on the machine changes little.

Memory is what tensors hold at the worst moment, beyond `hidden`, `weight` and `targets`: `PeakBytes` sees every operation's
results, and adds a storage up while it lives. What an operation takes and gives back inside itself is not in it. The
process's own peak is no measure here, since its allocator keeps what was freed.
"""

import statistics
import sys
import time
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainerkit.functional.cross_entropy import linear_cross_entropy

BATCH, WIDTH = 4, 128
VOCABULARIES = (257, 2048, 16384, 50257)
LENGTHS = (64, 256, 1024)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._count(leaf, given)
        return found

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._alive:  # a view, or written in place
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As it is usually written."""
    return F.cross_entropy(hidden.flatten(0, 1) @ weight.T, targets.flatten())


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours."""
    return linear_cross_entropy(hidden, weight, targets)[0]


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
CONTENDERS: tuple[Loss, Loss] = (plain, chunked)


def measure(length: int, vocabulary: int, rounds: int) -> tuple[list[float], list[float]]:
    """Bytes and seconds of both, in turns."""
    hidden = torch.randn(BATCH, length, WIDTH, requires_grad=True)
    weight = (0.05 * torch.randn(vocabulary, WIDTH)).requires_grad_()
    targets = torch.randint(vocabulary, (BATCH, length))

    def run(loss: Loss) -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, targets).backward()

    peaks = []
    for loss in CONTENDERS:
        with PeakBytes() as memory:
            run(loss)
        peaks.append(float(memory.peak))
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for place, loss in enumerate(CONTENDERS):
            start = time.process_time()
            run(loss)
            seconds[place].append(time.process_time() - start)
    return peaks, [statistics.median(times) for times in seconds]


def main(rounds: int = 5) -> None:
    """Print the curve."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"\nForward and backward of output layer and loss, batches of {BATCH}, width {WIDTH}, float32")
    print(
        f"  {'vocabulary':>10} {'length':>6} {'plain':>12} {'chunked':>12} {'ratio':>7} {'plain':>10} {'chunked':>10} {'ratio':>7}"
    )
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            peaks, seconds = measure(length, vocabulary, rounds)
            mebibytes = " ".join(f"{peak / 2**20:8.1f} MiB" for peak in peaks)
            times = " ".join(f"{1e3 * took:7.1f} ms" for took in seconds)
            ratios = [two[1] / two[0] for two in (peaks, seconds)]
            print(f"  {vocabulary:>10,} {length:>6} {mebibytes} {ratios[0]:7.3f} {times} {ratios[1]:7.2f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
