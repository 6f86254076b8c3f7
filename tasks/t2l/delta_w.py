"""What is asked of ΔW = B·A through its factors, never holding the whole of it.

By r×r Gram matrices, ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂)∘(A₁A₂ᵀ), for which r·(in + out) numbers are read; the product has in·out.
For the difference D = B̂Â − BA the terms of ‖D‖² = ‖B̂Â‖² − 2⟨B̂Â, BA⟩ + ‖BA‖² cancel where a prediction is good, and
float32 leaves some 1e-6·‖BA‖² of error: all of ‖D‖² where ‖D‖/‖BA‖ is 1e-3. With E = B̂ − B and F = Â − A,

    D = EÂ + BF,  ‖D‖² = Σ (EᵀE)∘(ÂÂᵀ) + 2·Σ (EᵀB)∘(ÂFᵀ) + Σ (BᵀB)∘(FFᵀ)

with terms no larger than E and F: nothing cancels where the factors agree. Where the products agree and the factors do
not (another gauge, (RA, BR⁻¹)) it is about as good as the first form. The gradients are 2·DÂᵀ = 2(E·ÂÂᵀ + B·FÂᵀ) for
B̂ and 2·B̂ᵀD = 2(B̂ᵀE·Â + B̂ᵀB·F) for Â; their error is relative to ‖D‖, not to its square.

L1 and Huber losses need every number of D, which is formed piece by piece.

Shapes: … tasks and layers, A (…, r, in), B (…, out, r); N: all matrices of a call in one row.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

# Numbers held at one time beyond inputs, outputs and gradients: 16 MiB of float32, about what a cache holds.
_PIECE = 2**22


def dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ of matrices (…, p, q), (…,), without their product in memory."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.matmul(x.flatten(-2).unsqueeze(-2), y.flatten(-2).unsqueeze(-1))[..., 0, 0]


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """⟨B₁A₁, B₂A₂⟩ (…,), the sum of the products of their numbers; differentiable, never in half precision.

    Args:
        b1: (…, out, r); the dimensions before fit those of the others by broadcasting.
        a1: (…, r, in).
        b2: (…, out, r').
        a2: (…, r', in).
    """
    with torch.autocast(a1.device.type, enabled=False):
        return ((b1.mT @ b2) * (a1 @ a2.mT)).sum((-2, -1))


def cosine(product: Tensor, squares: Tensor, target_squares: Tensor) -> Tensor:
    """cos(x̂, x) from ⟨x̂, x⟩, ‖x̂‖² and ‖x‖²; 0 where one of the two is zero, and then without a gradient that explodes.

    A prediction shorter than 1e-6 of its target counts as that long.
    """
    there = target_squares > 0
    target_squares = torch.where(there, target_squares, 1.0)
    length = squares.clamp_min(1e-12 * target_squares).sqrt()
    return product / length / target_squares.sqrt() * there


def squared_difference(b_hat: Tensor, a_hat: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """‖B̂Â − BA‖² (…,), the sum over all numbers; a gradient reaches B̂ and Â alone.

    Relative errors to be expected of float32, measured at 4096×4096, rank 8: in one gauge, where the factors come near
    as the products do, 1e-6 of the value and of the gradients, however small D is. In different gauges, with
    q = ‖D‖/‖BA‖, 3e-6/q² of the value, which is all of it at q = 1e-3 and may even be below zero; 6e-6/q of the
    gradients.

    Args:
        b_hat: (…, out, r).
        a_hat: (…, r, in).
        b: as `b_hat`.
        a: as `a_hat`.
    """
    rows = [factor.reshape(-1, *factor.shape[-2:]) for factor in (b_hat, a_hat, b.detach(), a.detach())]
    result: Tensor = _SquaredDifference.apply(*rows)  # type: ignore[no-untyped-call]
    return result.view(a_hat.shape[:-2])


def pointwise_difference(
    b_hat: Tensor, a_hat: Tensor, b: Tensor, a: Tensor, kind: Literal["l1", "huber"], delta: float = 1.0
) -> Tensor:
    """Σ |d| or Σ huber(d) (…,) over the numbers d of B̂Â − BA, at most `_PIECE` of them (or a row) at a time.

    A gradient reaches B̂ and Â alone; it is computed on the way, since it takes the same products.

    Args:
        b_hat: (…, out, r).
        a_hat: (…, r, in).
        b: as `b_hat`.
        a: as `a_hat`.
        kind: 'l1', or 'huber': ½d² up to |d| = δ, δ·(|d| − ½δ) beyond.
        delta: δ.
    """
    rows = [factor.reshape(-1, *factor.shape[-2:]) for factor in (b_hat, a_hat, b.detach(), a.detach())]
    result: Tensor = _PointwiseDifference.apply(*rows, kind, delta)  # type: ignore[no-untyped-call]
    return result.view(a_hat.shape[:-2])


class _SquaredDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b_hat: Tensor, a_hat: Tensor, b: Tensor, a: Tensor) -> Tensor:
        values, grams = [], []
        with torch.autocast(a.device.type, enabled=False):
            for part in _pieces(len(a), b[:1].numel() + a[:1].numel()):
                e, f = b_hat[part] - b[part], a_hat[part] - a[part]
                ee, eb, bb = e.mT @ e, e.mT @ b[part], b[part].mT @ b[part]
                aa, af, ff = a_hat[part] @ a_hat[part].mT, a_hat[part] @ f.mT, f @ f.mT
                values.append((ee * aa + 2 * eb * af + bb * ff).sum((-2, -1)))
                # B̂ = E + B.
                grams.append(torch.stack([aa, af.mT, ee + eb.mT, eb + bb]))
        ctx.save_for_backward(b_hat, a_hat, b, a, torch.cat(grams, dim=1))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        b_hat, a_hat, b, a, grams = ctx.saved_tensors
        grad_b = torch.empty_like(b_hat) if ctx.needs_input_grad[0] else None
        grad_a = torch.empty_like(a_hat) if ctx.needs_input_grad[1] else None
        with torch.autocast(a.device.type, enabled=False):
            aa, fa, hat_e, hat_b = 2 * grad[:, None, None] * grams
            for part in _pieces(len(a), b[:1].numel() + a[:1].numel()):
                if grad_b is not None:
                    torch.bmm(b_hat[part] - b[part], aa[part], out=grad_b[part])
                    grad_b[part].baddbmm_(b[part], fa[part])
                if grad_a is not None:
                    torch.bmm(hat_e[part], a_hat[part], out=grad_a[part])
                    grad_a[part].baddbmm_(hat_b[part], a_hat[part] - a[part])
        return grad_b, grad_a, None, None


class _PointwiseDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b_hat: Tensor, a_hat: Tensor, b: Tensor, a: Tensor, kind: str, delta: float) -> Tensor:
        out, width = b.shape[1], a.shape[2]
        values = a.new_zeros(len(a))
        grad_b = torch.empty_like(b_hat) if ctx.needs_input_grad[0] else None
        grad_a = torch.zeros_like(a_hat) if ctx.needs_input_grad[1] else None
        with torch.autocast(a.device.type, enabled=False):
            for part in _pieces(len(a), out * width):
                for rows in _pieces(out, width * len(a[part])):
                    mine = b_hat[part, rows]
                    d = torch.bmm(b[part, rows], a[part]).baddbmm_(mine, a_hat[part], beta=-1)
                    slope = d.sign() if kind == "l1" else d.clamp(-delta, delta)
                    # |d| = s·d; and huber is c·(d − ½c) with c, the slope, d between −δ and δ.
                    values[part] += (d if kind == "l1" else d - slope / 2).mul_(slope).sum((-2, -1))
                    if grad_b is not None:
                        grad_b[part, rows] = slope @ a_hat[part].mT
                    if grad_a is not None:
                        grad_a[part].baddbmm_(mine.mT, slope)
        ctx.save_for_backward(grad_b, grad_a)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad[:, None, None]
        scaled = [None if saved is None else saved * scale for saved in ctx.saved_tensors]
        return *scaled, None, None, None, None


def _pieces(total: int, each: int) -> Iterator[slice]:
    """Slices of `total` things of `each` numbers, one thing or at most `_PIECE` numbers in each."""
    step = max(1, _PIECE // each)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
