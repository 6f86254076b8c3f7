import math

import pytest
import torch

from trainerkit.adapter_layout import AdapterLayout
from trainerkit.tasks.t2l.metrics import adapter_metrics, change_gauge, gauge_note

LAYERS = [(f"b.{i}.{name}", *shape) for i in range(3) for name, shape in {"up": (5, 7), "down": (7, 4)}.items()][:5]
NAMES = {
    "delta_w_cosine",
    "magnitude_ratio",
    "mean_delta_w_cosine",
    "alignment",
    "mean_alignment",
    "effective_rank",
    "target_effective_rank",
    "layer_accuracy",
}


@pytest.fixture
def layout():
    return AdapterLayout(LAYERS, rank=3)


def random_factors(layout, tasks=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = layout.shapes.items()
    return {
        key: torch.randn(tasks, *shape, generator=generator, dtype=torch.float64).to(dtype) for key, shape in shapes
    }


def mean_of(factors):
    return {key: value.mean(0) for key, value in factors.items()}


def naive_cosine(x, y):
    return sum(p * q for p, q in zip(x.flatten(), y.flatten(), strict=True)) / (x.norm() * y.norm())


def naive_rank(matrix):
    values = torch.linalg.svdvals(matrix)[:3]
    return math.exp(-sum(float(s / values.sum()) * math.log(s / values.sum()) for s in values))


def test_every_measure_equals_its_formula_on_the_whole_products(layout):
    predicted, target = random_factors(layout), random_factors(layout, seed=1)
    # Near enough to some targets to be better than the mean adapter.
    predicted = {
        key: torch.where(torch.arange(4)[:, None, None, None] < 2, target[key] + 0.3 * value, value)
        for key, value in predicted.items()
    }
    mean = mean_of(target)
    found = adapter_metrics(layout, predicted, target, mean, effective_rank=True)
    assert found.keys() == NAMES
    sides = [layout.unpack(factors) for factors in (predicted, target, mean)]
    for place, name in enumerate(layout.names):
        for task in range(4):
            (a_hat, b_hat), (a, b) = [[part[task] for part in side[name]] for side in sides[:2]]
            mean_a, mean_b = sides[2][name]
            whole_hat, whole, whole_mean = b_hat @ a_hat, b @ a, mean_b @ mean_a
            joined = [torch.cat([x.flatten(), y.flatten()]) for x, y in ((a_hat, b_hat), (a, b), (mean_a, mean_b))]
            expected = {
                "delta_w_cosine": naive_cosine(whole_hat, whole),
                "mean_delta_w_cosine": naive_cosine(whole_mean, whole),
                "magnitude_ratio": whole_hat.norm() / whole.norm(),
                "alignment": naive_cosine(joined[0], joined[1]),
                "mean_alignment": naive_cosine(joined[2], joined[1]),
                "effective_rank": naive_rank(whole_hat),
                "target_effective_rank": naive_rank(whole),
                "layer_accuracy": float((whole_hat - whole).norm() < (whole_mean - whole).norm()),
            }
            for measure, value in expected.items():
                assert found[measure][task, place].item() == pytest.approx(float(value), rel=1e-6), (measure, name)
    assert 0 < found["layer_accuracy"].mean() < 1


def test_rotated_factors_have_delta_w_measures_of_one_and_an_alignment_far_from_it_and_the_note_says_so(layout):
    target = random_factors(layout)
    torch.manual_seed(3)
    rotations = torch.linalg.qr(torch.randn(5, 3, 3, dtype=torch.float64))[0]
    found = adapter_metrics(layout, change_gauge(layout, target, rotations), target, effective_rank=True)
    ones = torch.ones(4, 5, dtype=torch.float64)
    torch.testing.assert_close(found["delta_w_cosine"], ones)
    torch.testing.assert_close(found["magnitude_ratio"], ones)
    torch.testing.assert_close(found["effective_rank"], found["target_effective_rank"])
    assert found["alignment"].mean() < 0.5
    note = gauge_note(found["alignment"].mean().item(), found["delta_w_cosine"].mean().item())
    assert "agree in ΔW (cosine 1.00)" in note
    assert f"(alignment {found['alignment'].mean():.2f})" in note
    assert "another gauge" in note


def test_no_note_where_factors_agree_as_well_or_products_do_not():
    assert gauge_note(0.97, 0.99) is None
    assert gauge_note(0.2, 0.5) is None
    assert gauge_note(0.78, 0.1) is None
    assert gauge_note(math.nan, math.nan) is None


def test_any_change_of_gauge_keeps_products(layout):
    target = random_factors(layout)
    torch.manual_seed(3)
    for gauge in (torch.randn(3, 3, dtype=torch.float64), torch.randn(5, 3, 3, dtype=torch.float64)):
        changed = change_gauge(layout, target, gauge)
        for (a, b), (a_new, b_new) in zip(layout.unpack(target).values(), layout.unpack(changed).values(), strict=True):
            torch.testing.assert_close(b_new @ a_new, b @ a)
            assert not torch.allclose(a_new, a)
        one = change_gauge(layout, {key: value[0] for key, value in target.items()}, gauge)
        torch.testing.assert_close(one, {key: value[0] for key, value in changed.items()})


def test_scaled_predictions_move_the_magnitude_alone(layout):
    predicted, target = random_factors(layout), random_factors(layout, seed=1)
    before = adapter_metrics(layout, predicted, target, effective_rank=True)
    after = adapter_metrics(layout, {key: 3 * value for key, value in predicted.items()}, target, effective_rank=True)
    torch.testing.assert_close(after.pop("magnitude_ratio"), 9 * before.pop("magnitude_ratio"))
    torch.testing.assert_close(after, before)


def test_means_of_batches_weighted_by_their_size_are_those_of_the_whole_and_the_order_of_tasks_is_kept(layout):
    predicted, target = random_factors(layout, 7), random_factors(layout, 7, seed=1)
    mean = mean_of(target)
    whole = adapter_metrics(layout, predicted, target, mean, effective_rank=True)
    order = torch.tensor([4, 1, 6, 0, 3, 5, 2])
    sums = dict.fromkeys(whole, 0.0)
    for rows in order.split([3, 3, 1]):
        part = adapter_metrics(
            layout,
            {k: v[rows] for k, v in predicted.items()},
            {k: v[rows] for k, v in target.items()},
            mean,
            effective_rank=True,
        )
        for name, values in part.items():
            torch.testing.assert_close(values, whole[name][rows])
            sums[name] += values.mean().item() * len(rows)
    for name, total in sums.items():
        assert total / 7 == pytest.approx(whole[name].mean().item())


def test_a_perfect_prediction_and_the_mean_adapter_itself(layout):
    target = random_factors(layout)
    mean = mean_of(target)
    perfect = adapter_metrics(layout, target, target, mean)
    for name in ("delta_w_cosine", "magnitude_ratio", "alignment", "layer_accuracy"):
        torch.testing.assert_close(perfect[name], torch.ones(4, 5, dtype=torch.float64))
    same = adapter_metrics(layout, {key: value.expand(4, *value.shape) for key, value in mean.items()}, target, mean)
    assert (same["layer_accuracy"] == 0).all()
    torch.testing.assert_close(same["alignment"], same["mean_alignment"])
    torch.testing.assert_close(same["delta_w_cosine"], same["mean_delta_w_cosine"])


def test_what_is_not_asked_for_is_not_measured(layout):
    factors = random_factors(layout)
    assert adapter_metrics(layout, factors, factors).keys() == {"delta_w_cosine", "magnitude_ratio", "alignment"}
    found = adapter_metrics(layout, factors, factors, mean_of(factors), alignment=False, layer_accuracy=False)
    assert found.keys() == {"delta_w_cosine", "magnitude_ratio", "mean_delta_w_cosine"}


def test_adapters_that_change_nothing_have_no_direction_and_a_ratio_of_one_to_each_other(layout):
    target = random_factors(layout)
    zeros = {key: torch.zeros_like(value) for key, value in target.items()}
    nothing, missed, wrong = (
        adapter_metrics(layout, *pair, effective_rank=True)
        for pair in ((zeros, zeros), (zeros, target), (target, zeros))
    )
    for found in (nothing, missed, wrong):
        assert (found["delta_w_cosine"] == 0).all()
        assert (found["alignment"] == 0).all()
    assert (nothing["magnitude_ratio"] == 1).all()
    assert (missed["magnitude_ratio"] == 0).all()
    assert wrong["magnitude_ratio"].isinf().all()
    assert (missed["effective_rank"] == 0).all()


def test_half_precision_is_never_computed_with(layout):
    predicted, target = (random_factors(layout, seed=seed, dtype=torch.float32) for seed in (0, 1))
    mean = mean_of(target)
    exact = adapter_metrics(layout, predicted, target, mean, effective_rank=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter_metrics(layout, predicted, target, mean, effective_rank=True)
    torch.testing.assert_close(found, exact)
    rounded = {key: value.bfloat16() for key, value in target.items()}
    assert adapter_metrics(layout, predicted, rounded)["alignment"].dtype == torch.float32


def test_measures_keep_no_graph(layout):
    factors = {key: value.requires_grad_() for key, value in random_factors(layout).items()}
    found = adapter_metrics(layout, factors, factors, mean_of(factors), effective_rank=True)
    assert not any(value.requires_grad for value in found.values())
