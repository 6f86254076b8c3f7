"""The effective rank of a matrix.

Source: O. Roy, M. Vetterli, 'The effective rank: a measure of effective dimensionality', EUSIPCO 2007.
"""

import torch
from torch import Tensor


@torch.no_grad()
def effective_rank(matrix: Tensor) -> Tensor:
    """exp(−Σ p ln p) with p = σ/Σσ: from 1 to the rank, k for k equal singular values (Roy and Vetterli 2007).

    Args:
        matrix: (m, n, …); further dimensions are joined to the second. Half precision is computed in float32.

    Returns:
        A scalar; 0 for a matrix of zeros, NaN for one that is not finite.
    """
    flat = matrix.flatten(1)
    flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    # LAPACK raises where it should give NaN.
    finite = torch.isfinite(flat).all()
    values = torch.linalg.svdvals(torch.where(finite, flat, 0.0))
    total = values.sum()
    p = values / total
    rank = torch.where(total > 0, torch.exp(torch.special.entr(p).sum()), 0.0)
    return torch.where(finite, rank, torch.nan)
