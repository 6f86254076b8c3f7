import importlib
import multiprocessing
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
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
from torchmetrics import MeanMetric

from tests.support import FailsOnce, toy_trainer
from trainerkit.callbacks import ExactResume
from trainerkit.callbacks._inexact import inexact_reasons
from trainerkit.callbacks.exact_resume import random_state, set_random_state
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches, SeededSamples
from trainerkit.testing._compare import first_difference
from trainerkit.testing.processes import free_port
from trainerkit.trainer import Trainer

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


class Draws:
    """A linear regression that draws from all three generators in every step, of whatever the loaders give."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.mean_metric = MeanMetric()
        self.batches = []
        self.seen = []  # the weights of each validation

    def loss(self, batch):
        x, y = batch
        return (self.layer(x)[:, 0] - y).square().mean()

    def on_train_start(self):
        self.fixed = torch.rand(4)  # as generative models do it for their pictures

    def on_train_epoch_start(self):
        self.shift = 0.01 * torch.rand(())

    def training_step(self, batch, batch_idx):
        x, y = together(batch)
        self.batches.append((self.trainer.current_epoch, batch_idx, x.clone()))
        x = x * (torch.rand_like(x) < 0.8) + 0.1 * random.random()
        loss = self.loss((x, y + 0.1 * float(np.random.rand())))
        self.mean_metric(x.detach())
        for reduce in ("mean", "sum", "max"):
            self.log(f"train/{reduce}", loss, on_epoch=True, on_step=False, reduce_fx=reduce, batch_size=len(x))
        self.log("train/metric", self.mean_metric, on_epoch=True, on_step=False)
        return loss

    def on_save_checkpoint(self, checkpoint):
        checkpoint["shift"] = self.shift

    def on_load_checkpoint(self, checkpoint):
        self.shift = checkpoint["shift"]

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(self.layer.weight.detach().clone())
        self.log("val/loss", self.loss((x + 0.1 * torch.rand_like(x), y)), sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Dropping(Draws, LightningModule):
    """Of this namespace."""


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
    """Saves after every batch, but after an epoch's last one at its end only, as CrashSafeCheckpoint does."""

    def __init__(self, folder, last=False):
        self.folder = folder
        self.last = last
        self.paths = []

    def on_train_batch_end(self, trainer, *_):
        if self.last or not trainer.is_last_batch:
            self._save(trainer)

    def on_validation_end(self, trainer, _):
        if self.last:
            self._save(trainer, "-validated")

    def on_train_epoch_end(self, trainer, _):
        self._save(trainer, "-ended" if self.last else "")

    def _save(self, trainer, suffix=""):
        self.paths.append(self.folder / f"{trainer.current_epoch}-{trainer.fit_loop.batch_idx}{suffix}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


def fit(
    folder, make, kind=Dropping, resume=None, seed=7, callback=ExactResume, trainer=toy_trainer, last=False, **options
):
    saving = Saving(folder, last)
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
    assert again.callback_metrics.keys() == trainer.callback_metrics.keys()
    assert again.callback_metrics == trainer.callback_metrics


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
    "ignore:It is recommended to use `self.log",  # of two processes
    # Of the ModelCheckpoint that the other namespace adds.
    "ignore:The dirpath has changed",
    "ignore:Checkpoint directory",
)


@QUIET
@pytest.mark.parametrize("name", IN_PROCESS)
def test_resuming_after_any_batch_equals_the_uninterrupted_run(tmp_path, name):
    resumes_exactly(tmp_path, IN_PROCESS[name])


@QUIET
@pytest.mark.parametrize("name", WORKERS)
def test_resuming_is_exact_with_two_workers(tmp_path, name):
    def few(paths):
        return [path for path in paths if path.stem in ("0-2", "0-4", "1-1")]

    resumes_exactly(tmp_path, WORKERS[name], few)


@QUIET
@pytest.mark.parametrize("name", ["shuffled", "iterable", "BatchLoader", "StatefulDataLoader"])
def test_resuming_is_exact_where_the_loaders_are_set_up_early(tmp_path, name):
    resumes_exactly(tmp_path, IN_PROCESS[name], lambda paths: paths[1::2], kind=Scheduled)


