"""Metrics from ranks: torchmetrics' on whole rows of scores, and the same however rows are cut over processes."""

import math

import pytest
import torch
from torchmetrics.functional import retrieval

from tests.support import toy_trainer, two_processes
from trainerkit.tasks.retrieval.metrics import EvaluationSet, retrieval_metrics
from trainerkit.tasks.retrieval.search import ranks
from trainerkit.tasks.retrieval.similarity import similarity

KS = (1, 3, 10)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def csr(per_query):
    counts = torch.tensor([0, *map(len, per_query)])
    return counts.cumsum(0), torch.tensor([rank for found in per_query for rank in found], dtype=torch.int64)


def labelled(n=24, m=60, labels=9):
    generator = torch.Generator().manual_seed(3)
    keys = torch.randint(labels, (n,), generator=generator), torch.randint(labels, (m,), generator=generator)
    return drawn(n, 8), drawn(m, 8, seed=1), keys


def test_they_equal_torchmetrics_on_whole_rows():
    queries, candidates, keys = labelled()
    metrics = retrieval_metrics(*ranks(queries, candidates, keys, chunk_size=7), KS, mrr_ks=(3,))
    scores = (1 + similarity(queries, candidates)) / 2  # torchmetrics takes what is not above 0 for irrelevant
    for i, row in enumerate(scores):
        target = keys[1] == keys[0][i]
        expected = {
            "mrr": retrieval.retrieval_reciprocal_rank(row, target),
            "mrr@3": retrieval.retrieval_reciprocal_rank(row, target, top_k=3),
            "map": retrieval.retrieval_average_precision(row, target),
        }
        for k in KS:
            expected[f"recall@{k}"] = retrieval.retrieval_recall(row, target, top_k=k)
            expected[f"precision@{k}"] = retrieval.retrieval_precision(row, target, top_k=k)
            expected[f"hit_rate@{k}"] = retrieval.retrieval_hit_rate(row, target, top_k=k)
            expected[f"ndcg@{k}"] = retrieval.retrieval_normalized_dcg(row, target, top_k=k)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert float(metrics[name][i]) == pytest.approx(float(value), abs=1e-6), name


def test_they_equal_their_formulas_in_a_loop():
    found = [[1], [3], [2, 3, 11], [], [1, 2, 4, 40]]
    metrics = retrieval_metrics(*csr(found), KS, mrr_ks=(2,))
    for i, of_query in enumerate(found):
        relevant = max(1, len(of_query))
        for k in KS:
            hits = [r for r in of_query if r <= k]
            ideal = sum(1 / math.log2(j + 1) for j in range(1, min(relevant, k) + 1))
            assert float(metrics[f"recall@{k}"][i]) == pytest.approx(len(hits) / relevant)
            assert float(metrics[f"precision@{k}"][i]) == pytest.approx(len(hits) / k)
            assert float(metrics[f"hit_rate@{k}"][i]) == float(bool(hits))
            assert float(metrics[f"ndcg@{k}"][i]) == pytest.approx(sum(1 / math.log2(r + 1) for r in hits) / ideal)
        precision = sum(j / r for j, r in enumerate(of_query, 1)) / relevant
        assert float(metrics["map"][i]) == pytest.approx(precision)
        first = of_query[0] if of_query else math.inf
        assert float(metrics["mrr"][i]) == pytest.approx(1 / first)
        assert float(metrics["mrr@2"][i]) == pytest.approx(1 / first if first <= 2 else 0)


def test_the_rank_k_itself_counts_whatever_its_reciprocal_rounds_to():
    for k in range(1, 200):
        metrics = retrieval_metrics(*csr([[k], [k + 1], [k, k + 1]]), ks=(k,), mrr_ks=(k,))
        assert metrics[f"mrr@{k}"].tolist() == [1 / k, 0, 1 / k]
        assert metrics[f"hit_rate@{k}"].tolist() == [1, 0, 1]


def test_mrr_and_map_look_beyond_every_k():
    metrics = retrieval_metrics(*csr([[1000]]), ks=(1,))
    assert float(metrics["mrr"]) == float(metrics["map"]) == 0.001


def in_batches(data, evaluation_set, size=5):
    for start in range(0, len(data["index"]), size):
        evaluation_set.add(**{name: tensor[start : start + size] for name, tensor in data.items()})
    return evaluation_set


def rows(n=31, labels=None):
    data = {"index": torch.arange(n) * 3, "queries": drawn(n, 6), "positives": drawn(n, 6) + 0.7 * drawn(n, 6, seed=1)}
    return data if labels is None else data | {"labels": torch.arange(n) % labels}


@pytest.mark.parametrize("labels", [None, 5])
def test_a_set_ranks_in_the_whole_corpus_not_in_its_batches(labels):
    data = rows(labels=labels)
    keys = data.get("labels", data["index"])
    expected = retrieval_metrics(*ranks(data["queries"], data["positives"], (keys, keys)), KS)
    found = in_batches(data, EvaluationSet(KS, chunk_size=4)).compute()
    assert found == pytest.approx({name: float(value.mean()) for name, value in expected.items()}, abs=1e-12)
    assert 0 < found["recall@1"] < 1


@pytest.mark.parametrize("labels", [None, 5])
def test_order_batches_and_repeated_rows_change_nothing(labels):
    data = rows(labels=labels)
    whole = in_batches(data, EvaluationSet(KS), size=31).compute()
    order = torch.cat([torch.randperm(31, generator=torch.Generator().manual_seed(5)), torch.tensor([4, 4, 0])])
    shuffled = in_batches({name: tensor[order] for name, tensor in data.items()}, EvaluationSet(KS, chunk_size=3))
    assert len(shuffled) == 34
    assert shuffled.compute() == pytest.approx(whole, abs=1e-12)


