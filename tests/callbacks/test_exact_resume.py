import importlib
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from tests.support import ToyModule, toy_trainer
from trainerkit.callbacks import ExactResume
from trainerkit.callbacks.exact_resume import random_state, set_random_state
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches, SeededSamples

ROWS, BATCH = 20, 4


# Data that draw


class Noisy(Dataset):
    """Map-style; each sample draws from all three global generators."""

    def __init__(self, rows=ROWS):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(rows, 4, generator=generator)
        self.reads = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads.append(int(index))
        noise = 0.1 * torch.randn(4) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.x[index] + noise, self.x[index].sum()


class WithGenerators(Noisy):
    """Draws from generators of its own, which go on from epoch to epoch."""

    def __init__(self):
        super().__init__()
        self.own = [np.random.default_rng(3), random.Random(4), np.random.RandomState(5)]

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * (self.own[0].random() + self.own[1].random() + self.own[2].random()), y


class Buffered(IterableDataset):
    """Shuffles in a buffer of four, from the global generators; each worker reads its share."""

    def __init__(self):
        self.data = Noisy()

    def __iter__(self):
        info = get_worker_info()
        rows = range(ROWS) if info is None else range(info.id, ROWS, info.num_workers)
        buffer = []
        for row in rows:
            buffer.append(row)
            if len(buffer) == 4:
                yield self.data[buffer.pop(random.randrange(4))]
        while buffer:
            yield self.data[buffer.pop(int(torch.randint(len(buffer), ())))]


class BufferedWithLength(Buffered):
    def __len__(self):
        return ROWS


class Lazy(Sampler):
    """Draws each index when it is asked for it."""

    def __iter__(self):
        for _ in range(ROWS):
            yield random.randrange(ROWS)

    def __len__(self):
        return ROWS


class OwnLoader:
    """Neither a DataLoader nor does it know its position."""

    def __len__(self):
        return ROWS // BATCH

    def __iter__(self):
        data = Noisy()
        for _ in range(len(self)):
            samples = [data[int(row)] for row in torch.randint(ROWS, (BATCH,))]
            yield tuple(torch.stack(part) for part in zip(*samples, strict=True))


def loader(dataset=None, **options):
    return DataLoader(Noisy() if dataset is None else dataset, **{"batch_size": BATCH} | options)


def drawn(seed=2):
    return torch.Generator().manual_seed(seed)


def several(mode):
    return CombinedLoader({"a": loader(shuffle=True), "b": loader(Noisy(8), shuffle=True)}, mode)


def batch_loader(**options):
    data = Noisy().x
    return BatchLoader(
        ArrayDataset({"x": data, "y": data.sum(1)}), EpochBatches(ROWS, BATCH, shuffle=True, seed=1), **options
    )


def stateful(dataset=None, **options):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(Noisy() if dataset is None else dataset, batch_size=BATCH, **options)


IN_PROCESS = {
    "in order": lambda: loader(),
    "shuffled": lambda: loader(shuffle=True),
    "own generator": lambda: loader(shuffle=True, generator=drawn()),
    "sampler's generator": lambda: loader(sampler=RandomSampler(range(ROWS), True, 30, generator=drawn())),
    "weighted": lambda: loader(sampler=WeightedRandomSampler([1.0, 3.0] * 10, ROWS)),
    "batch sampler": lambda: loader(
        batch_size=1, batch_sampler=BatchSampler(RandomSampler(range(ROWS)), BATCH, drop_last=False)
    ),
    "lazy sampler": lambda: loader(sampler=Lazy()),
    "data's generators": lambda: loader(WithGenerators(), shuffle=True),
    "by index": lambda: loader(SeededSamples(Noisy(), seed=3), shuffle=True),
    "iterable": lambda: loader(Buffered()),
    "iterable with length": lambda: loader(BufferedWithLength()),
    "dict": lambda: {"a": loader(shuffle=True), "b": loader(Noisy(8), shuffle=True)},
    "iterable and map-style": lambda: [loader(Buffered()), loader(shuffle=True)],
    "min_size": lambda: several("min_size"),
    "max_size": lambda: several("max_size"),
    "knows and knows not": lambda: [batch_loader(), loader(Noisy(8), shuffle=True)],
    "BatchLoader": batch_loader,
    "StatefulDataLoader": lambda: stateful(shuffle=True),
    "StatefulDataLoader, iterable": lambda: stateful(CountsItself()),
    "a class": OwnLoader,
}


class CountsItself(IterableDataset):
    """Knows its position, as StatefulDataLoader wants it; no length."""

    def __init__(self):
        self.data, self.at, self.begin = Noisy(), 0, 0

    def __iter__(self):
        begin, self.begin = self.begin, 0
        for self.at in range(begin, ROWS):
            yield self.data[self.at]

    def state_dict(self):
        return {"next": self.at + 1}

    def load_state_dict(self, state):
        self.begin = state["next"] % ROWS


WORKERS = {
    "shuffled": lambda: loader(shuffle=True, num_workers=2),
    "persistent": lambda: loader(shuffle=True, num_workers=2, persistent_workers=True),
    "by index, persistent": lambda: loader(
        SeededSamples(Noisy(), seed=3), shuffle=True, num_workers=2, persistent_workers=True
    ),
    "iterable": lambda: loader(Buffered(), num_workers=2),
    "iterable with length, persistent": lambda: loader(BufferedWithLength(), num_workers=2, persistent_workers=True),
    "lazy sampler": lambda: loader(sampler=Lazy(), num_workers=2),
    "BatchLoader": lambda: batch_loader(num_workers=2),
}


