import copy
import importlib
import math
import os
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from tests.support import ROOT, ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import EMA, ExactResume, NonFiniteError, NonFiniteGuard, ParameterNormClip
from trainerkit.callbacks._non_finite import all_finite, as_plain, exactly_finite, spell_class
from trainerkit.callbacks._replay import find_class, main

# The check itself


def naive_finite(tensors):
    return all(math.isfinite(x) for t in tensors for x in t.to_dense().double().flatten().tolist())


def some_gradients():
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 2, 2), ())]
    sparse = torch.sparse_coo_tensor([[0, 2, 2]], torch.randn(3, 2, generator=generator), (4, 2), check_invariants=True)
    return [*dense, torch.zeros(0), dense[0].double(), dense[1].bfloat16(), dense[2].half(), sparse]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_anywhere_is_seen_as_a_naive_loop_sees_it(value):
    for place, tensor in enumerate(some_gradients()):
        gradients = some_gradients()
        assert bool(all_finite(gradients)) is naive_finite(gradients) is True
        if not tensor.is_sparse and tensor.numel():
            gradients[place].view(-1)[-1] = value
        elif tensor.is_sparse:
            gradients[place]._values()[1, 1] = value
        expected = naive_finite(gradients)
        assert expected == (tensor.numel() == 0)
        assert bool(all_finite(gradients)) == bool(all_finite(gradients[::-1])) == expected
        assert exactly_finite(gradients[place]) == expected


def test_scale_does_not_matter_and_very_large_elements_err_to_the_safe_side_only():
    for scale in (1e-30, 1.0, 1e15):
        assert bool(all_finite([scale * g for g in some_gradients()[:4]]))
    large = torch.full((3,), 1e25)
    assert not bool(all_finite([large]))
    assert exactly_finite(large)
    assert bool(all_finite([]))


# A module that breaks where it is told to


class Odd(nn.Module):
    def forward(self, x, is_bad):
        return x / 0.0 if is_bad else x


class Breaks(ToyModule):
    """Batch norm, dropout, and a step that goes bad in a given way at given global steps."""

    def __init__(self, how="", at=(2,)):
        super().__init__()
        self.save_hyperparameters()
        self.how, self.at = how, at
        self.first, self.norm, self.odd, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), Odd(), nn.Dropout(0.2)
        self.trail = []

    def is_bad(self, how):
        return self.how == how and self.trainer.global_step in self.at

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.odd(self.norm(self.first(x)), self.is_bad("forward"))
        out = self.layer(self.drop(hidden))[:, 0]
        if self.is_bad("backward"):
            out = out + (0 * out).sqrt()  # finite, with an infinite slope
        loss = (out - y).square().mean()
        return loss * math.nan if self.is_bad("loss") else loss

    def on_train_batch_start(self, batch, batch_idx):
        if self.is_bad("weights"):
            self.first.bias.data[1] = math.inf

    def on_train_batch_end(self, *_):
        self.trail.append(copy.deepcopy(self.state_dict()))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05, weight_decay=0.1)


def fit(tmp_path, callbacks, make_module=Breaks, loader=None, **options):
    torch.manual_seed(0)
    module = make_module()
    trainer = toy_trainer(tmp_path, callbacks, **{"max_epochs": 2} | options)
    trainer.fit(module, loader or toy_loader())
    return module, trainer


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def states(trainer):
    return [state for o in trainer.optimizers for state in o.state_dict()["state"].values()]


