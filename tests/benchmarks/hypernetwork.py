"""One training step of the hypernetwork at the shape of a 7 B model: `python -m tests.benchmarks.hypernetwork`.

A library of 500 random adapters of 32 layers × q, v of 4096×4096 at rank 8, 4.2 million numbers each, lies in bfloat16
safetensors files that are mapped into memory and read a batch at a time (4.2 GB of disk in a temporary folder, freed
after). Size L, latent 128, head 256 (34 million weights), loss delta_w with MSE, batches of 4 and 16, float32, on as
many threads as torch takes:

- ours: `HyperNetwork` and `ReconstructionLoss` without consistency and sparsity, which the others do not compute;
- regularized: the same with both at their defaults;
- loop: for each layer trunk, head, and the loss by Gram matrices, all tasks at once; one backward pass at the end;
- products: for each layer trunk, head, B̂Â and BA formed, mean square, and its backward pass at once, since the products
  of all layers take more gigabytes than there are; with the smaller batch alone.

All have the same weights, batch and loss, and memory that is freed is kept for the next tensor (`keep_freed_memory`).
Seconds are medians of forward, loss and backward, in turns; beside it with AdamW's step. Memory is what tensors hold at
the worst moment beyond parameters and batch (`cross_entropy.PeakBytes`).

Then the peak of a whole process (resident, mapped pages included) that opens a library, streams its statistics and
trains for a few steps, with 50 and with 500 adapters.
"""

import ctypes
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.cross_entropy import PeakBytes
from trainerkit.adapter_layout import AdapterLayout, Factors
from trainerkit.adapters import write_adapter
from trainerkit.data.lora_folders import AdapterFolders
from trainerkit.tasks.t2l.delta_w import inner
from trainerkit.tasks.t2l.losses import ReconstructionLoss
from trainerkit.tasks.t2l.network import HyperNetwork

ADAPTERS, FEW, DEPTHS, WIDTH, RANK = 500, 50, 32, 4096, 8
BATCHES, EMBEDDING = (4, 16), 384
LAYERS = [(f"model.layers.{i}.self_attn.{name}", WIDTH, WIDTH) for i in range(DEPTHS) for name in ("q_proj", "v_proj")]
Step = Callable[[HyperNetwork, Tensor, Factors], float]


def make_library(root: Path, few: Path) -> None:
    """All adapters in `root`, links to the first of them in `few`."""
    layout = AdapterLayout(LAYERS, RANK)
    few.mkdir()
    for number in range(ADAPTERS):
        folder = root / f"{number:03}"
        folder.mkdir(parents=True)
        write_adapter(
            folder, layout, {k: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02) for k, s in layout.shapes.items()}
        )
        if number < FEW:
            (few / folder.name).symlink_to(folder)


def ours(network: HyperNetwork, task: Tensor, target: Factors) -> float:
    """All layers at once."""
    losses = ReconstructionLoss(network.layout, "delta_w", "mse").layer_losses(network(task), target)
    loss = losses.sum()
    loss.backward()
    return loss.item()


def regularized(network: HyperNetwork, task: Tensor, target: Factors) -> float:
    """With consistency and sparsity."""
    parts = ReconstructionLoss(network.layout)(network(task), target, torch.ones(len(LAYERS)))
    parts.total.backward()
    return parts.layers.sum().item()


def loop(network: HyperNetwork, task: Tensor, target: Factors) -> float:
    """Layer by layer, the loss by Gram matrices."""
    losses = []
    for a_hat, b_hat, a, b in each_layer(network, task, target):
        squares = inner(b_hat, a_hat, b_hat, a_hat) - 2 * inner(b_hat, a_hat, b, a) + inner(b, a, b, a)
        losses.append(squares.mean() / WIDTH**2)
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item()


def products(network: HyperNetwork, task: Tensor, target: Factors) -> float:
    """Layer by layer, the products formed."""
    total = 0.0
    for a_hat, b_hat, a, b in each_layer(network, task, target):
        loss = F.mse_loss(b_hat @ a_hat, b @ a)
        loss.backward()
        total += loss.item()
    return total


def each_layer(network: HyperNetwork, task: Tensor, target: Factors):
    """A network of size L for one layer after the other: A and B, predicted and wanted, (B, r, in) and (B, out, r)."""
    for number, t in enumerate(network.layout.types):
        head = network.heads[f"to_{t.label}"]
        for place, depth in enumerate(t.depths):
            parts = [
                encoder(torch.tensor([index]))
                for encoder, index in ((network.depth_encoder, depth), (network.type_encoder, number))
            ]
            x = torch.cat([network.task_encoder(task), *(part.expand(len(task), -1) for part in parts)], dim=1)
            hidden = network.to_head(network.second_block(network.first_block(network.mixer(x))))
            a_hat = head.mean_a[place] + head.std_a[place] * head.a(hidden).view(-1, RANK, WIDTH)
            b_hat = head.mean_b[place] + head.std_b[place] * head.b(hidden).view(-1, WIDTH, RANK)
            yield a_hat, b_hat, target[f"A/{t.label}"][:, place], target[f"B/{t.label}"][:, place]