class Plateau(Dropping):
    """A schedule by an epoch's metric, which Lightning leaves as it is at the end of a resumed epoch."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train/mean"}}


@QUIET
@pytest.mark.parametrize("name", ["shuffled", "iterable", "BatchLoader"])
@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}, {"val_check_interval": 5, "max_steps": 9}])
def test_resuming_from_an_epochs_last_batch_and_from_validations_is_exact(tmp_path, name, options):
    """Lightning would leave out the validation and `on_train_epoch_end`, and what the epoch logged."""
    whole = fit(tmp_path / "whole", IN_PROCESS[name], kind=Plateau, last=True, **options)
    paths = [path for path in whole[2] if path.stem.startswith("0-4")]
    assert len(paths) == 2 if "limit_val_batches" in options else 3
    for path in paths:
        resumed = fit(tmp_path / "resumed", IN_PROCESS[name], kind=Plateau, last=True, resume=path, seed=99, **options)
        assert_same(whole, resumed)
        assert resumed[1].optimizers[0].param_groups[0]["lr"] == whole[1].optimizers[0].param_groups[0]["lr"]
        assert len(resumed[2]) == len(whole[2]) - whole[2].index(path) - 1


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
@pytest.mark.parametrize(
    ("variant", "name"),
    [(variant, name) for variant in VARIANTS for name in ("shuffled", "iterable")]
    + [(variant, "BatchLoader") for variant in ("accumulating", "validating in mid-epoch", "fewer batches", "steps")],
)
def test_resuming_is_exact_whatever_the_trainer_does(tmp_path, variant, name):
    resumes_exactly(tmp_path, IN_PROCESS[name], lambda paths: paths[::2], **VARIANTS[variant])


@QUIET
@pytest.mark.parametrize("name", ["shuffled", "iterable", "dict", "BatchLoader"])
def test_resuming_is_exact_in_our_trainer(tmp_path, name):
    """Its loop runs a batch of the plain case by itself."""

    def trainer(folder, callbacks, **options):
        return toy_trainer(folder, callbacks, kind=Trainer, **options)

    resumes_exactly(tmp_path, IN_PROCESS[name], trainer=trainer)


@QUIET
@pytest.mark.parametrize("name", ["shuffled", "iterable and map-style"])
def test_resuming_is_exact_under_the_other_namespace(tmp_path, name):
    """pytorch_lightning has a CombinedLoader of its own."""
    theirs = importlib.import_module("pytorch_lightning")

    def trainer(folder, callbacks, **options):
        return toy_trainer(folder, callbacks, kind=theirs.Trainer, **options)

    kind = type("Theirs", (Draws, theirs.LightningModule), {})
    resumes_exactly(tmp_path, IN_PROCESS[name], lambda paths: paths[::3], kind=kind, trainer=trainer)


@QUIET
def test_resuming_is_exact_in_two_processes(tmp_path):
    """Each rank has its own share of the data (a DistributedSampler that Lightning puts in) and its own random state."""

    def rank(number):
        options = {"strategy": "ddp", "devices": 2, "max_epochs": 3}
        resumes_exactly(tmp_path, lambda: loader(shuffle=True, batch_size=2), lambda paths: paths[1::4], **options)
        return fit(tmp_path / "two", lambda: loader(shuffle=True, batch_size=2), seed=number, **options)[0].batches

    one, other = in_two_processes(rank, tmp_path)
    assert not any(torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True))


def in_two_processes(function, folder):
    """What a function of the rank gives in each of two forked processes that find each other by gloo."""
    context, port = multiprocessing.get_context("fork"), free_port()

    def run(rank):
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            result = function(rank)
        except BaseException as error:
            result = repr(error)
        torch.save(result, folder / f"{rank}.result")
        os._exit(0)  # without what the parent process would do at its end

    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(2)]
    assert not any(isinstance(result, str) for result in results), results
    return results


def test_it_changes_nothing_in_a_run_that_is_not_interrupted(tmp_path):
    """Where watching is enough: one DataLoader with torch's samplers."""
    one = fit(tmp_path / "with", IN_PROCESS["shuffled"])
    other = fit(tmp_path / "without", IN_PROCESS["shuffled"], callback=None)
    assert_same(one, other)