def by_hand(bad=(), window=1, back_to=None):
    """The same training in a loop of one's own that leaves bad steps out; the state of everything after each step."""
    torch.manual_seed(0)
    module = Breaks()
    optimizer = module.configure_optimizers()
    batches = (batch for _ in range(2) for batch in toy_loader())  # each epoch draws a seed
    trail, kept = [], {}
    for step in range(8 // window):
        before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
        if step % 3 == 0:
            kept = before
        optimizer.zero_grad()
        for x, y in islice(batches, window):
            hidden = module.norm(module.first(x))
            ((module.layer(module.drop(hidden))[:, 0] - y).square().mean() / window).backward()
        if step in bad:
            module.load_state_dict((kept if back_to else before)[0])
            optimizer.load_state_dict((kept if back_to else before)[1])
        else:
            optimizer.step()
        trail.append(copy.deepcopy(module.state_dict()))
    return trail, optimizer


# raise

PLACES = {
    "forward": ("module 'odd' (Odd) gave 0 NaN and 32 infinite of 32 values from finite input", "odd", ""),
    "loss": ("every module's output was finite, but the loss holds 1 NaN and 0 infinite of 1 values", "", ""),
    "backward": ("in backward, the gradient of parameter 'layer.bias' is the first that holds", "layer", "layer.bias"),
    "weights": ("parameter 'first.bias' held 0 NaN and 1 infinite of 4 values before this step", "first", "first.bias"),
}


@pytest.mark.parametrize("how", PLACES)
def test_the_error_names_what_went_bad_first_in_a_screenful(tmp_path, how):
    guard = NonFiniteGuard()
    text, module, parameter = PLACES[how]
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, [guard], lambda: Breaks(how))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 8
    assert lines[0] == "optimizer step 3 (epoch 0, batch 2, both from 0) is not finite and was not taken."
    assert text in lines[2]
    assert (guard.finding.where, guard.finding.module, guard.finding.parameter) == (how, module, parameter)
    dump = tmp_path / "non_finite" / "step00000003_rank0.pt"
    assert str(dump) in lines[3]
    assert lines[4] == f"  replay: python -m trainerkit.callbacks._replay {dump} --module {__name__}:Breaks"
    content = torch.load(dump, weights_only=True)
    assert content["finding"] == guard.finding.text
    assert content["hyperparameters"] == {"how": how, "at": (2,)}


def test_a_bad_batch_is_named_by_its_place_and_the_step_is_not_taken(tmp_path):
    rows = [
        {"x": {"bands": torch.randn(4), "mask": torch.tensor([0.0, -math.inf])}, "y": torch.tensor(1.0)}
        for _ in range(8)
    ]
    rows[5]["x"]["bands"][2] = math.nan

    class Nested(Breaks):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"]["bands"], batch["y"]), batch_idx)

        def on_exception(self, *_):
            pass

    guard, module = NonFiniteGuard(), None

    def make():
        nonlocal module
        module = Nested()
        return module

    with pytest.raises(
        NonFiniteError, match=r"the batch itself holds 1 NaN and 0 infinite of 16 values, in batch\['x'\]\['bands'\]"
    ):
        fit(tmp_path, [guard], make, DataLoader(rows, batch_size=4))
    assert guard.finding.where == "batch"
    # Weights and the running statistics of batch norm are those after the first step.
    assert equal(module.state_dict(), module.trail[0])
    assert torch.isfinite(module.norm.running_mean).all()


def test_in_a_window_the_batch_that_began_it_is_found_and_dumped(tmp_path):
    class Third(Breaks):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss / 0.0 if batch_idx == 1 else loss

    guard = NonFiniteGuard()
    with pytest.raises(NonFiniteError, match="optimizer step 1 .epoch 0, batch 3, both from 0. is not finite"):
        fit(tmp_path, [guard], Third, accumulate_grad_batches=4)
    content = torch.load(next((tmp_path / "non_finite").iterdir()), weights_only=True)
    assert content["batch_idx"] == 1
    assert torch.equal(content["batch"][0], list(toy_loader())[1][0])
    assert guard.finding.where == "loss"


def test_finite_gradients_that_are_very_large_are_let_through(tmp_path):
    class Large(ToyModule):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) * 1e24

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-26)

    guard = NonFiniteGuard()
    _, trainer = fit(tmp_path, [guard], Large, max_epochs=1)
    assert trainer.global_step == 4
    assert guard.finding is None


def test_weights_that_went_bad_between_checks_are_found_at_the_next_one(tmp_path):
    guard = NonFiniteGuard(check_every_n_steps=3)
    with pytest.raises(NonFiniteError, match="(?s)optimizer step 6 .*check every step"):
        fit(tmp_path, [guard], lambda: Breaks("backward", at=(3,)))
    assert guard.finding.where == "weights"


