"""Task: metrics that wait on the device, and what comes out in the end."""

import itertools
import json
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.optim import warmup_cosine
from trainerkit.task import Task


class Positioned:
    """A loader that goes on where a checkpoint stood."""

    def __init__(self, loader):
        self.loader, self.given, self.skip = loader, 0, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.given, skip, self.skip = self.skip, self.skip, 0
        for batch in itertools.islice(self.loader, skip, None):
            self.given += 1
            yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.skip = state["given"]


class Tracks(Task):
    """Tracks given values for batches of given sizes."""

    def __init__(self, values, reduction="mean", **parts):
        super().__init__(**parts)
        self.layer = nn.Linear(4, 1)
        self.values = values
        self.reduction = reduction

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.track("train/loss", torch.tensor(self.values[batch_idx]), len(x), self.reduction)
        return (self.layer(x)[:, 0] - y).square().mean()

    def validation_step(self, batch, batch_idx):
        self.track("val/loss", torch.tensor(self.values[batch_idx]), len(batch[0]), self.reduction)


def fit(tmp_path, task, rows=20, **options):
    trainer = toy_trainer(tmp_path, **{"max_epochs": 1} | options)
    trainer.fit(task, toy_loader(rows), toy_loader(rows))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_an_epochs_mean_weighs_the_last_smaller_batch_by_its_size(tmp_path):
    metrics = fit(tmp_path, Tracks([1.0, 2.0, 6.0]))  # batches of 8, 8 and 4
    assert metrics["train/loss"] == metrics["val/loss"] == pytest.approx((8 * 1 + 8 * 2 + 4 * 6) / 20)


def test_a_sum_adds_up_whatever_the_batches_are(tmp_path):
    metrics = fit(tmp_path, Tracks([1.0, 2.0, 6.0], "sum"))
    assert metrics["train/loss"] == metrics["val/loss"] == 9


def test_the_step_metric_is_the_mean_since_the_last_log_step(tmp_path):
    seen = []

    class Watches(Tracks):
        def log(self, name, value, **options):
            seen.append((name, value))
            super().log(name, value, **options)

    fit(tmp_path, Watches([1.0, 3.0, 5.0, 9.0]), rows=32, log_every_n_steps=2)
    assert [value for name, value in seen if name == "train/loss_step"] == [2.0, 7.0]
    assert [value for name, value in seen if name == "train/loss"] == [4.5]


class SavesAfter(Checkpoint):
    """Saves after a batch, as checkpoints do: before the module's own hook of the batch's end."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("batch", range(5))
def test_the_step_metric_of_a_resumed_run_is_the_uninterrupted_ones(tmp_path, batch):
    class Watches(Tracks):
        def log(self, name, value, **options):
            seen.append((name, self.trainer.fit_loop.batch_idx, value))
            super().log(name, value, **options)

    def run(callbacks, **options):
        trainer = toy_trainer(tmp_path, callbacks, max_epochs=1, log_every_n_steps=2)
        trainer.fit(Watches([1.0, 3.0, 5.0, 9.0, 4.0, 8.0]), train_dataloaders=Positioned(toy_loader(48)), **options)

    seen = []
    run([SavesAfter(batch, tmp_path / "cut.ckpt")])
    whole = seen
    seen = []
    run([], ckpt_path=tmp_path / "cut.ckpt")
    assert len(whole) == 4  # after batches 1, 3 and 5, and the epoch's
    assert seen == [entry for entry in whole if entry[1] > batch]


def test_epochs_do_not_mix_and_max_steps_ends_one_early(tmp_path):
    metrics = fit(tmp_path, Tracks([1.0, 2.0, 6.0]), max_epochs=-1, max_steps=4)
    assert metrics["train/loss"] == 1.0  # the second epoch has one batch


class CountsCopies(TorchDispatchMode):
    """Counts what copies a value to the host: item(), tolist(), bool()."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.copies += 1
        return function(*arguments, **(keywords or {}))


def test_nothing_is_read_back_between_log_steps():
    task = Tracks([])
    with CountsCopies() as counter:
        for _ in range(100):
            task.track("train/loss", torch.ones(()), weight=3)
    assert counter.copies == 0
    assert task._meters["train/loss"].result(lambda values: values) == 1.0


def test_the_sum_does_not_depend_on_when_it_was_collected():
    values = torch.rand(200)
    results = []
    for every in (1, 7, 1000):
        task = Tracks([])
        for position, value in enumerate(values):
            task.track("a", value, weight=position % 5 + 1)
            if position % every == 0:
                task._meters["a"].window()
        results.append(task._meters["a"].result(lambda values: values))
    weights = [position % 5 + 1 for position in range(200)]
    expected = sum(float(v) * w for v, w in zip(values.double(), weights, strict=True)) / sum(weights)
    assert results[0] == results[1] == results[2] == pytest.approx(expected, rel=1e-12)


def test_optimizer_and_schedule_partials_are_finished(tmp_path):
    from functools import partial

    schedule = partial(warmup_cosine, warmup_epochs=1, min_lr_scale=0.0)
    task = Tracks([1.0] * 3, optimizer=partial(torch.optim.AdamW, lr=0.5, weight_decay=0.1), scheduler=schedule)
    fit(tmp_path, task, max_epochs=4)
    optimizer = task.trainer.optimizers[0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]  # after 12 of 12 steps


def test_a_schedule_without_an_end_is_refused(tmp_path):
    from functools import partial

    task = Tracks([1.0] * 3, scheduler=partial(warmup_cosine, warmup_steps=1))
    with pytest.raises(ValueError, match="max_epochs=-1: this schedule needs to know the length of the run"):
        fit(tmp_path, task, max_epochs=-1)


def test_a_schedule_without_need_of_an_end_runs_without_one(tmp_path):
    from functools import partial

    constant = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    task = Tracks([1.0] * 3, scheduler=partial(warmup_cosine, warmup_epochs=1.0))
    fit(tmp_path, task, max_epochs=-1, max_steps=7)
    assert task.trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    endless = Tracks([1.0] * 3, scheduler=constant)
    fit(tmp_path, endless, max_epochs=-1, max_time={"seconds": 0})


def test_it_is_a_plain_lightning_module_to_other_callbacks(tmp_path):
    assert fit(tmp_path, ToyModule())["val/loss"] > 0


class Saving(Task):
    """Saves every argument that it can."""

    def __init__(self, width=3, betas=(0.9, 0.95), network=None, path=None, limit=float("nan"), **options):
        super().__init__(partial(AdamW, lr=0.1))
        self.save_hyperparameters()


class SavingMore(Saving):
    def __init__(self, extra=1, hook=None):
        super().__init__(width=9, network=nn.Linear(2, 2), depth=2, head=nn.Linear(1, 1))


def test_hyperparameters_are_what_json_has_words_for():
    task = SavingMore(hook=print)
    expected = {"extra": 1, "width": 9, "betas": [0.9, 0.95], "path": None, "depth": 2}
    for hparams in (task.hparams, task.hparams_initial):
        assert dict(hparams) == expected
        assert json.loads(json.dumps(dict(hparams), allow_nan=False)) == expected


def test_a_hyperparameter_that_json_cannot_hold_is_refused_by_its_name():
    class Named(Task):
        def __init__(self, network):
            super().__init__()
            self.save_hyperparameters("network")

    with pytest.raises(ValueError, match="network: cannot be a hyperparameter, since JSON has no word for its value"):
        Named(nn.Linear(1, 1))
