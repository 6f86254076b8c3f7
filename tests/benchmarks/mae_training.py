"""The documented masked autoencoder trained three ways: `python -m tests.benchmarks.mae_training`.

256 bands, 16 patches of which 12 are hidden, width 256, 4 layers, the latent decoder; batches of 128 and 1,024;
average of the weights, gradient clipping, warm-up and cosine everywhere. Contenders: a hand-written loop, trainerkit
with its default callbacks, and the trainer of the package chemomae 0.2.4 where it is installed (pip install
chemomae==0.2.4).

Peak memory of a contender is that of a process of its own.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger

from tests.benchmarks.small_steps import Clock
from tests.benchmarks.turns import measure, quiet, table
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
from trainerkit.optim import make_optimizer, make_scheduler, warmup_cosine
from trainerkit.tasks.mae import MaskedAutoencoder, MaskedAutoencoderTask, masked_mse
from trainerkit.trainer import Trainer

STEPS = {128: 20, 1024: 8}
LENGTH = 256
SIZES = {
    "seq_len": LENGTH,
    "n_patches": 16,
    "n_mask": 12,
    "latent_dim": 64,
    "d_model": 256,
    "nhead": 4,
    "num_layers": 4,
}
OPTIMIZER = partial(torch.optim.AdamW, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.05)
SCHEDULE = partial(warmup_cosine, warmup_steps=10, min_lr_scale=0.1)


def data(batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size * STEPS[batch_size], LENGTH, generator=generator).cumsum(1)


def by_hand(batch_size: int):
    def run(folder: Path) -> float:
        x, steps = data(batch_size), STEPS[batch_size]
        network = MaskedAutoencoder(**SIZES)
        optimizer = make_optimizer(OPTIMIZER, network)
        scheduler = make_scheduler(SCHEDULE, optimizer, total_steps=steps, steps_per_epoch=steps)
        live = list(network.parameters())
        shadow = [p.detach().clone() for p in live]
        losses = []
        start = time.perf_counter()
        for step, rows in enumerate(torch.randperm(len(x)).split(batch_size)):
            batch = x[rows]
            x_recon, _, visible = network(batch)
            loss = masked_mse(x_recon, batch, ~visible)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(live, 1.0)
            optimizer.step()
            scheduler.step()
            ema_update_(shadow, live, ema_decay(0.999, step))
            losses.append(loss.detach())
        torch.stack(losses).mean().item()
        return (time.perf_counter() - start) / steps

    return run


def default_callbacks():
    monitor = "train/loss"
    return [
        EMA(), EarlyStopping(monitor), History(), BestWeights(monitor), ExactResume(), SavePredictions(),
        CrashSafeCheckpoint(monitor),
    ]  # fmt: skip


def trainerkit(batch_size: int):
    def run(folder: Path) -> float:
        x = data(batch_size)
        clock = Clock()
        callbacks = [clock, *default_callbacks()]
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=CSVLogger(folder), callbacks=callbacks, gradient_clip_val=1.0,
            enable_model_summary=False, enable_progress_bar=False, default_root_dir=folder,
        )  # fmt: skip
        task = MaskedAutoencoderTask(MaskedAutoencoder(**SIZES), optimizer=OPTIMIZER, scheduler=SCHEDULE)
        trainer.fit(task, BatchLoader(ArrayDataset({"x": x}), EpochBatches(len(x), batch_size, shuffle=True)))
        return clock.seconds / STEPS[batch_size]

    return run


def chemomae(batch_size: int):
    def run(folder: Path) -> float:
        from chemomae.models import ChemoMAE
        from chemomae.training.optim import build_optimizer, build_scheduler
        from chemomae.training.trainer import Trainer as Theirs
        from chemomae.training.trainer import TrainerConfig
        from torch.utils.data import DataLoader, TensorDataset

        x, steps = data(batch_size), STEPS[batch_size]
        network = ChemoMAE(**SIZES)
        optimizer = build_optimizer(network, lr=2e-4, weight_decay=0.05, betas=(0.9, 0.95))
        config = TrainerConfig(out_dir=folder, device="cpu", amp=False, grad_clip=1.0, use_ema=True, progress=False)
        trainer = Theirs(
            network, optimizer, DataLoader(TensorDataset(x), batch_size=batch_size, shuffle=True),
            scheduler=build_scheduler(optimizer, steps_per_epoch=steps, epochs=1, warmup_epochs=0), cfg=config,
        )  # fmt: skip
        start = time.perf_counter()
        trainer.train_one_epoch()
        return (time.perf_counter() - start) / steps

    return run


CONTENDERS = {
    "hand-written": by_hand,
    "trainerkit, default callbacks": trainerkit,
    "chemomae 0.2.4": chemomae,
}


def peak_memory(name: str, batch_size: int) -> float:
    """MiB of a process that does nothing else (Linux)."""
    command = [sys.executable, "-m", "tests.benchmarks.mae_training", "--memory", name, str(batch_size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(rounds: int = 5) -> None:
    names = [name for name in CONTENDERS if not name.startswith("chemomae") or importlib.util.find_spec("chemomae")]
    for batch_size in STEPS:
        medians = measure({name: CONTENDERS[name](batch_size) for name in names}, rounds)
        table(f"The documented model, batches of {batch_size}", medians, "hand-written")
        for name in names:
            print(f"  {name}: peak memory {peak_memory(name, batch_size):.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        quiet()
        with tempfile.TemporaryDirectory() as folder:
            CONTENDERS[sys.argv[2]](int(sys.argv[3]))(Path(folder))
        # Not ru_maxrss, which a process takes over from the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
    else:
        main(*map(int, sys.argv[1:]))
