import itertools
import math

import pytest
import torch

from tests.benchmarks.cross_entropy import PeakBytes
from trainerkit.adapter_layout import AdapterLayout
from trainerkit.tasks.t2l import delta_w
from trainerkit.tasks.t2l.delta_w import cosine, dot, inner, pointwise_difference, squared_difference
from trainerkit.tasks.t2l.losses import ReconstructionLoss, matrix_loss, product_loss, zscore
from trainerkit.tasks.t2l.metrics import change_gauge
from trainerkit.tasks.t2l.regularizers import consistency, sparsity

TARGETS = ("delta_w", "factors", "factors_zscore")
KINDS = ("mse", "l1", "huber", "cosine")
DELTA = 0.7
LAYERS = [(f"b.{i}.{name}", *shape) for i in range(3) for name, shape in {"up": (5, 7), "down": (7, 4)}.items()][:5]


@pytest.fixture
def layout():
    return AdapterLayout(LAYERS, rank=2)  # three layers of `up`, two of `down`


def random_factors(layout, tasks=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = layout.shapes.items()
    return {
        key: torch.randn(tasks, *shape, generator=generator, dtype=torch.float64).to(dtype) for key, shape in shapes
    }


def random_statistics(layout):
    mean, std = random_factors(layout, 1, seed=8), random_factors(layout, 1, seed=9)
    return {key: (mean[key][0], std[key][0].abs() + 0.1) for key in mean}


def naive_matrix(x, y, kind):
    """By a loop over numbers."""
    pairs = list(zip(x.flatten(), y.flatten(), strict=True))
    if kind == "cosine":
        return 1 - sum(p * q for p, q in pairs) / (sum(p * p for p, _ in pairs) * sum(q * q for _, q in pairs)).sqrt()
    total = 0.0
    for p, q in pairs:
        d = (p - q).abs()
        total = total + {"mse": d * d, "l1": d, "huber": d * d / 2 if d <= DELTA else DELTA * (d - DELTA / 2)}[kind]
    return total / len(pairs)


def naive_loss(layout, predicted, target, weights, options, statistics, shares):
    """Every formula by loops over tasks and layers: total, losses of the layers, C, S."""
    tasks = len(next(iter(predicted.values())))
    layers, varied, counts, size, numbers = [], [], [], 0.0, 0.0
    places = [(t, n) for t in layout.types for n in range(len(t.names))]
    for t, n in places:
        losses = []
        for b in range(tasks):
            (pa, pb), (ta, tb) = [[f[f"{side}/{t.label}"][b, n] for side in "AB"] for f in (predicted, target)]
            if options["target"] == "delta_w":
                losses.append(naive_matrix(pb @ pa, tb @ ta, options["kind"]))
                continue
            if options["target"] == "factors_zscore":
                (ma, sa), (mb, sb) = [[part[n] for part in statistics[f"{side}/{t.label}"]] for side in "AB"]
                pa, ta, pb, tb = (pa - ma) / sa, (ta - ma) / sa, (pb - mb) / sb, (tb - mb) / sb
            losses.append((naive_matrix(pa, ta, options["kind"]) + naive_matrix(pb, tb, options["kind"])) / 2)
        layers.append(sum(losses) / tasks)
    for t in layout.types:
        own = [g for (other, _), g in zip(places, shares, strict=True) if other is t]
        everything = torch.cat([predicted[f"{side}/{t.label}"].flatten(2) for side in "AB"], dim=2)
        variances = []
        for b, place in itertools.product(range(tasks), range(everything.shape[2])):
            values = everything[b, :, place]
            if sum(own) == 0:
                continue
            mean = sum(g * x for g, x in zip(own, values, strict=True)) / sum(own)
            variances.append(sum(g * (x - mean) ** 2 for g, x in zip(own, values, strict=True)) / sum(own))
        if variances:
            varied.append(sum(variances) / len(variances) * sum(own) / len(own))
            counts.append(sum(own) / len(own))
        for g, n in zip(own, range(len(own)), strict=True):
            size = size + g * everything[:, n].abs().sum()
            numbers = numbers + g * everything[:, n].numel()
    c, s = sum(varied) / sum(counts), size / numbers
    total = sum(w * g * layer for w, g, layer in zip(weights, shares, layers, strict=True))
    return total + options["consistency"] * c + options["sparsity"] * s, torch.stack(layers), c, s


@pytest.mark.parametrize("shares", [None, [1.0, 1.0, 0.3, 0.0, 0.0], [1.0, 0.5, 0.0, 0.25, 1.0]], ids=["all", "a", "b"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_and_its_gradient_equal_loops_over_tasks_layers_and_numbers(layout, target, kind, shares):
    options = {"target": target, "kind": kind, "consistency": 0.3, "sparsity": 0.2}
    predicted, wanted = random_factors(layout, 2), random_factors(layout, 2, seed=1)
    leaves = [each.requires_grad_() for each in predicted.values()]
    weights, statistics = torch.tensor([0.5, 1.5, 1.0, 0.8, 1.2], dtype=torch.float64), random_statistics(layout)
    tensor = None if shares is None else torch.tensor(shares, dtype=torch.float64)
    parts = ReconstructionLoss(layout, delta=DELTA, **options)(predicted, wanted, weights, statistics, tensor)
    expected = naive_loss(layout, predicted, wanted, weights, options, statistics, shares or [1.0] * 5)
    for mine, reference in zip(parts, expected, strict=True):
        torch.testing.assert_close(mine.detach(), reference.detach(), rtol=1e-10, atol=1e-12)
    for mine, reference in zip(
        torch.autograd.grad(parts.total, leaves), torch.autograd.grad(expected[0], leaves), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_product_losses_are_those_of_the_products_and_gradcheck_agrees(kind):
    torch.manual_seed(0)
    b_hat, b = torch.randn(2, 3, 2, 7, 3, dtype=torch.float64)
    a_hat, a = torch.randn(2, 3, 2, 3, 5, dtype=torch.float64)
    found = product_loss(b_hat, a_hat, b, a, kind, DELTA)
    torch.testing.assert_close(found, matrix_loss(b_hat @ a_hat, b @ a, kind, DELTA))
    leaves = (b_hat.requires_grad_(), a_hat.requires_grad_())
    assert torch.autograd.gradcheck(lambda *factors: product_loss(*factors, b, a, kind, DELTA), leaves)


@pytest.mark.parametrize("piece", [1, 11, 40, 100, 1000])
@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_the_size_of_pieces_changes_nothing(monkeypatch, piece, kind):
    torch.manual_seed(0)
    leaves = (
        torch.randn(5, 7, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 3, 9, dtype=torch.float64, requires_grad=True),
    )
    b, a = torch.randn(5, 7, 3, dtype=torch.float64), torch.randn(5, 3, 9, dtype=torch.float64)
    whole = product_loss(*leaves, b, a, kind, DELTA)
    gradients = torch.autograd.grad(whole.square().sum(), leaves)
    monkeypatch.setattr(delta_w, "_PIECE", piece)
    pieces = product_loss(*leaves, b, a, kind, DELTA)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    for mine, reference in zip(torch.autograd.grad(pieces.square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("fixed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_one_factor_alone_may_be_learnt(kind, fixed):
    factors = [torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)]
    b, a = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    both = [each.clone().requires_grad_() for each in factors]
    one = [each.clone().requires_grad_(place != fixed) for place, each in enumerate(factors)]
    for leaves in (both, one):
        product_loss(*leaves, b, a, kind).sum().backward()
    torch.testing.assert_close(one[1 - fixed].grad, both[1 - fixed].grad)
    assert one[fixed].grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_delta_w_are_the_same_in_every_gauge_and_losses_of_factors_are_not(layout, kind):
    predicted, wanted = random_factors(layout), random_factors(layout, seed=1)
    rotations = torch.randn(5, 2, 2, dtype=torch.float64)
    weights = torch.ones(5)
    for target, is_same in (("delta_w", True), ("factors", False)):
        loss = ReconstructionLoss(layout, target, kind, consistency=0, sparsity=0)
        layers = loss(predicted, wanted, weights).layers
        for turned in (
            loss(change_gauge(layout, predicted, rotations), wanted, weights).layers,
            loss(predicted, change_gauge(layout, wanted, rotations), weights).layers,
        ):
            assert torch.allclose(turned, layers, rtol=1e-8) is is_same


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tasks_changes_nothing_and_that_of_layers_their_order_alone(layout, target, kind):
    predicted, wanted, statistics = random_factors(layout), random_factors(layout, seed=1), random_statistics(layout)
    loss, weights = ReconstructionLoss(layout, target, kind), torch.tensor([2.0, 0.5, 1.0, 1.0, 0.5])
    parts = loss(predicted, wanted, weights, statistics)
    order = torch.tensor([2, 0, 3, 1])
    again = loss(
        {k: v[order] for k, v in predicted.items()}, {k: v[order] for k, v in wanted.items()}, weights, statistics
    )
    for one, other in zip(parts, again, strict=True):
        torch.testing.assert_close(one, other)

    def moved(factors, dim):  # up has layers 0, 1, 2 and down 3, 4
        return {
            k: v.index_select(dim, torch.tensor([2, 0, 1] if k.endswith("up") else [1, 0])) for k, v in factors.items()
        }

    means, stds = ({key: pair[place] for key, pair in statistics.items()} for place in (0, 1))
    means, stds = moved(means, 0), moved(stds, 0)
    places = torch.tensor([2, 0, 1, 4, 3])
    again = loss(
        moved(predicted, 1), moved(wanted, 1), weights[places], {key: (means[key], stds[key]) for key in means}
    )
    torch.testing.assert_close(again.layers, parts.layers[places])
    torch.testing.assert_close(again.total, parts.total)


@pytest.mark.parametrize(("kind", "power"), [("mse", 2), ("l1", 1), ("cosine", 0)])
def test_losses_scale_with_the_matrices(layout, kind, power):
    predicted, wanted = random_factors(layout), random_factors(layout, seed=1)
    thrice = [{key: 3 * value for key, value in factors.items()} for factors in (predicted, wanted)]
    for target, each in (("factors", 3.0), ("delta_w", 9.0)):
        loss = ReconstructionLoss(layout, target, kind)
        expected = loss(predicted, wanted, torch.ones(5)).layers * each**power
        torch.testing.assert_close(loss(*thrice, torch.ones(5)).layers, expected)


def test_huber_of_small_differences_is_half_of_mse_and_of_large_ones_near_delta_times_l1():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    noise = torch.rand(3, 4, 5, dtype=torch.float64) - 0.5
    torch.testing.assert_close(matrix_loss(x + noise, x, "huber", 1.0), matrix_loss(x + noise, x, "mse") / 2)
    far = 1e6 * noise
    torch.testing.assert_close(
        matrix_loss(x + far, x, "huber", 0.1), 0.1 * matrix_loss(x + far, x, "l1"), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("relative", [1.0, 1e-2, 1e-4])
def test_the_squared_difference_keeps_float32_precision_however_near_the_prediction(relative):
    torch.manual_seed(0)
    b, a = 0.02 * torch.randn(2, 3, 512, 8), 0.02 * torch.randn(2, 3, 8, 640)
    leaves = [(x + relative * 0.02 * torch.randn_like(x)).requires_grad_() for x in (b, a)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found, reference = (
        squared_difference(*leaves, b, a),
        (exact[0] @ exact[1] - b.double() @ a.double()).square().sum((-2, -1)),
    )
    assert ((found.double() - reference).abs() / reference).max() < 1e-5
    for mine, true in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(reference.sum(), exact), strict=True
    ):
        assert (mine.double() - true).norm() / true.norm() < 1e-5
    if relative < 1e-3:  # what it is for
        naive = inner(*leaves, *leaves) - 2 * inner(*leaves, b, a) + inner(b, a, b, a)
        assert ((naive.double() - reference).abs() / reference).max() > 0.1


def test_in_another_gauge_gradients_lose_no_more_than_the_length_of_the_difference():
    torch.manual_seed(0)
    b, a = torch.randn(3, 512, 8).double(), torch.randn(3, 8, 640).double()
    rotation = torch.linalg.qr(torch.randn(8, 8).double())[0]
    near = 1e-2
    exact = [
        ((b + near * torch.randn_like(b)) @ rotation.mT).requires_grad_(),
        (rotation @ (a + near * torch.randn_like(a))).requires_grad_(),
    ]
    leaves = [x.detach().float().requires_grad_() for x in exact]
    found, reference = (
        squared_difference(*leaves, b.float(), a.float()),
        (exact[0] @ exact[1] - b @ a).square().sum((-2, -1)),
    )
    assert ((found - reference).abs() / reference).max() < 0.1
    for mine, true in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(reference.sum(), exact), strict=True
    ):
        assert (mine.double() - true).norm() / true.norm() < 3e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("zero", ["predicted", "target", "both", "equal"])
def test_zeros_and_perfect_predictions_have_finite_losses_and_gradients(layout, target, kind, zero):
    predicted, wanted = (random_factors(layout, seed=seed, dtype=torch.float32) for seed in (0, 1))
    if zero in ("predicted", "both"):
        predicted = {key: torch.zeros_like(value) for key, value in predicted.items()}
    if zero in ("target", "both"):
        wanted = {key: torch.zeros_like(value) for key, value in wanted.items()}
    if zero == "equal":
        wanted = {key: value.clone() for key, value in predicted.items()}
    leaves = [each.requires_grad_() for each in predicted.values()]
    statistics = {key: tuple(part.float() for part in pair) for key, pair in random_statistics(layout).items()}
    parts = ReconstructionLoss(layout, target, kind)(predicted, wanted, torch.ones(5), statistics)
    assert all(part.isfinite().all() for part in parts)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(parts.total, leaves))
    if zero == "equal":
        assert parts.layers.abs().max() < 1e-6


def test_a_cosine_with_nothing_is_zero():
    x, nothing = torch.randn(3, 4, 5), torch.zeros(3, 4, 5)
    for one, other in ((x, nothing), (nothing, x), (nothing, nothing)):
        assert cosine(dot(one, other), dot(one, one), dot(other, other)).tolist() == [0, 0, 0]
    torch.testing.assert_close(cosine(dot(x, 3 * x), dot(x, x), dot(3 * x, 3 * x)), torch.ones(3))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_a_share_neither_counts_nor_learns(layout, target, kind):
    shares, weights = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0]), torch.ones(5)
    loss, statistics = ReconstructionLoss(layout, target, kind), random_statistics(layout)
    predicted, wanted = random_factors(layout), random_factors(layout, seed=1)
    leaves = {key: value.requires_grad_() for key, value in predicted.items()}
    total = loss(predicted, wanted, weights, statistics, shares).total
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    with torch.no_grad():
        for key in predicted:
            hidden = [1] if key.endswith("up") else [0]
            assert (gradients[key][:, hidden] == 0).all()
            assert (
                gradients[key].flatten(2)[:, [n for n in range(gradients[key].shape[1]) if n not in hidden]] != 0
            ).any()
            predicted[key][:, hidden] = 100.0
            wanted[key][:, hidden] = -100.0
        torch.testing.assert_close(loss(predicted, wanted, weights, statistics, shares).total, total)


def test_nothing_jumps_where_a_layer_begins_to_count_and_the_others_keep_their_loss(layout):
    predicted, wanted = random_factors(layout), random_factors(layout, seed=1)
    loss = ReconstructionLoss(layout, consistency=1.0, sparsity=1.0)
    before, begun = (
        loss(predicted, wanted, torch.ones(5), None, torch.tensor([1.0, 1, 1, share, share])).total
        for share in (0.0, 1e-6)
    )
    assert abs(before - begun) < 1e-3
    plain = ReconstructionLoss(layout, consistency=0, sparsity=0)
    half = plain(predicted, wanted, torch.ones(5), None, torch.tensor([1.0, 1, 1, 0.5, 0.5]))
    torch.testing.assert_close(half.total, half.layers[:3].sum() + half.layers[3:].sum() / 2)


def test_with_no_share_at_all_everything_is_zero_and_finite(layout):
    predicted = {key: value.requires_grad_() for key, value in random_factors(layout).items()}
    parts = ReconstructionLoss(layout)(predicted, random_factors(layout, seed=1), torch.ones(5), None, torch.zeros(5))
    assert [part.item() for part in (parts.total, parts.consistency, parts.sparsity)] == [0, 0, 0]
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(parts.total, list(predicted.values())))


def test_equal_shares_are_no_shares(layout):
    factors = random_factors(layout)
    for function in (consistency, sparsity):
        for share in (1.0, 0.2):
            torch.testing.assert_close(
                function(layout, factors, torch.full((5,), share).double()), function(layout, factors)
            )


def test_consistency_is_blind_to_what_all_layers_of_a_type_share_and_grows_with_the_square_of_the_rest(layout):
    factors = random_factors(layout)
    moved = {key: value + torch.randn(4, 1, *value.shape[2:]) for key, value in factors.items()}
    torch.testing.assert_close(consistency(layout, moved), consistency(layout, factors))
    thrice = {key: 3 * value for key, value in factors.items()}
    torch.testing.assert_close(consistency(layout, thrice), 9 * consistency(layout, factors))
    torch.testing.assert_close(sparsity(layout, thrice), 3 * sparsity(layout, factors))
    single = AdapterLayout([("a", 3, 4), ("b", 5, 6)], rank=2)
    assert consistency(single, random_factors(single)) == 0


def test_a_coefficient_of_zero_is_measured_and_not_learnt_from(layout):
    predicted = {key: value.requires_grad_() for key, value in random_factors(layout).items()}
    wanted = random_factors(layout, seed=1)
    without = ReconstructionLoss(layout, consistency=0, sparsity=0)(predicted, wanted, torch.zeros(5))
    assert without.total == 0
    assert without.consistency.item() == pytest.approx(consistency(layout, predicted).item())
    assert without.sparsity.item() == pytest.approx(sparsity(layout, predicted).item())
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(without.total, list(predicted.values())))


def test_where_the_library_does_not_vary_z_scores_are_zero():
    mean, std = torch.tensor([1.0, 1000.0, 0.0, 5.0]), torch.tensor([2.0, 1e-5, 0.0, 0.0])
    values = torch.tensor([5.0, 1001.0, 3.0, 5.0], requires_grad=True)
    scores = zscore(values, mean, std)
    assert scores.tolist() == [2, 0, 0, 0]
    assert torch.autograd.grad(scores.sum(), values)[0].tolist() == [0.5, 0, 0, 0]
    assert zscore(values, mean, torch.zeros(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_never_computed_with(layout, kind):
    predicted, wanted = (random_factors(layout, seed=seed, dtype=torch.float32) for seed in (0, 1))
    leaves = [each.requires_grad_() for each in predicted.values()]
    loss = ReconstructionLoss(layout, "delta_w", kind, delta=DELTA)
    parts = loss(predicted, wanted, torch.ones(5))
    gradients = torch.autograd.grad(parts.total, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        other = loss(predicted, wanted, torch.ones(5))
    others = torch.autograd.grad(other.total, leaves)
    assert other.total.dtype == torch.float32
    torch.testing.assert_close(other.total, parts.total)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two)
    rounded = {key: value.bfloat16() for key, value in wanted.items()}
    assert loss(predicted, rounded, torch.ones(5)).layers.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_target_of_a_product(kind):
    factors = [torch.randn(2, 4, 3).requires_grad_(), torch.randn(2, 3, 5).requires_grad_()]
    b, a = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    product_loss(*factors, b, a, kind).sum().backward()
    assert b.grad is None
    assert a.grad is None
    assert factors[0].grad is not None


def test_gram_matrices_hold_no_product_and_l1_a_piece_of_it(monkeypatch):
    monkeypatch.setattr(delta_w, "_PIECE", 2**12)
    b, a = torch.randn(3, 2, 300, 2), torch.randn(3, 2, 2, 400)
    b_hat, a_hat = torch.randn_like(b).requires_grad_(), torch.randn_like(a).requires_grad_()
    factors = 4 * (b.numel() + a.numel())
    for kind, held in (("mse", 2**14), ("cosine", 3 * factors), ("l1", 2**16), ("huber", 2**16)):
        with PeakBytes() as memory:
            product_loss(b_hat, a_hat, b, a, kind).sum().backward()
        assert memory.peak < 2 * factors + held < 300 * 400 * 4, kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "deltaw"}, r"target=deltaw: must be one of delta_w, factors, factors_zscore"),
        ({"kind": "mae"}, r"kind=mae: must be one of mse, l1, huber, cosine"),
        ({"delta": 0.0}, r"delta=0.0: must be above 0"),
        ({"delta": math.nan}, r"delta=nan: must be above 0"),
        ({"consistency": -0.1}, r"consistency=-0.1: must be 0 or more"),
        ({"sparsity": math.inf}, r"sparsity=inf: must be 0 or more"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(layout, options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionLoss(layout, **options)


def test_tensors_that_do_not_fit_are_refused_by_name(layout):
    loss, good, weights = ReconstructionLoss(layout), random_factors(layout), torch.ones(5)
    without = {key: value for key, value in good.items() if key != "B/down"}
    with pytest.raises(ValueError, match=r"target: B/down is missing"):
        loss(good, without, weights)
    with pytest.raises(ValueError, match=r"predicted: B/down is missing"):
        loss(without, good, weights)
    with pytest.raises(ValueError, match=r"target: A/up has shape \(4, 3, 2, 6\); must be \(4, 3, 2, 5\)"):
        loss(good, good | {"A/up": torch.zeros(4, 3, 2, 6)}, weights)
    with pytest.raises(ValueError, match=r"target: B/up has shape \(1, 3, 7, 2\); must be \(4, 3, 7, 2\)"):
        loss(good, good | {"B/up": good["B/up"][:1]}, weights)
    with pytest.raises(ValueError, match=r"weights: shape \(4,\); must be \(5,\)"):
        loss(good, good, torch.ones(4))
    with pytest.raises(ValueError, match=r"shares: shape \(5, 1\); must be \(5,\)"):
        loss(good, good, weights, None, torch.ones(5, 1))
    with pytest.raises(ValueError, match=r"target=factors_zscore: needs the statistics"):
        ReconstructionLoss(layout, "factors_zscore")(good, good, weights)
    for function in (
        lambda: matrix_loss(torch.ones(2, 2), torch.ones(2, 2), "mae"),
        lambda: product_loss(*[torch.ones(2, 2)] * 4, "mae"),
    ):
        with pytest.raises(ValueError, match=r"kind=mae: must be one of"):
            function()


def test_a_matrix_by_itself_needs_no_dimension_before():
    b_hat, a_hat, b, a = torch.randn(4, 2), torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 3)
    torch.testing.assert_close(squared_difference(b_hat, a_hat, b, a), (b_hat @ a_hat - b @ a).square().sum())
    torch.testing.assert_close(pointwise_difference(b_hat, a_hat, b, a, "l1"), (b_hat @ a_hat - b @ a).abs().sum())
