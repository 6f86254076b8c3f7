import importlib
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import GradientCheck, GradientMismatch
from trainerkit.callbacks.gradient_check import check_gradients


def fit(tmp_path, check, make_module=ToyModule, loader=None, **options):
    torch.manual_seed(0)
    module = make_module()
    callbacks = [] if check is None else [check]
    trainer = toy_trainer(tmp_path, callbacks, **{"max_epochs": 1} | options)
    trainer.fit(module, loader or toy_loader())
    return module, trainer


class Attention(torch.autograd.Function):
    """softmax(QKᵀ/√d)·V with a backward by hand, once right and once as it was found in the wild."""

    @staticmethod
    def forward(ctx, q, k, v, is_right):
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.is_right = is_right
        return weights @ v

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, weights = ctx.saved_tensors
        root = math.sqrt(q.shape[-1])
        d_weights = d_out @ v.mT
        if ctx.is_right:
            d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) / root
        else:
            d_scores = d_weights * root
        return d_scores @ k, d_scores.mT @ q, weights.mT @ d_out, None


class AttentionModule(ToyModule):
    def __init__(self, is_right):
        super().__init__()
        self.is_right = is_right
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def loss(self, batch):
        x = batch[0].reshape(-1, 4, 4)
        out = Attention.apply(self.query(x), self.key(x), self.value(x), self.is_right)
        return (self.layer(out)[..., 0].mean(1) - batch[1].reshape(-1, 4).mean(1)).square().mean()


def test_a_wrong_backward_of_attention_is_caught_with_names_and_both_values(tmp_path):
    check = GradientCheck()
    with pytest.raises(GradientMismatch) as caught:
        fit(tmp_path, check, lambda: AttentionModule(is_right=False))
    message = str(caught.value)
    assert " of 20 checked derivatives are wrong (rtol=0.0001)" in message
    assert len(message.splitlines()) <= 10
    # Query and key are behind the wrong term; value and layer are not.
    wrong = {one.name for one in check.coordinates if one.differs(check.rtol)}
    assert wrong == {"query.weight", "key.weight"}
    worst = max((one for one in check.coordinates), key=lambda one: one.relative_error)
    line = f"{worst.name}[{worst.index[0]}, {worst.index[1]}]: backward gives {worst.analytic:.6g}"
    assert line in message
    assert f"give {worst.numeric:.6g}" in message


def test_the_right_backward_of_attention_passes_to_eight_digits(tmp_path):
    check = GradientCheck()
    fit(tmp_path, check, lambda: AttentionModule(is_right=True))
    assert len(check.coordinates) == 20
    assert max(one.uncertainty for one in check.coordinates) < 1e-7
    assert max(one.relative_error for one in check.coordinates if one.scale > 1e-6) < 1e-7


def naive_gradient(weight, x, y):
    """Of mean((x·w − y)²), in float64, element by element."""
    residual = [sum(a * b for a, b in zip(row, weight, strict=True)) - t for row, t in zip(x, y, strict=True)]
    return [2 * sum(r * row[i] for r, row in zip(residual, x, strict=True)) / len(x) for i in range(len(weight))]


def regression():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 5), (7,)))
    weight = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    return x, y, weight


def test_both_derivatives_equal_a_naive_reference_and_the_values_come_back():
    x, y, weight = regression()
    before = weight.detach().clone()
    found = check_gradients(lambda: (x @ weight - y).square().mean(), {"w": weight}, 50)
    assert sorted({one.index for one in found}) == [(i,) for i in range(5)]  # each once, however many are asked for
    expected = naive_gradient(before.tolist(), x.tolist(), y.tolist())
    for one in found:
        assert one.analytic == pytest.approx(expected[one.index[0]], rel=1e-12)
        assert one.numeric == pytest.approx(expected[one.index[0]], rel=1e-7, abs=1e-9)
        assert not one.differs(1e-6)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_the_verdict_does_not_depend_on_the_scale_of_the_loss(factor):
    x, y, weight = regression()

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, d):
            return d * 1.001

    right = check_gradients(lambda: factor * (x @ weight - y).square().mean(), {"w": weight}, 5)
    wrong = check_gradients(lambda: factor * (x @ Off.apply(weight) - y).square().mean(), {"w": weight}, 5)
    assert not any(one.differs(1e-4) for one in right)
    assert all(one.differs(1e-4) for one in wrong)
    assert not any(one.differs(1e-2) for one in wrong)


