"""What the framework costs where steps are small: `python -m tests.benchmarks.small_steps`.

Three linear layers of 64, batches of 64, one thread. The hand-written loop exists twice: bare (forward, backward,
AdamW), and with the same work as trainerkit's default stack (shuffled batches, weight-decay groups, an average of the
weights, the epoch's mean loss).
"""

import sys
import time
from functools import partial
from pathlib import Path

import torch
from lightning import pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, TQDMProgressBar
from torch import Tensor, nn

from tests.benchmarks.turns import measure, table
from trainerkit.callbacks import (
    EMA,
    BestWeights,
    CrashSafeCheckpoint,
    EarlyStopping,
    ExactResume,
    History,
    SavePredictions,
)
from trainerkit.callbacks.ema import ema_decay, ema_update_
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.optim import make_optimizer
from trainerkit.task import Task
from trainerkit.trainer import Trainer

STEPS, BATCH, WIDTH = 1000, 64, 64
X, Y = torch.randn(STEPS * BATCH, WIDTH), torch.randn(STEPS * BATCH, WIDTH)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
    )


def bare(folder: Path, fused: bool | None = True) -> float:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    start = time.perf_counter()
    for i in range(0, len(X), BATCH):
        loss = (model(X[i : i + BATCH]) - Y[i : i + BATCH]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / STEPS


def same_work(folder: Path) -> float:
    model = network()
    optimizer = make_optimizer(torch.optim.AdamW, model)
    live = list(model.parameters())
    shadow = [p.detach().clone() for p in live]
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step, rows in enumerate(torch.randperm(len(X)).split(BATCH)):
        loss = (model(X[rows]) - Y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update_(shadow, live, ema_decay(0.999, step))
        losses.append(loss.detach())
    torch.stack(losses).mean().item()
    return (time.perf_counter() - start) / STEPS


class Clock(pl.Callback):
    """Times the steps of an epoch, from its start to the end of its last batch."""

    def on_train_epoch_start(self, *_) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_) -> None:
        self.seconds = time.perf_counter() - self.start


class Slices:
    def __len__(self) -> int:
        return STEPS

    def __iter__(self):
        for i in range(0, len(X), BATCH):
            yield X[i : i + BATCH], Y[i : i + BATCH]


class Lightning(pl.LightningModule):
    logs = False

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch, batch_idx):
        loss = (self.network(batch[0]) - batch[1]).square().mean()
        if self.logs:
            self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


class LightningLogs(Lightning):
    logs = True


def lightning(kind, *callbacks):
    def run(folder: Path) -> float:
        clock = Clock()
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[clock, *(make() for make in callbacks)], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(kind(), Slices())
        return clock.seconds / STEPS

    return run


class Ours(Task):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch, batch_idx):
        loss = (self.network(batch["x"]) - batch["y"]).square().mean()
        self.track("train/loss", loss, weight=len(batch["x"]))
        return loss


def default_stack(folder: Path) -> float:
    clock = Clock()
    monitor = "train/loss"
    callbacks = [
        clock, EMA(), EarlyStopping(monitor), History(), BestWeights(monitor), ExactResume(), SavePredictions(),
        CrashSafeCheckpoint(monitor), TQDMProgressBar(refresh_rate=20),
    ]  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=pl.loggers.CSVLogger(folder), callbacks=callbacks,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Ours(), BatchLoader(ArrayDataset({"x": X, "y": Y}), EpochBatches(len(X), BATCH, shuffle=True)))
    return clock.seconds / STEPS


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    contenders = {
        "hand-written, bare": bare,
        "hand-written, bare, AdamW as torch has it by default": partial(bare, fused=None),
        "hand-written, the same work": same_work,
        "Lightning, bare": lightning(Lightning),
        "Lightning, one self.log": lightning(LightningLogs),
        "Lightning, self.log and its EMA": lightning(LightningLogs, lambda: EMAWeightAveraging(decay=0.999)),
        "trainerkit, the whole default stack": default_stack,
    }
    medians = measure(contenders, rounds)
    table("Small steps, ratio to the hand-written loop with the same work", medians, "hand-written, the same work")
    table("The same, ratio to the bare hand-written loop", medians, "hand-written, bare")
    default = "hand-written, bare, AdamW as torch has it by default"
    table("The same, ratio to the bare hand-written loop with torch's default AdamW", medians, default)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
