"""512 new tokens with and without a cache of keys and values: `python -m tests.benchmarks.generation [rounds]`.

A network of GPT-2's shape that is fit for a CPU: learned positions, tanh GELU, 6 layers of 384, 6 heads, context 1,024,
vocabulary 4,096; a prompt of 16 tokens, one row, greedy. And 128 tokens for each of four rows at once, sampled.
"""

import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.turns import measure, table
from trainerkit.tasks.lm import GPT, generate

NETWORK = GPT(4096, 1024, 6, 384, 6, positions="learned", activation="gelu_tanh").eval()
PROMPT = torch.randint(4096, (4, 16), generator=torch.Generator().manual_seed(0))


def contender(use_cache: bool, rows: int, new_tokens: int, **options):
    def run(folder: Path) -> float:
        start = time.perf_counter()
        generate(NETWORK, PROMPT[:rows], max_new_tokens=new_tokens, use_cache=use_cache, **options)
        return (time.perf_counter() - start) / new_tokens

    return run


def main(rounds: int = 1) -> None:
    """Print milliseconds a token, and how many times as fast the cache is."""
    for rows, count, options in ((1, 512, {"temperature": 0}), (4, 128, {"seed": 0, "top_k": 50, "top_p": 0.9})):
        same = [generate(NETWORK, PROMPT[:rows], max_new_tokens=64, use_cache=use, **options) for use in (True, False)]
        medians = measure({f"cache={use}": contender(use, rows, count, **options) for use in (True, False)}, rounds)
        table(f"{count} tokens for each of {rows} rows, {options}; a step", medians, against="cache=True")
        ratio = medians["cache=False"] / medians["cache=True"]
        print(
            f"  the cache is {ratio:.1f} times as fast; the first 64 tokens are equal: {torch.equal(*same)}", flush=True
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
