import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tests.benchmarks.cross_entropy import PeakBytes
from trainerkit.functional.cross_entropy import cross_entropy, linear_cross_entropy

N, D, V = 11, 6, 13
OPTIONS = [
    {"label_smoothing": smoothing, "focal_gamma": gamma, "z_loss": z_loss, "logit_softcap": cap}
    for smoothing, gamma, z_loss, cap in itertools.product((0.0, 0.1, 1.0), (0.0, 0.5, 2.0), (0.0, 1e-2), (None, 3.0))
]
EVERYTHING = {"label_smoothing": 0.1, "focal_gamma": 2.0, "z_loss": 1e-2, "logit_softcap": 3.0}


def inputs(rows=N, dtype=torch.float64, ignored=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (rows,), generator=generator)
    targets[:ignored] = -100
    return hidden, weight, targets


def naive(logits, targets, label_smoothing=0.0, focal_gamma=0.0, z_loss=0.0, logit_softcap=None):
    """Row by row and word for word, on float64."""
    losses, nlls = [], []
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target == -100:
            continue
        z = row if logit_softcap is None else logit_softcap * torch.tanh(row / logit_softcap)
        log_sum = z.max() + torch.log(torch.exp(z - z.max()).sum())
        wanted = torch.full_like(z, label_smoothing / len(z))
        wanted[target] = wanted[target] + 1 - label_smoothing
        loss = -(wanted * (z - log_sum)).sum()
        loss = (1 - torch.exp(z[target] - log_sum)) ** focal_gamma * loss if focal_gamma else loss
        losses.append(loss + z_loss * log_sum**2)
        nlls.append(log_sum - z[target])
    return torch.stack(losses).mean(), torch.stack(nlls).mean()


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def close(first, second, **tolerance):
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradients_are_those_of_the_naive_loss(options):
    hidden, weight, targets = inputs()
    loss, nll = linear_cross_entropy(hidden, weight, targets, chunk_size=4, **options)
    expected, expected_nll = naive(hidden @ weight.T, targets, **options)
    close((loss, nll), (expected, expected_nll), check_dtype=True)
    close(gradients(loss, hidden, weight), gradients(expected, hidden, weight))
    assert not nll.requires_grad


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_the_gradients_are_those_of_finite_differences(options):
    hidden, weight, targets = inputs(rows=5, ignored=1)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_size=2, **options)[0], (hidden, weight)
    )
    logits = (hidden @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets, chunk_size=2, **options)[0], (logits,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_torchs_cross_entropy(dtype, smoothing):
    hidden, weight, targets = inputs(rows=64, dtype=dtype)
    theirs = F.cross_entropy(hidden @ weight.T, targets, label_smoothing=smoothing)
    expected = gradients(theirs, hidden, weight)
    loss, _ = linear_cross_entropy(
        hidden.view(4, 16, D), weight, targets.view(4, 16), label_smoothing=smoothing, chunk_size=9
    )
    close((loss, *gradients(loss, hidden, weight)), (theirs, *expected))
    logits = (hidden @ weight.T).detach().requires_grad_()
    loss, _ = cross_entropy(logits, targets, label_smoothing=smoothing)
    theirs = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    close((loss, *gradients(loss, logits)), (theirs, *gradients(theirs, logits)))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 20), chunk=st.integers(1, 25), ignored=st.integers(0, 20), options=st.sampled_from(OPTIONS))
def test_any_chunk_size_gives_the_same(rows, chunk, ignored, options):
    hidden, weight, targets = inputs(rows, ignored=ignored)
    whole, whole_nll = linear_cross_entropy(hidden, weight, targets, chunk_size=1000, **options)
    loss, nll = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk, **options)
    close((loss, nll), (whole, whole_nll))
    close(gradients(loss, hidden, weight), gradients(whole, hidden, weight))


def test_the_order_of_rows_and_rows_that_do_not_count_change_nothing():
    hidden, weight, targets = inputs(rows=20, ignored=0)
    loss, nll = linear_cross_entropy(hidden, weight, targets, chunk_size=6, **EVERYTHING)
    of_hidden, of_weight = gradients(loss, hidden, weight)
    order = torch.randperm(20)
    padded = torch.cat([hidden[order], 100 * torch.randn(7, D, dtype=torch.float64)])
    padding = torch.cat([targets[order], torch.full((7,), -1)])
    again, nll_again = linear_cross_entropy(padded, weight, padding, ignore_index=-1, chunk_size=6, **EVERYTHING)
    close((again, nll_again), (loss, nll))
    close(gradients(again, hidden, weight), (of_hidden, of_weight))


