"""Retrieval metrics on a whole corpus, over all processes.

They are computed from the ranks of the relevant candidates (`search.ranks`), where torchmetrics wants all N×M
similarities at once; tests hold each against torchmetrics on whole rows of scores.

For a query whose R relevant candidates have the ranks r₁ < r₂ < … < r_R, from 1:

    recall@k    |{j: r_j ≤ k}| / R                  hit_rate@k  1 if r₁ ≤ k, else 0
    precision@k |{j: r_j ≤ k}| / k                  mrr         1 / r₁
    map         1/R · Σ_j j / r_j                   mrr@k       1 / r₁ if r₁ ≤ k, else 0
    ndcg@k      Σ_{r_j ≤ k} 1/log₂(r_j + 1)  /  Σ_{j ≤ min(R, k)} 1/log₂(j + 1)
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainerkit.tasks.retrieval.rows import first_of_each, joined, of_all_ranks, on_host
from trainerkit.tasks.retrieval.search import ranks

Gather = Callable[[Tensor], Tensor]


def retrieval_metrics(
    offsets: Tensor, ranks: Tensor, ks: Sequence[int] = (1, 5, 10), mrr_ks: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Metrics of each query; their means are what is reported.

    Args:
        offsets: (N+1,) int64; the relevant candidates of query i are offsets[i] to offsets[i+1].
        ranks: (P,) int64 from 1, ascending within a query.
        ks: for `recall@k`, `hit_rate@k`, `precision@k`, `ndcg@k`.
        mrr_ks: for `mrr@k`; `mrr` and `map` look at the whole corpus.

    Returns:
        (N,) float64 by name; 0 where nothing is relevant, as torchmetrics has it.

    Raises:
        ValueError: for a k below 1.
    """
    check_ks("ks", ks)
    check_ks("mrr_ks", mrr_ks)
    counts = offsets.diff()
    query = torch.arange(len(counts)).repeat_interleave(counts)
    place = (torch.arange(len(ranks)) - offsets[query] + 1).double()
    rank = ranks.double()

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, query, values.double())

    relevant = counts.clamp(min=1)
    found: dict[str, Tensor] = {}
    for k in ks:
        within = rank <= k
        hits = summed(within)
        ideal = (1 / torch.arange(2, k + 2, dtype=torch.float64).log2()).cumsum(0)
        found |= {
            f"recall@{k}": hits / relevant,
            f"hit_rate@{k}": hits.clamp(max=1),
            f"precision@{k}": hits / k,
            f"ndcg@{k}": summed(within / (rank + 1).log2()) / ideal[relevant.clamp(max=k) - 1],
        }
    reciprocal = summed((place == 1) / rank)
    found |= {"mrr": reciprocal, "map": summed(place / rank) / relevant}
    return found | {f"mrr@{k}": summed((place == 1) & (ranks <= k)) * reciprocal for k in mrr_ks}


def ranks_of(metrics: Sequence[str]) -> tuple[list[int], list[int]]:
    """The `ks` and `mrr_ks` that metrics of these names need.

    Raises:
        ValueError: for a name that is none.
    """
    found: dict[bool, set[int]] = {False: set(), True: set()}
    for name in metrics:
        match = re.fullmatch(r"(recall|hit_rate|precision|ndcg|mrr)@([1-9]\d*)", name)
        if match:
            found[match[1] == "mrr"].add(int(match[2]))
        elif name not in ("mrr", "map"):
            raise ValueError(f"metrics={name}: must be recall@k, hit_rate@k, precision@k, ndcg@k, mrr, mrr@k or map")
    return sorted(found[False]), sorted(found[True])


def check_ks(name: str, ks: Sequence[int]) -> None:
    """Raise ValueError unless each is 1 or more."""
    if any(k < 1 for k in ks):
        raise ValueError(f"{name}={list(ks)}: each must be 1 or more")