def test_the_sample_depends_on_the_seed_only_and_goes_round_the_parameters():
    parameters = {name: nn.Parameter(torch.randn(6, dtype=torch.float64)) for name in "abcd"}

    def loss():
        return sum(p.pow(3).sum() for p in parameters.values())

    def sample(seed, n=4):
        return [(one.name, one.index) for one in check_gradients(loss, parameters, n, seed)]

    assert sample(1) == sample(1)
    assert sample(1, 12) != sample(2, 12)
    assert sorted(name for name, _ in sample(5)) == list("abcd")
    for name, index in sample(5):  # the first of each tensor is the largest
        assert index == (int(parameters[name].grad.abs().argmax()),)


@pytest.mark.parametrize("place", [0.0, 1e-7, 1e-6, 2e-6, 3e-6, 4e-6, 5.9e-6, -2e-6])
def test_a_kink_is_undecided_and_not_wrong(place):
    """Width of the differences: 6e-6 and 3e-6 to each side."""
    at_kink = nn.Parameter(torch.tensor(place, dtype=torch.float64))
    smooth = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    parameters = {"kink": at_kink, "one": smooth[0], "two": smooth[1]}
    found = check_gradients(lambda: at_kink.relu() * 3 + sum(s.square().sum() for s in smooth), parameters, 7)
    (one,) = [one for one in found if one.name == "kink"]
    assert one.index == ()
    assert not one.differs(1e-4)
    assert not one.is_decided(1e-4, largest=3.0)
    assert all(other.is_decided(1e-4, largest=3.0) for other in found if other is not one)