# Runs


class Dropping(ToyModule):
    """Draws from all three generators in every step, of whatever the loaders give."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.fixed = None

    def on_train_start(self):
        self.fixed = torch.rand(4)  # as generative models do it for their pictures

    def on_train_epoch_start(self):
        self.shift = 0.01 * torch.rand(())

    def training_step(self, batch, batch_idx):
        x, y = together(batch)
        self.batches.append((self.trainer.current_epoch, batch_idx, x.clone()))
        x = x * (torch.rand_like(x) < 0.8) + 0.1 * random.random()
        return self.loss((x, y + 0.1 * float(np.random.rand())))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["shift"] = self.shift

    def on_load_checkpoint(self, checkpoint):
        self.shift = checkpoint["shift"]

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(self.layer.weight.detach().clone())
        self.log("val/loss", self.loss((x + 0.1 * torch.rand_like(x), y)))


class Scheduled(Dropping):
    """Asks for the length of the run, which sets the loaders up before the checkpoint's loops are restored."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total if total < float("inf") else 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def together(batch):
    """x (B, 4) and y (B,) of a batch of one loader or of several."""
    if isinstance(batch, dict) and "x" in batch:
        return batch["x"], batch["y"]
    parts = list(batch.values()) if isinstance(batch, dict) else list(batch)
    if all(isinstance(part, torch.Tensor) for part in parts):
        return parts[0], parts[1]
    pairs = [together(part) for part in parts if part is not None]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


class Saving(Checkpoint):
    """Saves after every batch but the last, whose validation has to be in the checkpoint, and at each epoch's end."""

    def __init__(self, folder, every=1):
        self.folder = folder
        self.paths = []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer, _):
        self._save(trainer)

    def _save(self, trainer):
        self.paths.append(self.folder / f"{trainer.current_epoch}-{trainer.fit_loop.batch_idx}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


def fit(folder, make, kind=Dropping, resume=None, seed=7, callback=ExactResume, trainer=toy_trainer, **options):
    saving = Saving(folder)
    made = trainer(folder, [*([callback()] if callback else []), saving], **{"max_epochs": 2} | options)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    module = kind()
    val = DataLoader(TensorDataset(torch.ones(4, 4), torch.zeros(4)), batch_size=2)
    given = make()
    made.fit(module, given, val, ckpt_path=resume)
    return module, made, saving.paths


def assert_same(whole, resumed):
    (one, trainer, _), (other, again, _) = whole, resumed
    rest = one.batches[-len(other.batches) :] if other.batches else []
    assert [place[:2] for place in rest] == [place[:2] for place in other.batches]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(rest, other.batches, strict=True)), "other batches"
    assert torch.equal(one.layer.weight, other.layer.weight)
    for a, b in zip(trainer.optimizers, again.optimizers, strict=True):
        momenta = [[s["momentum_buffer"] for s in o.state_dict()["state"].values()] for o in (a, b)]
        assert all(torch.equal(m, n) for m, n in zip(*momenta, strict=True))
    assert again.global_step == trainer.global_step
    if other.seen:
        assert again.callback_metrics["val/loss"] == trainer.callback_metrics["val/loss"]


def resumes_exactly(tmp_path, make, choose=lambda paths: paths, **options):
    whole = fit(tmp_path / "whole", make, **options)
    paths = choose(whole[2][:-1])
    assert paths
    for path in paths:
        resumed = fit(tmp_path / "resumed", make, resume=path, seed=99, **options)
        begun = len(whole[0].batches) - len(resumed[0].batches)
        assert begun == whole[2].index(path) + 1, path.name
        assert_same(whole, resumed)


QUIET = pytest.mark.filterwarnings(
    "ignore:ExactResume",
    "ignore:Your `IterableDataset` has `__len__`",
    "ignore:'set_vital' is deprecated",  # torchdata's
    "ignore:You requested to overfit",
)


@QUIET
@pytest.mark.parametrize("name", IN_PROCESS)
def test_resuming_after_any_batch_equals_the_uninterrupted_run(tmp_path, name):
    resumes_exactly(tmp_path, IN_PROCESS[name])


@QUIET
@pytest.mark.parametrize("name", WORKERS)
def test_resuming_is_exact_with_two_workers(tmp_path, name):
    def few(paths):
        return [path for path in paths if path.stem in ("0-2", "0-4", "1-0", "1-3")]

    resumes_exactly(tmp_path, WORKERS[name], few)


@QUIET
@pytest.mark.parametrize("name", ["in order", "shuffled", "iterable", "dict", "BatchLoader", "StatefulDataLoader"])
def test_resuming_is_exact_where_the_loaders_are_set_up_early(tmp_path, name):
    resumes_exactly(tmp_path, IN_PROCESS[name], lambda paths: paths[1::2], kind=Scheduled)


VARIANTS = {
    "accumulating": {"accumulate_grad_batches": 3},
    "validating in mid-epoch": {"val_check_interval": 2},
    "validating every other epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "fewer batches": {"limit_train_batches": 3},
    "overfitting": {"overfit_batches": 2},
    "steps": {"max_steps": 8, "max_epochs": -1},
    "reloading": {"reload_dataloaders_every_n_epochs": 1},
    "reloading every other": {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 4},
}


@QUIET
@pytest.mark.parametrize("name", ["shuffled", "iterable", "BatchLoader"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_exact_whatever_the_trainer_does(tmp_path, variant, name):
    resumes_exactly(tmp_path, IN_PROCESS[name], **VARIANTS[variant])
