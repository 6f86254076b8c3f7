"""What StepHashes costs a step of the documented masked autoencoder: `python -m tests.benchmarks.step_hashes`.

The model, data and optimizer of tests/benchmarks/mae_training.py, in batches of 128 on the CPU, one thread, no other
callback. Milliseconds of this process's CPU time, in which other work on the machine does not count.
"""

import sys
import time
from pathlib import Path

import torch
from lightning import pytorch as pl

from tests.benchmarks.mae_training import OPTIMIZER, SIZES, STEPS, data
from tests.benchmarks.turns import measure, table
from trainerkit.callbacks import StepHashes
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.tasks.mae import MaskedAutoencoder, MaskedAutoencoderTask
from trainerkit.trainer import Trainer

BATCH = 128


class Clock(pl.Callback):
    """CPU time of an epoch's steps."""

    def on_train_epoch_start(self, *_) -> None:
        self.start = time.process_time()

    def on_train_epoch_end(self, *_) -> None:
        self.seconds = time.process_time() - self.start


def steps(folder: Path, *callbacks: StepHashes) -> float:
    """Seconds a step."""
    x, clock = data(BATCH), Clock()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[clock, *callbacks], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=folder,
    )  # fmt: skip
    task = MaskedAutoencoderTask(MaskedAutoencoder(**SIZES), optimizer=OPTIMIZER)
    trainer.fit(task, BatchLoader(ArrayDataset({"x": x}), EpochBatches(len(x), BATCH, shuffle=True)))
    return clock.seconds / STEPS[BATCH]


def every_step(folder: Path) -> float:
    took = steps(folder, StepHashes())
    (file,) = folder.rglob("rank0.jsonl")
    WRITTEN[:] = [len(line) for line in file.read_bytes().splitlines()]
    return took


WRITTEN: list[int] = []
CONTENDERS = {
    "without": steps,
    "every step": every_step,
    "every 10th step": lambda folder: steps(folder, StepHashes(every_n_steps=10)),
}


def main(rounds: int = 5) -> None:
    """Print milliseconds a step."""
    torch.set_num_threads(1)
    table(f"The documented model, batches of {BATCH}, CPU time", measure(CONTENDERS, rounds), "without")
    weights = sum(p.numel() * p.element_size() for p in MaskedAutoencoder(**SIZES).parameters())
    print(f"  hashed at a record: {3 * weights / 2**20:.1f} MiB (weights, Adam's two averages)")
    print(f"  written: {WRITTEN[-1]} bytes a step, the names once: {max(WRITTEN)} bytes")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
