import random

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import GradientAccumulation
from trainerkit.callbacks._accumulation import Window, amount, planned_steps, rows_of, steps_at
from trainerkit.callbacks._adaptive_window import (
    AdaptiveWindow,
    gradient_noise,
    noise_scale,
    window_by_noise,
    window_by_norm,
)
from trainerkit.testing.bench import Bench, Failure, module_class, witness_class
from trainerkit.testing.processes import in_two_ranks, sharded_in_two_ranks
from trainerkit.testing.syncs import SyncCounter
from trainerkit.trainer import Trainer as FastTrainer

FAST = {
    "max_epochs": 3,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


class BigBatch(Callback):
    """Compares the gradient of each step with that of all rows of its window in one batch, in float64."""

    def __init__(self):
        self.rows, self.windows, self.worst = [], [], 0.0

    def on_train_epoch_start(self, trainer, pl_module):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        big = [torch.cat(parts).double() for parts in zip(*self.rows, strict=True)]
        self.windows.append(len(self.rows))
        self.rows = []
        layer = nn.Linear(pl_module.layer.in_features, 1).double()
        layer.load_state_dict(pl_module.layer.state_dict())
        (layer(big[0])[:, 0] - big[1]).square().mean().backward()
        for own, expected in zip(pl_module.layer.parameters(), layer.parameters(), strict=True):
            distance = (own.grad.double() - expected.grad).norm() / expected.grad.norm()
            self.worst = max(self.worst, float(distance))


class Endless(IterableDataset):
    """Batches of a loader that does not say how many they are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def lengthless(loader):
    return DataLoader(Endless(list(loader)), batch_size=None)


def fit(tmp_path, callbacks, module=None, loader=None, fast=False, **options):
    module = module or ToyModule(lr=1e-3)  # it stays far from the minimum, where gradients cancel out
    torch.manual_seed(0)
    module.layer.reset_parameters()
    if fast:
        trainer = FastTrainer(callbacks=callbacks, default_root_dir=tmp_path, **FAST | options)
    else:
        trainer = toy_trainer(tmp_path, callbacks, **options)
    trainer.fit(module, toy_loader(rows=80) if loader is None else loader)
    return module, trainer


# Windows


def naive_steps(batches, epochs, schedule, by):
    step = 0
    for epoch in range(epochs):
        inside = 0
        for batch in range(batches):
            inside += 1
            position = epoch if by == "epoch" else step
            length = [schedule[key] for key in sorted(schedule) if key <= position][-1:] or [1]
            if inside >= length[0] or batch == batches - 1:
                step, inside = step + 1, 0
    return step


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_planned_steps_are_those_of_a_loop_over_all_batches(by):
    draw = random.Random(1)
    for _ in range(60):
        schedule = {draw.randrange(12): draw.randint(1, 5) for _ in range(draw.randint(1, 4))}
        batches, epochs = draw.randint(1, 13), draw.randint(1, 6)
        assert planned_steps(batches, epochs, schedule, by) == naive_steps(batches, epochs, schedule, by)
    assert planned_steps(7, 3, {0: 1}, by) == 21
    assert planned_steps(7, 3, {0: 100}, by) == 3


def test_a_window_is_a_number_that_steps_and_begins_at_its_own_place():
    window = Window(3, 4, lambda batches: batches / 4)
    assert window == 4
    assert [batch % window == 0 for batch in range(3, 7)] == [True, False, False, False]  # zeroed before its first
    assert [ready % window == 0 for ready in range(4, 8)] == [False, False, False, True]  # stepped after its last
    assert torch.equal(torch.tensor(8.0) / window, torch.tensor(2.0))
    assert 10 / window == 2.5
    assert 1 / Window(0, 4, lambda batches: 99.0) == 0.25


def test_steps_at_takes_the_last_key_that_was_reached():
    assert [steps_at({0: 1, 2: 3, 5: 2}, epoch) for epoch in range(7)] == [1, 1, 3, 3, 3, 2, 2]
    assert steps_at({3: 7}, 2) == 1


@pytest.mark.parametrize("fast", [False, True], ids=["lightning", "fast loop"])
@pytest.mark.parametrize("known", [True, False], ids=["sized", "lengthless"])
def test_every_steps_gradient_is_that_of_the_big_batch(tmp_path, fast, known):
    """Ten batches an epoch in windows that change from step to step, the tail of each epoch included."""
    schedule = {0: 1, 1: 2, 2: 3, 3: 4, 5: 3}
    watch = BigBatch()
    loader = toy_loader(rows=80) if known else lengthless(toy_loader(rows=80))
    _, trainer = fit(tmp_path, [watch, GradientAccumulation(steps=schedule, steps_by="step")], loader=loader, fast=fast)
    assert watch.windows == [1, 2, 3, 4, 4, 3, 3, 3, 3, 3, 1]
    assert watch.worst < 1e-6
    assert trainer.global_step == 11
    assert trainer.accumulate_grad_batches == 1  # given back


def test_lightnings_scheduler_is_not_exact_and_this_is(tmp_path):
    theirs, ours, same = BigBatch(), BigBatch(), BigBatch()
    fit(tmp_path, [theirs, GradientAccumulationScheduler({0: 2, 1: 3})])
    fit(tmp_path, [ours, GradientAccumulation(steps={0: 2, 1: 3})])
    fit(tmp_path, [same, GradientAccumulation()], accumulate_grad_batches=3)  # the Trainer's own number, made exact
    assert theirs.windows == ours.windows == [2] * 5 + 2 * [3, 3, 3, 1]
    assert theirs.worst == pytest.approx(2 / 3)  # a tail of one batch, divided by three
    assert max(ours.worst, same.worst) < 1e-6
    assert same.windows == 3 * [3, 3, 3, 1]


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_without_a_loss_does_not_count(tmp_path):
    class Skips(ToyModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 2, 5) else super().training_step(batch, batch_idx)

    class Watch(BigBatch):
        def on_before_backward(self, trainer, pl_module, loss):
            self.rows.append(self.batch)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch = batch

    watch = Watch()
    accumulation = GradientAccumulation(steps=3)
    fit(tmp_path, [accumulation, watch], Skips(lr=1e-3), max_epochs=1)
    assert watch.windows == [1, 2, 3, 1]
    assert watch.worst < 1e-6


def test_rows_weigh_batches_of_unequal_length(tmp_path):
    watch, plain = BigBatch(), BigBatch()
    loader = toy_loader(rows=45)  # five batches of 8, one of 5
    fit(tmp_path, [watch, GradientAccumulation(steps=4, weight="rows")], loader=loader)
    fit(tmp_path, [plain, GradientAccumulation(steps=4)], loader=loader)
    assert watch.worst < 1e-6
    assert plain.worst > 1e-3  # each batch counts the same


# A loss per token


class Tokens(ToyModule):
    """The mean over the tokens of a batch that its mask lets through."""

    def __init__(self, lr=0.1):
        super().__init__(lr)
        self.gradients = []

    def loss(self, batch):
        error = (self.layer(batch["x"])[..., 0] - batch["y"]).square()
        return (error * batch["mask"]).sum() / batch["mask"].sum().clamp(min=1)

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.layer.weight.grad.clone())


def token_rows(rows=36, empty=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 5, 4, generator=generator)
    mask = (torch.rand(rows, 5, generator=generator) < torch.linspace(0.1, 0.95, rows)[:, None]).float()
    mask[empty : empty + 4] = 0  # a batch in which nothing counts
    return [{"x": x[i], "y": x[i].sum(-1).sin(), "mask": mask[i]} for i in range(rows)]


@pytest.mark.parametrize("weight", ["mask", lambda batch: batch["mask"].sum()], ids=["key", "function"])
def test_a_token_count_weighs_batches(tmp_path, weight):
    small, big = Tokens(), Tokens()
    options = {"max_epochs": 2, "accelerator": "cpu"}
    fit(tmp_path, [GradientAccumulation(steps=3, weight=weight)], small, DataLoader(token_rows(), 4), **options)
    fit(tmp_path, [], big, DataLoader(token_rows(), 12), **options)
    assert len(small.gradients) == 6
    for own, expected in zip(small.gradients, big.gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-6, atol=1e-7)


def test_float16_gradients_times_token_counts_do_not_overflow(tmp_path):
    """A scale of 256 times ten thousand tokens is beyond float16; with the counts in a unit of their size it is not."""

    def many(batch):
        return batch["mask"].sum() * 1000

    module, plain = Tokens(), Tokens()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    loader = DataLoader(token_rows(), 4)
    fit(tmp_path, [GradientAccumulation(steps=3, weight=many)], module, loader, plugins=[plugin], max_epochs=1)
    assert scaler.get_scale() == 2.0**8
    fit(tmp_path, [GradientAccumulation(steps=3, weight=many)], plain, loader, max_epochs=1)
    for own, expected in zip(module.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-3)
    # A first batch without a token says nothing about their size; the next window knows better.
    loader = DataLoader(token_rows(empty=0), 4)
    fit(tmp_path, [GradientAccumulation(steps=3, weight=many)], Tokens(), loader, plugins=[plugin], max_epochs=1)
    assert scaler.get_scale() == 2.0**7


def test_bf16_gives_the_mean_of_its_window(tmp_path):
    watch = BigBatch()
    fit(tmp_path, [watch, GradientAccumulation(steps=3)], precision="bf16-mixed", max_epochs=1)
    assert watch.windows == [3, 3, 3, 1]
    assert watch.worst < 2e-2


class OfEachRank:
    """A loader that gives each process its own batches."""

    def __init__(self, loaders):
        self.loaders = loaders

    def __len__(self):
        return len(self.loaders[0])

    def __iter__(self):
        return iter(self.loaders[torch.distributed.get_rank()])


@pytest.mark.filterwarnings("ignore")
def test_two_processes_with_unequal_tokens_give_what_one_gives(tmp_path):
    class Saves(Tokens):
        def on_train_end(self):
            torch.save(self.gradients, tmp_path / f"{self.global_rank}.pt")

    rows = token_rows()
    # Together the processes have the same four rows in a batch as one process.
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    halves = OfEachRank([DataLoader(rows[rank::2], 2) for rank in range(2)])
    fit(tmp_path, [GradientAccumulation(steps=3, weight="mask")], Saves(), halves, **options)
    one = Tokens()
    fit(tmp_path, [GradientAccumulation(steps=3, weight="mask")], one, DataLoader(rows, 4))
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(one.gradients) == 9
    for first, second, expected in zip(*both, one.gradients, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-7)


# Estimates of steps, and schedules of the learning rate


class Scheduled(ToyModule):
    def __init__(self):
        super().__init__(lr=0.02)
        self.rates = []

    def configure_optimizers(self):
        self.estimated = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 5 else 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("options", "steps", "estimate"),
    [
        ({"steps": 3}, 12, 12),
        ({"steps": {0: 1, 1: 3}}, 18, 18),
        ({"steps": {0: 4, 2: 3}}, 10, 12),  # as an estimate is so many an epoch, at most one an epoch too many
        ({"steps": {0: 1, 5: 5}, "steps_by": "step"}, 10, 12),
        ({"mode": "adaptive", "min_steps": 2, "max_steps": 4}, None, 15),  # no more than with min_steps
    ],
)
def test_schedules_by_optimizer_steps_are_right(tmp_path, options, steps, estimate):
    module, trainer = fit(tmp_path, [GradientAccumulation(**options)], Scheduled())
    assert module.estimated == estimate
    assert trainer.global_step == len(module.rates)
    assert trainer.global_step == steps if steps is not None else trainer.global_step <= estimate
    assert module.rates == [0.02] * 5 + [pytest.approx(0.002)] * (len(module.rates) - 5)


# Adaptive windows


def test_a_window_by_the_norm_follows_the_documented_rule():
    draw = random.Random(2)
    for _ in range(200):
        low, norm, average = draw.randint(1, 5), draw.uniform(0, 3), draw.uniform(0.1, 2)
        high = low + draw.randint(0, 9)
        share = min(1.0, norm / average)
        expected = max(low, min(high, round(low + (high - low) * (1 - share))))
        assert window_by_norm(norm, average, low, high) == expected
        assert window_by_norm(norm * 7, average * 7, low, high) == expected  # the unit does not matter
        assert window_by_norm(norm * 1.5, average, low, high) <= expected  # a larger gradient never waits longer
    assert window_by_norm(0.0, 0.0, 2, 8) == 2


def test_the_gradient_noise_is_that_of_a_float64_simulation():
    """Samples with a known mean and covariance: both estimates are unbiased."""
    generator = torch.Generator().manual_seed(5)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    spread = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    samples = mean + spread * torch.randn(20000, 12, 3, generator=generator, dtype=torch.float64)
    small, big = samples[:, :3].mean(1).square().sum(1), samples.mean(1).square().sum(1)
    found = torch.tensor([gradient_noise(s, 3, b, 12) for s, b in zip(small.tolist(), big.tolist(), strict=True)])
    signal, noise = found.mean(0).tolist()
    assert signal == pytest.approx(float(mean.square().sum()), rel=0.02)
    assert noise == pytest.approx(float(spread.square().sum()), rel=0.02)


def test_the_noise_scale_does_not_depend_on_the_loss_scale_and_counts_in_the_unit_of_the_sizes():
    signal, noise = gradient_noise(9.0, 4, 5.0, 32)
    assert gradient_noise(9.0 * 25, 4, 5.0 * 25, 32) == pytest.approx((signal * 25, noise * 25))
    in_tokens = gradient_noise(9.0, 40, 5.0, 320)
    assert noise_scale(*in_tokens) == pytest.approx(10 * noise_scale(signal, noise))
    assert gradient_noise(3.0, 4, 3.0, 32) == (3.0, 0.0)
    assert noise_scale(3.0, -1.0) == 0
    assert noise_scale(-0.1, 1.0) == float("inf")


def test_a_window_by_the_noise_scale_has_as_many_samples():
    assert [window_by_noise(scale, 8, 2, 6) for scale in (0, 16, 16.1, 40, 1e9, float("inf"))] == [2, 2, 3, 5, 6, 6]
    assert window_by_noise(100, 8, 2, 99) == window_by_noise(1000, 80, 2, 99)


class Norms(Callback):
    """‖g‖ of each step, and the number of batches in it."""

    def __init__(self):
        self.norms, self.windows, self._batches = [], [], 0

    def on_train_batch_start(self, *_):
        self._batches += 1

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad.flatten().double() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))
        self.windows.append(self._batches)
        self._batches = 0


def test_adaptive_windows_are_those_that_the_norms_of_earlier_steps_ask_for(tmp_path):
    watch, big = Norms(), BigBatch()
    accumulation = GradientAccumulation(mode="adaptive", max_steps=5, decay=0.8)
    _, trainer = fit(tmp_path, [watch, accumulation, big], max_epochs=3, log_every_n_steps=1, limit_val_batches=0)
    average, expected = 0.0, [1, 1]  # the window after a step comes from the norms up to the step before
    for count, norm in enumerate(watch.norms[:-2], start=1):
        average = 0.8 * average + 0.2 * norm
        expected.append(window_by_norm(norm, average / (1 - 0.8**count), 1, 5))
    assert len(set(watch.windows)) > 2
    left = 10
    for window, length in zip(watch.windows, expected, strict=True):
        assert window == min(length, left)  # cut by the end of the epoch
        left = left - window or 10
    assert big.worst < 1e-6
    assert float(trainer.callback_metrics["accumulation/steps"]) == watch.windows[-1]
    assert float(trainer.callback_metrics["accumulation/gradient_norm"]) == pytest.approx(watch.norms[-2], rel=1e-5)


@pytest.mark.parametrize("by", ["gradient_norm", "noise_scale"])
def test_a_step_that_the_scaler_skips_decides_nothing(tmp_path, by):
    class Overflows(ToyModule):
        def loss(self, batch):
            return super().loss(batch) * (float("inf") if self.trainer.global_step == 1 else 1.0)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    accumulation = GradientAccumulation(mode="adaptive", by=by, min_steps=2, max_steps=2)
    _, trainer = fit(tmp_path, [accumulation], Overflows(), plugins=[plugin], max_epochs=1, log_every_n_steps=1)
    assert trainer.global_step == 5
    state = accumulation.state_dict()["adaptive"]
    assert state["count"] == 3  # of four steps before the last
    assert all(abs(average) < float("inf") for average in state["averages"])


class Noisy(ToyModule):
    """A gradient of known mean and noise: g = mean(x) over the rows, whatever the weights are."""

    def loss(self, batch):
        return self.layer(batch[0]).mean() - self.layer.bias.mean()


@pytest.mark.parametrize("precision", ["32-true", "fp16"])
def test_windows_grow_to_the_noise_scale(tmp_path, precision):
    """tr(Σ)/|G|² = 99·1/(99·0.2²) = 25 samples: with batches of 8, windows of 4."""
    generator = torch.Generator().manual_seed(7)
    x = 0.2 + torch.randn(2400, 99, generator=generator)
    loader = DataLoader(torch.utils.data.TensorDataset(x, x[:, 0]), 8)
    accumulation = GradientAccumulation(mode="adaptive", by="noise_scale", min_steps=2, max_steps=16, decay=0.99)
    watch = Norms()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if precision == "fp16" else {}
    _, trainer = fit(
        tmp_path, [watch, accumulation], Noisy(lr=0.0, width=99), loader, max_epochs=1, log_every_n_steps=1, **options
    )
    assert float(trainer.callback_metrics["accumulation/noise_scale"]) == pytest.approx(25, rel=0.15)
    assert sorted(watch.windows[-21:-1])[10] in (3, 4)  # the median


# In every setting


VARIANTS = {
    "fixed": lambda: GradientAccumulation(steps=3),
    "rows": lambda: GradientAccumulation(steps=3, weight="rows"),
    "weights": lambda: GradientAccumulation(steps=3, weight=lambda batch: batch["y"].exp().sum()),
    "norm": lambda: GradientAccumulation(mode="adaptive", max_steps=3, decay=0.5),
    "noise": lambda: GradientAccumulation(mode="adaptive", by="noise_scale", min_steps=2, max_steps=3),
    "dynamic": lambda: GradientAccumulation(mode="dynamic", steps=3),
}


def equal(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("variant", "saves"),
    [("fixed", range(1, 8)), ("noise", range(1, 8)), ("weights", (2, 3)), ("norm", (2, 5)), ("dynamic", (2, 5))],
)
@pytest.mark.filterwarnings("ignore")
def test_a_run_resumed_after_any_batch_ends_with_the_same_bits(tmp_path, variant, saves):
    """Inside a window too: the checkpoint has the gradient so far. And under the other namespace."""
    bench = Bench([VARIANTS[variant]], tmp_path)
    whole = bench.fit(saves=saves)
    for batch in saves:
        torch.load(tmp_path / f"{batch}.ckpt", weights_only=True)
        resumed = bench.fit(resume=tmp_path / f"{batch}.ckpt")
        assert equal(resumed.weights, whole.weights), batch
        assert resumed.trainer.global_step == whole.trainer.global_step
    assert equal(bench.fit("pytorch_lightning").weights, whole.weights)
    assert equal(bench.fit(callbacks=whole.callbacks).weights, whole.weights)  # the same object once more
    if variant == "fixed":
        assert not equal(Bench([lambda: GradientAccumulation(steps=2)], tmp_path).fit().weights, whole.weights)


@pytest.mark.parametrize("variant", ["rows", "dynamic"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_late_and_unused_layers_change_nothing(tmp_path, variant):
    """The bench's module has tied weights and a frozen layer as well."""
    bench = Bench([VARIANTS[variant]], tmp_path)
    plain = bench.fit().weights
    compiled = {"compiled": True}
    whole = bench.fit(module=compiled, saves=(2,)).weights
    assert equal(bench.fit(resume=tmp_path / "2.ckpt", module=compiled).weights, whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, plain[name.replace("_orig_mod.", "")], rtol=1e-5, atol=1e-6)
    for option in ("late", "unused"):
        weights = bench.fit(module={option: True}).weights
        for name, tensor in weights.items():
            if name != "unused":
                assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize("variant", ["fixed", "rows", "norm", "dynamic"])
@pytest.mark.filterwarnings("ignore")
def test_two_processes_give_what_one_gives(tmp_path, variant):
    bench = Bench([VARIANTS[variant]], tmp_path)
    whole = bench.fit()
    ranks = in_two_ranks(bench)
    assert not isinstance(ranks, str), ranks
    assert equal(ranks[0]["weights"], ranks[1]["weights"])
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_window_that_two_processes_began_they_can_end(tmp_path):
    """The checkpoint, which is the first one's, has the mean of their gradients so far."""
    bench = Bench([VARIANTS["rows"]], tmp_path)
    whole, kind = bench.fit(), module_class()

    class Saves(kind):
        def on_train_end(self):
            torch.save(self.state_dict(), tmp_path / f"end-{self.global_rank}.pt")

    for saves, resume in (((2,), None), ((), tmp_path / "2.ckpt")):
        callbacks = [VARIANTS["rows"](), witness_class()(tmp_path, saves)]
        bench.trainer(callbacks, strategy="ddp_fork", devices=2).fit(Saves(), ckpt_path=resume)
        ends = [torch.load(tmp_path / f"end-{rank}.pt", weights_only=True) for rank in range(2)]
        assert equal(*ends)
        for name, tensor in whole.weights.items():
            torch.testing.assert_close(ends[0][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_sharded_parameters_work_with_fixed_windows_and_are_refused_otherwise(tmp_path):
    bench = Bench([VARIANTS["fixed"]], tmp_path)
    whole, ranks = bench.fit(), sharded_in_two_ranks(bench)
    assert not isinstance(ranks, str), ranks
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, rtol=1e-4, atol=1e-6)
    trainer = toy_trainer(tmp_path)
    trainer.strategy.__class__ = type("ModelParallelStrategy", (type(trainer.strategy),), {})
    for variant in ("rows", "norm", "noise", "dynamic"):
        with pytest.raises(ValueError, match="strategy=ModelParallelStrategy: GradientAccumulation does not work on"):
            VARIANTS[variant]().setup(trainer, ToyModule(), "fit")


@pytest.mark.parametrize("variant", ["rows", "norm", "noise", "dynamic"])
@pytest.mark.filterwarnings("ignore")
def test_nothing_waits_for_the_device(tmp_path, variant):
    """As many copies to the host as the Trainer alone makes with as many optimizer steps."""
    callback, counts = VARIANTS[variant](), []
    callback._adaptive.minimum = callback._adaptive.maximum = 3
    for callbacks, own in (([callback], 1), ([], 3)):
        counter = SyncCounter()
        with counter:
            run = Bench([], tmp_path).fit(
                callbacks=callbacks, first=[counter.opening()], max_epochs=3, accumulate_grad_batches=own
            )
        assert run.trainer.global_step == 6
        counts.append(counter.count)
    assert counts[0] == counts[1]


class Stops(Callback):
    """Raises within the second batch of the second epoch."""

    def on_before_backward(self, trainer, pl_module, loss):
        self._maybe(trainer, "before")

    def on_after_backward(self, trainer, pl_module):
        self._maybe(trainer, "after")

    def __init__(self, when):
        self.when = when

    def _maybe(self, trainer, when):
        if self.when == when and trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_idx == 1:
            raise Failure


@pytest.mark.parametrize(
    ("order", "window", "windows"),
    [
        # Of three batches one was before; two more, and the tail of one.
        (lambda ours, stops: [stops("before"), ours], {"at": 1, "seen": 1}, [2, 1]),
        # The gradient may have a part of the batch, or all of it: a window of the three that are left.
        (lambda ours, stops: [ours, stops("before")], None, [3]),
        (lambda ours, stops: [ours, stops("after")], {"at": 2, "seen": 2}, [3]),
    ],
    ids=["before its backward pass", "within it", "after it"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_broke_off_and_is_run_again_counts_once(tmp_path, order, window, windows):
    callbacks = [*order(GradientAccumulation(steps=3), Stops), OnExceptionCheckpoint(tmp_path, "broken")]
    with pytest.raises(Failure):
        fit(tmp_path, callbacks, loader=toy_loader())
    state = torch.load(tmp_path / "broken.ckpt", weights_only=True)["callbacks"]["GradientAccumulation"]
    found = state.get("window")
    assert (found and {key: found[key] for key in ("at", "seen")}) == window
    watch = Norms()
    trainer = toy_trainer(tmp_path, [GradientAccumulation(steps=3), watch], max_epochs=2, log_every_n_steps=1)
    trainer.fit(ToyModule(), toy_loader(), ckpt_path=tmp_path / "broken.ckpt")
    assert watch.windows == windows
    assert trainer.global_step == 2 + len(windows)
    assert trainer.callback_metrics["accumulation/steps"] == windows[-1]


def test_a_new_number_of_steps_wins_over_the_checkpoints(tmp_path):
    bench = Bench([VARIANTS["fixed"]], tmp_path)
    bench.fit(saves=(3, 4))
    other = Bench([lambda: GradientAccumulation(steps=2)], tmp_path)
    assert other.fit(resume=tmp_path / "4.ckpt").trainer.global_step == 2 + 2
    assert other.fit(resume=tmp_path / "3.ckpt").trainer.global_step == 1 + 1 + 2


def test_a_new_longest_window_wins_over_the_checkpoints_length():
    window = AdaptiveWindow(1, 3, "gradient_norm", 0.5)
    state = {"by_noise": False, "length": 9, "count": 4, "averages": [1.0], "measured": None}
    window.load_state_dict(state)
    assert window.length == 3
    assert window.state_dict() == state | {"length": 3}
    other = AdaptiveWindow(2, 3, "noise_scale", 0.5)
    other.load_state_dict(state)  # of another rule
    assert other.state_dict()["count"] == 0


def test_an_optimizer_that_evaluates_a_batch_several_times_sees_its_gradient(tmp_path):
    class Newton(ToyModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

    plain, _ = fit(tmp_path, [], Newton(), max_epochs=1)
    ours, _ = fit(tmp_path, [GradientAccumulation(mode="dynamic")], Newton(), max_epochs=1)
    torch.testing.assert_close(ours.layer.weight, plain.layer.weight)


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([GradientAccumulation(steps=2)], {"accumulate_grad_batches": 3}, "accumulate_grad_batches=3: must be 1"),
        ([GradientAccumulation(mode="adaptive")], {"accumulate_grad_batches": 3}, "accumulate_grad_batches=3: must be"),
        (
            [GradientAccumulationScheduler({0: 2}), GradientAccumulation(steps=2)],
            {},
            "must not stand beside Lightning's",
        ),
    ],
)
def test_who_else_sets_the_number_is_refused_and_the_trainer_gets_its_own_back(tmp_path, callbacks, options, message):
    trainer = toy_trainer(tmp_path, callbacks, **options)
    with pytest.raises(ValueError, match=message):
        trainer.fit(ToyModule(), toy_loader())
    assert trainer.accumulate_grad_batches == options.get("accumulate_grad_batches", 1)
    assert type(trainer.accumulate_grad_batches) is int


def test_manual_optimization_is_refused_in_one_sentence(tmp_path):
    module = ToyModule()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization=False: GradientAccumulation works with automatic"):
        toy_trainer(tmp_path, [GradientAccumulation(steps=2)]).fit(module, toy_loader())


@pytest.mark.parametrize("mode", ["fixed", "dynamic"])
def test_an_exception_gives_back_what_was_taken(tmp_path, mode):
    class Fails(ToyModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    module = Fails()
    trainer = toy_trainer(tmp_path, [GradientAccumulation(mode=mode, steps=2)])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, toy_loader())
    assert type(trainer.accumulate_grad_batches) is int
    assert "training_step" not in vars(module)
    assert "log" not in vars(module)


def test_sizes_come_from_rows_keys_attributes_and_functions():
    batch = {"name": "a", "x": torch.ones(6, 2), "mask": torch.tensor([[1, 0], [1, 1]])}
    assert rows_of(batch) == amount(batch, None) == amount(batch, "rows") == 6
    assert amount(batch, "mask") == 3
    assert amount(batch, lambda batch: 7) == 7
    assert amount(type("Batch", (), {"tokens": 5}), "tokens") == 5
    with pytest.raises(ValueError, match="weight=tokens: is not in the batch, which has name, x, mask"):
        amount(batch, "tokens")
    with pytest.raises(ValueError, match="weight=tokens: a batch of type list has no such attribute"):
        amount([1], "tokens")
    with pytest.raises(ValueError, match="batch=int: must be a tensor"):
        rows_of(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "auto"}, "mode=auto: must be fixed, adaptive or dynamic"),
        ({"steps": 0}, "steps=0: must be 1 or more"),
        ({"steps": {}}, r"steps=\{\}: must be 1 or more"),
        ({"steps": {-1: 2}}, "steps=.*: must be 1 or more"),
        ({"steps": {0: 1.5}}, "steps=.*: must be 1 or more"),
        ({"steps": 2, "mode": "adaptive"}, "steps=2: must be null with mode=adaptive"),
        ({"steps_by": "batch"}, "steps_by=batch: must be epoch or step"),
        ({"min_steps": 0}, "min_steps=0: must be 1 or more"),
        ({"mode": "adaptive", "by": "noise_scale"}, "min_steps=1: must be 2 or more with by=noise_scale"),
        ({"max_steps": 0}, "max_steps=0: must be min_steps=1 or more"),
        ({"by": "loss"}, "by=loss: must be gradient_norm or noise_scale"),
        ({"decay": 1.0}, "decay=1.0: must be from 0 to below 1"),
        ({"target_memory_mb": 100}, "target_memory_mb=100: must be above 0, and null unless mode=dynamic"),
        ({"target_memory_mb": 0, "mode": "dynamic"}, "target_memory_mb=0: must be above 0"),
        ({"weight": ""}, "weight='': must be 'rows', a name"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        GradientAccumulation(**options)
