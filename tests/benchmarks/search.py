"""Memory and time of an exact search: `python -m tests.benchmarks.search`.

`top_k` in tiles beside torch's `(queries @ candidates.T).topk(k)` on vectors of length 1, which has all similarities at
once, and `ranks`, which compares each similarity with that of the relevant candidate. 2,000 queries, width 128, float32;
one thread, seconds on the processor, in turns in one process. Memory as in `tests.benchmarks.cross_entropy`: the most
that tensors hold beyond queries and candidates.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tests.benchmarks.cross_entropy import PeakBytes
from trainerkit.tasks.retrieval.search import ranks, top_k
from trainerkit.tasks.retrieval.similarity import normalized

QUERIES, WIDTH, K = 2_000, 128, 10
CANDIDATES = (10_000, 30_000, 100_000)


def plain(queries: Tensor, candidates: Tensor) -> Tensor:
    """All similarities at once."""
    return (normalized(queries) @ normalized(candidates).T).topk(K, dim=1).indices


def tiled(queries: Tensor, candidates: Tensor) -> Tensor:
    """Ours."""
    return top_k(queries, candidates, K)[1]


def ranked(queries: Tensor, candidates: Tensor) -> Tensor:
    """The rank of the candidate that has the query's number."""
    return ranks(queries, candidates, (torch.arange(len(queries)), torch.arange(len(candidates))))[1]


Search = Callable[[Tensor, Tensor], Tensor]
CONTENDERS: tuple[Search, ...] = (plain, tiled, ranked)


def measure(candidates: int, rounds: int) -> tuple[list[float], list[float]]:
    """Bytes and seconds of each, in turns."""
    queries, corpus = torch.randn(QUERIES, WIDTH), torch.randn(candidates, WIDTH)
    peaks, seconds = [], [[] for _ in CONTENDERS]
    found = []
    for search in CONTENDERS:
        with PeakBytes() as memory:
            found.append(search(queries, corpus))
        peaks.append(float(memory.peak))
    assert torch.equal(found[0], found[1])
    for _ in range(rounds):
        for place, search in enumerate(CONTENDERS):
            start = time.process_time()
            search(queries, corpus)
            seconds[place].append(time.process_time() - start)
    return peaks, [statistics.median(times) for times in seconds]


def main(rounds: int = 3) -> None:
    """Print the curve."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = [search.__name__ for search in CONTENDERS]
    print(
        f"\n{QUERIES:,} queries, width {WIDTH}, float32: memory in MiB and seconds of {', '.join(names)}; tiled/plain"
    )
    for candidates in CANDIDATES:
        peaks, seconds = measure(candidates, rounds)
        mebibytes = " ".join(f"{peak / 2**20:8.1f}" for peak in peaks)
        times = " ".join(f"{took:7.2f}" for took in seconds)
        ratios = f"{peaks[1] / peaks[0]:6.3f} {seconds[1] / seconds[0]:6.2f}"
        print(f"  {candidates:>9,} {mebibytes}   {times}   {ratios}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
