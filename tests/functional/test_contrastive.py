import math

import pytest
import torch

from trainerkit.functional.contrastive import info_nce


def pairs(number=7, extra=0, width=5, dtype=torch.float64):
    queries = torch.randn(number, width, dtype=dtype).requires_grad_()
    return queries, torch.randn(number + extra, width, dtype=dtype).requires_grad_()


def naive(queries, documents, temperature, symmetric, normalize):
    """Query by query."""

    def product(a, b):
        return a @ b / (a.norm() * b.norm() if normalize else 1) / temperature

    total = 0
    for i, query in enumerate(queries):
        others = torch.stack([product(query, document) for document in documents])
        term = torch.logsumexp(others, 0) - others[i]
        if symmetric:
            back = torch.stack([product(other, documents[i]) for other in queries])
            term = (term + torch.logsumexp(back, 0) - back[i]) / 2
        total = total + term
    return total / len(queries)


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_value_and_gradients_are_those_of_the_naive_loss(extra, symmetric, normalize):
    queries, documents = pairs(extra=extra)
    loss = info_nce(queries, documents, 0.3, symmetric=symmetric, normalize=normalize)
    expected = naive(queries, documents, 0.3, symmetric, normalize)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, (queries, documents)) for value in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_the_order_of_pairs_of_extra_documents_and_all_lengths_change_nothing():
    queries, documents = pairs(extra=3)
    order = torch.randperm(7)
    rows = torch.cat([order, 7 + torch.randperm(3)])
    lengths = torch.rand(7, 1, dtype=torch.float64) + 0.1
    again = info_nce((queries * lengths)[order], 5 * documents[rows], symmetric=True)
    torch.testing.assert_close(again, info_nce(queries, documents, symmetric=True))


def test_turning_everything_changes_nothing():
    queries, documents = pairs()
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    torch.testing.assert_close(info_nce(queries @ turn, documents @ turn), info_nce(queries, documents))


def test_the_symmetric_loss_does_not_know_which_side_is_which():
    queries, documents = pairs()
    swapped = info_nce(documents, queries, symmetric=True)
    torch.testing.assert_close(swapped, info_nce(queries, documents, symmetric=True))
    assert abs(float((info_nce(documents, queries) - info_nce(queries, documents)).detach())) > 1e-3


def test_it_is_the_logarithm_of_the_number_where_all_are_alike_and_zero_where_pairs_stand_out():
    alike = torch.ones(6, 4)
    assert float(info_nce(alike, torch.ones(10, 4))) == pytest.approx(math.log(10))
    apart = torch.eye(6)
    assert 0 <= float(info_nce(apart, apart)) < 1e-7
    assert float(info_nce(torch.zeros(0, 4), torch.ones(3, 4))) == 0


def test_autocast_rounds_nothing_that_the_temperature_would_enlarge():
    queries, documents = pairs(dtype=torch.float32)
    expected = info_nce(queries, documents, 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(info_nce(queries, documents, 0.01), expected)


@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((3, 4), (3, 4)), 0.0, "temperature=0.0: must be above 0"),
        (((3, 4), (3, 5)), 0.1, r"shapes \(3, 4\) and \(3, 5\); must be"),
        (((3, 4), (2, 4)), 0.1, r"\(B, D\) and \(B or more, D\)"),
    ],
)
def test_what_cannot_be_says_what_is_allowed(shapes, temperature, message):
    with pytest.raises(ValueError, match=message):
        info_nce(*(torch.ones(shape) for shape in shapes), temperature)
