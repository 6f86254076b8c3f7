import csv
import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import ProgressiveUnfreezing
from trainerkit.callbacks._ramp import ramp, split_group
from trainerkit.callbacks.progressive_unfreezing import by_depth, layer_of, plan_stages, still_norms

HEAD, MIDDLE, BOTTOM = "network.4", "network.2", "network.0"


class Deep(LightningModule):
    """Three layers that begin with equal values; data that follow from the step, so that a resume sees the same."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        values = torch.Generator().manual_seed(2)
        first = torch.randn(4, 4, generator=values)
        with torch.no_grad():
            for layer in self.network[::2]:
                layer.weight.copy_(first[: len(layer.weight)])
                layer.bias.zero_()
        self.trail = []  # of each batch: names of what is trained
        self.weights = []  # before each step
        self.gradients = []  # of each step
        self.rates = []  # the first group's, as everybody sees it outside of a step
        self.with_state = []  # names of what has optimizer state

    def batch(self):
        draws = torch.Generator().manual_seed(100 + self.trainer.fit_loop.epoch_loop.total_batch_idx)
        x = torch.randn(8, 4, generator=draws)
        return x, x.sum(1)

    def training_step(self, batch, batch_idx):
        x, y = self.batch()
        loss = (self.network(x)[:, 0] - y).square().mean()
        self.log("train/loss", loss.detach(), on_epoch=True, on_step=False)
        return loss

    def on_train_batch_start(self, *_):
        self.trail.append(trained(self))

    def on_before_optimizer_step(self, optimizer):
        named = dict(self.named_parameters())
        self.weights.append({name: p.detach().double().clone() for name, p in named.items()})
        self.gradients.append({n: p.grad.double().clone() for n, p in named.items() if p.grad is not None})

    def on_train_batch_end(self, *_):
        optimizer = self.trainer.optimizers[0]
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.with_state.append({n.rpartition(".")[0] for n, p in self.named_parameters() if p in optimizer.state})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def trained(module):
    return {name.rpartition(".")[0] for name, p in module.named_parameters() if p.requires_grad}


def fit(folder, callback, module=None, loaders=None, **options):
    """4 batches an epoch, whatever is in them."""
    module = module or Deep()
    trainer = toy_trainer(folder, [callback] if isinstance(callback, Callback) else callback, **options)
    trainer.fit(module, *(loaders or (toy_loader(),)))
    return module, trainer


def per_epoch(module, batches=4):
    assert all(
        len({frozenset(t) for t in module.trail[i : i + batches]}) == 1 for i in range(0, len(module.trail), batches)
    )
    return module.trail[::batches]


# The pure functions


def test_the_ramp_is_linear_from_0_to_1_then_stays_and_scales_with_its_length():
    assert [ramp(n, 4) for n in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert ramp(0, 0) == 1
    for warmup in (1, 3, 100):
        values = [ramp(n, warmup) for n in range(2 * warmup)]
        assert values == sorted(values)
        assert values == pytest.approx([min(n, warmup) / warmup for n in range(2 * warmup)])
        assert values == [ramp(7 * n, 7 * warmup) for n in range(2 * warmup)]


def test_a_split_group_holds_the_same_parameters_whatever_their_order_and_scales_only_the_rate():
    ones = [nn.Parameter(torch.ones(i)) for i in range(1, 5)]
    factors = {id(p): f for p, f in zip(ones, [1.0, 0.5, 1.0, 0.0], strict=True)}
    for params in (ones, ones[::-1]):
        parts = split_group({"params": params, "lr": 0.2, "weight_decay": 0.1}, lambda p: factors[id(p)])
        found = {id(p): part["lr"] for part in parts for p in part["params"]}
        assert found == pytest.approx({key: 0.2 * factor for key, factor in factors.items()})
        assert sum(len(part["params"]) for part in parts) == 4
        assert all(part["weight_decay"] == 0.1 for part in parts)
    assert split_group({"params": [], "lr": 0.2}, lambda p: 0.0) == [{"params": [], "lr": 0.2}]


def test_a_layer_is_a_numbered_block_or_a_module():
    names = ["scale", "stem.conv.weight", "encoder.layers.3.attention.out.weight", "layer4.0.conv1.weight", "head.bias"]
    assert [layer_of(n) for n in names] == ["scale", "stem.conv", "encoder.layers.3", "layer4.0", "head"]


def test_stages_by_depth_go_either_way_and_hold_every_parameter_once():
    names = ["stem.weight", "blocks.0.a.weight", "blocks.0.b.weight", "blocks.1.a.weight", "head.weight", "head.bias"]
    downward, upward = by_depth(names, "from_output", 1), by_depth(names, "from_input", 1)
    assert downward[0] == ["head.weight", "head.bias"]
    assert downward == upward[::-1]
    assert sorted(name for stage in by_depth(names, "from_output", 3) for name in stage) == sorted(names)
    assert by_depth(names, "from_output", 2)[1] == ["blocks.0.a.weight", "blocks.0.b.weight", "stem.weight"]


def test_a_tied_parameter_belongs_to_the_first_stage_that_any_of_its_names_is_in():
    aliases = {
        "embed.weight": "embed.weight",
        "body.weight": "body.weight",
        "head.weight": "embed.weight",
        "head.bias": "head.bias",
    }
    every = ["embed.weight", "body.weight", "head.bias"]
    assert plan_stages(aliases, every) == [["embed.weight", "head.bias"], ["body.weight"]]
    assert plan_stages(aliases, every, ["head.*"], [["body.*"]]) == [["embed.weight", "head.bias"], ["body.weight"]]
    assert plan_stages(aliases, every, None, [["body.*"]]) == [["embed.weight", "head.bias"], ["body.weight"]]
    assert plan_stages(aliases, every[1:], ["head.*"]) == [["head.bias"], ["body.weight"]]


# When and what


def test_by_depth_the_head_is_first_and_a_layer_joins_every_n_epochs(tmp_path):
    module, _ = fit(tmp_path, ProgressiveUnfreezing(every_n_epochs=2), max_epochs=6)
    head, two, all_of_them = {HEAD}, {HEAD, MIDDLE}, {HEAD, MIDDLE, BOTTOM}
    assert per_epoch(module) == [head, head, two, two, all_of_them, all_of_them]
    assert trained(module) == all_of_them


def test_patterns_choose_stages_and_what_none_names_is_never_trained(tmp_path):
    before = Deep().network[2].weight.clone()
    callback = ProgressiveUnfreezing("network.4.*", [["network.0.w*"], "*.0.bias"])
    module, _ = fit(tmp_path, callback, max_epochs=4)
    assert callback.plan[1:] == [["network.0.weight"], ["network.0.bias"]]
    assert per_epoch(module) == [{HEAD}, {HEAD, BOTTOM}, {HEAD, BOTTOM}, {HEAD, BOTTOM}]
    assert torch.equal(module.network[2].weight, before)
    assert not torch.equal(module.network[0].weight, before)


def test_by_steps_a_stage_joins_after_n_optimizer_steps_and_never_within_a_window(tmp_path):
    callback = ProgressiveUnfreezing(every_n_steps=2)
    module, _ = fit(tmp_path, callback, max_epochs=2, accumulate_grad_batches=3)  # steps after batches 3, 4, 7, 8
    assert [len(names) for names in module.trail] == [1, 1, 1, 1, 2, 2, 2, 2]
    longer, _ = fit(tmp_path, ProgressiveUnfreezing(every_n_steps=3), max_epochs=2, accumulate_grad_batches=3)
    assert [len(names) for names in longer.trail] == [1, 1, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("validation", [True, False])
def test_on_a_plateau_the_next_stage_joins_after_patience_is_spent(tmp_path, validation):
    losses = [3.0, 2.0, 2.0, 1.95, 1.0, 1.0, 1.0, 5.0, 0.1]  # of each epoch; 0.1 better counts as better

    class Scripted(Deep):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", losses[self.current_epoch])

        def training_step(self, batch, batch_idx):
            if not validation:
                self.log("val/loss", losses[self.current_epoch], on_epoch=True)
            return super().training_step(batch, batch_idx)

    callback = ProgressiveUnfreezing(on_plateau="val/loss", patience=2, min_delta=0.1)
    loaders = (toy_loader(), toy_loader()) if validation else (toy_loader(),)
    module, _ = fit(tmp_path, callback, Scripted(), loaders, max_epochs=9)
    # Epochs 3 and 4 do not improve, nor do 6 and 7.
    assert [len(names) for names in per_epoch(module)] == [1, 1, 1, 1, 2, 2, 2, 3, 3]


def test_a_metric_that_was_not_logged_is_an_error_that_lists_what_was(tmp_path):
    with pytest.raises(ValueError, match="on_plateau=val/loss: was not logged; logged are: train/loss"):
        fit(tmp_path, ProgressiveUnfreezing(on_plateau="val/loss"))


@pytest.mark.filterwarnings("ignore")
def test_what_is_trained_in_each_epoch_and_at_the_end_equals_finetuning_schedulers(tmp_path):
    theirs = pytest.importorskip("finetuning_scheduler")

    class Validates(Deep):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", (self.network(batch[0])[:, 0] - batch[1]).square().mean())

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    schedule = {
        phase: {"params": [f"{layer}.weight", f"{layer}.bias"], "max_transition_epoch": 2 * phase + 2}
        for phase, layer in enumerate([HEAD, MIDDLE, BOTTOM])
    }
    scheduler = theirs.FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True)
    saver = theirs.FTSCheckpoint(tmp_path / "theirs", monitor="val_loss", save_top_k=1)
    loaders = toy_loader(), toy_loader()
    reference, _ = fit(tmp_path, [scheduler, saver], Validates(), loaders, max_epochs=6)
    module, _ = fit(tmp_path, ProgressiveUnfreezing(every_n_epochs=2), Validates(), loaders, max_epochs=6)
    assert per_epoch(module) == per_epoch(reference)
    assert trained(module) == trained(reference)
    assert [len(names) for names in per_epoch(module)] == [1, 1, 2, 2, 3, 3]


# The ramp


def float64_adamw(weights, gradients, rates, decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8):
    """Weights after these steps; gradients None while frozen."""
    w, m, v, n = weights, 0.0, 0.0, 0
    for gradient, rate in zip(gradients, rates, strict=True):
        if gradient is None:
            continue
        n += 1
        w = w - rate * decay * w
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        w = w - rate * (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + eps)
    return w


class Scheduled(Deep):
    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self):
        groups = [
            {"params": self.network[::2][i].parameters(), "lr": lr} for i, lr in ((0, 0.01), (1, 0.02), (2, 0.03))
        ]
        optimizer = torch.optim.AdamW([*groups, {"params": []}], weight_decay=0.1)
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda n: 0.9**n] * 4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.01, 0.02, 0.03, 0.1], total_steps=20, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    ],
)
def test_weights_equal_a_float64_adamw_whose_rates_are_the_schedulers_times_the_ramp(tmp_path, schedule):
    """The decoupled weight decay ramps too, and the scheduler goes on as if nothing were there."""
    callback = ProgressiveUnfreezing(every_n_steps=4, warmup_steps=5)
    module, trainer = fit(tmp_path, callback, Scheduled(schedule), max_epochs=5)
    bare, _ = fit(tmp_path, [], Scheduled(schedule), max_epochs=5)
    assert module.rates == bare.rates  # between steps nobody sees the ramp
    before = [bare.rates[0] if n == 0 else bare.rates[n - 1] for n in range(20)]
    before[0] = schedule_start(schedule)
    assert len(trainer.optimizers[0].param_groups) == 4
    for index, joined in ((0, 8), (1, 4), (2, 0)):
        name = f"network.{2 * index}.weight"
        factors = [1.0 if joined == 0 else min(1, max(0, n - joined) / 5) for n in range(20)]
        rates = [(index + 1) * rate * factor for rate, factor in zip(before, factors, strict=True)]
        gradients = [step.get(name) for step in module.gradients]
        assert [g is None for g in gradients] == [n < joined for n in range(20)]
        expected = float64_adamw(module.weights[0][name], gradients, rates)
        torch.testing.assert_close(module.get_parameter(name).double(), expected, rtol=1e-5, atol=1e-7)


def schedule_start(schedule):
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": r} for r in (0.01, 0.02, 0.03, 0.1)])
    schedule(optimizer)
    return optimizer.param_groups[0]["lr"]


def test_with_adam_the_size_of_the_update_ramps(tmp_path):
    """Adam moves by the rate whatever the size of the gradient, so a ramped gradient would show nothing here."""

    class Constant(Deep):
        def training_step(self, batch, batch_idx):
            return sum(p.sum() for p in self.parameters())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    module, _ = fit(tmp_path, ProgressiveUnfreezing(every_n_steps=4, warmup_steps=4), Constant())
    trail = [step["network.2.bias"] for step in module.weights]
    moves = [(before - after).mean().item() for before, after in pairwise(trail)]
    expected = [0.0] * 4 + [0.01 * factor for factor in (0, 0.25, 0.5, 0.75, 1, 1, 1)]
    assert moves == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_what_is_frozen_has_no_gradient_and_no_optimizer_state(tmp_path):
    module, _ = fit(tmp_path, ProgressiveUnfreezing(every_n_epochs=1), max_epochs=3)
    assert module.with_state == module.trail
    assert [len(names) for names in module.with_state[::4]] == [1, 2, 3]
    assert all({n.rpartition(".")[0] for n in g} == t for g, t in zip(module.gradients, module.trail, strict=True))


def test_a_gradient_from_before_fit_does_not_move_what_is_frozen(tmp_path):
    module = Deep()
    module.network(torch.ones(1, 4)).sum().backward()
    before = module.network[0].weight.clone()
    fit(tmp_path, ProgressiveUnfreezing(every_n_epochs=5), module, max_epochs=1)
    assert torch.equal(module.network[0].weight, before)


def test_a_step_that_the_scaler_skips_is_no_step_of_the_ramp(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    class Overflows(Deep):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if self.global_step == 5 else 1)

    callback = ProgressiveUnfreezing(every_n_steps=4, warmup_steps=10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    _, trainer = fit(tmp_path, callback, Overflows(), plugins=[plugin], max_epochs=2)
    assert trainer.global_step == 8
    assert callback.state_dict()["optimizers"] == [{"steps": 7, "joined": {"network.2.weight": 4, "network.2.bias": 4}}]


# Resume


class Saves(Callback):
    """A checkpoint after each batch and each epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch + 1}.ckpt")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resume_after_any_batch_ends_with_the_same_bits(tmp_path):
    """Within epochs and within ramps; layers of equal values are not taken for each other, none is frozen again."""

    def make():
        return ProgressiveUnfreezing(every_n_epochs=1, warmup_steps=6)

    schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    whole, _ = fit(tmp_path, [make(), Saves(tmp_path)], Scheduled(schedule), max_epochs=3)
    for step in range(1, 12):
        path = tmp_path / f"{step}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["ProgressiveUnfreezing"]
        assert state["stage"] == (step - 1) // 4
        resumed = Scheduled(schedule)
        trainer = toy_trainer(tmp_path, [make()])
        trainer.fit(resumed, toy_loader(), ckpt_path=path)
        assert resumed.trail == whole.trail[step:]
        for name, weight in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], weight), (step, name)


