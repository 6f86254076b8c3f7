"""Exact search of a corpus in tiles, so that the similarities of a million queries and candidates never sit in memory.

A tile is `chunk_size` queries by `chunk_size` candidates; its similarities, and for late interaction all products of
its vectors, are at most chunk_size² numbers. Which candidates belong to a query is told by keys, one number a query
and one a candidate: the pairs of equal keys. Row numbers as keys say 'its own row', labels 'all of its label'.

N: queries, M: candidates, D: width.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainerkit.tasks.retrieval.similarity import similarity

Keys = tuple[Tensor, Tensor]  # of queries (N,) and of candidates (M,)

_FEW = 12  # relevant candidates: for more of them a binary search is faster than comparing with each
_NAN = 2.0  # above every cosine


@torch.no_grad()
def top_k(
    queries: Tensor,
    candidates: Tensor,
    k: int,
    *,
    exclude: Sequence[Keys] = (),
    chunk_size: int = 2048,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most similar candidates of each query, the best first; of equal ones the lower row first.

    Args:
        queries: embeddings (N, D) or (N, T, D).
        candidates: embeddings (M, D) or (M, S, D).
        k: 1 or more.
        exclude: pairs with equal keys, in any of these, are not found.
        chunk_size: queries and candidates of a tile.
        device: where tiles are computed; None: where the queries are.

    Returns:
        Similarities (N, k) and rows of `candidates` (N, k) int64, both on the host; -inf and -1 where there are fewer
        than k. A similarity that is no number is not found.

    Raises:
        ValueError: for k or a chunk size below 1, for embeddings or keys whose shapes do not fit.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be 1 or more")
    tiles = _Tiles(queries, candidates, exclude, chunk_size, device)
    scores, rows = queries.new_empty(0, k, device="cpu"), torch.empty(0, k, dtype=torch.int64)
    parts = [(scores, rows), *(_top_of(tiles, part, k) for part in tiles.query_parts())]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _top_of(tiles: "_Tiles", part: slice, k: int) -> tuple[Tensor, Tensor]:
    best, rows = tiles.filled(part, k, -math.inf), tiles.filled(part, k, -1).long()
    for columns in tiles.candidate_parts():
        scores = tiles.scores(part, columns)
        for number in range(len(tiles.keys)):
            scores.masked_fill_(tiles.same_key(part, columns, number), -math.inf)
        scores.nan_to_num_(nan=-math.inf, neginf=-math.inf)
        here, where = _first_k(scores, min(k, scores.shape[1]))
        # What was found before stands first and has lower rows: a stable sort keeps that among equals.
        merged, order = torch.cat([best.to(here), here], 1).sort(dim=1, descending=True, stable=True)
        best = merged[:, :k]
        rows = torch.cat([rows, where + columns.start], 1).gather(1, order[:, :k])
    return best.cpu(), rows.masked_fill(best == -math.inf, -1).cpu()


def _first_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, of equal ones the first; in the order of the columns."""
    values, where = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    # topk takes any of those that equal the last; only rows where the next one does too need the slow way.
    tied = values[:, k - 1] == values[:, -1] if values.shape[1] > k else values.new_zeros(len(values)).bool()
    where = where[:, :k]
    if tied.any():
        where[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    where = where.sort(dim=1).values
    return scores.gather(1, where), where


@torch.no_grad()
def ranks(
    queries: Tensor, candidates: Tensor, keys: Keys, *, chunk_size: int = 2048, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The exact rank, from 1, of each relevant candidate among all candidates, by counting which ones score higher.

    Of equal similarities the irrelevant ones count as higher, so that an encoder that maps everything to one point
    ranks last; so does a similarity that is no number. Equal is what differs by rounding: by no more than 8 times the
    machine epsilon (9.5e-7 in float32).

    Args:
        queries: embeddings (N, D) or (N, T, D).
        candidates: embeddings (M, D) or (M, S, D).
        keys: of queries (N,) and candidates (M,), integers; a candidate is relevant where they are equal.
        chunk_size: queries and candidates of a tile; beyond the tile, N·R ranks are kept, R the relevant ones a query.
        device: where tiles are computed; None: where the queries are.

    Returns:
        offsets (N+1,) and ranks (P,) int64 on the host: those of query i are ranks[offsets[i]:offsets[i+1]], ascending.

    Raises:
        ValueError: for a chunk size below 1, for embeddings or keys whose shapes do not fit.
    """
    tiles = _Tiles(queries, candidates, [keys], chunk_size, device)
    empty = torch.empty(0, dtype=torch.int64)
    counts, found = [empty], [empty]
    for part in tiles.query_parts():
        relevant, there = _relevant_scores(tiles, part)
        tolerance = 8 * torch.finfo(relevant.dtype).eps
        higher = torch.zeros_like(relevant, dtype=torch.int64)
        for columns in tiles.candidate_parts():
            scores = tiles.scores(part, columns).nan_to_num_(nan=_NAN)
            scores.masked_fill_(tiles.same_key(part, columns), -math.inf)
            higher += _at_least(scores, relevant - tolerance)
        places = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
        found.append((higher + places)[there].cpu())
        counts.append(there.sum(1).cpu())
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)]), torch.cat(found)


def _relevant_scores(tiles: "_Tiles", part: slice) -> tuple[Tensor, Tensor]:
    """Similarities of each query's relevant candidates (n, R), descending, and which of these there are (n, R).

    Taken from the same tiles as all others: computed in another way they would be rounded in another way.
    """
    rows, values = [], []
    for columns in tiles.candidate_parts():
        same = tiles.same_key(part, columns)
        if same.any():
            rows.append(same.nonzero()[:, 0])
            values.append(tiles.scores(part, columns)[same])
    n = part.stop - part.start
    if not rows:
        nothing = tiles.filled(part, 0, 0.0)
        return nothing, nothing.bool()
    row, value = torch.cat(rows), torch.cat(values).nan_to_num(nan=-_NAN)
    value, order = value.sort(descending=True)
    row, by_row = row[order].sort(stable=True)
    count = row.bincount(minlength=n)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    relevant = value.new_full((n, int(count.max())), -math.inf)
    relevant[row, place] = value[by_row]
    return relevant, torch.arange(relevant.shape[1], device=row.device) < count[:, None]


def _at_least(scores: Tensor, thresholds: Tensor) -> Tensor:
    """How many of scores (n, m) reach each of thresholds (n, R), which descend: (n, R)."""
    n, several = thresholds.shape
    if several <= _FEW:
        counts = [(scores >= thresholds[:, r : r + 1]).count_nonzero(1) for r in range(several)]
        return torch.stack(counts, 1) if counts else thresholds.long()
    ascending = thresholds.flip(1).contiguous()
    reached = torch.searchsorted(ascending, scores, right=True)  # how many thresholds each score reaches
    reaching = reached.new_zeros(n, several + 1).scatter_add_(1, reached, torch.ones_like(reached))
    return reaching.flip(1).cumsum(1)[:, :several]


class _Tiles:
    """Similarities of slices of queries and candidates, and which of these have equal keys."""

    def __init__(
        self, queries: Tensor, candidates: Tensor, keys: Sequence[Keys], chunk_size: int, device: torch.device | None
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be 1 or more")
        similarity(queries[:1], candidates[:1])  # refuses shapes that do not fit
        for of_queries, of_candidates in keys:
            if of_queries.shape != queries.shape[:1] or of_candidates.shape != candidates.shape[:1]:
                raise ValueError(
                    f"keys: shapes {tuple(of_queries.shape)} and {tuple(of_candidates.shape)}; must be "
                    f"({len(queries)},) and ({len(candidates)},)"
                )
        self.queries = queries
        self.candidates = candidates
        self.keys = list(keys)
        self.device = device or queries.device
        vectors = math.prod(queries.shape[1:-1]) * math.prod(candidates.shape[1:-1])  # T·S of late interaction
        self.rows = max(1, int(chunk_size / math.sqrt(max(1, vectors))))

    def query_parts(self) -> Iterator[slice]:
        return self._parts(len(self.queries))

    def candidate_parts(self) -> Iterator[slice]:
        return self._parts(len(self.candidates))

    def _parts(self, length: int) -> Iterator[slice]:
        return (slice(start, min(start + self.rows, length)) for start in range(0, length, self.rows))

    def scores(self, part: slice, columns: slice) -> Tensor:
        return similarity(self.queries[part].to(self.device), self.candidates[columns].to(self.device))

    def same_key(self, part: slice, columns: slice, number: int = 0) -> Tensor:
        of_queries, of_candidates = self.keys[number]
        return of_queries[part].to(self.device)[:, None] == of_candidates[columns].to(self.device)

    def filled(self, part: slice, columns: int, value: float) -> Tensor:
        dtype = torch.promote_types(self.queries.dtype, torch.float32)
        return torch.full((part.stop - part.start, columns), value, dtype=dtype, device=self.device)
