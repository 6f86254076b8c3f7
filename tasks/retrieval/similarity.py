"""How alike two embeddings are: the cosine of vectors, or late interaction (MaxSim) of sequences of vectors.

Late interaction: O. Khattab, M. Zaharia, 'ColBERT', SIGIR 2020 (arXiv:2004.12832): each vector of the query takes the
most alike one of the candidate; these cosines are added up.

N: queries, M: candidates, D: width, T and S: vectors of a query and of a candidate; a vector of zeros is padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_MOST_PRODUCTS = 2**24  # of vectors with vectors that late interaction holds at once


def similarity(queries: Tensor, candidates: Tensor) -> Tensor:
    """All similarities of queries (N, D) and candidates (M, D); or (N, T, D) and (M, S, D) for late interaction.

    In float32 under autocast too. The lengths of the vectors count for nothing. Late interaction holds the products of
    one block of queries at a time.

    Returns:
        (N, M): cosines, or the means of the query's T' largest cosines, T' the number of vectors that are no padding;
        a mean, where ColBERT has a sum, so that temperatures and margins mean the same for both.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if queries.ndim not in (2, 3) or candidates.ndim != queries.ndim or queries.shape[-1] != candidates.shape[-1]:
        raise ValueError(
            f"queries, candidates: shapes {tuple(queries.shape)} and {tuple(candidates.shape)}; must be (N, D) and "
            "(M, D), or (N, T, D) and (M, S, D)"
        )
    with torch.autocast(queries.device.type, enabled=False):
        queries, candidates = normalized(queries), normalized(candidates)
        if queries.ndim == 2:
            return queries @ candidates.T
        step = max(1, _MOST_PRODUCTS // max(1, queries.shape[1] * candidates.shape[0] * candidates.shape[1]))
        if len(queries) <= step:
            return _max_sim(queries, candidates)
        # The products of a block are computed again for its gradient: kept, they would be N·M·T·S numbers.
        blocks = [
            checkpoint(_max_sim, block, candidates, use_reentrant=False, preserve_rng_state=False)
            for block in queries.split(step)
        ]
        return torch.cat(blocks)


def _max_sim(queries: Tensor, candidates: Tensor) -> Tensor:
    """(N, M) of vectors of length 1."""
    products = torch.einsum("ntd,msd->nmts", queries, candidates)
    padding = ~candidates.any(-1)
    best = products.masked_fill(padding[None, :, None, :], -1.0).amax(-1)  # (N, M, T)
    there = queries.any(-1)[:, None]
    return (best * there).sum(-1) / there.sum(-1).clamp(min=1)


def normalized(embeddings: Tensor) -> Tensor:
    """The same of length 1, in float32 or float64; zeros stay zeros."""
    if embeddings.dtype != torch.float64:
        embeddings = embeddings.float()
    return F.normalize(embeddings, dim=-1)