def test_a_plateau_is_counted_on_after_a_resume(tmp_path):
    class Scripted(Deep):
        def training_step(self, batch, batch_idx):
            self.log("flat", 1.0, on_epoch=True)
            return super().training_step(batch, batch_idx)

    def make():
        return ProgressiveUnfreezing(on_plateau="flat", patience=2, warmup_steps=0)

    fit(tmp_path, [make(), Saves(tmp_path)], Scripted(), max_epochs=2)
    trainer = toy_trainer(tmp_path, [again := make()], max_epochs=4)
    trainer.fit(module := Scripted(), toy_loader(), ckpt_path=tmp_path / "epoch2.ckpt")
    assert again.stage == 1  # improved in epoch 1, not in 2 and 3
    assert [len(names) for names in per_epoch(module)] == [1, 2]


def test_new_arguments_win_over_the_checkpoints_and_nothing_is_frozen_again(tmp_path):
    fit(tmp_path, [ProgressiveUnfreezing(every_n_epochs=1, warmup_steps=6), Saves(tmp_path)], max_epochs=2)
    path = tmp_path / "8.ckpt"
    other = ProgressiveUnfreezing("network.4.*", ["network.0.*"], every_n_steps=100, warmup_steps=3)
    trainer = toy_trainer(tmp_path, [other])
    trainer.fit(module := Deep(), toy_loader(), ckpt_path=path)
    assert other.stage == 1
    # The middle had joined at step 4; the bottom, of the newly given first stage, joins now.
    assert per_epoch(module) == [{HEAD, MIDDLE, BOTTOM}]
    joined = {"network.2.weight": 4, "network.2.bias": 4, "network.0.weight": 8, "network.0.bias": 8}
    assert other.state_dict()["optimizers"] == [{"steps": 12, "joined": joined}]


