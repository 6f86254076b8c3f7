import pytest
import torch

from trainerkit.functional.rank import effective_rank, effective_rank_of_product


def naive(matrix):
    values = torch.linalg.svdvals(matrix.double())
    p = values[values > 1e-12 * values[0]] / values.sum()
    return torch.exp(-(p * p.log()).sum())


@pytest.mark.parametrize(("m", "n", "r"), [(9, 7, 3), (2, 7, 3), (9, 2, 3), (5, 5, 5), (6, 4, 1)])
def test_of_a_product_it_is_that_of_the_matrix(m, n, r):
    torch.manual_seed(0)
    left, right = torch.randn(2, 3, m, r, dtype=torch.float64), torch.randn(2, 3, r, n, dtype=torch.float64)
    found = effective_rank_of_product(left, right)
    assert found.shape == (2, 3)
    for one, two, value in zip(left.flatten(0, 1), right.flatten(0, 1), found.flatten(), strict=True):
        torch.testing.assert_close(value, naive(one @ two))
        torch.testing.assert_close(value, effective_rank(one @ two), rtol=1e-6, atol=0)


def test_it_is_blind_to_scale_to_rotations_and_to_the_gauge():
    torch.manual_seed(0)
    left, right = torch.randn(4, 9, 3, dtype=torch.float64), torch.randn(4, 3, 7, dtype=torch.float64)
    rank = effective_rank_of_product(left, right)
    gauge, turn = torch.randn(3, 3, dtype=torch.float64), torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    torch.testing.assert_close(effective_rank_of_product(-1e-3 * left, right), rank)
    torch.testing.assert_close(effective_rank_of_product(turn @ left, right), rank)
    torch.testing.assert_close(effective_rank_of_product(left @ torch.linalg.inv(gauge), gauge @ right), rank)


def test_k_equal_directions_have_rank_k():
    for k in range(1, 5):
        left = torch.eye(6)[:, :4] * (torch.arange(4) < k)
        assert effective_rank_of_product(left, 3 * torch.eye(4)).item() == pytest.approx(k)


def test_products_of_nothing_have_rank_zero_and_only_what_is_not_finite_is_nan():
    left, right = torch.randn(3, 4, 2), torch.randn(3, 2, 5)
    left[0] = 0
    left[1, 0, 0] = torch.inf
    found = effective_rank_of_product(left, right)
    assert found[0] == 0
    assert found[1].isnan()
    assert 1 <= found[2] <= 2


def test_half_precision_and_autocast_are_computed_in_float32():
    torch.manual_seed(0)
    left, right = torch.randn(3, 6, 2).bfloat16(), torch.randn(3, 2, 5).bfloat16()
    expected = effective_rank_of_product(left.float(), right.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = effective_rank_of_product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
