"""A step of Muon for small models: `python -m tests.benchmarks.muon`.

The hidden matrices of a GPT of 4 layers and width 256, turn by turn, one thread, in seconds of the processor:
torch.optim.Muon, which takes one matrix after the other in bfloat16; ours, which takes all of one shape at once; Newton and
Schulz's iteration alone in both types; and AdamW.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from tests.benchmarks.turns import table
from trainerkit.muon import Muon, newton_schulz

LAYERS, WIDTH = 4, 256
SHAPES = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] * LAYERS


def matrices() -> list[nn.Parameter]:
    """With gradients."""
    found = [nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter)
    return found


def iterations(kind: torch.dtype) -> Callable[[], object]:
    """The iteration of all matrices, shape by shape."""
    stacks = [torch.randn(LAYERS, *sorted(shape)) for shape in SHAPES[:4]]
    return lambda: [newton_schulz(stack, 5, kind) for stack in stacks]


def main(rounds: int = 7) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    contenders: dict[str, Callable[[], object]] = {
        "trainerkit.muon.Muon": Muon([{"params": matrices(), "muon": True}]).step,
        "the iteration alone, float32": iterations(torch.float32),
        "the iteration alone, bfloat16": iterations(torch.bfloat16),
        "torch.optim.AdamW, fused": torch.optim.AdamW(matrices(), fused=True).step,
    }
    if hasattr(torch.optim, "Muon"):
        contenders = {"torch.optim.Muon": torch.optim.Muon(matrices()).step} | contenders
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, step in contenders.items():
            start = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    table(f"A step for {len(SHAPES)} matrices, {LAYERS} layers of {WIDTH}", medians, next(iter(contenders)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