def test_a_second_fit_starts_anew_with_the_same_callback_and_with_a_new_one(tmp_path):
    callback = ProgressiveUnfreezing()
    module, _ = fit(tmp_path, callback, max_epochs=2)
    assert trained(module) == {HEAD, MIDDLE}
    for again in (callback, ProgressiveUnfreezing()):
        module.trail.clear()
        fit(tmp_path, again, module, max_epochs=3)
        assert [len(names) for names in per_epoch(module)] == [1, 2, 3]


def test_a_fit_that_goes_on_with_the_same_trainer_goes_on_with_the_stages(tmp_path):
    callback = ProgressiveUnfreezing(warmup_steps=6)
    module, trainer = fit(tmp_path, callback, max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, toy_loader())
    assert [len(names) for names in per_epoch(module)] == [1, 2, 3]
    assert callback.state_dict()["optimizers"][0]["joined"]["network.2.bias"] == 4


def test_an_exception_within_a_step_leaves_the_users_groups_and_no_hooks(tmp_path):
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            if len(self.param_groups) > 1:
                raise RuntimeError("broken")
            return loss

    class Module(Deep):
        def configure_optimizers(self):
            return Breaks(self.parameters(), lr=0.5)

    trainer = toy_trainer(tmp_path, [ProgressiveUnfreezing()])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Module(), toy_loader())
    optimizer = trainer.optimizers[0]
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(6, 0.5)]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert trainer.global_step == 4