@pytest.mark.parametrize("make", [loader, batch_loader], ids=["by torch", "with a state"])
def test_a_checkpoint_of_a_resumed_run_is_that_of_the_uninterrupted_one(tmp_path, make):
    """So that a run may be killed twice in one epoch."""
    whole = fit(tmp_path / "whole", make)
    resumed = fit(tmp_path / "resumed", make, resume=whole[2][1], seed=99)
    again = {path.name: path for path in resumed[2]}
    for path in whole[2][2:]:
        one, other = (torch.load(p, weights_only=True)["callbacks"]["ExactResume"] for p in (path, again[path.name]))
        assert first_difference(one, other) is None, path.name


def test_without_it_a_resumed_run_is_another(tmp_path):
    """The tests above can fail."""
    whole = fit(tmp_path / "whole", IN_PROCESS["BatchLoader"], callback=None)
    resumed = fit(tmp_path / "resumed", IN_PROCESS["BatchLoader"], resume=whole[2][1], seed=99, callback=None)
    assert not torch.equal(whole[0].layer.weight, resumed[0].layer.weight)


@pytest.mark.parametrize("name", ["shuffled", "iterable", "BatchLoader"])
def test_the_second_fit_of_a_trainer_is_exact_too(tmp_path, name):
    make, callback = IN_PROCESS[name], ExactResume()
    whole = fit(tmp_path / "whole", make, callback=lambda: callback)
    resumed = fit(tmp_path / "resumed", make, resume=whole[2][6], seed=99, callback=lambda: callback)
    assert_same(whole, resumed)


def test_a_run_goes_on_from_a_checkpoint_that_is_written_when_fit_is_over(tmp_path):
    whole = fit(tmp_path / "whole", IN_PROCESS["shuffled"])
    _, trainer, _ = fit(tmp_path / "short", IN_PROCESS["shuffled"], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "over.ckpt")
    assert_same(whole, fit(tmp_path / "resumed", IN_PROCESS["shuffled"], resume=tmp_path / "over.ckpt", seed=99))


def test_a_fit_from_the_start_after_one_that_failed_to_resume_begins_at_the_first_batch(tmp_path):
    make = IN_PROCESS["shuffled"]
    whole = fit(tmp_path / "whole", make)
    exact, fails = ExactResume(), FailsOnce()

    def trainer(folder, callbacks, **options):
        return toy_trainer(folder, [*callbacks, fails], **options)

    with pytest.raises(RuntimeError, match="failed once"):
        fit(tmp_path / "failed", make, resume=whole[2][1], callback=lambda: exact, trainer=trainer)
    assert_same(whole, fit(tmp_path / "new", make, callback=lambda: exact, trainer=trainer))


def test_after_fit_the_loaders_are_as_they_were(tmp_path):
    given = several("min_size")
    _, trainer, _ = fit(tmp_path, lambda: given)
    assert type(given) is CombinedLoader
    assert vars(trainer.fit_loop._data_source).keys() == {"instance", "name"}


# What is passed over


def reads_on_resuming(tmp_path, make, callback=ExactResume):
    """Samples that the data set gives from the beginning of a run that is resumed after the fourth batch, this one's."""
    fit(tmp_path, make, callback=callback)
    given = make()
    fit(tmp_path, lambda: given, resume=tmp_path / "0-3.ckpt", seed=99, callback=callback, max_epochs=1)
    return given.dataset.reads


def test_samples_of_the_batches_that_were_seen_are_not_read_again(tmp_path):
    assert len(reads_on_resuming(tmp_path, IN_PROCESS["shuffled"])) == BATCH
    assert len(reads_on_resuming(tmp_path, lambda: loader(sampler=Lazy()))) == ROWS  # here they have to be
    assert len(reads_on_resuming(tmp_path, lambda: loader(sampler=Lazy()), lambda: ExactResume("indices"))) == BATCH


@QUIET
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_are_seeded_by_index_may_be_passed_over_in_workers_too(tmp_path, workers):
    def make():
        return loader(SeededSamples(Noisy(), seed=3), shuffle=True, num_workers=workers)

    resumes_exactly(tmp_path, make, lambda paths: paths[2:8:3])


def test_a_data_set_can_say_so_itself_and_so_can_the_user(tmp_path):
    class Still(Noisy):
        def __getitem__(self, index):
            return self.x[index], self.x[index].sum()

    def make():
        return loader(Still(), shuffle=True, num_workers=2)

    resumes_exactly(tmp_path, make, lambda paths: paths[2:8:3], callback=lambda: ExactResume(replay="indices"))