def test_what_cannot_be_copied_does_not_hide_the_error(tmp_path):
    class Uncopyable(Breaks):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    with pytest.raises(NonFiniteError, match="the step could not be run again: TypeError: no copies"):
        fit(tmp_path, [NonFiniteGuard()], lambda: Uncopyable("loss"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NonFiniteError, match="dump:   could not be written"):
        fit(tmp_path, [NonFiniteGuard(dirpath=str(tmp_path / "file"))], lambda: Breaks("loss"))


# skip and rollback


@pytest.mark.parametrize(("how", "window"), [("forward", 1), ("loss", 1), ("backward", 1), ("forward", 2)])
def test_skipping_equals_a_loop_that_leaves_the_step_out(tmp_path, how, window):
    guard = NonFiniteGuard("skip")
    module, trainer = fit(tmp_path, [guard], lambda: Breaks(how), accumulate_grad_batches=window)
    trail, optimizer = by_hand(bad=(2,), window=window)
    for weights, expected in zip(module.trail[window - 1 :: window], trail, strict=True):
        assert equal(weights, expected)
    for state, expected in zip(states(trainer), optimizer.state_dict()["state"].values(), strict=True):
        assert equal(state, expected)
    assert trainer.global_step == 8 // window
    assert (guard.skipped, guard.rollbacks) == (1, 0)
    assert trainer.callback_metrics["non_finite/skipped"] == 1


def test_going_back_equals_a_loop_that_does(tmp_path):
    """Snapshots after steps 0, 3 and 6; step 5, counted from 0, is bad."""
    guard = NonFiniteGuard("rollback", snapshot_every_n_steps=3)
    module, trainer = fit(tmp_path, [guard], lambda: Breaks("forward", at=(5,)))
    trail, optimizer = by_hand(bad=(5,), back_to=True)
    assert equal(module.trail[5], module.trail[2])
    for weights, expected in zip(module.trail, trail, strict=True):
        assert equal(weights, expected)
    for state, expected in zip(states(trainer), optimizer.state_dict()["state"].values(), strict=True):
        assert equal(state, expected)
    assert trainer.callback_metrics["non_finite/rollbacks"] == guard.rollbacks == guard.skipped == 1


def test_going_back_to_the_start_empties_the_optimizer_and_schedules_go_on(tmp_path):
    class Scheduled(Breaks):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

        def on_train_batch_end(self, *_):
            super().on_train_batch_end()
            optimizer = self.trainer.optimizers[0]
            self.seen.append((len(optimizer.state), optimizer.param_groups[0]["lr"]))

        seen = ()

    def make():
        module = Scheduled("loss", at=(2, 3))
        module.seen = []
        return module

    guard = NonFiniteGuard("rollback")
    module, _ = fit(tmp_path, [guard], make, max_epochs=1)
    assert [count for count, _ in module.seen] == [6, 6, 0, 0]
    assert [lr for _, lr in module.seen] == pytest.approx([0.05 * 0.1**n for n in (1, 2, 3, 4)])
    torch.manual_seed(0)
    assert equal(module.state_dict(), Breaks().state_dict())
    assert guard.rollbacks == 2


@pytest.mark.parametrize(
    ("guard", "at", "message"),
    [
        (NonFiniteGuard("rollback", max_rollbacks=2), (1, 3, 5), r"(?s)optimizer step 6 .*gone back 2 times"),
        (
            NonFiniteGuard("skip", max_skips_in_a_row=2),
            (0, 2, 3, 4),
            r"(?s)optimizer step 5 .*2 steps before were skipped",
        ),
    ],
)
def test_after_a_number_of_times_it_raises(tmp_path, guard, at, message):
    with pytest.raises(NonFiniteError, match=message):
        fit(tmp_path, [guard], lambda: Breaks("loss", at=at))


def test_only_the_first_bad_steps_are_reported(tmp_path, caplog):
    guard = NonFiniteGuard("skip", max_skips_in_a_row=None, max_reports=2, dirpath=str(tmp_path / "mine"))
    with caplog.at_level("INFO"):
        fit(tmp_path, [guard], lambda: Breaks("loss", at=range(1, 6)))
    assert guard.skipped == 5
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "step00000002_rank0.pt",
        "step00000003_rank0.pt",
    ]
    assert caplog.text.count("The step is left out.") == 2
    fit(tmp_path / "none", [NonFiniteGuard("skip", dump=False)], lambda: Breaks("loss"))
    assert not (tmp_path / "none" / "non_finite").exists()


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["SGD", "fused", "foreach", "RMSprop", "Adafactor", "Adagrad"],
)
def test_a_skipped_step_changes_nothing_in_any_optimizer(tmp_path, make_optimizer):
    class Own(Breaks):
        def configure_optimizers(self):
            return make_optimizer(self.parameters())

        def on_train_batch_end(self, *_):
            super().on_train_batch_end()
            self.states.append(copy.deepcopy(states(self.trainer)))

        states = ()

    def make():
        module = Own("loss")
        module.states = []
        return module

    module, _ = fit(tmp_path, [NonFiniteGuard("skip", dump=False)], make, max_epochs=1)
    assert equal(module.trail[1], module.trail[2])
    assert not equal(module.trail[2], module.trail[3])
    assert all(equal(a, b) for a, b in zip(module.states[1], module.states[2], strict=True))


