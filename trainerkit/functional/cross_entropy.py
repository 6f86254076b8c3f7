"""Cross-entropy of a large vocabulary, without the logits of all positions at once.

The logits of N positions over V tokens are N·V numbers, and autograd keeps them, their logarithms of probabilities and
their gradients. Here a chunk of rows at a time goes through projection, loss and gradient, in the forward pass: what is
left of a chunk is its part of the gradients of `hidden` and `weight`. Backward multiplies these by the gradient of the
loss. That takes the three matrix products of the plain way; to compute chunks again in backward takes four.

Loss of a row with logits z, target y and p = softmax(z), nll = −log p_y:

    w · [(1−ε) · nll − (ε/V) · Σ_j log p_j] + λ · logsumexp(z)²,    w = (1−p_y)^γ

Its gradient by z_j is a·p_j − c, and another number for j = y: three numbers a row, and nothing else of the size of z.

Sources: label smoothing: C. Szegedy et al., 'Rethinking the Inception architecture', CVPR 2016 (arXiv:1512.00567);
focal loss: T.-Y. Lin et al., 'Focal loss for dense object detection', ICCV 2017 (arXiv:1708.02002); z-loss:
A. Chowdhery et al., 'PaLM', 2022 (arXiv:2204.02311), λ = 1e-4; soft-cap: 'Gemma 2', 2024 (arXiv:2408.00118); gradients
in the forward pass: P.-L. Hsu et al., 'Liger kernel', 2024 (arXiv:2410.10989).

N: positions, V: vocabulary, D: width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of a chunk. More makes longer matrix products, fewer stay in the cache: tests/benchmarks/cross_entropy.py.
_CHUNK = {"cpu": 2**22}
_CHUNK_ELSEWHERE = 2**27
# A weight's gradient in float16 is a sum over a chunk's rows, which may not pass 65,504 whatever the loss's scale. With
# these it does not while numbers of `hidden`, which are made smaller for it, stay below 1,000.
_HALF_ROWS, _HALF_SCALE = 2**12, 2**6


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    focal_gamma: float
    z_loss: float
    logit_softcap: float | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    row_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T`, a chunk of rows at a time; the formula stands at the top of the file.

    Under autocast the matrix products are of its type; the loss is float32, or float64 of float64. The gradients have
    been computed when this returns, unless gradients are switched off; there is no second derivative.

    Args:
        hidden: (…, D).
        weight: of the output layer, (V, D).
        targets: (…), int64, from 0 to V − 1 or `ignore_index`.
        ignore_index: the target of rows that do not count.
        label_smoothing: ε, from 0 to 1. As torch's: each of the V tokens gets ε/V of the target's probability, and the
            right one 1 − ε besides.
        focal_gamma: γ, 0 or more; 0 is cross-entropy. With label smoothing the factor stands before the smoothed loss.
        z_loss: λ, 0 or more, which keeps the logarithm of the sum near 0.
        logit_softcap: c, makes c·tanh(z/c) of the logits; None leaves them.
        row_weights: (…), by which each row's loss and negative log-likelihood are multiplied; the means stay over the
            number of rows. No gradient goes to them. None: 1 each.
        chunk_size: rows of a chunk; None: as many as have 2²² logits on the CPU (16 MiB), 2²⁷ elsewhere (512 MiB).

    Returns:
        The loss, and the negative log-likelihood alone in nats, detached, whatever the loss: perplexity is its
        exponential. Scalars, means over the rows that count; 0 with gradients of zeros if none does.

    Raises:
        ValueError: for shapes that do not fit, or an option outside its range.
    """
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden, weight: shapes {tuple(hidden.shape)} and {tuple(weight.shape)} do not fit; must be (…, D), (V, D)"
        )
    options = _Options(ignore_index, label_smoothing, focal_gamma, z_loss, logit_softcap)
    return _loss(hidden, weight, targets, row_weights, options, chunk_size)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    row_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` of logits (…, V) that are there already; half precision is computed in float32."""
    options = _Options(ignore_index, label_smoothing, focal_gamma, z_loss, logit_softcap)
    return _loss(logits, None, targets, row_weights, options, chunk_size)


def _loss(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    row_weights: Tensor | None,
    options: _Options,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    _check(hidden, targets, row_weights, options, chunk_size)
    vocabulary = hidden.shape[-1] if weight is None else weight.shape[0]
    rows = targets.numel()
    most = chunk_size or max(1, _CHUNK.get(hidden.device.type, _CHUNK_ELSEWHERE) // max(1, vocabulary))
    if _kind_of_products(hidden, weight) == torch.float16:
        most = min(most, _HALF_ROWS)
    chunks = max(1, -(-rows // most))
    size = max(1, -(-rows // chunks))  # of equal length, rather than a short one at the end
    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight is not None and weight.requires_grad)
    flat = hidden.reshape(rows, hidden.shape[-1])
    loss, nll = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        flat, weight, targets.reshape(rows), None if row_weights is None else row_weights.reshape(rows),
        options, size, wanted,
    )  # fmt: skip
    return loss, nll


def _check(
    hidden: Tensor, targets: Tensor, row_weights: Tensor | None, options: _Options, chunk_size: int | None
) -> None:
    if row_weights is not None and row_weights.shape != targets.shape:
        raise ValueError(f"row_weights: shape {tuple(row_weights.shape)}, must be {tuple(targets.shape)}, one a row")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"targets: shape {tuple(targets.shape)}, must be {tuple(hidden.shape[:-1])}, a target a row")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing={options.label_smoothing}: must be from 0 to 1")
    for name in ("focal_gamma", "z_loss"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"{name}={getattr(options, name)}: must be 0 or more")
    if options.logit_softcap is not None and not options.logit_softcap > 0:
        raise ValueError(f"logit_softcap={options.logit_softcap}: must be above 0, or null for none")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be 1 or more, or null to choose by the vocabulary")


class _ChunkedLoss(torch.autograd.Function):
    """Mean loss and mean nll of (N, D) rows, or of (N, V) logits if weight is None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        targets: Tensor,
        row_weights: Tensor | None,
        options: _Options,
        size: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        kind = _kind_of_products(hidden, weight)
        wide = torch.promote_types(kind, torch.float32)
        # Cast once: autocast would cast the weight for every chunk where it is no leaf.
        head = None if weight is None else weight.to(kind)
        grad_hidden = torch.empty_like(hidden, dtype=kind) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if weight is not None and wanted[1] else None
        counted = targets != options.ignore_index
        sums = []
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            rows = hidden[part].to(kind)
            logits = rows if head is None else rows @ head.T
            weights = None if row_weights is None else row_weights[part].to(wide)
            loss, nll, slope = _rows(logits, targets[part], counted[part], weights, options, wide, any(wanted))
            sums.append(torch.stack([loss, nll]))
            if slope is None:
                continue
            slope = slope.to(kind)
            if grad_hidden is not None:
                grad_hidden[part] = slope if head is None else slope @ head
            if grad_weight is not None and kind == wide:
                grad_weight.addmm_(slope.T, rows)
            elif grad_weight is not None and kind == torch.float16:
                grad_weight.add_(slope.T @ (rows / _HALF_SCALE), alpha=_HALF_SCALE)
            elif grad_weight is not None:
                grad_weight.add_(slope.T @ rows)
        # The gradients so far are of the sum: divided by N, those of small probabilities would vanish in float16.
        number = counted.sum().clamp_min(1)
        total = torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=wide, device=hidden.device)
        loss, nll = (part.clone() for part in total / number)  # clones: an output may not be a view of another
        ctx.kinds = hidden.dtype, weight.dtype if weight is not None else wide
        ctx.save_for_backward(grad_hidden, grad_weight, number)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, number = ctx.saved_tensors  # once: activation checkpointing unpacks them once only
        scale = grad_loss / number
        found = [
            None if gradient is None else (gradient.to(torch.promote_types(gradient.dtype, kind)) * scale).to(kind)
            for gradient, kind in zip(gradients, ctx.kinds, strict=True)
        ]
        return (*found, None, None, None, None, None)


def _kind_of_products(hidden: Tensor, weight: Tensor | None) -> torch.dtype:
    """The type in which a matrix product of both is computed, autocast's if it is on."""
    if weight is None:
        return hidden.dtype
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _rows(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    weights: Tensor | None,
    options: _Options,
    wide: torch.dtype,
    sloped: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of the loss and of the nll over the rows that count, and the loss's gradient by the logits if `sloped`."""
    cap = options.logit_softcap
    tanh = None
    if cap is not None:
        tanh = (logits.to(wide) / cap).tanh_()
        logits = tanh * cap
    logs = torch.log_softmax(logits, dim=-1, dtype=wide)
    right = torch.where(counted, targets, 0)[:, None]
    zero = logs.new_zeros(())
    nll = -logs.gather(1, right)[:, 0]
    log_sum = logits.gather(1, right)[:, 0].to(wide) + nll
    smoothing, gamma, z_loss = options.label_smoothing, options.focal_gamma, options.z_loss
    loss = nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * logs.mean(1)
    rest = -torch.expm1(-nll)  # 1 − p_y, without its rounding to 0
    factor, focal = torch.ones_like(nll), zero  # w, and −∂w/∂z_y · the loss before w
    if gamma:
        rest = rest.clamp_min(1e-30)  # or a power below 0 would be infinite
        factor = rest**gamma
        focal = gamma * factor * torch.exp(-nll) * loss
        loss = factor * loss
    if z_loss:
        loss = loss + z_loss * log_sum.square()
    kept = (loss, nll) if weights is None else (loss * weights, nll * weights)
    total = torch.where(counted, kept[0], zero).sum(), torch.where(counted, kept[1], zero).sum()
    if not sloped:
        return (*total, None)
    # Of the right token p − 1 is taken as −rest: where p is nearly 1 the difference would be all rounding.
    of_z = 2 * z_loss * log_sum
    of_right = factor * (smoothing - rest) - focal + of_z * torch.exp(-nll)
    of_p = factor + of_z + (focal / rest if gamma else zero)
    slope = logs.exp_().mul_(torch.where(counted, of_p, zero)[:, None])
    slope.scatter_(1, right, torch.where(counted, of_right, zero)[:, None])
    if smoothing:
        slope.sub_(torch.where(counted, factor * (smoothing / logs.shape[1]), zero)[:, None])
    if tanh is not None:
        slope.mul_(tanh.square_().neg_().add_(1))
    if weights is not None:
        slope.mul_(weights[:, None])
    return (*total, slope)