# Several optimizers, several processes


class Gan(LightningModule):
    """The generator's optimizer steps twice a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.critic = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.trail = []

    def training_step(self, batch, batch_idx):
        self.trail.append(trained(self))
        for index in (0, 0, 1):
            optimizer = self.optimizers()[index]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.critic(self.generator(batch[0])).square().mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.critic)]


def test_of_two_optimizers_each_counts_its_own_steps(tmp_path):
    callback = ProgressiveUnfreezing(["*.2.*"], ["critic.0.*", "generator.0.*"], every_n_steps=3)
    module, _ = fit(tmp_path, callback, Gan(), max_epochs=2)
    assert [len(names) for names in module.trail] == [2, 2, 2, 3, 3, 3, 4, 4]
    generator, critic = callback.state_dict()["optimizers"]
    assert generator == {"steps": 16, "joined": {"generator.0.weight": 12, "generator.0.bias": 12}}
    assert critic == {"steps": 8, "joined": {"critic.0.weight": 3, "critic.0.bias": 3}}
    assert trained(module) == {"generator.0", "generator.2", "critic.0", "critic.2"}


def test_of_two_optimizers_only_one_may_have_stages(tmp_path):
    callback = ProgressiveUnfreezing(stages=["generator.0.*"])
    module, _ = fit(tmp_path, callback, Gan(), max_epochs=2)
    assert per_epoch(module) == [
        {"generator.2", "critic.0", "critic.2"},
        {"generator.0", "generator.2", "critic.0", "critic.2"},
    ]


class Halves(ToyModule):
    """Each process writes what it ends with."""

    def __init__(self, folder, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.folder = folder
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        return None

    def train_dataloader(self):
        rows, world = toy_loader().dataset, self.trainer.world_size
        sampler = DistributedSampler(rows, world, self.global_rank, shuffle=False)
        return DataLoader(rows, batch_size=8 // world, sampler=sampler)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self):
        torch.save(self.state_dict(), self.folder / f"rank{self.global_rank}.pt")


def two_ranks(folder, callbacks, resume=None, **options):
    """Each rank gets half of every batch, so that the mean gradient is that of the whole batch."""
    torch.manual_seed(0)
    module = Halves(folder, options.pop("manual", False))
    options |= {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    toy_trainer(folder, callbacks, **options).fit(module, ckpt_path=resume)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"manual": True}], ids=str)
def test_two_ranks_with_different_data_end_equal_and_as_one_process_does(tmp_path, options):
    """With DDP as it is, without find_unused_parameters."""
    one, two = two_ranks(tmp_path, [ProgressiveUnfreezing(warmup_steps=2)], **options)
    assert all(torch.equal(one[name], two[name]) for name in one)
    torch.manual_seed(0)
    module = Halves(tmp_path, options.pop("manual", False))
    start = {name: weight.clone() for name, weight in module.state_dict().items()}
    toy_trainer(tmp_path, [ProgressiveUnfreezing(warmup_steps=2)], **options).fit(module)
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(one[name], weight, rtol=1e-5, atol=1e-6)
        assert not torch.equal(weight, start[name])


def test_two_ranks_resume_within_a_ramp_to_the_same_bits(tmp_path):
    whole, _ = two_ranks(tmp_path, [ProgressiveUnfreezing(warmup_steps=6), Saves(tmp_path)])
    one, two = two_ranks(tmp_path, [ProgressiveUnfreezing(warmup_steps=6)], resume=tmp_path / "epoch2.ckpt")
    assert all(torch.equal(one[name], weight) and torch.equal(two[name], weight) for name, weight in whole.items())


def test_without_wrapping_anew_the_ranks_would_part(tmp_path, monkeypatch):
    """What the test above sees: DDP wrapped after the freezing, and not again."""
    from trainerkit.callbacks import progressive_unfreezing as module

    wrap, calls = module._wrap_again, []

    def only_once(trainer):
        calls.append(1)
        if len(calls) == 1:
            wrap(trainer)

    monkeypatch.setattr(module, "_wrap_again", only_once)
    one, two = two_ranks(tmp_path, [ProgressiveUnfreezing(warmup_steps=2)])
    assert not torch.equal(one["layer.0.weight"], two["layer.0.weight"])


# Normalization layers


class Norms(Deep):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)]
        self.network = nn.Sequential(*layers)
        self.means = []

    def on_train_batch_start(self, *_):
        super().on_train_batch_start()
        self.means.append([self.network[i].running_mean.clone() for i in (1, 3)])

    def validation_step(self, batch, batch_idx):
        self.network(batch[0])


@pytest.mark.parametrize("freeze", [True, False])
def test_statistics_of_frozen_norms_stand_still_if_asked_and_move_once_they_are_trained(tmp_path, freeze):
    callback = ProgressiveUnfreezing("network.4.*", ["network.2.*", "*"], freeze_norm_statistics=freeze)
    loaders = toy_loader(), toy_loader()  # after a validation Lightning sets the modes of all modules
    module, _ = fit(tmp_path, callback, Norms(), loaders, max_epochs=3)
    moves = [
        [not torch.equal(a, b) for a, b in zip(*pair, strict=True)]
        for pair in zip(module.means[:-1], module.means[1:], strict=True)
    ]
    epoch = [(False, False), (False, True), (True, True)] if freeze else [(True, True)] * 3
    assert [tuple(m) for m in moves] == [epoch[n // 4] for n in range(11)]
    assert all(norm.track_running_stats and norm.training for norm in (module.network[1], module.network[3]))


def test_a_norm_goes_by_its_own_parameters_else_by_the_layer_before_it():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False), nn.LayerNorm(2))
    assert still_norms(network) == []
    network[0].requires_grad_(False)
    assert still_norms(network) == []
    network[1].requires_grad_(False)
    assert still_norms(network) == [network[1], network[2]]
    network[1].eval()  # by the user, who keeps it
    assert still_norms(network) == [network[2]]


# All kinds of modules, trainers and loggers


class Compiled(Deep):
    def __init__(self):
        super().__init__()
        self.network = torch.compile(self.network, backend="eager")


class Tied(Deep):
    def __init__(self):
        super().__init__()
        self.network[2].weight = self.network[0].weight


class Odd(Deep):
    """Has a frozen layer, and one that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.network[2].requires_grad_(False)
        self.unused = nn.Linear(2, 2)