def test_a_shift_of_all_logits_of_a_row_changes_neither_value_nor_gradient():
    hidden, weight, targets = inputs()
    logits = (hidden @ weight.T).detach().requires_grad_()
    shift = 50 * torch.randn(N, 1, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "focal_gamma": 2.0}
    loss, shifted = (cross_entropy(z, targets, **options)[0] for z in (logits, logits + shift))
    close((shifted, *gradients(shifted, logits)), (loss, *gradients(loss, logits)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_of_a_thousand_give_what_float64_gives(options, dtype):
    logits = torch.tensor([[1000, -1000, 0.0], [-1000, 1000, 1000], [1000, 999, -1000], [0, 0, 0]], dtype=dtype)
    logits.requires_grad_()
    for targets in (torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 0, -100])):
        loss, nll = cross_entropy(logits, targets, **options)
        exact = logits.detach().double().requires_grad_()
        expected, expected_nll = cross_entropy(exact, targets, **options)
        assert loss.isfinite()
        close((loss, nll), (expected, expected_nll), check_dtype=False, rtol=1e-5, atol=1e-5)
        half = {"rtol": 1e-2, "atol": 1e-3} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-5}
        close(gradients(loss, logits), gradients(expected, exact), check_dtype=False, **half)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=str)
def test_a_weight_of_a_row_multiplies_its_loss_and_its_gradient(options):
    hidden, weight, targets = inputs()
    row_weights = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    logits = hidden @ weight.T
    rows = [row for row in range(N) if targets[row] != -100]
    singly = [naive(logits[row : row + 1], targets[row : row + 1], **options) for row in rows]
    expected = sum(row_weights[row] * loss for row, (loss, _) in zip(rows, singly, strict=True)) / len(rows)
    nll_expected = sum(row_weights[row] * nll for row, (_, nll) in zip(rows, singly, strict=True)) / len(rows)
    slopes = gradients(expected, hidden, weight)
    for chunk in (None, 2):
        loss, nll = linear_cross_entropy(hidden, weight, targets, row_weights=row_weights, chunk_size=chunk, **options)
        close((loss, nll), (expected, nll_expected))
        close(gradients(loss, hidden, weight), slopes)


def test_weights_of_two_are_rows_given_twice_over_half_as_many():
    hidden, weight, targets = inputs(ignored=0)
    once, _ = linear_cross_entropy(hidden, weight, targets, row_weights=torch.full((N,), 2.0))
    twice, _ = linear_cross_entropy(hidden.repeat(2, 1), weight, targets.repeat(2))
    torch.testing.assert_close(once, 2 * twice)
    with pytest.raises(ValueError, match=r"row_weights: shape \(2,\), must be \(11,\)"):
        linear_cross_entropy(hidden, weight, targets, row_weights=torch.ones(2))


def test_a_focal_loss_without_gamma_is_cross_entropy_and_gamma_lowers_easy_rows_most():
    logits = torch.tensor([[3.0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    plain, focal = (
        [float(cross_entropy(row[None], torch.tensor([0]), focal_gamma=gamma)[0]) for row in logits]
        for gamma in (0.0, 2.0)
    )
    p = torch.softmax(logits, 1)[:, 0]
    assert plain == pytest.approx((-p.log()).tolist(), rel=1e-12)
    assert focal == pytest.approx((-((1 - p) ** 2) * p.log()).tolist(), rel=1e-12)
    assert focal[0] / plain[0] < focal[1] / plain[1] < 1


def test_the_nll_is_the_likelihood_alone_whatever_the_loss():
    hidden, weight, targets = inputs()
    plain = F.cross_entropy(hidden @ weight.T, targets)
    options = {"label_smoothing": 0.3, "focal_gamma": 1.0, "z_loss": 0.1}
    loss, nll = linear_cross_entropy(hidden, weight, targets, **options)
    torch.testing.assert_close(nll, plain.detach())
    assert abs(float(loss.detach() - nll)) > 0.01


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same_and_nothing_is_kept(off):
    hidden, weight, targets = inputs()
    expected = linear_cross_entropy(hidden, weight, targets, chunk_size=4, **EVERYTHING)
    with off(), PeakBytes() as memory:
        found = linear_cross_entropy(hidden, weight, targets, chunk_size=4, **EVERYTHING)
        assert memory.now < hidden.nbytes + weight.nbytes
    close(found, [value.detach() for value in expected])
    assert not found[0].requires_grad


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_that_counts_gives_zero_and_gradients_of_zeros(rows):
    hidden, weight, targets = inputs(rows, ignored=rows)
    loss, nll = linear_cross_entropy(hidden, weight, targets, **EVERYTHING)
    assert float(loss.detach()) == float(nll) == 0
    of_hidden, of_weight = gradients(loss, hidden, weight)
    assert of_hidden.shape == (rows, D)
    assert not of_hidden.any()
    assert not of_weight.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen):
    hidden, weight, targets = inputs()
    expected = gradients(linear_cross_entropy(hidden, weight, targets)[0], hidden, weight)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        trained, place = (weight, 1) if frozen == "hidden" else (hidden, 0)
        close(gradients(loss, trained), expected[place : place + 1])


def test_the_gradient_follows_what_the_loss_is_multiplied_by_and_can_be_taken_twice():
    hidden, weight, targets = inputs()
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    once = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    again = gradients(loss, hidden, weight)
    close(once, [3 * gradient for gradient in again])


class Tied(nn.Module):
    """A small model whose embedding is its head."""

    def __init__(self, linear):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.layer, self.linear = nn.Embedding(V, D), nn.Linear(D, D), linear

    def forward(self, tokens, targets):
        hidden = self.layer(self.embedding(tokens))
        if self.linear:
            return linear_cross_entropy(hidden, self.embedding.weight, targets, chunk_size=10)[0]
        return F.cross_entropy((hidden @ self.embedding.weight.T).float(), targets)


def grads(model, tokens, targets, scale=1.0):
    model.zero_grad()
    (scale * model(tokens, targets)).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def tokens():
    return torch.randint(V, (2, 20))


def test_a_tied_weight_gets_both_gradients(tokens):
    close(*(grads(Tied(linear), tokens[0], tokens[1]) for linear in (True, False)))


def test_under_autocast_products_are_bfloat16_and_losses_float32(tokens):
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (grads(Tied(linear), tokens[0], tokens[1]) for linear in (True, False))
        loss = Tied(True)(tokens[0], tokens[1])
    exact = grads(Tied(False), tokens[0], tokens[1])
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in ours)
    # bfloat16 has eight bits; ours is no further from float32 than torch's.
    distances = [
        [float((one - true).norm() / true.norm()) for one, true in zip(found, exact, strict=True)]
        for found in (ours, theirs)
    ]
    assert 1e-5 < max(distances[0]) < 2 * max(distances[1]) < 0.1
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert linear_cross_entropy(hidden, weight, targets)[0].dtype == torch.float64


def test_float16_keeps_gradients_that_a_mean_over_many_rows_would_lose():
    """1/N of a probability of 1e-4 is below float16's smallest number; the scaler's factor brings it back."""
    rows, scale = 2**14, 2.0**16
    hidden = torch.full((rows, 1), 1.0).requires_grad_()
    weight = torch.tensor([[9.0], [0.0]]).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_size=1024)
    found = torch.autograd.grad(scale * loss, (hidden, weight))
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    expected = torch.autograd.grad(scale * exact, (hidden, weight))
    close(found, expected, rtol=5e-3, atol=0)
    assert float(found[0].abs().min()) > 0


