"""What a checkpoint costs: `python -m tests.benchmarks.checkpoints`.

A hundred million parameters. In one run, in turns: `torch.save` and a flush to disk, the least a checkpoint that survives
a power cut can be; CrashSafeCheckpoint, which hashes, writes a manifest and removes the oldest as well; Lightning's
ModelCheckpoint, which does not flush. Then how long the step waits where the writing goes on behind it, beside one copy of
the weights in the host's memory.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning import pytorch as pl
from lightning.pytorch import LightningModule
from torch import nn

from tests.benchmarks.turns import quiet
from trainerkit.callbacks import CrashSafeCheckpoint

MATRICES, WIDTH = 100, 1000


class Large(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(MATRICES)])

    def training_step(self, batch, batch_idx):
        return self.weights[0].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Turns(pl.Callback):
    """Times every contender after each step; the first round, which makes files and memory anew, does not count."""

    def __init__(self, contenders: dict[str, Callable[[pl.Trainer], None]]) -> None:
        self.contenders = contenders
        self.took: dict[str, list[float]] = {name: [] for name in contenders}

    def on_train_batch_end(self, trainer, *_) -> None:
        for name, contender in self.contenders.items():
            os.sync()  # nobody pays for what another one left to be written
            start = time.perf_counter()
            contender(trainer)
            self.took[name].append(time.perf_counter() - start)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(took[1:]) for name, took in self.took.items()}


def plain(folder: Path) -> Callable[[pl.Trainer], None]:
    def save(trainer: pl.Trainer) -> None:
        with open(folder / "plain.ckpt", "wb") as file:
            torch.save(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), file)
            file.flush()
            os.fsync(file.fileno())

    return save


def with_callback(folder: Path, asynchronous: bool) -> tuple[CrashSafeCheckpoint, Callable[[pl.Trainer], None]]:
    callback = CrashSafeCheckpoint(
        monitor=None, dirname=str(folder), keep_checkpoints=1, asynchronous=asynchronous, every_n_epochs=10**9
    )
    return callback, lambda trainer: callback._save(trainer, trainer.global_step, ["last"])


def fit(folder: Path, rounds: int, callbacks: list[pl.Callback]) -> None:
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=callbacks, default_root_dir=folder,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Large(), torch.zeros(rounds + 1, 1))


def main(rounds: int = 7) -> None:
    quiet()
    with tempfile.TemporaryDirectory(dir=".") as name:  # not where temporary files may be in memory
        folder = Path(name).resolve()
        callback, ours = with_callback(folder / "ours", False)
        contenders = {
            "torch.save, flushed": plain(folder),
            "CrashSafeCheckpoint": ours,
            "Lightning's save_checkpoint, not flushed": lambda trainer: trainer.save_checkpoint(
                folder / "lightning.ckpt"
            ),
        }
        turns = Turns(contenders)
        fit(folder, rounds, [turns, callback])
        report(f"A checkpoint of {MATRICES * WIDTH**2 / 1e6:.0f} M parameters", turns.medians())

        callback, behind = with_callback(folder / "behind", True)
        copies = [torch.empty(WIDTH, WIDTH) for _ in range(MATRICES)]

        def copy(trainer: pl.Trainer) -> None:
            torch._foreach_copy_(copies, [weight.detach() for weight in trainer.lightning_module.weights])

        def rest(trainer: pl.Trainer) -> None:
            callback._behind.finish()

        turns = Turns({"one copy to the host": copy, "the step waits": behind, "written behind it": rest})
        fit(folder, rounds, [turns, callback])
        report("Asynchronously", turns.medians())


def report(title: str, medians: dict[str, float]) -> None:
    print(f"\n{title}")
    first = next(iter(medians.values()))
    for contender, took in medians.items():
        print(f"  {contender:<42} {took * 1e3:7.1f} ms  {took / first:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
