"""GradientAccumulation(mode="dynamic"): a batch in parts gives the gradient, the loss and the metrics of the whole."""

import collections
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from tests.callbacks.test_gradient_accumulation import FAST, OfEachRank, Tokens, token_rows
from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import GradientAccumulation
from trainerkit.callbacks._memory_target import peak_bytes, reset_peak
from trainerkit.callbacks._micro_batches import is_out_of_memory, part_of, split
from trainerkit.trainer import Trainer as FastTrainer


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > ctx.rows:
            raise torch.OutOfMemoryError("in the backward pass")
        return gradient, None


class Small(ToyModule):
    """A module for which more rows than `fits` are too many.

    The error is raised by hand, where a GPU would raise it: no allocation on a test machine fails in a way that can be
    repeated.
    """

    def __init__(self, fits=100, where="forward", noise=False):
        super().__init__(lr=0.05)
        self.fits, self.where, self.noise = fits, where, noise
        self.dropout, self.norm = nn.Dropout(0.5 if noise else 0.0), nn.BatchNorm1d(4) if noise else nn.Identity()
        self.register_buffer("rows", torch.zeros(()))
        self.sizes, self.gradients = [], []

    def loss(self, batch):
        x, y = batch
        self.sizes.append(len(x))
        if self.where == "first part" and self.sizes == [8, 4, 4, 4]:  # of the second batch
            raise torch.OutOfMemoryError("at once")
        if self.where == "second part" and self.sizes == [8, 4, 4, 4, 4]:
            self.rows = (
                self.rows + self.dropout(self.norm(x)).abs().sum()
            )  # draws and statistics of an attempt that fails
            raise torch.OutOfMemoryError("half-way")
        if self.where != "backward" and len(x) > self.fits:
            raise torch.OutOfMemoryError("in the forward pass")
        self.rows = self.rows + len(x)  # another tensor, where batch normalization writes into its own
        guess = self.layer(self.dropout(self.norm(x)))[:, 0]
        if self.where == "backward":
            guess = FailsBackward.apply(guess, self.fits)
        return (guess - y).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.layer.weight.grad.clone())


def fit(tmp_path, module, callback=None, loader=None, fast=False, **options):
    torch.manual_seed(0)
    module.layer.reset_parameters()
    torch.manual_seed(1)
    callbacks = [] if callback is None else [callback]
    if fast:
        trainer = FastTrainer(callbacks=callbacks, default_root_dir=tmp_path, **FAST | options)
    else:
        trainer = toy_trainer(tmp_path, callbacks, **options)
    trainer.fit(module, toy_loader() if loader is None else loader)
    return trainer


def assert_same_gradients(one, other, rtol=1e-6, atol=1e-6):
    assert len(one.gradients) == len(other.gradients) > 0
    for own, expected in zip(one.gradients, other.gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("where", "fast"), [("forward", False), ("backward", True)], ids=["forward", "backward, in the fast loop"]
)
def test_what_does_not_fit_is_split_and_gives_the_gradients_of_the_whole(tmp_path, where, fast):
    """Windows of three batches of 8 with a tail, 3 rows fit: parts of 2; the batch that failed is repeated."""
    whole, parts = Small(), Small(fits=3, where=where)
    expected = fit(tmp_path, whole, GradientAccumulation(steps=3), max_epochs=2).callback_metrics["train/loss"]
    callback = GradientAccumulation(mode="dynamic", steps=3)
    trainer = fit(tmp_path, parts, callback, fast=fast, log_every_n_steps=1, max_epochs=2)
    assert parts.sizes[:7] == [8, 4, 2, 2, 2, 2, 2]  # two attempts, then the first batch
    assert set(parts.sizes[7:]) == {2}
    assert_same_gradients(parts, whole)
    assert float(trainer.callback_metrics["accumulation/micro_batches"]) == 4
    resumed, again = Small(fits=3, where=where), Small(fits=3, where=where)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    toy_trainer(tmp_path, [callback], max_epochs=3).fit(resumed, toy_loader(), ckpt_path=tmp_path / "end.ckpt")
    assert resumed.sizes == 4 * 4 * [2]
    fit(tmp_path, again, callback, fast=fast, max_epochs=1)
    assert again.sizes[:7] == parts.sizes[:7]  # another run begins with one part
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], expected)