# What it must not do


@pytest.mark.parametrize("action", ["raise", "skip", "rollback"])
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}])
def test_a_run_in_which_all_is_finite_is_bit_equal_with_and_without_it(tmp_path, action, options):
    plain, _ = fit(tmp_path, [], **options)
    guarded, _ = fit(tmp_path, [NonFiniteGuard(action, snapshot_every_n_steps=2)], **options)
    assert all(equal(a, b) for a, b in zip(plain.trail, guarded.trail, strict=True))
    assert not (tmp_path / "non_finite").exists()


def test_naming_a_bad_step_does_not_move_the_random_numbers(tmp_path):
    named, _ = fit(tmp_path, [NonFiniteGuard("skip")], lambda: Breaks("loss"))
    counted, _ = fit(tmp_path, [NonFiniteGuard("skip", max_reports=0)], lambda: Breaks("loss"))
    assert all(equal(a, b) for a, b in zip(named.trail, counted.trail, strict=True))


def test_one_number_a_step_is_copied_to_the_host(tmp_path):
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
            return func(*args, **(kwargs or {}))

    def count(*callbacks):
        with Copies() as mode:
            fit(tmp_path, callbacks, max_epochs=1)
        return mode.count

    assert count(NonFiniteGuard("skip")) - count() == 4
    assert count(NonFiniteGuard(check_every_n_steps=2)) - count() == 2
    assert NonFiniteGuard.syncs_every_step


# Other ways of training


def test_under_the_fast_loop_steps_are_skipped_as_under_lightnings(tmp_path):
    from trainerkit.trainer import Trainer

    expected, _ = fit(tmp_path, [NonFiniteGuard("skip")], lambda: Breaks("forward"))
    torch.manual_seed(0)
    module, options = Breaks("forward"), {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[NonFiniteGuard("skip")], default_root_dir=tmp_path, **options
    ).fit(module, toy_loader())
    assert all(equal(a, b) for a, b in zip(module.trail, expected.trail, strict=True))


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_modules_and_trainers_of_both_namespaces(tmp_path, namespace):
    pl = importlib.import_module(namespace)

    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch):
            loss = (self.layer(batch[0])[:, 0] - batch[1]).square().mean()
            self.log("train/loss", loss)
            return {"loss": loss / 0 if self.trainer.global_step == 1 else loss}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, options = Plain(), {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    guard = NonFiniteGuard("skip")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[guard],
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, toy_loader())
    assert guard.finding.where == "loss"
    found = NonFiniteGuard.replay(tmp_path / "non_finite" / "step00000002_rank0.pt", Plain())
    assert found == guard.finding


class Gan(LightningModule):
    """Two optimizers; the second one's loss, or its input in the first one's, goes bad at the second batch."""

    def __init__(self, bad="discriminator"):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.bad = bad
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
        self.trail = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        fake = self.generator(batch[0])
        self.toggle_optimizer(first)
        loss = self.discriminator(fake).mean()
        self.manual_backward(loss / 0 if self.bad == "generator" and batch_idx == 1 else loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        loss = self.discriminator(fake.detach()).square().mean()
        self.manual_backward(loss / 0 if self.bad == "discriminator" and batch_idx == 1 else loss)
        second.step()
        second.zero_grad()
        self.trail.append(copy.deepcopy(self.state_dict()))

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]


