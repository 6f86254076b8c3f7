"""The effective rank of a matrix, and of a product of two that is never formed.

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
    return _of_matrices(_full(matrix.flatten(1)))


@torch.no_grad()
def effective_rank_of_product(left: Tensor, right: Tensor) -> Tensor:
    """The effective rank of each product left·right, from an r×r matrix that has its singular values.

    With left = Q₁R₁ and rightᵀ = Q₂R₂ the product is Q₁(R₁R₂ᵀ)Q₂ᵀ, and the Q change no singular value.

    Args:
        left: (…, m, r).
        right: (…, r, n). Half precision is computed in float32.

    Returns:
        (…,); 0 where the product is zero, NaN where a factor is not finite.
    """
    with torch.autocast(left.device.type, enabled=False):
        cores = [torch.linalg.qr(_full(factor), mode="r").R for factor in (left, right.mT)]
        return _of_matrices(cores[0] @ cores[1].mT)


def _of_matrices(matrices: Tensor) -> Tensor:
    """(…, m, n) to (…,)."""
    # LAPACK raises where it should give NaN.
    finite = torch.isfinite(matrices).flatten(-2).all(-1)
    values = torch.linalg.svdvals(torch.where(finite[..., None, None], matrices, 0.0))
    total = values.sum(-1)
    p = values / total[..., None]
    rank = torch.where(total > 0, torch.exp(torch.special.entr(p).sum(-1)), 0.0)
    return torch.where(finite, rank, torch.nan)


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