def test_compiled_modules_go_by_their_plain_names(tmp_path):
    compiled, _ = fit(tmp_path, ProgressiveUnfreezing("network.4.*"), Compiled())
    plain, _ = fit(tmp_path, ProgressiveUnfreezing("network.4.*"), Deep())
    assert [len(names) for names in per_epoch(compiled)] == [1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), plain.parameters(), strict=True))


def test_layers_that_configure_model_makes_are_found(tmp_path):
    class Late(Deep):
        def __init__(self):
            super().__init__()
            del self.network

        def configure_model(self):
            if not hasattr(self, "network"):
                self.network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    module, _ = fit(tmp_path, ProgressiveUnfreezing(), Late(), max_epochs=2)
    assert per_epoch(module) == [{"network.2"}, {"network.2", "network.0"}]
    with pytest.raises(ValueError, match=r"initial=netwrk\.2\.\*: matches no parameter; the nearest are network\.2"):
        fit(tmp_path, ProgressiveUnfreezing("netwrk.2.*"), Late())


def test_a_tied_weight_is_trained_with_the_first_of_its_layers(tmp_path):
    module, _ = fit(tmp_path, ProgressiveUnfreezing(), Tied())
    assert per_epoch(module) == [{HEAD}, {HEAD, MIDDLE, BOTTOM}, {HEAD, MIDDLE, BOTTOM}]
    assert not any("0.bias" in name for name in module.gradients[4])


