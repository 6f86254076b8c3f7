"""Draws by seed, epoch and row."""

import math

import numpy as np
import torch

from trainerkit.functional.row_draws import row_draws, row_normals

ROWS = torch.arange(500)


def naive_draw(key, counter):
    """SplitMix64 by Python's integers."""
    x = (key + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return ((x ^ (x >> 31)) >> 40) / 2**24


def test_draws_equal_splitmix_of_a_counter():
    key = int(np.random.SeedSequence([3, 4, 5]).generate_state(1, np.uint64)[0])
    draws = row_draws(3, 4, torch.tensor([0, 7, 10**12]), 2, stream=5)
    assert draws.tolist() == [[naive_draw(key, 2 * row + k) for k in range(2)] for row in (0, 7, 10**12)]


def test_draws_of_a_row_do_not_depend_on_the_batch_and_move_no_state():
    state = torch.get_rng_state()
    whole = row_draws(0, 1, ROWS, 3)
    assert torch.equal(row_draws(0, 1, ROWS.flip(0)[:9], 3), whole.flip(0)[:9])
    assert torch.equal(torch.get_rng_state(), state)
    for other in (row_draws(1, 0, ROWS, 3), row_draws(0, 2, ROWS, 3), row_draws(0, 1, ROWS, 3, stream=1)):
        assert (other == whole).float().mean() < 0.02


def test_draws_are_uniform():
    draws = row_draws(0, 0, torch.arange(40_000), 1)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, 10, 0, 1)
    assert ((counts - 4000).abs() < 5 * 60).all()


def test_normals_are_box_and_mullers_of_the_draws_in_float64():
    rows = torch.tensor([3, 10**9])
    u = row_draws(1, 2, rows, 6, stream=3).double()
    expected = [
        [math.sqrt(-2 * math.log(1 - float(u[i, k]))) * math.cos(2 * math.pi * float(u[i, 3 + k])) for k in range(3)]
        for i in range(2)
    ]
    found = row_normals(1, 2, rows, 3, stream=3)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_normals_have_the_normal_distributions_moments_and_no_correlation():
    z = row_normals(0, 0, torch.arange(20_000), 8).double()
    assert z.isfinite().all()
    assert z.mean(0).abs().max() < 0.03
    assert (z.std(0) - 1).abs().max() < 0.03
    assert abs(float((z**4).mean()) - 3) < 0.1
    assert (torch.corrcoef(z.T) - torch.eye(8)).abs().max() < 0.03


def test_normals_of_a_row_do_not_depend_on_the_batch():
    whole = row_normals(0, 1, ROWS, 4)
    assert torch.equal(row_normals(0, 1, ROWS.flip(0)[:9], 4), whole.flip(0)[:9])
