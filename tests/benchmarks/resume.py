"""What ExactResume costs a step, and what resuming at batch n costs: `python -m tests.benchmarks.resume`.

1. A step that only gets its batch, with and without ExactResume, turn by turn; the difference as a part of a step of the
   documented masked autoencoder at batches of 128.
2. The time from the start of fit to the first batch that is trained on, resumed at batch n of a map-style data set whose
   samples take 0.2 ms each to read.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.benchmarks.mae_training import LENGTH, OPTIMIZER, SCHEDULE, SIZES
from tests.benchmarks.turns import measure, quiet
from trainerkit.callbacks import ExactResume
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches, SeededSamples
from trainerkit.tasks.mae import MaskedAutoencoder, MaskedAutoencoderTask

STEPS, BATCH = 12, 128
POSITIONS = (10, 1_000, 100_000)
READ_SECONDS = 2e-4


# 1. A step


class Rows(IterableDataset):
    """Read in the main process: its draws need a stream of their own, the dearest kind."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


LOADERS = {
    "BatchLoader": lambda x: BatchLoader(ArrayDataset({"x": x}), EpochBatches(len(x), 8, shuffle=True)),
    "DataLoader": lambda x: DataLoader(x, 8, shuffle=True),
    "DataLoader, 2 workers": lambda x: DataLoader(x, 8, shuffle=True, num_workers=2),
    "iterable, no workers": lambda x: DataLoader(Rows(x), 8),
}


class Steps(Callback):
    """Seconds a batch; the fastest quarter, for the machine has other things to do."""

    def __init__(self):
        self.times = []

    def on_train_batch_start(self, *_):
        self.times.append(time.perf_counter())

    def seconds(self):
        return torch.tensor(self.times, dtype=torch.float64).diff()[1:].quantile(0.25).item()


def documented_step(folder):
    """Seconds of a step of the documented model."""
    x = torch.randn(BATCH * STEPS, LENGTH, generator=torch.Generator().manual_seed(0)).cumsum(1)
    steps = Steps()
    task = MaskedAutoencoderTask(MaskedAutoencoder(**SIZES), optimizer=OPTIMIZER, scheduler=SCHEDULE)
    loader = BatchLoader(ArrayDataset({"x": x}), EpochBatches(len(x), BATCH, shuffle=True))
    nothing_trainer(folder, [steps]).fit(task, loader)
    return steps.seconds()


def empty_step(kind, callbacks, folder):
    """Seconds of a step that does nothing but get its batch."""
    steps = Steps()
    nothing_trainer(folder, [*callbacks(), steps]).fit(Nothing(), LOADERS[kind](torch.zeros(8 * 500, 4)))
    return steps.seconds()


def step_costs(rounds):
    contenders = {"the documented model, batches of 128": documented_step}
    for kind in LOADERS:
        contenders[f"{kind}: empty step"] = partial(empty_step, kind, list)
        contenders[f"{kind}: with ExactResume"] = partial(empty_step, kind, lambda: [ExactResume()])
    medians = measure(contenders, rounds)
    step = next(iter(medians.values()))
    print(f"\nA step of the documented model: {1e3 * step:.1f} ms. Of it ExactResume takes, by the loader")
    for kind in LOADERS:
        cost = medians[f"{kind}: with ExactResume"] - medians[f"{kind}: empty step"]
        print(f"  {kind:<24}{1e6 * cost:8.1f} µs  {100 * cost / step:7.3f} %")


# 2. Resuming


class Slow(Dataset):
    """A sample takes as long as decoding a small picture."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        end = time.perf_counter() + READ_SECONDS
        while time.perf_counter() < end:
            continue
        return torch.rand(1)


class Nothing(LightningModule):
    """Trains nothing: the way to the first batch is all there is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class First(Callback):
    """When the first batch is there."""

    def __init__(self):
        self.at = 0.0

    def on_train_batch_start(self, trainer, *_):
        self.at = self.at or time.perf_counter()


class SaveAt(Checkpoint):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.batch_idx == 0:
            trainer.save_checkpoint(self.path)


def nothing_trainer(folder, callbacks, **options):
    return Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=folder, callbacks=callbacks,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks), enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def seconds_to_the_first_batch(make, replay, n, folder):
    path = Path(folder) / "last.ckpt"
    nothing_trainer(folder, [ExactResume(replay), SaveAt(path)], max_steps=1).fit(Nothing(), make())
    # As if it had been saved after n batches: training so many would take minutes.
    content = torch.load(path, weights_only=True)
    place = content["callbacks"]["ExactResume"]["ranks"][0]["position"]
    place["batches"] = n
    for own in place["loaders"]:
        own["batches"] = n
    progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["current"], progress["total"]):
        counts.update(dict.fromkeys(("ready", "started", "processed"), n), completed=n - 1)
    torch.save(content, path)
    first = First()
    start = time.perf_counter()
    trainer = nothing_trainer(folder, [ExactResume(replay), first], limit_train_batches=n + 2)
    trainer.fit(Nothing(), make(), ckpt_path=path)
    return first.at - start


def resume_costs(positions):
    batch, length = 8, 8 * (POSITIONS[-1] + 10)
    kinds = {
        "BatchLoader": (lambda: BatchLoader(Slow1(length), EpochBatches(length, batch, shuffle=True)), "samples", 1e9),
        "DataLoader": (lambda: DataLoader(Slow(length), batch, shuffle=True), "samples", 1e9),
        "DataLoader, 2 workers, SeededSamples": (
            lambda: DataLoader(SeededSamples(Slow(length)), batch, shuffle=True, num_workers=2), "samples", 1e9,
        ),
        "DataLoader, 2 workers, by reading": (
            lambda: DataLoader(Slow(length), batch, shuffle=True, num_workers=2), "samples", 1_000,
        ),
    }  # fmt: skip
    print(f"\nSeconds to the first batch, resumed at batch n of {batch} (samples of {1e3 * READ_SECONDS} ms)")
    print(f"  {'n':<38}" + "".join(f"{n:>10,}" for n in positions))
    for name, (make, replay, most) in kinds.items():
        cells = []
        for n in positions:
            if n > most:
                cells.append(f"{'-':>10}")
                continue
            with tempfile.TemporaryDirectory() as folder:
                cells.append(f"{min(seconds_to_the_first_batch(make, replay, n, folder) for _ in range(2)):10.3f}")
        print(f"  {name:<38}" + "".join(cells))


class Slow1(Slow):
    """The same by batches of positions, as BatchLoader reads."""

    seeded_by_index = True

    def __getitem__(self, index):
        return torch.stack([super(Slow1, self).__getitem__(one) for one in index])


def main(rounds=5):
    quiet()
    resume_costs(POSITIONS)
    step_costs(rounds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