@pytest.mark.parametrize("bad", ["generator", "discriminator"])
def test_with_manual_optimization_the_optimizer_of_a_bad_loss_does_not_step(tmp_path, bad):
    guard = NonFiniteGuard("skip")
    module, trainer = fit(tmp_path, [guard], lambda: Gan(bad), max_epochs=1)
    moved = {name: not torch.equal(a, module.trail[1][name]) for name, a in module.trail[0].items()}
    # The generator's step came before the discriminator's loss; after a bad loss nothing steps in that batch.
    assert moved["generator.weight"] == (bad == "discriminator")
    assert not moved["discriminator.weight"]
    assert (guard.skipped, guard.finding.where, trainer.global_step) == (1, "loss", 8)
    which = {"generator": 1, "discriminator": 2}[bad]
    assert f"loss {which} of 2 holds 0 NaN and 1 infinite" in guard.finding.text
    found = NonFiniteGuard.replay(tmp_path / "non_finite" / "step00000002_rank0.pt", Gan(bad))
    assert found == guard.finding
    back = NonFiniteGuard("rollback", dump=False)
    module, _ = fit(tmp_path, [back], lambda: Gan(bad), max_epochs=1)
    torch.manual_seed(0)
    assert back.rollbacks == 1


class Peculiar(Breaks):
    """Layers made late, one compiled, tied and frozen weights, one that no gradient reaches, a mask of -inf."""

    def configure_model(self):
        if not hasattr(self, "tied"):
            self.tied = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), backend="eager")
            self.again = nn.Linear(4, 4)
            self.again.weight = self.tied._orig_mod[0].weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(2))
            self.mask = nn.Threshold(0.0, -math.inf)
            self.register_buffer("table", torch.tensor([-math.inf, 0.0]))

    def training_step(self, batch, batch_idx):
        x, y = batch
        attention = self.mask(self.again(self.tied(x))).exp()
        out = self.layer(self.odd(self.frozen(attention), self.is_bad("forward")))[:, 0]
        return (out - y).square().mean()


def test_late_compiled_tied_and_frozen_layers_and_masks(tmp_path):
    guard = NonFiniteGuard("skip")
    module, _ = fit(tmp_path, [guard], lambda: Peculiar("forward"))
    assert (guard.finding.where, guard.finding.module) == ("forward", "odd")
    assert module.again.weight is module.tied._orig_mod[0].weight
    path = tmp_path / "non_finite" / "step00000003_rank0.pt"
    assert not any("_orig_mod" in name for name in torch.load(path, weights_only=True)["weights"])
    assert NonFiniteGuard.replay(path, Peculiar("forward")) == guard.finding
    nan = Peculiar("forward")
    nan.configure_model()
    nan.tied._orig_mod[0].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="parameter 'tied.0.weight' held 1 NaN"):
        fit(tmp_path, [NonFiniteGuard()], lambda: nan)


def scaled(init_scale):
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=10**6)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def test_overflow_is_left_to_the_scaler_until_scaling_cannot_be_the_cause(tmp_path):
    guard = NonFiniteGuard()
    module, _ = fit(tmp_path, [guard], lambda: Breaks("loss", at=(1, 3)), **scaled(4.0))
    assert equal({"w": module.trail[0]["layer.weight"]}, {"w": module.trail[1]["layer.weight"]})
    assert guard.finding is None
    with pytest.raises(NonFiniteError, match="optimizer step 5"):  # 4, 2, 1: the third one is not the scaler's fault
        fit(tmp_path, [guard], lambda: Breaks("loss", at=(0, 2, 4)), **scaled(4.0))
    guard = NonFiniteGuard("rollback", dump=False)
    module, trainer = fit(tmp_path, [guard], lambda: Breaks("loss", at=(0, 2, 4)), **scaled(4.0))
    assert guard.rollbacks == 1
    assert trainer.precision_plugin.scaler.get_scale() == 4.0  # that of the snapshot


def test_two_ranks_skip_together_and_name_the_one_where_it_happened(tmp_path):
    class OnOneRank(Breaks):
        def training_step(self, batch, batch_idx):
            # Infinite, with finite gradients: only the loss of one rank tells.
            is_bad = self.global_rank == 1 and self.trainer.global_step == 2
            return super().training_step(batch, batch_idx) + (math.inf if is_bad else 0.0)

        def on_train_end(self):
            torch.save(self.trail, tmp_path / f"rank{self.global_rank}.pt")

    class Notes(NonFiniteGuard):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / f"rank{trainer.global_rank}.txt").write_text(f"{self.skipped} {self.finding}")

    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork", "max_epochs": 1}
    loader = DataLoader(toy_loader().dataset, batch_size=4)
    fit(tmp_path, [Notes("skip")], OnOneRank, loader, **options)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for step in range(4):
        assert torch.equal(one[step]["layer.weight"], two[step]["layer.weight"])
    assert equal(one[1], one[2])
    assert equal(two[1], two[2])
    assert not equal(two[2], two[3])
    texts = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("1 Finding(where='loss'")
    assert [path.name for path in (tmp_path / "non_finite").iterdir()] == ["step00000003_rank1.pt"]