def test_a_batch_that_is_repeated_draws_the_same_numbers_and_leaves_no_trace(tmp_path):
    """Dropout and batch statistics of an attempt that failed half-way: bit for bit as if it had failed at once."""
    late, early = Small(4, "second part", noise=True), Small(4, "first part", noise=True)
    trainers = [fit(tmp_path, module, GradientAccumulation(mode="dynamic")) for module in (late, early)]
    assert late.sizes[:7] == [8, 4, 4, 4, 4, 2, 2]
    assert early.sizes[:6] == [8, 4, 4, 4, 2, 2]
    for name, tensor in early.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name
    assert late.norm.num_batches_tracked == 2 + 11 * 4
    assert late.rows == 3 * 32
    first, second = (trainer.callback_metrics["train/loss"] for trainer in trainers)
    assert torch.equal(first, second)


def test_an_error_that_is_not_about_memory_or_that_one_row_raises_is_raised(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="forward"):
        fit(tmp_path, Small(fits=0), GradientAccumulation(mode="dynamic"))

    class Breaks(Small):
        def loss(self, batch):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        fit(tmp_path, Breaks(), GradientAccumulation(mode="dynamic"))


def test_a_failed_allocation_is_known_by_type_or_words():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16"])
def test_mixed_precision_keeps_its_gradients(tmp_path, precision):
    """Of 10⁻⁷, which float16 does not hold: the loss is scaled before each part's backward, not after."""
    casts = set()

    class Watches(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            casts.add(torch.is_autocast_enabled("cpu"))
            return gradient

    class Tiny(Small):
        def loss(self, batch):
            return Watches.apply(super().loss(batch)) * 1e-6

    modules = Tiny(), Tiny(fits=4)
    for module, callback in zip(modules, (None, GradientAccumulation(mode="dynamic")), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        plugin = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
        fit(tmp_path, module, callback, **(plugin if precision == "fp16" else {"precision": precision}))
        assert scaler.get_scale() == 2.0**16
    assert all(float(gradient.abs().max()) > 0 for gradient in modules[1].gradients)
    assert casts == {False}  # a backward pass is not under autocast
    assert_same_gradients(*modules, rtol=2e-2, atol=2e-8)


def test_a_step_that_overflows_is_skipped_as_without_parts(tmp_path):
    class Overflows(Small):
        def loss(self, batch):
            return super().loss(batch) * (float("inf") if self.trainer.global_step == 1 else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    module = Overflows(fits=4)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    fit(tmp_path, module, GradientAccumulation(mode="dynamic"), plugins=plugins, max_epochs=1)
    assert scaler.get_scale() == 2.0
    assert torch.isfinite(module.layer.weight).all()


def test_hooks_on_parameters_see_the_whole_gradient_once(tmp_path):
    """A hook that is not linear: sign(g₁ + g₂), not sign(g₁) + sign(g₂)."""
    seen = {}
    for name, module, callback in (
        ("whole", Small(), None),
        ("parts", Small(fits=2), GradientAccumulation(mode="dynamic")),
    ):
        seen[name] = []

        def hook(gradient, name=name):
            seen[name].append(gradient.clone())
            return gradient.sign()

        handle = module.layer.weight.register_hook(hook)
        fit(tmp_path, module, callback, max_epochs=1)
        assert len(module.layer.weight._backward_hooks) == 1
        handle.remove()
        assert all(torch.equal(gradient, gradient.sign()) for gradient in module.gradients)
    for own, expected in zip(seen["parts"], seen["whole"], strict=True):
        torch.testing.assert_close(own, expected)


class Logs(Small):
    """Logs and gives back all kinds of things."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss(batch)
        self.log("mean", loss, on_step=True, on_epoch=True)
        self.log_dict({"sum": y.sum(), "rows_too": float(len(x))}, reduce_fx="sum")
        self.log("most", y.max(), reduce_fx=max)
        for _ in range(2):
            self.log("twice", loss, on_epoch=True)
        self.log("rows", 1.0, reduce_fx="sum", on_step=False, on_epoch=True, batch_size=len(x))
        return {"loss": loss, "error": self.layer(x).detach(), "mean": y.mean(), "count": 3, "nest": {"y": y}}


class Outputs(Callback):
    def __init__(self):
        self.outputs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(outputs)


def test_metrics_and_outputs_are_those_of_the_whole_batch(tmp_path):
    metrics, outputs = {}, {}
    for name, module, callbacks in (
        ("whole", Logs(), []),
        ("parts", Logs(fits=3), [GradientAccumulation(mode="dynamic")]),
    ):
        watch = Outputs()
        torch.manual_seed(0)
        module.layer.reset_parameters()
        logger = CSVLogger(tmp_path, name=name)
        trainer = toy_trainer(tmp_path, [*callbacks, watch], max_epochs=1, logger=logger, log_every_n_steps=1)
        trainer.fit(module, toy_loader(rows=30))
        metrics[name], outputs[name] = dict(trainer.callback_metrics), watch.outputs
    assert metrics["parts"].pop("accumulation/micro_batches") == 4
    assert set(metrics["whole"]) >= {"mean_step", "mean_epoch", "sum", "most", "rows", "twice_epoch"}
    for key, value in metrics["whole"].items():
        tolerance = 4 if key == "rows" else 1  # logged once by each of four parts
        torch.testing.assert_close(metrics["parts"][key], value * tolerance, rtol=1e-5, atol=1e-6)
    for own, expected in zip(outputs["parts"], outputs["whole"], strict=True):
        assert own["count"] == 3
        assert own["error"].shape == expected["error"].shape
        torch.testing.assert_close(own["nest"]["y"], expected["nest"]["y"])
        for key in ("loss", "mean", "error"):
            torch.testing.assert_close(own[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_that_is_skipped_in_parts_is_skipped(tmp_path):
    class Skips(Small):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skips(fits=4)
    fit(tmp_path, module, GradientAccumulation(mode="dynamic", steps=4), max_epochs=1)
    expected = Small()
    rows = [torch.utils.data.Subset(toy_loader().dataset, [*range(8), *range(16, 32)])]
    fit(tmp_path, expected, None, DataLoader(rows[0], 24), max_epochs=1)
    assert_same_gradients(module, expected)


def test_parts_with_unequal_tokens_weigh_what_they_have(tmp_path):
    class SmallTokens(Tokens):
        def loss(self, batch):
            if len(batch["x"]) > 3:
                raise torch.OutOfMemoryError
            return super().loss(batch)

    whole, parts = Tokens(), SmallTokens()
    loader = DataLoader(token_rows(), 4)  # one of the batches has no token
    fit(tmp_path, whole, GradientAccumulation(steps=2, weight="mask"), loader)
    fit(tmp_path, parts, GradientAccumulation(mode="dynamic", steps=2, weight="mask"), loader)
    assert_same_gradients(parts, whole)


@pytest.mark.filterwarnings("ignore")
def test_when_one_process_runs_out_all_have_as_many_parts_and_the_gradients_of_one(tmp_path):
    class Saves(Small):
        def loss(self, batch):
            self.fits = 2 if self.global_rank == 1 else 100
            return super().loss(batch)

        def on_train_end(self):
            torch.save({"gradients": self.gradients, "sizes": self.sizes}, tmp_path / f"{self.global_rank}.pt")

    rows = toy_loader().dataset
    halves = [torch.utils.data.Subset(rows, range(rank, 32, 2)) for rank in range(2)]
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    loader = OfEachRank([DataLoader(half, 4) for half in halves])
    fit(tmp_path, Saves(), GradientAccumulation(mode="dynamic", steps=2), loader, **options)
    one = Small()
    fit(tmp_path, one, GradientAccumulation(steps=2))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert second["sizes"][:3] == [4, 2, 2]
    assert first["sizes"][:3] == [4, 2, 2]  # its first batch whole, from the next on as the other's
    for own, other, expected in zip(first["gradients"], second["gradients"], one.gradients, strict=True):
        assert torch.equal(own, other)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


# Memory

measurable = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="a peak on the CPU can be measured on Linux only"
)


class Wide(Small):
    """One MiB for each tensor of a row."""

    def loss(self, batch):
        x, y = batch
        wide = x[:, :1].expand(len(x), 2**18).exp()
        return super().loss((x, y)) + (wide * 0).sum()


@measurable
def test_the_measured_peak_comes_below_the_target_at_the_same_gradients(tmp_path):
    """32 rows take about 96 MiB, over what the process has anyway: the target allows 50."""
    cpu = torch.device("cpu")
    whole, parts = Wide(), Wide()
    loader = toy_loader(rows=160, batch_size=32)
    fit(tmp_path, whole, None, loader, max_epochs=1)
    reset_peak(cpu)  # only now: a first fit imports and allocates what stays
    target = peak_bytes(cpu) / 2**20 + 50
    callback = GradientAccumulation(mode="dynamic", target_memory_mb=target)
    trainer = fit(tmp_path, parts, callback, loader, max_epochs=1, log_every_n_steps=1)
    assert parts.sizes[0] == 32
    assert parts.sizes[-1] in (4, 8, 16)
    assert 0 < float(trainer.callback_metrics["accumulation/peak_memory_mb"]) <= target
    assert_same_gradients(parts, whole)


class Spends(Small):
    """Takes 120 MiB in a validation, or in an attempt that fails."""

    def validation_step(self, batch, batch_idx):
        torch.ones(30, 2**20).sum()

    def loss(self, batch):
        if len(batch[0]) > self.fits:
            torch.ones(30, 2**20).sum()
        return super().loss(batch)


@measurable
def test_the_peak_of_a_validation_or_of_a_failed_attempt_does_not_count(tmp_path):
    cpu = torch.device("cpu")
    reset_peak(cpu)
    module = Spends(fits=4)
    callback = GradientAccumulation(mode="dynamic", target_memory_mb=peak_bytes(cpu) / 2**20 + 60)
    trainer = toy_trainer(tmp_path, [callback])
    trainer.fit(module, toy_loader(), toy_loader(rows=8))
    assert module.sizes == [8] + 2 * 3 * 4 * [4]


@measurable
def test_a_target_that_one_row_exceeds_is_said_once(tmp_path):
    module = Small()
    with pytest.warns(UserWarning, match="target_memory_mb=1: one row at a time still takes") as warnings:
        fit(tmp_path, module, GradientAccumulation(mode="dynamic", target_memory_mb=1))
    assert len([w for w in warnings if "one row" in str(w.message)]) == 1
    assert module.sizes[:4] == [8, 4, 4, 2]
    assert module.sizes[-1] == 1


# Splitting


Pair = collections.namedtuple("Pair", ["x", "names"])


def test_parts_of_any_batch_put_together_are_the_batch():
    x = torch.arange(14).view(7, 2)
    batch = {"pair": Pair(x, list("abcdefg")), "weights": torch.ones(3), "scalar": torch.tensor(1.0), "deep": [(x, x)]}
    for number in (1, 2, 3, 7):
        parts = split(batch, number)
        sizes = [len(part["pair"].x) for part in parts]
        assert sum(sizes) == 7
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([part["pair"].x for part in parts]), x)
        assert [name for part in parts for name in part["pair"].names] == list("abcdefg")
        assert torch.equal(torch.cat([part["deep"][0][1] for part in parts]), x)
        assert all(type(part["pair"]) is Pair and len(part["weights"]) == 3 for part in parts)
    ordered = collections.OrderedDict(x=x)
    assert type(part_of(ordered, 0, 2, 7)) is collections.OrderedDict
    with pytest.raises(ValueError, match="batch=str: must be a tensor, or a dict"):
        split("rows", 2)


def test_modules_that_cannot_be_split_are_refused(tmp_path):
    class OwnBackward(ToyModule):
        def backward(self, loss):
            loss.backward()

    with pytest.raises(ValueError, match="mode=dynamic: must not meet a module with a backward of its own"):
        fit(tmp_path, OwnBackward(), GradientAccumulation(mode="dynamic"))
    trainer = toy_trainer(tmp_path)
    trainer.strategy.__class__ = type("Other", (type(trainer.strategy),), {"root_device": torch.device("meta")})
    with pytest.raises(ValueError, match="target_memory_mb=9: must be null on this meta, where no peak can be"):
        GradientAccumulation(mode="dynamic", target_memory_mb=9).setup(trainer, ToyModule(), "fit")
    trainer = toy_trainer(tmp_path)
    trainer.strategy.world_size = 2
    module = ToyModule()
    module.norm = nn.Sequential(nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match="mode=dynamic: must not meet SyncBatchNorm"):
        GradientAccumulation(mode="dynamic").setup(trainer, module, "fit")
