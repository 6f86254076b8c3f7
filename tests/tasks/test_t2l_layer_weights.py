import pytest
import torch

from trainerkit.adapter_layout import AdapterLayout
from trainerkit.tasks.t2l.layer_weights import layer_weights, matches

LAYERS = [
    (f"model.layers.{i}.{name}", width_in, width_out)
    for i in range(3)
    for name, width_in, width_out in [("attention.q_proj", 8, 8), ("mlp.down", 12, 4)]
]


@pytest.fixture
def layout():
    return AdapterLayout(LAYERS, rank=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "by_parameter_count"},
        {"kind": "by_depth", "decay": 0.5},
        {"kind": "custom", "custom": {"q_proj": 3, "model.layers.0.*": 0.25}},
    ],
)
def test_the_mean_is_one_and_no_weight_is_below_zero(layout, options):
    weights = layer_weights(layout, **options)
    assert weights.shape == (6,)
    assert weights.dtype == torch.float32
    assert weights.mean() == pytest.approx(1)
    assert (weights >= 0).all()


def test_by_parameter_count_is_in_proportion_to_the_numbers_of_each_layers_factors():
    layout = AdapterLayout([("a.0", 8, 24), ("b.0", 3, 5), ("a.1", 8, 24)], rank=3)
    weights = layer_weights(layout, "by_parameter_count")
    numbers = torch.tensor([3.0 * (8 + 24), 3 * (8 + 24), 3 * (3 + 5)])
    assert layout.names == ["a.0", "a.1", "b.0"]
    torch.testing.assert_close(weights, numbers / numbers.mean())


def test_by_depth_falls_by_the_decay_from_each_layer_to_the_next(layout):
    weights = dict(zip(layout.names, layer_weights(layout, "by_depth", decay=0.5).tolist(), strict=True))
    for name in ("attention.q_proj", "mlp.down"):
        first, second, third = (weights[f"model.layers.{i}.{name}"] for i in range(3))
        assert second / first == pytest.approx(0.5)
        assert third / second == pytest.approx(0.5)
    assert weights["model.layers.1.attention.q_proj"] == weights["model.layers.1.mlp.down"]


def test_a_decay_of_one_is_uniform(layout):
    assert torch.equal(layer_weights(layout, "by_depth", decay=1.0), layer_weights(layout))


def test_the_longest_matching_pattern_wins_whatever_the_order(layout):
    custom = {"*": 1, "*.q_proj": 2, "model.layers.2.*": 4, "model.layers.2.attention.q_proj": 8}
    weights = layer_weights(layout, "custom", custom=custom)
    again = layer_weights(layout, "custom", custom=dict(reversed(custom.items())))
    raw = torch.tensor([2.0, 2, 8, 1, 1, 4])  # q_proj 0 1 2, down 0 1 2
    torch.testing.assert_close(weights, raw / raw.mean())
    assert torch.equal(weights, again)


def test_layers_that_no_pattern_matches_weigh_one_before_the_mean_is_taken_out(layout):
    weights = layer_weights(layout, "custom", custom={"down": 3})
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0.5, 1.5, 1.5, 1.5]))


def test_scaling_all_custom_weights_changes_nothing(layout):
    custom = {"q_proj": 0.5, "down": 2.0}
    torch.testing.assert_close(
        layer_weights(layout, "custom", custom=custom),
        layer_weights(layout, "custom", custom={name: 7 * weight for name, weight in custom.items()}),
    )


def test_the_order_of_the_layers_given_moves_no_weight(layout):
    other = AdapterLayout(LAYERS[::-1], rank=2)
    for options in ({"kind": "by_depth"}, {"kind": "by_parameter_count"}):
        one, two = (
            dict(zip(each.names, layer_weights(each, **options).tolist(), strict=True)) for each in (layout, other)
        )
        assert one == pytest.approx(two)


@pytest.mark.parametrize(
    ("pattern", "does"),
    [
        ("q_proj", True),
        ("attention.q_proj", True),
        ("layers.0.*.q_proj", True),
        ("model.layers.0.attention.q_proj", True),
        ("*q_proj", True),
        ("proj", False),
        ("attention", False),
        ("attention.*", True),
        ("model.layers.1.*", False),
        ("Q_PROJ", False),
    ],
)
def test_a_pattern_matches_the_whole_name_or_its_end_from_a_dot_on(pattern, does):
    assert matches("model.layers.0.attention.q_proj", pattern) is does


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "depth"}, r"kind=depth: must be one of uniform, by_parameter_count, by_depth, custom"),
        ({"kind": "by_depth", "decay": 0.0}, r"decay=0.0: must be above 0 up to 1"),
        ({"kind": "by_depth", "decay": 1.1}, r"decay=1.1: must be"),
        ({"kind": "by_depth", "decay": float("nan")}, r"decay=nan: must be"),
        ({"kind": "custom"}, r"custom=None: needs patterns and weights, kind=custom"),
        ({"custom": {"q_proj": 1}}, r"custom=.*is for kind=custom alone, kind=uniform"),
        ({"kind": "custom", "custom": {"q_proj": -1}}, r"custom.q_proj=-1: must be 0 or more"),
        ({"kind": "custom", "custom": {"q_proj": float("inf")}}, r"custom.q_proj=inf: must be 0 or more"),
        ({"kind": "custom", "custom": {"*": 0}}, r"at least one layer must have a weight above 0"),
        ({"kind": "custom", "custom": {"q_porj": 1}}, r"custom=q_porj: matches none of the 6 .*Did you mean q_proj\b"),
        (
            {"kind": "custom", "custom": {"zzz": 1}},
            r"custom=zzz: matches none .*The layers are model.layers.0.attention",
        ),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(layout, options, message):
    with pytest.raises(ValueError, match=message):
        layer_weights(layout, **options)