# Checkpoints, fits, refusals


class SavesAtSix(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/six.ckpt")


def test_a_resume_in_mid_epoch_goes_on_counting_and_new_arguments_win(tmp_path):
    from trainerkit.data.loader import ArrayDataset, BatchLoader, EpochBatches

    class Dicts(Breaks):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    def go(folder, guard, **options):
        torch.manual_seed(0)
        module = Dicts("loss", at=(1, 4, 6))
        x, y = toy_loader().dataset.tensors
        loader = BatchLoader(ArrayDataset({"x": x, "y": y}), EpochBatches(32, 8, shuffle=False))  # knows its position
        trainer = toy_trainer(tmp_path / folder, [guard, ExactResume(), SavesAtSix()], max_epochs=2)
        trainer.fit(module, loader, **options)
        return module, trainer

    whole = NonFiniteGuard("skip", max_reports=1)
    module, _ = go("whole", whole)
    path = tmp_path / "whole" / "six.ckpt"
    content = torch.load(path, weights_only=True)["callbacks"]["NonFiniteGuard"]
    assert content == {"skipped": 2, "rolled_back": 0, "row": 0, "reports": 1}
    again = NonFiniteGuard("skip", max_reports=2)
    resumed, trainer = go("resumed", again, ckpt_path=path)
    assert whole.skipped == again.skipped == 3
    assert (again.max_reports, again._reports) == (2, 2)
    assert trainer.global_step == 8
    assert equal(module.state_dict(), resumed.state_dict())


def test_a_second_fit_counts_anew_and_an_exception_lets_go_of_everything(tmp_path):
    guard = NonFiniteGuard("rollback", dump=False)
    first, _ = fit(tmp_path, [guard], lambda: Breaks("loss"))
    second, _ = fit(tmp_path, [guard], lambda: Breaks("loss"))
    assert guard.rollbacks == 1
    assert all(equal(a, b) for a, b in zip(first.trail, second.trail, strict=True))
    guard = NonFiniteGuard()
    with pytest.raises(NonFiniteError):
        fit(tmp_path, [guard], lambda: Breaks("loss"))
    assert guard._window == guard._losses == []
    assert guard._snapshot is guard._buffers is None


def test_beside_other_callbacks_a_skipped_step_leaves_the_weights_alone(tmp_path):
    callbacks = [EMA(), NonFiniteGuard("skip", dump=False), ParameterNormClip(0.5)]
    module, _ = fit(tmp_path, callbacks, lambda: Breaks("loss"))
    assert equal(module.trail[1], module.trail[2])
    assert all(torch.isfinite(average).all() for average in callbacks[0].average().values())
    assert callbacks[0].updates == len(module.trail) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "stop"}, "action=stop: must be raise, skip or rollback"),
        ({"max_rollbacks": -1}, "max_rollbacks=-1: must be 0 or more"),
        ({"max_skips_in_a_row": 0}, "max_skips_in_a_row=0: must be 1 or more, or null"),
        ({"snapshot_every_n_steps": 0}, "snapshot_every_n_steps=0: must be 1 or more"),
        ({"check_every_n_steps": 0}, "check_every_n_steps=0: must be 1, or more with action='raise'"),
        ({"check_every_n_steps": 2, "action": "skip"}, "check_every_n_steps=2: must be 1, or more with action='raise'"),
        ({"max_reports": -1}, "max_reports=-1: must be 0 or more"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        NonFiniteGuard(**options)


def test_what_cannot_skip_a_step_and_sharded_parameters_are_refused(tmp_path):
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Own(Breaks):
        def configure_optimizers(self):
            kind = torch.optim.LBFGS if self.how == "lbfgs" else torch.optim.AdamW
            return kind(self.parameters(), **({} if self.how == "lbfgs" else {"fused": True}))

    with pytest.raises(ValueError, match="action=skip: a step of LBFGS cannot be skipped"):
        fit(tmp_path, [NonFiniteGuard("skip")], lambda: Own("lbfgs"))
    with pytest.raises(
        ValueError, match=r"action=rollback: a step of AdamW \(fused, with a scaler\) cannot be skipped"
    ):
        fit(tmp_path, [NonFiniteGuard("rollback")], Own, **scaled(4.0))
    sharded = toy_trainer(tmp_path, strategy=ModelParallelStrategy(1, 1), devices=1)
    with pytest.raises(ValueError, match="strategy=ModelParallelStrategy: NonFiniteGuard does not work on sharded"):
        NonFiniteGuard().setup(sharded, Breaks(), "fit")


# Replays

SCRIPT = """
import torch
from tests.support import ToyModule

class Unlucky(ToyModule):
    # The logarithm of noise: how many are negative is a matter of luck, of the epoch and of the step.

    def __init__(self, width, shift):
        super().__init__(width=width)
        self.save_hyperparameters()
        self.norm = torch.nn.BatchNorm1d(width)
        self.shift = shift
        self.logarithm = Logarithm()

    def training_step(self, batch, batch_idx):
        noise = torch.randn(8) + self.shift - 0.5 * self.current_epoch - 0.1 * self.global_step
        return (self.layer(self.norm(batch[0]))[:, 0] - batch[1] + self.logarithm(noise)).square().mean()

class Logarithm(torch.nn.Module):
    def forward(self, x):
        return x.log()
"""


@pytest.fixture
def unlucky(tmp_path, monkeypatch):
    """A class in a file of its own, and the dump of its first bad step."""
    (tmp_path / "unlucky_module.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unlucky_module", raising=False)
    kind = importlib.import_module("unlucky_module").Unlucky
    guard = NonFiniteGuard()
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, [guard], lambda: kind(4, 4.0), max_epochs=50)
    (dump,) = (tmp_path / "non_finite").iterdir()
    return kind, guard.finding, dump, str(caught.value)


