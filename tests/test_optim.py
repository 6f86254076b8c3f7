import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trainerkit.build import build
from trainerkit.compose import compose_config
from trainerkit.optim import (
    decays,
    make_optimizer,
    make_scheduler,
    parameter_groups,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)
from trainerkit.plugins import AllowList


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm2d(4)
        self.embedding = nn.Embedding(5, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 6, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


def factors(schedule, steps, lr=1.0, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_weight_decay_leaves_out_biases_norms_embeddings_and_tokens():
    net = Net()
    found = {n for n, p in net.named_parameters() if decays(n, p, net.get_submodule(n.rpartition(".")[0]))}
    assert found == {"linear.weight", "attention.in_proj_weight", "attention.out_proj.weight", "frozen.weight"}


def test_parameter_groups_hold_each_trainable_parameter_once_tied_ones_too():
    net = Net()
    net.tied = net.linear
    decay, keep = parameter_groups(net, 0.3)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    grouped = [id(p) for group in (decay, keep) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(net.frozen, 0.1)


def test_fused_is_chosen_unless_scaling_or_the_user_says_otherwise():
    net = nn.Linear(2, 2)
    assert make_optimizer(torch.optim.AdamW, net).defaults["fused"] is True
    assert make_optimizer(torch.optim.AdamW, net, allow_fused=False).defaults["fused"] is False
    assert make_optimizer(partial(torch.optim.AdamW, foreach=True), net).defaults["fused"] is None
    assert make_optimizer(partial(torch.optim.AdamW, fused=False), net).defaults["fused"] is False
    assert "fused" not in make_optimizer(torch.optim.RMSprop, net).defaults


def test_warmup_cosine_has_the_documented_values():
    expected = [0.25, 0.5, 0.75, 1, 1, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343, 0.1, 0.1]
    found = factors(warmup_cosine, 14, total_steps=12, warmup_steps=4, min_lr_scale=0.1)
    assert found == pytest.approx(expected, abs=5e-5)


def test_warmup_cosine_without_warmup_is_torchs_cosine():
    mine = factors(warmup_cosine, 20, lr=0.3, total_steps=20, warmup_steps=0)
    theirs = factors(torch.optim.lr_scheduler.CosineAnnealingLR, 20, lr=0.3, T_max=20)
    assert mine == pytest.approx(theirs, abs=1e-12)


def test_warmup_linear_at_its_knots():
    found = factors(warmup_linear, 13, total_steps=12, warmup_steps=4, min_lr_scale=0.2)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert found[8] == pytest.approx(0.6)
    assert found[12] == pytest.approx(0.2)


def test_schedules_scale_with_the_rate_and_stay_between_the_floor_and_it():
    small, large = (
        factors(warmup_cosine, 30, lr=lr, total_steps=30, warmup_steps=5, min_lr_scale=0.1) for lr in (1, 7)
    )
    assert large == pytest.approx([7 * value for value in small])
    assert all(0.1 - 1e-12 <= value <= 1 for value in small)


def test_warmup_is_counted_in_epochs_unless_a_ratio_or_steps_are_given():
    by_epochs = factors(warmup_cosine, 12, total_steps=40, steps_per_epoch=5, warmup_epochs=2)
    assert by_epochs == factors(warmup_cosine, 12, total_steps=40, warmup_steps=10)
    by_ratio = {"total_steps": 40, "warmup_ratio": 0.25}
    assert by_epochs == factors(warmup_cosine, 12, **by_ratio)
    assert factors(warmup_cosine, 12, **by_ratio, warmup_steps=3) == factors(
        warmup_cosine, 12, total_steps=40, warmup_steps=3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 5, "min_lr_scale": 1.5}, "min_lr_scale=1.5: must be from 0 to 1"),
        ({"total_steps": 5, "warmup_epochs": -1}, "warmup_epochs=-1: must be 0 or more"),
        ({"total_steps": 5, "warmup_ratio": 1.5}, "warmup_ratio=1.5: must be from 0 to 1"),
        ({"total_steps": 5, "warmup_steps": -2}, "warmup_steps=-2: must be 0 or more"),
        ({"total_steps": 5, "warmup_epochs": 2}, "warmup_epochs=2: needs steps_per_epoch"),
        ({}, "total_steps=None: must be 1 or more"),
        ({"total_steps": 5, "decay_fraction": 1.2}, "decay_fraction=1.2: must be from 0 to 1"),
        ({"total_steps": 5, "decay": "square"}, "decay=square: must be one of linear, cosine, 1-sqrt"),
    ],
)
def test_impossible_schedules_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        factors(warmup_stable_decay, 1, **options)


def test_make_scheduler_fills_only_what_was_left_open():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=None)
    assert make_scheduler(cosine, optimizer, total_steps=77, steps_per_epoch=7).T_max == 77
    fixed = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=9)
    assert make_scheduler(fixed, optimizer, total_steps=77, steps_per_epoch=7).T_max == 9
    assert math.isclose(
        make_scheduler(warmup_cosine, optimizer, total_steps=70, steps_per_epoch=7).get_last_lr()[0], 1 / 7
    )