class EvaluationSet:
    """Collects the embeddings of an evaluation on the host, batch by batch, and computes its metrics.

    Every row's query is searched among the positives of all rows of all processes, and the explicit negatives of all
    rows. Relevant are its own positive, or with labels those of all rows of its label.

    Args:
        ks: see `retrieval_metrics`.
        mrr_ks: the same.
        chunk_size: see `search.ranks`.

    Raises:
        ValueError: for a k or a chunk size below 1.
    """

    def __init__(self, ks: Sequence[int] = (1, 5, 10), mrr_ks: Sequence[int] = (), *, chunk_size: int = 2048) -> None:
        check_ks("ks", ks)
        check_ks("mrr_ks", mrr_ks)
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be 1 or more")
        self.ks = tuple(ks)
        self.mrr_ks = tuple(mrr_ks)
        self.chunk_size = chunk_size
        self.clear()

    def __len__(self) -> int:
        return sum(len(index) for index in self._parts.get("index", []))

    def clear(self) -> None:
        """Begin anew."""
        self._parts: dict[str, list[Tensor]] = {}

    def add(
        self,
        index: Tensor,
        queries: Tensor,
        positives: Tensor,
        labels: Tensor | None = None,
        negatives: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> None:
        """Take a batch.

        Args:
            index: row numbers (B,), 0 or more; a row that comes again, here or in another process, counts once.
            queries: embeddings (B, D) or (B, T, D).
            positives: embeddings (B, D) or (B, S, D).
            labels: (B,) int64, in all batches or in none.
            negatives: embeddings (M, D) or (M, S, D); relevant to no query.
            owners: (M,) int64: which row of the batch each negative was given for.

        Raises:
            ValueError: for lengths that do not fit, negatives without owners, labels in some batches only.
        """
        parts = {"index": index, "queries": queries, "positives": positives}
        if labels is not None:
            parts["labels"] = labels
        lengths = {name: len(part) for name, part in parts.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"rows={lengths}: must all be of one number")
        if self._parts and ("labels" in self._parts) != (labels is not None):
            raise ValueError("labels: must be in all batches of an evaluation set or in none")
        if negatives is not None:
            if owners is None or owners.shape != negatives.shape[:1]:
                raise ValueError(f"owners: must be ({len(negatives)},), the row of each negative")
            places = _places(owners.cpu())
            parts |= {"negatives": negatives, "owners": index.cpu()[owners.cpu()], "places": places}
        for name, part in parts.items():
            kept = on_host(part) if part.is_floating_point() else part.detach().cpu()
            self._parts.setdefault(name, []).append(kept)

    def local(self) -> dict[str, Tensor]:
        """What this process was given, each row once in the order of `index`: `index`, `queries`, `positives`, `keys`.

        Rows of equal keys are relevant to each other. A process that was given nothing has tensors without rows.
        """
        if not self._parts:
            return dict.fromkeys(("index", "queries", "positives", "keys"), torch.empty(0))
        names = ("index", "queries", "positives")
        rows = {name: joined(self._parts[name]) for name in names}
        rows["keys"] = joined(self._parts["labels"]) if "labels" in self._parts else rows["index"]
        once = first_of_each(rows["index"])
        return {name: tensor[once] for name, tensor in rows.items()}

    def compute(self, gather: Gather = of_all_ranks, device: torch.device | None = None) -> dict[str, float]:
        """The means over all queries of all processes, the same in each; every process has to call it.

        Each process ranks its own queries, so that time falls with their number; all candidates are in each.

        Args:
            gather: gives the rows of all processes in one order; integers and float64 too. A process without rows
                gives it a tensor of shape (0,), whatever those of the others are.
            device: where tiles are computed; None: the host.

        Raises:
            ValueError: in every process, if none has a row.
        """
        mine = self.local()
        index, candidates, keys = (gather(mine[name]) for name in ("index", "positives", "keys"))
        if not len(index):
            raise ValueError("rows=0: an evaluation set needs at least one row")
        once = first_of_each(index)
        candidates, keys = candidates[once], keys[once]
        negatives = self._all_negatives(gather)
        if negatives is not None:
            candidates = joined([candidates, negatives])
            keys = torch.cat([keys, (keys.min() - 1).expand(len(negatives))])
        queries = mine["queries"] if len(self) else candidates[:0]
        found = ranks(queries, candidates, (mine["keys"], keys), chunk_size=self.chunk_size, device=device)
        metrics = retrieval_metrics(*found, self.ks, self.mrr_ks)
        # In the order of the rows: the sums do not depend on who ranked which.
        values = gather(torch.stack(list(metrics.values()), 1))[once]
        return dict(zip(metrics, values.mean(0).tolist(), strict=True))

    def _all_negatives(self, gather: Gather) -> Tensor | None:
        """The explicit negatives of all processes; those of a row that was given twice once."""
        mine = "negatives" in self._parts
        # A process without any takes part with nothing.
        owners, places, negatives = (
            gather(joined(self._parts[name]) if mine else torch.empty(0)) for name in ("owners", "places", "negatives")
        )
        if not len(owners):
            return None
        return negatives[first_of_each(owners * (places.max() + 1) + places)]


def _places(owners: Tensor) -> Tensor:
    """The how-manieth negative of its owner each one is, from 0."""
    ordered, order = owners.sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(owners)) - torch.searchsorted(ordered, ordered)
    return places