class Noisy(ToyModule):
    """Draws from all generators, has batch norm, a metric, counters, and keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.calls = 0
        self.trail = []

    def training_step(self, batch, batch_idx):
        self.calls += 1
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        batch[0].mul_(scale)  # in place
        self.kept = self.drop(self.norm(batch[0] + 0.1 * torch.randn_like(batch[0])))
        loss = (self.layer(self.kept)[:, 0] - batch[1]).square().mean()
        self.log("train/loss", loss, on_step=True, prog_bar=True)
        self.log_dict({"train/scale": scale})
        self.logger.log_metrics({"own": scale})
        return loss

    def on_train_batch_end(self, *_):
        self.trail.append(self.layer.weight.detach().clone())


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_the_run_is_bit_equal_with_and_without_it(tmp_path, options):
    from lightning.pytorch.loggers import Logger

    class Counts(Logger):
        name, version = "counts", 0

        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append({key: value for key, value in metrics.items() if key != "epoch"})

        def log_hyperparams(self, *_):
            pass

    ends = []
    for check in (None, GradientCheck(parameters=["layer.*", "norm.*"])):
        random.seed(1)
        np.random.seed(1)
        logger = Counts()
        module, _ = fit(tmp_path, check, Noisy, logger=logger, log_every_n_steps=1, **options)
        draws = (random.random(), float(np.random.rand()), float(torch.rand(())))
        ends.append((module, logger.rows, draws))
    (one, rows, draws), (other, other_rows, other_draws) = ends
    assert all(torch.equal(a, b) for a, b in zip(one.trail, other.trail, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert (rows, draws, one.calls) == (other_rows, other_draws, other.calls)
    assert check.coordinates


class Watches(Callback):
    """Counts forward passes by three kinds of hooks, which stand there when the check is made."""

    def __init__(self):
        self.counts = [0, 0, 0]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        def closure(*_):
            self.counts[0] += 1

        hooks = (closure, self.method, partial(self.method, 2))
        self.handles = [pl_module.layer.register_forward_hook(hook) for hook in hooks]

    def method(self, *arguments):
        self.counts[2 if arguments[0] == 2 else 1] += 1

    def on_train_batch_end(self, *_):
        for handle in self.handles:
            handle.remove()


def test_hooks_of_callbacks_do_not_see_the_check_and_those_of_the_module_do(tmp_path):
    class Hooked(ToyModule):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))
            self.layer.register_forward_hook(self.of_module)

        def of_module(self, module, inputs, output):
            return output * self.factor

    check, counts = GradientCheck(), []
    for callbacks in ([Watches()], [Watches(), check]):
        torch.manual_seed(0)
        toy_trainer(tmp_path, callbacks, max_epochs=1).fit(Hooked(), toy_loader())
        counts.append(callbacks[0].counts)
    assert counts[0] == counts[1] == [4, 4, 4]
    (factor,) = [one for one in check.coordinates if one.name == "factor"]
    assert abs(factor.numeric) > 1e-3  # the copy's own factor is at work
    assert not factor.differs(1e-6)


def test_under_the_fast_loop_it_finds_the_same(tmp_path):
    from trainerkit.trainer import Trainer

    check = GradientCheck()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    with pytest.raises(GradientMismatch):
        Trainer(max_epochs=1, callbacks=[check], **options).fit(AttentionModule(is_right=False), toy_loader())


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_modules_and_trainers_of_both_namespaces(tmp_path, namespace):
    pl = importlib.import_module(namespace)

    class Inner(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x):
            out = self.layer(x)
            self.log("inner", out.mean())
            return out

    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def training_step(self, batch):
            loss = (self.inner(batch[0])[:, 0] - batch[1]).square().mean()
            self.log("train/loss", loss)
            return {"loss": loss}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    check = GradientCheck()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[check], enable_model_summary=False, logger=False,
        enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    module = Plain()
    module.inner.log = lambda *_, **__: None  # Lightning lets the outermost module log only
    trainer.fit(module, toy_loader())
    assert {one.name for one in check.coordinates} == {"inner.layer.weight", "inner.layer.bias"}


class Odd(ToyModule):
    """Layers that are made late, one compiled; tied, frozen and unused weights; integers in the batch."""

    def configure_model(self):
        if not hasattr(self, "table"):
            self.table = nn.Embedding(5, 4)
            self.tied = torch.compile(nn.Linear(4, 4), backend="eager")
            self.again = nn.Linear(4, 4)
            self.again.weight = self.tied._orig_mod.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(3))

    def loss(self, batch):
        index = (batch[0].abs() * 2).long().clamp(max=4)
        hidden = self.again((self.tied(batch[0]) + self.table(index).mean(1)).tanh())
        noise = torch.zeros(4) + 1.0  # made in the default type
        return (self.layer(self.frozen(hidden) * noise)[:, 0] - batch[1]).square().mean()


def test_late_compiled_tied_frozen_and_unused_parameters(tmp_path):
    check = GradientCheck(n_parameters=30)
    module, _ = fit(tmp_path, check, Odd)
    names = {one.name for one in check.coordinates}
    expected = {"table.weight", "tied.weight", "tied.bias", "again.bias", "layer.weight", "layer.bias", "unused"}
    assert names == expected
    assert all(one.analytic == one.numeric == 0 for one in check.coordinates if one.name == "unused")
    assert module.layer.weight.dtype == torch.float32
    assert all(p.grad is None for p in module.frozen.parameters())


def test_integers_of_the_batch_stay_integers_and_dictionaries_are_read(tmp_path):
    kinds = []

    class Reads(ToyModule):
        def training_step(self, batch, batch_idx):
            kinds.append((batch["x"].dtype, batch["label"].dtype))
            return nn.functional.cross_entropy(self.layer(batch["x"]) * torch.arange(3.0), batch["label"])

    rows = [{"x": torch.randn(4), "label": torch.tensor(i % 3)} for i in range(8)]
    fit(tmp_path, GradientCheck(2), Reads, torch.utils.data.DataLoader(rows, batch_size=4))
    assert kinds[0] == (torch.float64, torch.int64)
    assert kinds[-1] == (torch.float32, torch.int64)
    assert len(kinds) == 3 + 4 * 2 + 2  # three at the point itself, four for each coordinate, two of training


def test_a_graph_that_is_cut_is_found_and_can_be_left_out(tmp_path):
    class Cut(ToyModule):
        def loss(self, batch):
            return (self.layer(batch[0]).detach() * self.scale).square().mean()

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(GradientMismatch, match=r"layer\.bias\[0\]: backward gives 0, differences of the loss give"):
        fit(tmp_path, GradientCheck(), Cut)
    fit(tmp_path, GradientCheck(parameters="scale"), Cut)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda self, x: self.layer(x).float().mean(), "float64: ValueError: the loss of a float64 copy is torch.float32"),
        (lambda self, x: self.layer(x).mean() * next(self.numbers), "two runs of one step from one random state give"),
        (lambda self, x: None, "training_step gives no loss"),
        (lambda self, x: self.layer(x.float()).mean(), "cannot run the training step in float64: RuntimeError"),
        (lambda self, x: self.layer(x).float().mean().double(), "can decide none of 5 derivatives"),
    ],
    ids=["float32 loss", "not deterministic", "no loss", "float32 inside", "rounded"],
)  # fmt: skip
def test_what_cannot_be_checked_is_said_to_be_so(tmp_path, step, message):
    class Peculiar(ToyModule):
        def __init__(self):
            super().__init__()
            self.numbers = Numbers()

        def training_step(self, batch, batch_idx):
            return step(self, batch[0])

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, GradientCheck(), Peculiar)


class Numbers:
    """1, 2, 3, …"""

    value = 0

    def __next__(self):
        self.value += 1
        return self.value


def test_each_fit_is_checked_once(tmp_path):
    check = GradientCheck(3)
    fit(tmp_path, check, max_epochs=2)
    first, check.coordinates = check.coordinates, []
    fit(tmp_path, check, max_epochs=2)
    assert check.coordinates == first
    assert len(first) == 3


def test_both_ranks_stop_where_one_finds_a_wrong_gradient(tmp_path):
    class OnOneRank(AttentionModule):
        def loss(self, batch):
            self.is_right = self.global_rank == 0
            return super().loss(batch)

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    class Notes(GradientCheck):
        def on_train_batch_start(self, trainer, *rest):
            # The process that is first to raise has the other one killed: note it and go on.
            try:
                super().on_train_batch_start(trainer, *rest)
            except GradientMismatch as error:
                (tmp_path / f"rank{trainer.global_rank}.txt").write_text(str(error))

    fit(tmp_path, Notes(), lambda: OnOneRank(True), accelerator="cpu", devices=2, strategy="ddp_fork")
    for rank in range(2):
        assert (tmp_path / f"rank{rank}.txt").read_text().startswith("on rank 1: ")


class Gan(LightningModule):
    """Two optimizers; the discriminator learns from detached fakes, and a penalty takes a gradient in the step."""

    def __init__(self, wrong=None):
        super().__init__()
        self.automatic_optimization = False
        self.wrong = wrong
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        first.zero_grad()
        fake = self.generator(batch[0])
        judged = Doubled.apply(self.discriminator(fake), self.wrong == "generator")
        self.manual_backward(nn.functional.softplus(-judged).mean())
        first.step()
        self.untoggle_optimizer(first)
        second.zero_grad()
        inputs = torch.cat([fake.detach(), batch[0]]).requires_grad_()
        judged = Doubled.apply(self.discriminator(inputs), self.wrong == "discriminator")
        (slope,) = torch.autograd.grad(self.discriminator(inputs).sigmoid().sum(), inputs, create_graph=True)
        self.manual_backward(judged.square().mean() + slope.square().mean())
        second.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]


class Doubled(torch.autograd.Function):
    """2x, with a backward that forgets the 2 if asked to."""

    @staticmethod
    def forward(ctx, x, is_wrong):
        ctx.is_wrong = is_wrong
        return 2 * x

    @staticmethod
    def backward(ctx, d):
        return (d if ctx.is_wrong else 2 * d), None


def test_with_manual_optimization_each_loss_is_checked_and_nothing_steps(tmp_path):
    check = GradientCheck(8)
    ends = [fit(tmp_path, one, Gan) for one in (None, check)]
    (plain, trainer), (checked, other) = ends
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), checked.parameters(), strict=True))
    assert trainer.global_step == other.global_step == 8
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [o.param_groups[0]["lr"] for o in other.optimizers]
    parts = {one.name.rpartition(".")[0] for one in check.coordinates}
    assert parts == {"loss 1: generator", "loss 1: discriminator", "loss 2: discriminator"}
    assert max(one.relative_error for one in check.coordinates) < 1e-6

    for number, part in ((1, "generator"), (2, "discriminator")):
        with pytest.raises(GradientMismatch, match=rf"  loss {number}: \w+\.\w+\[") as caught:
            fit(tmp_path, check, lambda part=part: Gan(wrong=part))
        assert f"  loss {3 - number}:" not in str(caught.value)


def test_sharded_parameters_and_wrong_patterns_are_refused_in_setup(tmp_path):
    from lightning.pytorch.strategies import ModelParallelStrategy

    sharded = toy_trainer(tmp_path, strategy=ModelParallelStrategy(1, 1), devices=1)
    with pytest.raises(ValueError, match="strategy=ModelParallelStrategy: GradientCheck does not work on sharded"):
        GradientCheck().setup(sharded, ToyModule(), "fit")
    with pytest.raises(ValueError, match="parameters=layr: matches no parameter; the nearest are layer.bias"):
        GradientCheck(parameters="layr").setup(toy_trainer(tmp_path), ToyModule(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_parameters": 0}, "n_parameters=0: must be 1 or more"),
        ({"rtol": 0}, "rtol=0: must be between 0 and 1"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"parameters": []}, r"parameters=\[\]: must be a pattern"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        GradientCheck(**options)
