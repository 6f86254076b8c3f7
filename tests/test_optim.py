import math

import pytest
import torch
from torch import nn

from trainerkit.optim import decays, make_optimizer, make_scheduler, parameter_groups, warmup_cosine, warmup_linear


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
    import functools

    net = nn.Linear(2, 2)
    assert make_optimizer(torch.optim.AdamW, net).defaults["fused"] is True
    assert make_optimizer(torch.optim.AdamW, net, allow_fused=False).defaults["fused"] is False
    assert make_optimizer(functools.partial(torch.optim.AdamW, foreach=True), net).defaults["fused"] is None
    assert make_optimizer(functools.partial(torch.optim.AdamW, fused=False), net).defaults["fused"] is False
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


def test_warmup_is_counted_in_epochs_unless_steps_are_given():
    by_epochs = factors(warmup_cosine, 12, total_steps=40, steps_per_epoch=5, warmup_epochs=2)
    assert by_epochs == factors(warmup_cosine, 12, total_steps=40, warmup_steps=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 5, "min_lr_scale": 1.5}, "min_lr_scale=1.5: must be from 0 to 1"),
        ({"total_steps": 5, "warmup_epochs": -1}, "warmup_epochs=-1: must be 0 or more"),
        ({"total_steps": 5, "warmup_steps": -2}, "warmup_steps=-2: must be 0 or more"),
        ({"total_steps": 5, "warmup_epochs": 2}, "warmup_epochs=2: needs steps_per_epoch"),
        ({}, "total_steps=None: must be 1 or more"),
    ],
)
def test_impossible_schedules_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        factors(warmup_cosine, 1, **options)


def test_make_scheduler_fills_only_what_was_left_open():
    import functools

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=None)
    assert make_scheduler(cosine, optimizer, total_steps=77, steps_per_epoch=7).T_max == 77
    fixed = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=9)
    assert make_scheduler(fixed, optimizer, total_steps=77, steps_per_epoch=7).T_max == 9
    assert math.isclose(
        make_scheduler(warmup_cosine, optimizer, total_steps=70, steps_per_epoch=7).get_last_lr()[0], 1 / 7
    )
