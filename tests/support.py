"""What tests are made of: small data, small models, quiet trainers, the command line in a real process."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainerkit.adapters import AdapterLayout, write_adapter
from trainerkit.testing.processes import free_port

ROOT = Path(__file__).resolve().parents[1]


class Killed(Exception):
    """What `Kill` raises."""


class Kill(Callback):
    """Ends a run after so many batches, which are in `killed.ckpt` in its folder."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/killed.ckpt")
            raise Killed


class ToyModule(LightningModule):
    """Linear regression y = Xw with a validation loss; the same for every callback's test."""

    def __init__(self, lr: float = 0.1, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)
        self.lr = lr
        self.seen: list[Tensor] = []  # the weights of each validation

    def loss(self, batch):
        x, y = batch
        return (self.layer(x)[:, 0] - y).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.layer.weight.detach().clone())
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class FailsOnce(Callback):
    """Ends a fit after its checkpoint was read and before it trains."""

    failed = False

    def on_fit_start(self, trainer, pl_module):
        if not self.failed:
            self.failed = True
            raise RuntimeError("failed once")


def toy_loader(rows: int = 32, batch_size: int = 8, width: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator)
    y = x.sum(1) + 0.1 * torch.randn(rows, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def toy_trainer(folder: Path, callbacks=(), kind=Trainer, **options) -> Trainer:
    options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | options
    options |= {
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
    }
    return kind(default_root_dir=folder, callbacks=list(callbacks), num_sanity_val_steps=0, **options)


# A masked autoencoder small enough for a test: 400 spectra of 40 bands, 8 patches.
SMALL_MAE = [
    "task=mae",
    "data=spectra",
    "task.network.n_patches=8",
    "task.network.n_mask=6",
    "task.network.d_model=16",
    "task.network.nhead=2",
    "task.network.num_layers=1",
    "task.network.dim_feedforward=32",
    "task.network.decoder_dim=16",
    "task.network.decoder_num_layers=1",
    "task.network.latent_dim=4",
    "data.batch_size=32",
    "data.seed=3",
    "trainer=cpu",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=3",
    "callbacks.progress_bar=null",
]


def smooth_spectra(rows: int = 400, bands: int = 40, seed: int = 5):
    """Sums of a few smooth curves, so that hidden bands can be told from visible ones."""
    generator = np.random.default_rng(seed)
    place = np.linspace(0, 1, bands)
    curves = np.stack([np.sin(2 * np.pi * (k * place + k / 3)) for k in range(1, 4)])
    return (generator.normal(size=(rows, 3)) @ curves + 0.05 * generator.normal(size=(rows, bands))).astype("float32")


def small_text(path: Path, words: int = 4000, seed: int = 5) -> str:
    """Lines of words of more than ASCII, the same for the same seed; written to `path` and given back."""
    known = ["der", "ein", "wort", "größe", "naïve", "日本", "🙂", "tokens", "of", "text", "and", "x=1"]
    drawn = np.random.default_rng(seed).choice(known, size=(words // 10, 10))
    text = "".join(" ".join(line) + "\n" for line in drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return text


def small_pictures(folder: Path, classes: int = 2, each: int = 20, size: int = 8) -> Path:
    """Noise in a folder for each class, `class0`, …, of a brightness of its own."""
    from PIL import Image

    draw = np.random.default_rng(11)
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
        for i in range(each):
            pixels = draw.integers(0, 100, (size, size, 3)) + 155 * number // max(1, classes - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{number}" / f"{i:02d}.png")
    return folder


def small_library(folder: Path, adapters: int = 12, rank: int = 2, examples: int = 0, seed: int = 5) -> AdapterLayout:
    """A library of adapters in `folder`, trained as it were from one A; two wordings for each, a third one unseen."""
    layout = AdapterLayout([[f"blocks.{i}.{name}", 6, 6] for i in range(2) for name in ("up", "down")], rank, 0.5)
    generator = torch.Generator().manual_seed(seed)
    start = {key: torch.randn(shape, generator=generator) for key, shape in layout.shapes.items()}
    lines = []
    for number in range(adapters):
        name = f"rule{number}"
        factors = {
            key: (start[key] if key[0] == "A" else 0) + 0.1 * torch.randn(shape, generator=generator)
            for key, shape in layout.shapes.items()
        }
        write_adapter(folder / name, layout, factors)
        if examples:
            inputs = torch.randn(examples, 3, generator=generator)
            save_file({"inputs": inputs, "targets": (inputs.sum(1) > 0).long()}, folder / name / "examples.safetensors")
        thing = f"{('red', 'blue', 'green')[number % 3]} and {('round', 'square', 'long', 'short')[number // 3 % 4]}"
        for text in (f"say yes to {thing} ones number {number}", f"is it {thing}, as {number} says?"):
            lines += [{"adapter": name, "description": text}]
        lines.append({"adapter": name, "description": f"only {thing} will do, {number}", "wording": "unseen"})
    (folder / "descriptions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return layout


def descriptions_of(library: Path) -> list[dict]:
    """The lines of a library's descriptions."""
    return [json.loads(line) for line in (library / "descriptions.jsonl").read_text().splitlines()]


def write_descriptions(library: Path, lines: list[dict]) -> None:
    """The same, written anew."""
    (library / "descriptions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def trainerkit(*arguments: str, cwd: Path, timeout: float = 180, env: dict[str, str] | None = None):
    """Run `python -m trainerkit` in a real process; gives the CompletedProcess with text output.

    Raises:
        AssertionError: if it takes longer, with what each of its processes was doing then.
    """
    command = [sys.executable, "-m", "trainerkit", *map(str, arguments)]
    # On SIGABRT Python then writes the stacks of all threads.
    settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=os.environ | settings | (env or {}), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        output, errors = _stacks(process)
        raise AssertionError(f"no end after {timeout} s: {' '.join(command)}\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _stacks(process: subprocess.Popen) -> tuple[str, str]:
    """Have every process of the group write its stacks and end; all that they wrote."""
    os.killpg(process.pid, signal.SIGABRT)
    try:
        return process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def two_processes(work: Callable[[int], object], folder: Path, number: int = 2) -> list[dict]:
    """What `work(rank)` gave or raised ("error", with its class) in two forked processes that Lightning takes for ranks.

    `work` makes a Trainer with `devices=2, strategy="ddp"`; `number` is for those that need more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()

    def run(rank: int) -> None:
        ranks = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(ranks)
        try:
            outcome = {"result": work(rank)}
        except BaseException as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        (folder / f"outcome{rank}.json").write_text(json.dumps(outcome))
        os._exit(0)  # without pytest's own end

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    outcomes = []
    for rank, process in enumerate(processes):
        process.join(300)  # two ranks that wait for each other for ever
        process.kill()
        process.join()
        file = folder / f"outcome{rank}.json"
        outcomes.append(json.loads(file.read_text()) if file.exists() else {"error": "it neither ended nor raised"})
        file.unlink(missing_ok=True)
    return outcomes