def test_what_the_user_froze_stays_frozen_and_what_gets_no_gradient_disturbs_nothing(tmp_path):
    before = Deep().network[2].weight.clone()
    callback = ProgressiveUnfreezing(layers_per_stage=2)
    module, _ = fit(tmp_path, callback, Odd())
    assert per_epoch(module) == [{"unused", HEAD}, {"unused", HEAD, BOTTOM}, {"unused", HEAD, BOTTOM}]
    assert torch.equal(module.network[2].weight, before)
    assert not any("network.2" in name for stage in callback.plan for name in stage)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed", "accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str
)
def test_the_fast_loop_trains_to_the_same_bits_as_lightnings(tmp_path, options):
    from trainerkit.trainer import Trainer

    plain, _ = fit(tmp_path, ProgressiveUnfreezing(warmup_steps=5), **options)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    fast = Deep()
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, callbacks=[ProgressiveUnfreezing(warmup_steps=5)], **quiet, **options
    )
    trainer.fit(fast, toy_loader())
    assert fast.trail == plain.trail
    assert all(torch.equal(a, b) for a, b in zip(fast.parameters(), plain.parameters(), strict=True))


def test_the_other_namespace_trains_the_same(tmp_path):
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Deep().network

        def training_step(self, batch, batch_idx):
            return (self.network(batch[0])[:, 0] - batch[1]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    callbacks = [ProgressiveUnfreezing(warmup_steps=5)]
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=callbacks, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module := Module(), toy_loader())
    assert trained(module) == {HEAD, MIDDLE}
    assert callbacks[0].state_dict()["optimizers"][0] == {
        "steps": 8,
        "joined": {"network.2.weight": 4, "network.2.bias": 4},
    }


