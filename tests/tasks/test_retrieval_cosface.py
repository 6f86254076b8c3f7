"""CosFace against a naive float64 loop, what must not change it, what it takes from other losses, what is refused."""

import math

import pytest
import torch

from trainerkit.tasks.retrieval.losses import CosFace, InfoNCE, SupCon
from trainerkit.tasks.retrieval.losses.cosface import cosface

N, D, K = 6, 5, 9
LABELS = torch.tensor([3, 0, 8, 3, 1, 7])


def embeddings(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def made(loss=None, **options):
    torch.manual_seed(0)
    return CosFace(InfoNCE() if loss is None else loss, **{"classes": K, "dim": D} | options).double()


def naive(rows, labels, vectors, temperature, margin):
    terms = []
    for row, label in zip(rows, labels.tolist(), strict=True):
        cosines = [row @ vector / (row.norm() * vector.norm()) for vector in vectors]
        own = torch.exp((cosines[label] - margin) / temperature)
        others = sum(torch.exp(cosine / temperature) for place, cosine in enumerate(cosines) if place != label)
        terms.append(-torch.log(own / (own + others)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("other", [InfoNCE(0.2, symmetric=True), SupCon()], ids=["info_nce", "sup_con"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.2, "margin": 0.0, "weight": 2.5}], ids=str)
def test_value_and_gradients_are_those_of_the_naive_loop_added_to_the_other_loss(other, options):
    loss, (queries, positives) = made(other, **options), embeddings()
    settings = {"temperature": 0.05, "margin": 0.2, "weight": 1.0} | options
    vectors = loss.vectors.weight
    rows = torch.cat([queries, positives])
    expected = other(queries, positives, labels=LABELS) + settings["weight"] * naive(
        rows, LABELS.repeat(2), vectors, settings["temperature"], settings["margin"]
    )
    found = loss(queries, positives, labels=LABELS)
    torch.testing.assert_close(found, expected)
    inputs = (queries, positives, vectors)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_turning_everything_all_lengths_and_the_order_of_rows_and_labels_change_nothing():
    loss, (queries, positives) = made(), embeddings()
    before = loss(queries, positives, labels=LABELS)
    turn, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    order, names = torch.randperm(N), torch.randperm(K)
    with torch.no_grad():  # label k is called names[k] now
        loss.vectors.weight[names] = 3 * loss.vectors.weight.clone() @ turn
    again = loss(queries[order] @ turn * 0.1, positives[order] @ turn * 7, labels=names[LABELS[order]])
    torch.testing.assert_close(again, before)


def test_a_margin_is_what_it_would_cost_to_be_that_much_less_alike():
    cosines = torch.eye(3, dtype=torch.float64) * 0.8
    lower = cosines - 0.3 * torch.eye(3, dtype=torch.float64)
    labels = torch.arange(3)
    assert float(cosface(cosines, labels, 0.1, 0.3)) == pytest.approx(float(cosface(lower, labels, 0.1, 0.0)))
    # Where all are alike it is the logarithm of the number of labels.
    assert float(cosface(torch.ones(4, 7), torch.arange(4), 0.05, 0.0)) == pytest.approx(math.log(7))
    assert float(cosface(torch.ones(0, 7), torch.arange(0), 0.05, 0.0)) == 0


def test_in_evaluation_it_is_the_other_loss_whose_labels_it_need_not_know():
    loss, (queries, positives) = made().eval(), embeddings()
    torch.testing.assert_close(loss(queries, positives), InfoNCE()(queries, positives))
    torch.testing.assert_close(
        loss(queries, positives, labels=LABELS + 100), InfoNCE()(queries, positives, labels=LABELS)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(dtype):
    loss, rows = made().float(), [part.detach().to(dtype) for part in embeddings()]
    expected = loss(*(part.float() for part in rows), labels=LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*rows, labels=LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_its_vectors_learn_to_tell_labels_apart():
    loss, (queries, positives) = made(margin=0.1), embeddings()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    rows, labels = torch.cat([queries, positives]).detach(), torch.cat([LABELS, LABELS])
    for _ in range(200):
        optimizer.zero_grad()
        loss(queries.detach(), queries.detach(), labels=LABELS).backward()
        optimizer.step()
    nearest = (
        torch.nn.functional.normalize(rows[:N], dim=1) @ torch.nn.functional.normalize(loss.vectors.weight, dim=1).T
    ).argmax(1)
    assert nearest.tolist() == labels[:N].tolist()


ONES = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosFace(InfoNCE(), 0, 3), "classes=0: must be 1 or more"),
        (lambda: CosFace(InfoNCE(), 3, 0), "dim=0: must be 1 or more"),
        (lambda: CosFace(InfoNCE(), 3, 3, temperature=0.0), "temperature=0.0: must be above 0"),
        (lambda: CosFace(InfoNCE(), 3, 3, weight=-1.0), "weight=-1.0: must be above 0"),
        (lambda: CosFace(InfoNCE(), 3, 3, margin=1.0), "margin=1.0: must be from 0 to below 1"),
        (lambda: CosFace(InfoNCE(), 3, 4)(ONES, ONES, labels=torch.zeros(4).long()), r"queries: shape \(4, 3\); must be \(N, 4\)"),
        (lambda: CosFace(InfoNCE(), 3, 3)(ONES, ONES), "labels: CosFace needs a label of each query"),
        (
            lambda: CosFace(InfoNCE(), 3, 3)(ONES, ONES, labels=torch.tensor([0, 1, 2, 3])),
            "labels: from 0 to 3; must be from 0 to 2, as classes=3 says",
        ),
        (lambda: CosFace(InfoNCE(), 3, 3)(ONES, ONES, labels=torch.zeros(3)), r"labels: shape \(3,\); must be \(4,\)"),
        (lambda: CosFace(InfoNCE(), 3, 3)(ONES, ONES, scores=torch.ones(4)), "scores: InfoNCE has no use for graded"),
    ],
)  # fmt: skip
def test_what_cannot_be_says_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
