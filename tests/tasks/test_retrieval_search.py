"""Exact search in tiles: equal to whole rows of similarities, whatever the tiles."""

import math
from importlib import import_module

import pytest
import torch

from trainerkit.tasks.retrieval.rows import first_of_each, joined
from trainerkit.tasks.retrieval.search import ranks, top_k
from trainerkit.tasks.retrieval.similarity import similarity


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def naive_top_k(queries, candidates, k, leave_out=lambda i, j: False):
    rows = []
    for i, query in enumerate(queries):
        scored = [(-cosine(query, c), j) for j, c in enumerate(candidates) if not leave_out(i, j)]
        rows.append([j for _, j in sorted(scored)[:k]])
    return rows


def naive_ranks(scores, of_queries, of_candidates):
    """By comparing each pair: irrelevant ones win ties."""
    found = []
    for i, row in enumerate(scores.tolist()):
        right = [s for s, key in zip(row, of_candidates, strict=True) if key == of_queries[i]]
        wrong = [s for s, key in zip(row, of_candidates, strict=True) if key != of_queries[i]]
        right.sort(reverse=True)
        found.append([1 + place + sum(w >= s for w in wrong) for place, s in enumerate(right)])
    return found


def split(offsets, found):
    return [part.tolist() for part in found.split(offsets.diff().tolist())]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 2048])
def test_the_k_nearest_equal_a_loop_whatever_the_tiles(chunk_size):
    queries, candidates = drawn(11, 5), drawn(23, 5, seed=1)
    scores, rows = top_k(queries, candidates, 4, chunk_size=chunk_size)
    assert rows.tolist() == naive_top_k(queries, candidates, 4)
    torch.testing.assert_close(scores, similarity(queries, candidates).gather(1, rows))


@pytest.mark.parametrize("chunk_size", [2, 9, 2048])
def test_late_interaction_is_searched_by_its_own_similarity(chunk_size):
    queries, candidates = drawn(6, 3, 4), drawn(17, 5, 4, seed=1)
    candidates[::2, 3:] = 0
    whole = similarity(queries, candidates)
    scores, rows = top_k(queries, candidates, 3, chunk_size=chunk_size)
    torch.testing.assert_close(scores, whole.sort(dim=1, descending=True).values[:, :3])
    torch.testing.assert_close(scores, whole.gather(1, rows))
    keys = torch.arange(6), torch.arange(17) % 6
    expected = naive_ranks(whole, keys[0].tolist(), keys[1].tolist())
    assert split(*ranks(queries, candidates, keys, chunk_size=chunk_size)) == expected


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 2048])
def test_of_equal_candidates_the_lower_row_comes_first(chunk_size):
    """Axes: their products are exact, so that equal is equal whatever the tile."""
    candidates = torch.eye(3)[[0, 1, 0, 1, 0, 2, 0, 1]]
    _, rows = top_k(torch.eye(3), candidates, 5, chunk_size=chunk_size)
    assert rows.tolist() == [[0, 2, 4, 6, 1], [1, 3, 7, 0, 2], [5, 0, 1, 2, 3]]


@pytest.mark.parametrize("chunk_size", [3, 2048])
def test_pairs_of_equal_keys_are_left_out_and_missing_ones_are_said(chunk_size):
    queries, candidates = drawn(5, 4), drawn(5, 4, seed=1)
    own, label = torch.arange(5), torch.tensor([0, 1, 0, 1, 2])
    scores, rows = top_k(queries, candidates, 4, exclude=[(own, own), (label, label)], chunk_size=chunk_size)
    expected = naive_top_k(queries, candidates, 4, lambda i, j: label[i] == label[j])
    for found, values, right in zip(rows.tolist(), scores.tolist(), expected, strict=True):
        assert found == right + [-1] * (4 - len(right))
        assert values[len(right) :] == [-math.inf] * (4 - len(right))