def test_the_stage_and_the_number_of_trained_values_are_logged_when_they_change(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    one, two = CSVLogger(tmp_path, "one"), CSVLogger(tmp_path, "two")
    _, trainer = fit(tmp_path, ProgressiveUnfreezing(), max_epochs=3, logger=[one, two])
    columns = ["step", "unfreezing/stage", "unfreezing/trainable_parameters"]
    for logger in (one, two):
        with open(f"{logger.log_dir}/metrics.csv") as file:
            rows = [[row[column] for column in columns] for row in csv.DictReader(file) if row[columns[1]]]
        assert [[float(cell) for cell in row] for row in rows] == [[0, 0, 5], [4, 1, 25], [8, 2, 45]]
    assert float(trainer.callback_metrics["unfreezing/stage"]) == 2


def test_it_asks_the_device_for_nothing(tmp_path):
    class Counts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")
            return func(*args, **(kwargs or {}))

    class Module(Deep):
        def configure_optimizers(self):  # Adam asks for its count of steps
            return torch.optim.SGD(self.parameters(), lr=0.01)

    with Counts() as counts:
        fit(tmp_path, ProgressiveUnfreezing(every_n_steps=2, freeze_norm_statistics=True), Module(), max_epochs=2)
    with Counts() as bare:
        fit(tmp_path, [], Module(), max_epochs=2)
    assert counts.count == bare.count


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": "netwrk.4.*"}, r"initial=netwrk.4.\*: matches no parameter; the nearest are network.4.bias"),
        ({"stages": ["network.9"]}, r"stages=network.9: matches no parameter; the nearest are"),
        (
            {"initial": "*", "stages": ["network.0.*"]},
            r"stages=network.0.\*: adds nothing to train; .* in an earlier stage",
        ),
        ({"stages": ["network.*"]}, "initial=None: must be a pattern here; nothing is left to train from the start"),
    ],
)
def test_patterns_that_name_nothing_are_refused_in_setup(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveUnfreezing(**arguments).setup(toy_trainer(tmp_path), Deep(), "fit")


def test_a_stage_that_no_optimizer_holds_is_refused(tmp_path):
    class Forgets(Deep):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network[4].parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"stages=network.0.\*: adds nothing to train; .* held by no optimizer"):
        fit(tmp_path, ProgressiveUnfreezing("network.4.*", ["network.0.*"]), Forgets())