STEPS: dict[str, Step] = {"ours": ours, "regularized": regularized, "loop": loop, "products": products}


def network_for(folders: AdapterFolders) -> HyperNetwork:
    """Of the library's layout."""
    torch.manual_seed(0)
    return HyperNetwork(folders.layout.layers, folders.layout.rank, EMBEDDING)


def compare(root: Path, batch: int, rounds: int) -> None:
    """Print seconds and bytes of each contender."""
    folders = AdapterFolders(root, "path", in_memory=False)
    network = network_for(folders)
    start = time.perf_counter()
    target = folders.factors(torch.arange(batch))
    reading = time.perf_counter() - start
    network.set_statistics({key: (value.mean(0), value.std(0)) for key, value in target.items()})
    task, optimizer = torch.randn(batch, EMBEDDING), torch.optim.AdamW(network.parameters(), 1e-9)
    steps = {name: step for name, step in STEPS.items() if name != "products" or batch == BATCHES[0]}
    losses, peaks = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    updates: list[float] = []

    def run(name: str) -> None:
        optimizer.zero_grad()
        start = time.perf_counter()
        losses[name] = steps[name](network, task, target)
        seconds[name].append(time.perf_counter() - start)

    for name in steps:
        with PeakBytes() as memory:
            run(name)
        peaks[name] = memory.peak
    for _ in range(rounds):
        for name in steps:
            if name == "products":  # once is enough: it takes longer than all the rest
                continue
            run(name)
            start = time.perf_counter()
            optimizer.step()
            updates.append(time.perf_counter() - start)
    assert max(losses.values()) / min(losses.values()) < 1.001, losses
    # The first does not count, except where there is no other.
    medians = {name: statistics.median(values[1:] or values) for name, values in seconds.items()}
    update = statistics.median(updates)
    print(
        f"\nA step of {batch} adapters, {torch.get_num_threads()} threads; reading them {reading:.2f} s, AdamW {update:.2f} s"
    )
    print(f"  {'':<12} {'seconds':>8} {'to ours':>8} {'with AdamW':>11} {'to ours':>8} {'MiB':>8}")
    for name, took in medians.items():
        whole, first = took + update, medians["ours"]
        ratios = f"{took:8.2f} {took / first:8.2f} {whole:11.2f} {whole / (first + update):8.2f}"
        print(f"  {name:<12} {ratios} {peaks[name] / 2**20:8.0f}", flush=True)


def train_once(root: Path, steps: int = 3) -> None:
    """A process of its own: print the time of the statistics, and the peak of all it held, in MiB."""
    folders = AdapterFolders(root, "path", in_memory=False)
    network = network_for(folders)
    start = time.perf_counter()
    network.set_statistics(folders.statistics(torch.arange(len(folders))))
    took = time.perf_counter() - start
    optimizer, batch = torch.optim.AdamW(network.parameters(), 1e-4), BATCHES[0]
    for rows in torch.randperm(len(folders))[: batch * steps].split(batch):
        optimizer.zero_grad()
        regularized(network, torch.randn(len(rows), EMBEDDING), folders.factors(rows))
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"  {len(folders):>4} adapters: {peak:7.0f} MiB, statistics {took:5.1f} s", flush=True)


def keep_freed_memory() -> None:
    """Have glibc give freed memory to the next that asks, as torch's allocator does on a GPU: else each of the many
    large tensors of a loop is paid for in new pages of the system."""
    mmap_max, trim_threshold = -4, -1
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1)):
        ctypes.CDLL("libc.so.6").mallopt(option, value)


def main(rounds: int = 3) -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as folder:
        root, few = Path(folder, "all"), Path(folder, "few")
        start = time.perf_counter()
        make_library(root, few)
        print(f"{ADAPTERS} adapters written in {time.perf_counter() - start:.0f} s")
        keep_freed_memory()
        for batch in BATCHES:
            compare(root, batch, rounds)
        print("\nPeak of a process that streams statistics and trains, by the number of adapters", flush=True)
        for one in (few, root):
            subprocess.run([sys.executable, "-m", "tests.benchmarks.hypernetwork", str(one)], check=True)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].isdecimal():
        train_once(Path(sys.argv[1]))
    else:
        main(*map(int, sys.argv[1:]))