def test_the_command_of_the_error_replays_the_step_in_a_process_of_its_own(tmp_path, unlucky):
    _, finding, _, message = unlucky
    (command,) = [line for line in message.splitlines() if line.startswith("  replay: ")]
    assert command.startswith("  replay: python -m trainerkit.callbacks._replay ")
    answer = subprocess.run(
        [sys.executable, *command.split()[2:]], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert answer.returncode == 1, answer.stderr
    assert re.search("module 'logarithm' .Logarithm. gave [1-8] NaN and 0 infinite of 8 values", finding.text)
    assert answer.stdout.splitlines()[1:] == [f"  then:  {finding.text}", f"  again: {finding.text}"]
    assert answer.stderr == ""


def test_a_replay_has_the_draws_the_weights_the_epoch_and_the_step_of_then(tmp_path, unlucky):
    kind, finding, dump, _ = unlucky
    torch.manual_seed(99)
    assert NonFiniteGuard.replay(dump, kind(4, 4.0)) == finding
    content = torch.load(dump, weights_only=True)
    assert content["epoch"] > 0
    for name in ("epoch", "global_step"):
        torch.save(content | {name: -100}, dump)
        assert NonFiniteGuard.replay(dump, kind(4, 4.0)) is None
    others = set()
    for seed in range(9):
        torch.manual_seed(seed)
        torch.save(content | {"random": content["random"] | {"torch": torch.get_rng_state()}}, dump)
        others.add(NonFiniteGuard.replay(dump, kind(4, 4.0)))
    assert len(others) > 1


def test_the_command_line_says_what_is_wrong(tmp_path, unlucky, capsys):
    _, finding, dump, _ = unlucky
    content = torch.load(dump, weights_only=True)
    assert main([str(dump), "--module", f"{tmp_path / 'unlucky_module.py'}:Unlucky"]) == 1
    assert finding.text in capsys.readouterr().out
    (tmp_path / "other.pt").write_bytes(b"")
    torch.save({"a": 1}, tmp_path / "other.pt")
    here = f"{__name__}:Breaks"
    for arguments, message in (
        ([str(tmp_path / "other.pt"), "--module", here], "other.pt: must be a dump of NonFiniteGuard (format 1)"),
        ([str(tmp_path / "none.pt"), "--module", here], "none.pt"),
        ([str(dump), "--module", "Breaks"], "module=Breaks: must be package.module:Class or file.py:Class"),
        ([str(dump), "--module", f"{__name__}:Breks"], "has no attribute 'Breks'"),
        ([str(dump), "--module", here], "module=Breaks: must have the weights of the dump; not in both: ['first.bias'"),
    ):
        assert main(arguments) == 2, message
        assert message in capsys.readouterr().err
    torch.save(content | {"hyperparameters": {"width": 4}}, dump)
    assert main([str(dump), "--module", "unlucky_module:Unlucky"]) == 2
    assert "cannot be made of its saved hyperparameters ['width']" in capsys.readouterr().err
    torch.save(content | {"epoch": -100}, dump)
    assert main([str(dump), "--module", "unlucky_module:Unlucky"]) == 0
    assert "again: everything is finite" in capsys.readouterr().out


def test_a_class_of_a_script_is_spelled_by_its_file(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("class Model:\n    class Inner:\n        value = 3\n")
    kind = find_class(f"{script}:Model.Inner")
    assert kind.value == 3
    monkeypatch.setattr(kind, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    assert spell_class(kind) == f"{script}:Model.Inner"

    class Local:
        pass

    assert spell_class(Local) is None


class Boxed:
    """A batch that is no plain value."""

    def __init__(self, rows):
        self.pair = torch.utils.data.default_collate(rows)


class Unboxes(Breaks):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch.pair, batch_idx)


def test_a_batch_of_another_kind_is_left_out_of_the_dump_and_given_to_the_replay(tmp_path):
    loader = DataLoader(toy_loader().dataset, 8, collate_fn=Boxed)
    with pytest.raises(NonFiniteError, match="forward|loss"):
        fit(tmp_path, [NonFiniteGuard()], lambda: Unboxes("loss"), loader)
    (dump,) = (tmp_path / "non_finite").iterdir()
    assert "batch" not in torch.load(dump, weights_only=True)
    with pytest.raises(
        ValueError, match="batch=None: must be given, for the dump has none: .*Boxed is not made of tensors"
    ):
        NonFiniteGuard.replay(dump, Unboxes("loss"))
    assert NonFiniteGuard.replay(dump, Unboxes("loss"), batch=list(loader)[2]).where == "loss"


def test_what_is_plain_comes_through_a_file_and_nothing_else_is_taken(tmp_path):
    value = {"a": [1, 2.5, None, "x", (True, torch.ones(2, requires_grad=True))], 3: b"y"}
    torch.save(as_plain(value), tmp_path / "plain.pt")
    loaded = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert loaded["a"][:4] == [1, 2.5, None, "x"]
    assert torch.equal(loaded["a"][4][1], torch.ones(2))
    for odd in ({"a": Boxed([(1, 2)])}, [object()], {1, 2}):
        with pytest.raises(TypeError, match="is not made of tensors and plain values"):
            as_plain(odd)


def test_what_is_accumulated_by_hand_is_one_step(tmp_path):
    """Four batches a step, the second of eight not finite: its step is left out whole, and the batch is found."""

    class ByHand(Breaks):
        def __init__(self):
            super().__init__("forward", at=())
            self.automatic_optimization = False

        def is_bad(self, how):
            return how == "forward" and self.bad

        def training_step(self, batch, batch_idx):
            self.bad = (self.trainer.current_epoch, batch_idx) == (0, 1)
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()

    guard = NonFiniteGuard("skip", dump=False)
    module, _ = fit(tmp_path, [guard], ByHand)
    assert guard.skipped == 1
    assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())
    assert module.norm.num_batches_tracked == 4  # of the second step only
    assert guard.finding is not None


def test_a_run_that_goes_back_after_a_resume_equals_the_uninterrupted_one(tmp_path):
    """The checkpoint, after step 8, lies between two snapshots, after 5 and 10: both runs go back to it."""

    class Saves(Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "eight.ckpt")

    def run(path=None):
        torch.manual_seed(0)
        guard, module = NonFiniteGuard("rollback", snapshot_every_n_steps=5, dump=False), Breaks("loss", at=(9,))
        module.drop = nn.Identity()
        trainer = toy_trainer(tmp_path, [guard, Saves()], max_epochs=3)
        trainer.fit(module, toy_loader(), ckpt_path=path)
        assert guard.rollbacks == 1
        return module.state_dict()

    assert equal(run(), run(tmp_path / "eight.ckpt"))