def test_lbfgs_has_one_rate_and_so_no_ramp(tmp_path):
    class Second(Deep):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)

    with pytest.raises(ValueError, match="warmup_steps=100: must be 0 with LBFGS"):
        fit(tmp_path, ProgressiveUnfreezing(), Second())


def test_sharded_parameters_are_refused_in_one_sentence(tmp_path):
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(
        ValueError, match="strategy=ModelParallelStrategy: ProgressiveUnfreezing does not work on sharded"
    ):
        ProgressiveUnfreezing().setup(toy_trainer(tmp_path, strategy=strategy, devices=1), Deep(), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": []}, r"initial=\[\]: must be a pattern"),
        ({"stages": []}, r"stages=\[\]: must be a list"),
        ({"stages": "head.*"}, r"stages='head.\*': must be a list"),
        ({"stages": [[]]}, r"stages=\[\]: must be a pattern"),
        ({"order": "random"}, "order=random: must be from_output or from_input"),
        ({"layers_per_stage": 0}, "layers_per_stage=0: must be 1 or more"),
        ({"every_n_epochs": 0}, "every_n_epochs=0: must be 1 or more"),
        ({"every_n_steps": -1}, "every_n_steps=-1: must be 1 or more"),
        ({"every_n_epochs": 1, "every_n_steps": 5}, "every_n_epochs=1, every_n_steps=5: must be one of them"),
        ({"every_n_steps": 5, "on_plateau": "val/loss"}, "every_n_steps=5, on_plateau=val/loss: must be one of them"),
        ({"patience": 0}, "patience=0: must be 1 or more"),
        ({"min_delta": -0.1}, "min_delta=-0.1: must be 0 or more"),
        ({"min_delta": math.nan}, "min_delta=nan: must be 0 or more"),
        ({"mode": "low"}, "mode=low: must be min or max"),
        ({"warmup_steps": -1}, "warmup_steps=-1: must be 0 or more"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveUnfreezing(**arguments)