def test_explicit_negatives_are_candidates_and_relevant_to_nobody():
    """Negatives that equal each query's own direction outrank everything; each is in the corpus once."""
    data = rows(6)
    evaluation_set = EvaluationSet((1, 7))
    negatives, owners = data["queries"][[2, 2, 4]], torch.tensor([2, 2, 4])
    evaluation_set.add(**data, negatives=negatives, owners=owners)
    plain = ranks(data["queries"], data["positives"], (torch.arange(6), torch.arange(6)))[1]
    candidates = torch.cat([data["positives"], negatives])
    expected = ranks(data["queries"], candidates, (torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 5, -1, -1, -1])))[1]
    assert (expected[[2, 4]] == plain[[2, 4]] + torch.tensor([2, 1])).all()
    found = evaluation_set.compute()
    assert found["mrr"] == pytest.approx(float((1 / expected.double()).mean()))
    again = torch.tensor([2, 5])  # a row that comes again brings its negatives again
    evaluation_set.add(
        **{name: tensor[again] for name, tensor in data.items()}, negatives=negatives[:2], owners=torch.tensor([0, 0])
    )
    assert evaluation_set.compute() == pytest.approx(found, abs=1e-12)


def test_late_interaction_of_other_lengths_in_each_batch():
    queries, positives = drawn(8, 3, 4), drawn(8, 5, 4, seed=1)
    positives[:4, 2:] = 0
    evaluation_set = EvaluationSet(KS)
    evaluation_set.add(torch.arange(4), queries[:4], positives[:4, :2])
    evaluation_set.add(torch.arange(4, 8), queries[4:], positives[4:])
    expected = retrieval_metrics(*ranks(queries, positives, (torch.arange(8), torch.arange(8))), KS)
    assert evaluation_set.compute() == pytest.approx({n: float(v.mean()) for n, v in expected.items()})


@pytest.mark.parametrize("labels", [None, 5])
def test_two_processes_with_uneven_rows_equal_one(labels, tmp_path):
    data = rows(labels=labels)

    def share(rank):
        """Rows 3, 10 and 11 are in both, the negatives of 3 too."""
        chosen = torch.arange(12) if rank == 0 else torch.tensor([*range(12, 31), 3, 10, 11])
        mine = {name: tensor[chosen] for name, tensor in data.items()}
        evaluation_set = in_batches(mine, EvaluationSet(KS, chunk_size=6))
        if rank == 1:
            given = {name: tensor[:2] for name, tensor in mine.items()}
            evaluation_set.add(**given, negatives=drawn(3, 6, seed=9), owners=torch.tensor([0, 1, 1]))
        return evaluation_set

    def work(rank):
        trainer = toy_trainer(tmp_path, devices=2, strategy="ddp")
        trainer.strategy.setup_environment()
        return share(rank).compute()

    outcomes = two_processes(work, tmp_path)
    assert "error" not in outcomes[0], outcomes
    assert outcomes[0] == outcomes[1]
    single = in_batches(data, EvaluationSet(KS))
    given = {name: tensor[12:14] for name, tensor in data.items()}
    single.add(**given, negatives=drawn(3, 6, seed=9), owners=torch.tensor([0, 1, 1]))
    assert outcomes[0]["result"] == pytest.approx(single.compute(), abs=1e-12)


@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("given", [0, 1])
def test_a_process_without_rows_takes_part_and_gets_the_metrics_of_the_other(given, negatives, tmp_path):
    def filled():
        evaluation_set = in_batches(rows(), EvaluationSet(KS))
        if negatives:
            evaluation_set.add(**rows(2), negatives=drawn(3, 6, seed=9), owners=torch.tensor([0, 1, 1]))
        return evaluation_set

    def work(rank):
        trainer = toy_trainer(tmp_path, devices=2, strategy="ddp")
        trainer.strategy.setup_environment()
        with pytest.raises(ValueError, match="rows=0: an evaluation set needs at least one row"):
            EvaluationSet(KS).compute()
        return (filled() if rank == given else EvaluationSet(KS)).compute()

    outcomes = two_processes(work, tmp_path)
    assert "error" not in outcomes[0], outcomes
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["result"] == pytest.approx(filled().compute(), abs=1e-12)


def test_a_cleared_set_begins_anew():
    evaluation_set = in_batches(rows(), EvaluationSet(KS))
    evaluation_set.clear()
    assert len(evaluation_set) == 0
    with pytest.raises(ValueError, match="rows=0: an evaluation set needs at least one row"):
        evaluation_set.compute()


def added(change, first=None):
    evaluation_set = EvaluationSet()
    if first:
        evaluation_set.add(**rows(4, **first))
    evaluation_set.add(**(rows(4) | change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EvaluationSet(ks=(1, 0)), r"ks=\[1, 0\]: each must be 1 or more"),
        (lambda: EvaluationSet(mrr_ks=(-1,)), r"mrr_ks=\[-1\]: each must be 1 or more"),
        (lambda: EvaluationSet(chunk_size=0), r"chunk_size=0: must be 1 or more"),
        (
            lambda: added({"queries": drawn(3, 6)}),
            r"rows={'index': 4, 'queries': 3, 'positives': 4}: must all be of one",
        ),
        (lambda: added({}, {"labels": 2}), r"labels: must be in all batches of an evaluation set or in none"),
        (lambda: added({"negatives": drawn(3, 6)}), r"owners: must be \(3,\), the row of each negative"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