# What cannot be exact


def reasons(make, replay="samples", **options):
    """What is said at the start of fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = toy_trainer(Path("unused"), [ExactResume(replay)], fast_dev_run=1, **options)
        trainer.fit(Dropping(), make())
    begin = "ExactResume: a resumed run may differ from an uninterrupted one: "
    return [str(w.message).removeprefix(begin) for w in caught if str(w.message).startswith(begin)]


EXACT = IN_PROCESS | {f"{name}, workers": make for name, make in WORKERS.items()}
del EXACT["a class"]  # it happens to be exact, which nobody can see


@pytest.mark.parametrize("name", EXACT)
def test_nothing_is_said_where_it_is_exact(name):
    assert reasons(EXACT[name]) == []


class Endless(IterableDataset):
    """Goes on where it was."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return ((row, row.sum()) for row in self.rows)


class ItsOwnIterator(IterableDataset):
    def __iter__(self):
        return self

    def __next__(self):
        return torch.ones(4), torch.ones(())


def random_transform(batch):
    return batch | {"x": batch["x"] + torch.randn_like(batch["x"])}


INEXACT = {
    "an iterator": (lambda: loader(Endless(iter(torch.ones(8, 4)))), "Endless holds an iterator (rows)"),
    "its own": (lambda: loader(ItsOwnIterator()), "ItsOwnIterator is its own iterator"),
    "a class": (OwnLoader, "OwnLoader has an __iter__ of its own and no state_dict"),
    "not in order": (
        lambda: loader(num_workers=1, in_order=False),
        "DataLoader(in_order=False) gives batches in the order in which workers finish",
    ),
    "drawing in a BatchLoader's workers": (
        lambda: BatchLoader(
            ArrayDataset({"x": torch.ones(8, 4), "y": torch.ones(8)}, transform=random_transform),
            EpochBatches(8, BATCH, shuffle=True),
            num_workers=1,
        ),
        "what samples draw inside the workers of BatchLoader is not part of its state_dict",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_cannot_be_exact_is_said_at_the_start_of_fit(name):
    make, expected = INEXACT[name]
    said = reasons(make)
    assert len(said) == 1
    assert said[0].startswith(expected)


def test_what_keeps_a_cuda_device_from_being_exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    # A strategy's device is all that is asked for.
    trainer = toy_trainer(Path("unused"))
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda", 0))
    said = inexact_reasons(trainer, [loader()], "samples")
    assert [reason.partition(";")[0] for reason in said] == [
        "cudnn.benchmark chooses algorithms by their time",
        "some CUDA operations add in an order that varies",
    ]


def test_another_kind_of_loader_is_refused_in_mid_epoch_only(tmp_path):
    fit(tmp_path, IN_PROCESS["shuffled"])
    with pytest.raises(ValueError, match="^train_dataloader: is of another kind"):
        fit(tmp_path / "again", batch_loader, resume=tmp_path / "0-1.ckpt")
    fit(tmp_path / "again", batch_loader, resume=tmp_path / "0-4.ckpt")


def test_another_number_of_processes_begins_the_epoch_anew_and_says_so(tmp_path):
    fit(tmp_path, IN_PROCESS["shuffled"])
    content = torch.load(tmp_path / "0-1.ckpt", weights_only=True)
    content["callbacks"]["ExactResume"]["ranks"] *= 2
    torch.save(content, tmp_path / "of_two.ckpt")
    with (
        pytest.warns(UserWarning, match="the checkpoint is of 2 processes and this run has 1"),
        pytest.warns(UserWarning, match="your dataloader is not resumable"),
    ):
        fit(tmp_path / "again", IN_PROCESS["shuffled"], resume=tmp_path / "of_two.ckpt")


def test_another_replay_is_refused():
    with pytest.raises(ValueError, match="^replay=all: must be samples or indices"):
        ExactResume(replay="all")


# What is saved


def test_the_state_is_small_and_loads_safely(tmp_path):
    fit(tmp_path, IN_PROCESS["data's generators"])
    content = torch.load(tmp_path / "1-1.ckpt", weights_only=True)["callbacks"]["ExactResume"]
    torch.save(content, tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 100_000


def test_the_state_of_all_generators_comes_back_through_a_safe_file(tmp_path):
    torch.save(random_state(), tmp_path / "state")
    first = (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item())
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()) == first