def test_float16_sums_of_many_rows_with_one_target_stay_finite():
    """A sum over the rows of one frequent token passes float16's 65,504, and no loss scale would help."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2**15, 4, generator=generator)
    hidden[:, 0] = 40.0
    weight = torch.zeros(257, 4, requires_grad=True)
    targets = torch.randint(257, (2**15,), generator=generator)
    targets[: 2**14] = 32
    with torch.autocast("cpu", torch.float16):
        loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_size=2**15)
    (found,) = torch.autograd.grad(loss, weight)
    wide = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden.double() @ wide.T, targets), wide)
    close([found.double()], [expected], rtol=5e-3, atol=1e-4)


def test_activation_checkpointing_gives_the_same(tokens):
    hidden, weight, targets = inputs()
    expected = gradients(linear_cross_entropy(hidden, weight, targets)[0], hidden, weight)
    loss = checkpoint(lambda h: linear_cross_entropy(h, weight, targets)[0], hidden, use_reentrant=False)
    close(gradients(loss, hidden, weight), expected)


# Dynamo makes an instance of the Function while it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_it_compiles_without_a_break_and_gives_the_same(tokens):
    torch._dynamo.reset()
    model = Tied(True)
    expected = grads(model, tokens[0], tokens[1])
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    close(grads(compiled, tokens[0], tokens[1]), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = grads(compiled, tokens[0], tokens[1])
        close(half, grads(model, tokens[0], tokens[1]))


def test_a_sharded_model_gets_the_same_gradients(tokens, tmp_path):
    """FSDP2 in one process; the head is then a view of gathered memory and no leaf."""
    expected = grads(Tied(True), tokens[0], tokens[1])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = fully_shard(Tied(True), mesh=init_device_mesh("cpu", (1,)))
        found = [gradient.full_tensor() for gradient in grads(model, tokens[0], tokens[1])]
    finally:
        torch.distributed.destroy_process_group()
    close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing=1.5: must be from 0 to 1"),
        ({"focal_gamma": -1.0}, "focal_gamma=-1.0: must be 0 or more"),
        ({"z_loss": float("nan")}, "z_loss=nan: must be 0 or more"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0: must be above 0"),
        ({"chunk_size": 0}, "chunk_size=0: must be 1 or more"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: shape \(3,\), must be \(11,\)"),
        ({"weight": torch.zeros(4, 5)}, r"shapes \(11, 6\) and \(4, 5\) do not fit"),
    ],
)
def test_what_cannot_be_says_what_is_allowed(options, message):
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "targets": targets} | options)


def test_the_logits_are_never_there_at_once():
    rows, width, vocabulary, chunk = 512, 8, 1000, 32
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))
    all_logits, gradient = 4 * rows * vocabulary, 4 * vocabulary * width
    with PeakBytes() as plain:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    hidden.grad = weight.grad = None
    with PeakBytes() as ours:
        linear_cross_entropy(hidden, weight, targets, chunk_size=chunk)[0].backward()
    assert plain.peak >= 2 * all_logits
    assert ours.peak < 3 * all_logits * chunk / rows + 3 * gradient + 8 * 4 * rows * width
