"""Memory and time of the gradient cache against the batch: `python -m tests.benchmarks.gradient_cache [BATCH …]`.

Forward and backward of an encoder of two Transformer layers (16 tokens, width 64) over queries and documents, and InfoNCE
between them, chunks of 32 rows, float32, one thread:

- whole: the batch at once, as long as it fits;
- chunks: the same chunks with all of their activations, what the cache is measured by: the limit is 4/3 of its time, one
  more forward pass, where backward takes twice the forward pass;
- checkpoint: the same chunks, each under `torch.utils.checkpoint`;
- cache: `GradientCache`;
- sentence-transformers: CachedMultipleNegativesRankingLoss with the same encoder, where it is installed.

Memory is what tensors hold at the worst moment beyond batch and parameters (`cross_entropy.PeakBytes`). Seconds are those of
the processor. The contenders run in rounds, in another order each, and a time is compared with that of `chunks` in its own
round: the median of these ratios, and between which two half of the rounds are. The table of similarities is taken in 32 rows at a time, as sentence-transformers
does, so that it is the embeddings that grow: what a pair adds is the slope between the two largest batches.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.benchmarks.cross_entropy import PeakBytes
from trainerkit.functional.cross_entropy import linear_cross_entropy
from trainerkit.tasks.retrieval.gradient_cache import GradientCache

CHUNK, TOKENS, WIDTH, VOCABULARY, TEMPERATURE = 32, 16, 64, 1000, 0.05
BATCHES = (64, 256, 1024, 4096, 8192)
ROWS_A_CONTENDER, LEAST_ROUNDS = 8192, 5  # rounds of a batch: as many as make so many pairs, and not fewer
PEER = "sentence-transformers"
LARGEST_WHOLE = 1024  # above, all activations together take gigabytes and the machine's patience
# On a CPU, drawing masks takes as long as the rest of a forward pass, and nothing in the backward pass.
DROPOUT = 0.0
Step = Callable[[Tensor, Tensor], Tensor]


class Encoder(nn.Module):
    """Token ids (B, T) to the mean of the last layer, (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=DROPOUT, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.layers(self.table(ids))
        return hidden.mean(1)


def info_nce(queries: Tensor, documents: Tensor) -> Tensor:
    """With the table of similarities 32 rows at a time."""
    queries, documents = F.normalize(queries, dim=1), F.normalize(documents, dim=1)
    own = torch.arange(len(queries))
    return linear_cross_entropy(queries / TEMPERATURE, documents, own, chunk_size=CHUNK)[0]


def contenders(encoder: Encoder) -> dict[str, Step]:
    """Name to the loss of a batch; ours is `cache`, measured by `chunks`."""
    cache = GradientCache(CHUNK)

    def step(encode: Callable[[Tensor], Tensor]) -> Step:
        return lambda queries, documents: info_nce(encode(queries), encode(documents))

    found = {
        "whole": step(encoder),
        "chunks": step(lambda ids: torch.cat([encoder(part) for part in ids.split(CHUNK)])),
        "checkpoint": step(
            lambda ids: torch.cat([checkpoint(encoder, part, use_reentrant=False) for part in ids.split(CHUNK)])
        ),
        "cache": lambda queries, documents: info_nce(*cache(encoder, queries, documents)),
    }
    other = sentence_transformers(encoder)
    return found if other is None else found | {PEER: other}


def sentence_transformers(encoder: Encoder) -> Step | None:
    """Its cached loss with this encoder, or None where it is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    except ImportError:
        return None

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return features | {"sentence_embedding": self.encoder(features["input_ids"])}

    model = SentenceTransformer(modules=[Module()], device="cpu").train()
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=CHUNK)

    def step(queries: Tensor, documents: Tensor) -> Tensor:
        return loss([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (queries, documents)], None)

    return step


def measure(steps: dict[str, Step], encoder: Encoder, batch: int, rounds: int) -> dict[str, tuple[float, list[float]]]:
    """Bytes of each, and the seconds of each in each round."""
    queries, documents = torch.randint(VOCABULARY, (2, batch, TOKENS))
    losses, peaks = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}

    def run(step: Step) -> float:
        encoder.zero_grad()
        torch.manual_seed(1)
        loss = step(queries, documents)
        loss.backward()
        return loss.item()

    for name, step in steps.items():
        with PeakBytes() as memory:
            losses[name] = run(step)
        peaks[name] = memory.peak
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    shuffled, names = random.Random(0), list(steps)
    for _ in range(rounds):
        for name in shuffled.sample(names, len(names)):  # none is always the one after another's garbage
            start = time.process_time()
            run(steps[name])
            seconds[name].append(time.process_time() - start)
    return {name: (peaks[name], seconds[name]) for name in steps}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """What a quarter is below, half, and three quarters."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compared(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the rounds' ratios, and between which two half of them are."""
    low, middle, high = quartiles([one / other for one, other in zip(ours, theirs, strict=True)])
    return f"{middle:6.2f} ({low:.2f} to {high:.2f})"


def main(batches: Sequence[int] = BATCHES) -> None:
    """Print the curves."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = Encoder()
    steps = contenders(encoder)
    if PEER not in steps:
        print(f"{PEER} is not installed: its cached loss is left out")
    print(f"\nForward and backward over pairs, chunks of {CHUNK}, embeddings of {4 * WIDTH} bytes")
    found: dict[int, dict[str, tuple[float, list[float]]]] = {}
    for batch in batches:
        able = {name: step for name, step in steps.items() if name != "whole" or batch <= LARGEST_WHOLE}
        rounds = max(LEAST_ROUNDS, ROWS_A_CONTENDER // batch)
        print(f"  batch {batch:,}, {rounds} rounds{'':<13} {'MiB':>8} {'to chunks':>10} {'seconds':>9}   to chunks")
        found[batch] = measure(able, encoder, batch, rounds)
        bytes_, seconds = found[batch]["chunks"]
        for name, (peak, took) in found[batch].items():
            memory = f"{peak / 2**20:8.1f} {peak / bytes_:10.3f}"
            print(f"    {name:<32} {memory} {statistics.median(took):9.3f} {compared(took, seconds)}", flush=True)
        if PEER in found[batch]:
            print(f"    {'cache to ' + PEER:<32} {'':29}{compared(found[batch]['cache'][1], found[batch][PEER][1])}")
    if len(found) > 1:
        small, large = sorted(found)[-2:]
        for name in (name for name in steps if name != "whole"):
            slope = (found[large][name][0] - found[small][name][0]) / (large - small)
            print(f"  what a pair adds: {name:<22} {slope:9,.0f} bytes, {slope / (8 * WIDTH):6.1f} of its embeddings")


if __name__ == "__main__":
    main([int(batch) for batch in sys.argv[1:]] or BATCHES)
