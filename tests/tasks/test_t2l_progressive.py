import json

import pytest
import torch

from trainerkit.adapter_layout import AdapterLayout
from trainerkit.tasks.t2l.progressive import Progressive, layer_groups, ramp

LAYERS = [(f"blocks.{i}.{name}", 4, 4) for i in range(3) for name in ("q", "k", "v")]


@pytest.fixture
def layout():
    return AdapterLayout(LAYERS, rank=2)


def bound(layout, **options):
    progressive = Progressive(**{"initial_layers": ["q"]} | options)
    progressive.bind(layout)
    return progressive


def course(progressive, epochs, steps_per_epoch=5, start=0):
    """The shares before each step."""
    found = []
    for step in range(start, epochs * steps_per_epoch):
        if step % steps_per_epoch == 0:
            progressive.begin_epoch(step // steps_per_epoch, step)
        found.append(progressive.shares(step))
    return torch.stack(found)


def test_groups_by_type_come_one_module_type_after_the_other(layout):
    groups = dict(zip(layout.names, layer_groups(layout, ["q"], "type"), strict=True))
    assert groups == {f"blocks.{i}.{name}": group for i in range(3) for name, group in {"q": 0, "k": 1, "v": 2}.items()}


def test_groups_by_depth_come_from_the_first_layer_on(layout):
    groups = dict(zip(layout.names, layer_groups(layout, ["blocks.1.*"], "depth"), strict=True))
    assert groups == {f"blocks.{i}.{name}": group for i, group in {1: 0, 0: 1, 2: 2}.items() for name in "qkv"}


def test_each_layer_is_in_one_group_and_no_group_is_empty(layout):
    for initial in (["q"], ["blocks.0.q"], ["*"], ["blocks.2.*", "k"]):
        for order in ("type", "depth"):
            groups = layer_groups(layout, initial, order)
            assert len(groups) == 9
            assert set(groups) == set(range(max(groups) + 1))


def test_shares_equal_the_formula_at_every_step(layout):
    progressive = bound(layout, layer_addition_interval=2, layer_warmup_steps=4)
    shares = course(progressive, epochs=6)
    for step, row in enumerate(shares):
        for name, share in zip(layout.names, row.tolist(), strict=True):
            start = {"q": None, "k": 10, "v": 20}[name[-1]]
            assert share == pytest.approx(1.0 if start is None else min(max((step - start) / 4, 0), 1)), (step, name)


def test_no_share_ever_falls_and_all_end_at_one(layout):
    shares = course(bound(layout, layer_addition_interval=1, layer_warmup_steps=7, order="depth"), epochs=8)
    assert (shares.diff(dim=0) >= 0).all()
    assert (shares[-1] == 1).all()


def test_without_warmup_an_added_layer_counts_at_once(layout):
    shares = course(bound(layout, layer_addition_interval=1, layer_warmup_steps=0), epochs=3)
    assert set(shares.flatten().tolist()) == {0.0, 1.0}
    assert shares[5].tolist() == [1] * 6 + [0] * 3


def test_with_every_layer_from_the_start_nothing_is_added(layout):
    progressive = bound(layout, initial_layers=["*"])
    assert (course(progressive, epochs=5) == 1).all()
    assert progressive.state_dict() == {"starts": []}
    assert bool((progressive.shares(0) == 1).all())


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_run_resumed_at_any_step_has_the_same_shares(layout, cut):
    options = {"layer_addition_interval": 2, "layer_warmup_steps": 7}
    whole = course(bound(layout, **options), epochs=6)
    first = bound(layout, **options)
    for step in range(cut):
        if step % 5 == 0:
            first.begin_epoch(step // 5, step)
    state = json.loads(json.dumps(first.state_dict()))
    second = bound(layout, **options)
    second.load_state_dict(state)
    # A run may be told again of the epoch it is in the middle of.
    second.begin_epoch((cut - 1) // 5, cut)
    assert torch.equal(course(second, epochs=6, start=cut), whole[cut:])


def test_an_epoch_that_begins_twice_adds_nothing_twice(layout):
    progressive = bound(layout, layer_addition_interval=1)
    assert progressive.begin_epoch(1, 10) == [1]
    assert progressive.begin_epoch(1, 12) == []
    assert progressive.state_dict() == {"starts": [10]}
    assert progressive.begin_epoch(9, 90) == [2]
    assert progressive.begin_epoch(99, 990) == []


def test_epochs_that_nobody_told_of_add_all_that_is_due(layout):
    progressive = bound(layout, layer_addition_interval=1, layer_warmup_steps=10)
    assert progressive.begin_epoch(5, 50) == [1, 2]
    assert progressive.shares(55).tolist() == pytest.approx([1] * 3 + [0.5] * 6)
    assert not bool((progressive.shares(55) == 1).all())
    assert bool((progressive.shares(60) == 1).all())


def test_a_group_that_was_not_added_has_no_share():
    assert ramp(1000, None, 100) == 0
    assert ramp(9, 10, 100) == 0
    assert ramp(10, 10, 0) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_layers": []}, r"initial_layers=\[\]: must be a list of at least one pattern"),
        ({"initial_layers": "q"}, r"initial_layers='q': must be a list"),
        ({"layer_addition_interval": 0}, r"layer_addition_interval=0: must be 1 or more"),
        ({"layer_warmup_steps": -1}, r"layer_warmup_steps=-1: must be 0 \(at once\) or more"),
        ({"order": "size"}, r"order=size: must be type or depth"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        Progressive(**{"initial_layers": ["q"]} | options)


def test_an_initial_pattern_that_matches_nothing_names_what_is_near(layout):
    with pytest.raises(
        ValueError, match=r"initial_layers=blocks.0.qq: matches none of the 9 .*Did you mean blocks.0.q"
    ):
        bound(layout, initial_layers=["q", "blocks.0.qq"])