@pytest.mark.parametrize(
    ("decay", "middle"), [("linear", 0.6), ("cosine", 0.6), ("1-sqrt", 0.2 + 0.8 * (1 - math.sqrt(0.5)))]
)
def test_warmup_stable_decay_at_its_knots(decay, middle):
    options = {"warmup_steps": 4, "decay_fraction": 0.4, "decay": decay, "min_lr_scale": 0.2}
    found = factors(warmup_stable_decay, 23, total_steps=20, **options)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert found[4:13] == [1] * 9  # the decay begins at the twelfth of twenty steps
    assert found[13] < 1
    assert found[16] == pytest.approx(middle)
    assert found[20:] == pytest.approx([0.2] * 3)
    assert found[12:21] == sorted(found[12:21], reverse=True)


@pytest.mark.parametrize(("decay", "other"), [("cosine", warmup_cosine), ("linear", warmup_linear)])
def test_a_decay_over_all_steps_is_the_schedule_without_a_constant(decay, other):
    options = {"total_steps": 30, "warmup_steps": 6, "min_lr_scale": 0.1}
    assert factors(warmup_stable_decay, 32, decay_fraction=1.0, decay=decay, **options) == factors(other, 32, **options)
    assert factors(warmup_stable_decay, 30, decay_fraction=0.0, **options)[6:] == [1] * 24


def test_until_the_decay_begins_the_length_of_the_run_does_not_matter():
    short, long = (
        factors(warmup_stable_decay, 40, total_steps=total, warmup_steps=5, decay_fraction=0.2) for total in (50, 500)
    )
    assert short == long


def torchs(warmup, first, *rest):
    """Torch's own schedulers one after the other, from steps on; a warm-up whose first step is 1/W."""

    def make(optimizer):
        warm = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        parts = [warm, *(part(optimizer) for _, part in (first, *rest))]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[at for at, _ in (first, *rest)])

    return make


@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step\\(\\)`.*")  # SequentialLR's own
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            partial(warmup_cosine, total_steps=25, warmup_steps=5, min_lr_scale=0.1),
            torchs(5, (5, partial(lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=0.03))),
        ),
        (
            partial(warmup_linear, total_steps=25, warmup_steps=5, min_lr_scale=0.1),
            torchs(5, (5, partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=20))),
        ),
        (
            partial(warmup_stable_decay, total_steps=25, warmup_steps=5, decay_fraction=0.4, min_lr_scale=0.1),
            torchs(
                5,
                (5, partial(lr_scheduler.ConstantLR, factor=1.0, total_iters=0)),
                (15, partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=10)),
            ),
        ),
    ],
    ids=["cosine", "linear", "stable"],
)
def test_the_schedules_with_a_warmup_are_torchs_in_sequence(ours, theirs):
    assert factors(ours, 26, lr=0.3) == pytest.approx(factors(theirs, 26, lr=0.3), rel=1e-9)


CONFIGURED = {
    "constant": partial(lr_scheduler.ConstantLR, factor=1.0, total_iters=0),
    "step scheduler.step_size=4": partial(lr_scheduler.StepLR, step_size=4, gamma=0.1),
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.999),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=15),
}


@pytest.mark.parametrize("choice", CONFIGURED)
def test_configured_schedules_are_torchs_over_the_whole_run(choice):
    factory = build(compose_config(["task=mae", *f"scheduler={choice}".split()]).scheduler, "scheduler", AllowList())
    ours = factors(partial(make_scheduler, factory), 16, lr=0.3, total_steps=15, steps_per_epoch=5)
    assert ours == factors(CONFIGURED[choice], 16, lr=0.3)


def sgd(p, gradient, state, t, lr, weight_decay):
    state["v"] = 0.9 * state.get("v", torch.zeros_like(p)) + gradient + weight_decay * p
    return p - lr * state["v"]


def adam(p, gradient, state, t, lr, weight_decay, beta2=0.999, decoupled=False):
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        gradient = gradient + weight_decay * p
    state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * gradient
    state["v"] = beta2 * state.get("v", torch.zeros_like(p)) + (1 - beta2) * gradient**2
    return p - lr * (state["m"] / (1 - 0.9**t)) / ((state["v"] / (1 - beta2**t)).sqrt() + 1e-8)


def rmsprop(p, gradient, state, t, lr, weight_decay):
    gradient = gradient + weight_decay * p
    state["v"] = 0.99 * state.get("v", torch.zeros_like(p)) + 0.01 * gradient**2
    return p - lr * gradient / (state["v"].sqrt() + 1e-8)


UPDATES = {
    "sgd optimizer.momentum=0.9": sgd,
    "adam": adam,
    "adamw": partial(adam, beta2=0.95, decoupled=True),
    "rmsprop": rmsprop,
}


@pytest.mark.parametrize("choice", UPDATES)
def test_ten_steps_of_a_configured_optimizer_are_the_update_written_out(choice):
    """With decay on the matrix and none on the bias, from the same gradients."""
    lr, weight_decay = 0.03, 0.2
    words = [*f"optimizer={choice}".split(), f"optimizer.lr={lr}", f"optimizer.weight_decay={weight_decay}"]
    factory = build(compose_config(["task=mae", *words]).optimizer, "optimizer", AllowList())
    layer = nn.Linear(3, 2).double()
    optimizer = make_optimizer(factory, layer)
    expected = [p.detach().clone() for p in layer.parameters()]
    states = [{}, {}]
    for t in range(1, 12):
        for place, (p, decay) in enumerate(zip(layer.parameters(), (weight_decay, 0.0), strict=True)):
            p.grad = torch.randn_like(p)
            expected[place] = UPDATES[choice](expected[place], p.grad, states[place], t, lr, decay)
        optimizer.step()
    for p, value in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-9, atol=1e-9)
