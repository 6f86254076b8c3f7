"""What taking turns costs beside a loop written by hand: `python -m tests.benchmarks.alternating`.

A DCGAN of 28 × 28 pictures, batches of 64, Adam for both networks, two threads: the loop of the tutorials, and
`AlternatingTask`.
"""

import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import softplus

from tests.benchmarks.turns import measure, quiet, table
from trainerkit.alternating import AlternatingTask, Turn
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.trainer import Trainer

BATCH, STEPS, NOISE, WIDTH = 64, 40, 64, 32
ADAM = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999))


class DCGAN(AlternatingTask):
    """A. Radford et al., 2016, arXiv:1511.06434, for 28 × 28 pictures."""

    def __init__(self) -> None:
        super().__init__({"discriminator": Turn("discriminator", ADAM), "generator": Turn("generator", ADAM)})
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(NOISE, 4 * WIDTH, 7), nn.BatchNorm2d(4 * WIDTH), nn.ReLU(),
            nn.ConvTranspose2d(4 * WIDTH, 2 * WIDTH, 4, 2, 1), nn.BatchNorm2d(2 * WIDTH), nn.ReLU(),
            nn.ConvTranspose2d(2 * WIDTH, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(2 * WIDTH * 49, 1),
        )  # fmt: skip

    def turn_loss(self, name: str, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = gan_loss(self.generator, self.discriminator, name, batch["x"])
        self.track(f"train/{name}", loss, weight=len(batch["x"]))
        return loss


def gan_loss(generator: nn.Module, discriminator: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    z = torch.randn(len(x), NOISE, 1, 1)
    if name == "generator":
        return softplus(-discriminator(generator(z))).mean()
    with torch.no_grad():
        fake = generator(z)
    return (softplus(-discriminator(x)) + softplus(discriminator(fake))).mean()


def batches() -> BatchLoader:
    x = torch.rand(BATCH * STEPS, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return BatchLoader(ArrayDataset({"x": x}), EpochBatches(len(x), BATCH, shuffle=True))


def by_hand(folder: Path) -> float:
    task = DCGAN()
    networks = {"discriminator": task.discriminator, "generator": task.generator}
    optimizers = {name: ADAM(network.parameters(), fused=True) for name, network in networks.items()}
    totals = dict.fromkeys(networks, torch.zeros(()))
    starts = []
    for batch in batches():
        starts.append(time.perf_counter())
        for name, optimizer in optimizers.items():
            # What a turn does not need a gradient of has none, as in `AlternatingTask`.
            for other, network in networks.items():
                network.requires_grad_(other == name)
            optimizer.zero_grad()
            loss = gan_loss(task.generator, task.discriminator, name, batch["x"])
            loss.backward()
            optimizer.step()
            totals[name] = totals[name] + loss.detach()
    return of_steps(starts)


class Starts(Callback):
    """When each batch began."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def ours(folder: Path) -> float:
    starts = Starts()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[starts], default_root_dir=folder,
        enable_model_summary=False, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(DCGAN(), batches())
    return of_steps(starts.times)


def of_steps(starts: list[float]) -> float:
    """The median of a run's steps, its first two left out."""
    return statistics.median(end - start for start, end in pairwise(starts[2:]))


def main(rounds: int = 9) -> None:
    quiet()
    contenders = {"written by hand": by_hand, "AlternatingTask": ours}
    table(f"A DCGAN, batches of {BATCH}", measure(contenders, rounds), "written by hand")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