def test_a_search_does_not_depend_on_lengths_or_the_order_of_queries():
    queries, candidates = drawn(9, 5), drawn(12, 5, seed=1)
    _, rows = top_k(queries, candidates, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    _, again = top_k(7.0 * queries[order], 0.01 * candidates, 3, chunk_size=4)
    assert torch.equal(again, rows[order])


def test_what_is_no_number_is_never_found():
    candidates = torch.eye(3)
    candidates[1] = math.nan
    scores, rows = top_k(torch.eye(3), candidates, 3)
    assert rows[0].tolist() == [0, 2, -1]
    assert not scores.isnan().any()


@pytest.mark.parametrize("labels", [3, 40])  # about thirteen relevant ones a query, and one or none
@pytest.mark.parametrize("chunk_size", [1, 6, 2048])
def test_ranks_equal_counting_pair_by_pair(chunk_size, labels):
    queries, candidates = drawn(20, 6), drawn(45, 6, seed=1)
    generator = torch.Generator().manual_seed(3)
    keys = torch.randint(labels, (20,), generator=generator), torch.randint(labels, (45,), generator=generator)
    offsets, found = ranks(queries, candidates, keys, chunk_size=chunk_size)
    expected = naive_ranks(similarity(queries, candidates), keys[0].tolist(), keys[1].tolist())
    assert split(offsets, found) == expected
    if labels == 40:
        assert [] in expected


def test_many_relevant_candidates_are_counted_as_few_ones_are():
    """The binary search, by its two neighbours: twelve relevant ones are compared one by one, thirteen searched."""
    for several in (12, 13):
        candidates = drawn(60, 4, seed=several)
        keys = torch.zeros(2, dtype=torch.int64), (torch.arange(60) >= several).long()
        queries = drawn(2, 4)
        expected = naive_ranks(similarity(queries, candidates), [0, 0], keys[1].tolist())
        assert split(*ranks(queries, candidates, keys, chunk_size=16)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_an_encoder_that_maps_everything_to_one_point_ranks_last(value, dtype):
    embeddings = torch.linspace(-1, 1, 37).to(dtype).expand(50, 37) * value
    keys = torch.arange(50), torch.arange(50)
    for chunk_size in (7, 16, 2048):
        assert ranks(embeddings, embeddings.clone(), keys, chunk_size=chunk_size)[1].tolist() == [50] * 50


def test_ranks_do_not_depend_on_the_order_of_candidates():
    queries, candidates, key = drawn(9, 5), drawn(30, 5, seed=1), torch.arange(30) % 9
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    whole = ranks(queries, candidates, (torch.arange(9), key))
    shuffled = ranks(queries, candidates[order], (torch.arange(9), key[order]), chunk_size=8)
    assert all(torch.equal(a, b) for a, b in zip(whole, shuffled, strict=True))


def test_half_precision_is_searched_in_float32():
    queries, candidates = drawn(9, 5).half(), drawn(30, 5, seed=1).half()
    scores, rows = top_k(queries, candidates, 3)
    assert scores.dtype == torch.float32
    assert torch.equal(rows, top_k(queries.float(), candidates.float(), 3)[1])


def test_no_query_and_no_candidate_are_nothing_found():
    assert top_k(drawn(0, 4), drawn(3, 4), 2)[1].shape == (0, 2)
    assert top_k(drawn(3, 4), drawn(0, 4), 2)[1].tolist() == [[-1, -1]] * 3
    offsets, found = ranks(drawn(2, 4), drawn(3, 4), (torch.tensor([7, 8]), torch.arange(3)))
    assert offsets.tolist() == [0, 0, 0]
    assert found.tolist() == []


def test_parts_of_other_lengths_are_joined_with_padding():
    found = joined([torch.ones(2, 1, 3), torch.ones(1, 4, 3)])
    assert found.shape == (3, 4, 3)
    assert found.sum((1, 2)).tolist() == [3, 3, 12]
    assert first_of_each(torch.tensor([4, 2, 4, 0, 2])).tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, c: top_k(q, c, 0), r"k=0: must be 1 or more"),
        (lambda q, c: top_k(q, c, 1, chunk_size=0), r"chunk_size=0: must be 1 or more"),
        (lambda q, c: top_k(q[:, 1:], c, 1), r"shapes \(1, 3\) and \(1, 4\)"),
        (
            lambda q, c: ranks(q, c, (torch.arange(3), torch.arange(3))),
            r"keys: shapes \(3,\) and \(3,\); must be \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(drawn(2, 4), drawn(3, 4))


@pytest.mark.parametrize("most", [1, 7 * 5 * 4 * 2, 10**9])
def test_late_interaction_in_blocks_is_that_of_all_at_once(most, monkeypatch):
    """Value and both gradients, against query by query and vector by vector; padding on both sides."""
    # Imported by name: in the package, `similarity` is the function.
    monkeypatch.setattr(import_module("trainerkit.tasks.retrieval.similarity"), "_MOST_PRODUCTS", most)
    torch.manual_seed(0)
    queries, candidates = (torch.randn(*shape, 3, dtype=torch.float64) for shape in ((6, 4), (7, 5)))
    queries[2, 1:], candidates[3, 2:] = 0, 0
    queries.requires_grad_(), candidates.requires_grad_()
    naive = torch.stack([torch.stack([_max_sim(query, candidate) for candidate in candidates]) for query in queries])
    found = similarity(queries, candidates)
    torch.testing.assert_close(found, naive)
    weights = torch.randn(6, 7, dtype=torch.float64)
    expected = torch.autograd.grad((naive * weights).sum(), (queries, candidates))
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), (queries, candidates)), expected)


def _max_sim(query, candidate):
    """Of two texts, vectors of zeros left out."""
    vectors, others = ([v / v.norm() for v in side if v.any()] for side in (query, candidate))
    return torch.stack([torch.stack([v @ other for other in others]).max() for v in vectors]).mean()
