"""How far predicted adapters are from their targets.

    L = Σ_l w_l·ℓ_l + λ_c·C + λ_s·S,  ℓ_l the mean over the tasks of
        delta_w         ℓ(B̂Â, BA)
        factors         ½·[ℓ(Â, A) + ℓ(B̂, B)]
        factors_zscore  the same of (x − mean)/std, by the statistics of the library

with ℓ the mean over a matrix' numbers of d² (mse), |d| (l1) or huber_δ(d), or one minus the cosine of both matrices; C
and S of `trainerkit.tasks.t2l.regularizers`. Layer weights w have mean 1, so that L grows with the number of layers.

Losses of factors assume that all adapters share one gauge: BA is the same for (RA, BR⁻¹). `delta_w` does not care.

Where layers are added in the course of training each has a share g_l from 0 to 1: w_l·g_l takes the place of w_l, and C
and S are means weighted by g_l. Nothing is divided by the sum of w_l·g_l: the loss of a layer that is there stays what
it was when another one comes.

B: tasks, L: layers, n: layers of one type, r: rank; A (B, n, r, in), B (B, n, out, r).
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainerkit.adapter_layout import AdapterLayout, Factors
from trainerkit.part import Part
from trainerkit.tasks.t2l.delta_w import cosine, dot, inner, pointwise_difference, squared_difference
from trainerkit.tasks.t2l.regularizers import consistency, sparsity

Target = Literal["delta_w", "factors", "factors_zscore"]
Kind = Literal["mse", "l1", "huber", "cosine"]
Statistics = Mapping[str, tuple[Tensor, Tensor]]
_KINDS = ("mse", "l1", "huber", "cosine")
_TARGETS = ("delta_w", "factors", "factors_zscore")


def matrix_loss(predicted: Tensor, target: Tensor, kind: Kind = "mse", delta: float = 1.0) -> Tensor:
    """ℓ of matrices (…, p, q), each by itself: (…,).

    Huber is ½d² up to |d| = δ and δ·(|d| − ½δ) beyond, without a factor: 'mse' is d², twice of huber's small errors.

    Raises:
        ValueError: for another kind.
    """
    if kind == "mse":
        return (predicted - target).square().mean((-2, -1))
    if kind == "l1":
        return (predicted - target).abs().mean((-2, -1))
    if kind == "huber":
        return F.huber_loss(predicted, target, reduction="none", delta=delta).mean((-2, -1))
    if kind == "cosine":
        return 1 - cosine(dot(predicted, target), dot(predicted, predicted), dot(target, target))
    raise ValueError(f"kind={kind}: must be one of {', '.join(_KINDS)}")


def product_loss(b_hat: Tensor, a_hat: Tensor, b: Tensor, a: Tensor, kind: Kind = "mse", delta: float = 1.0) -> Tensor:
    """ℓ(B̂Â, BA) of each pair, (…,), as `matrix_loss` of the products; a gradient reaches B̂ and Â alone.

    'mse' and 'cosine' by Gram matrices, see `trainerkit.tasks.t2l.delta_w` for their rounding; 'l1' and 'huber' form
    the products piece by piece.

    Raises:
        ValueError: for another kind.
    """
    numbers = b.shape[-2] * a.shape[-1]
    if kind == "mse":
        return squared_difference(b_hat, a_hat, b, a) / numbers
    if kind == "cosine":
        b, a = b.detach(), a.detach()
        squares = inner(b_hat, a_hat, b_hat, a_hat)
        return 1 - cosine(inner(b_hat, a_hat, b, a), squares, inner(b, a, b, a))
    if kind in ("l1", "huber"):
        return pointwise_difference(b_hat, a_hat, b, a, kind, delta) / numbers
    raise ValueError(f"kind={kind}: must be one of {', '.join(_KINDS)}")


def in_full(factors: Mapping[str, Tensor]) -> Factors:
    """Factors of half precision in float32: sums of thousands of small differences are lost in it."""
    halves = (torch.float16, torch.bfloat16)
    return {key: factor.float() if factor.dtype in halves else factor for key, factor in factors.items()}


def zscore(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x − mean)/std; 0 where std is 0 or rounding alone: there the library has one value, and so has the network.

    Rounding is what is below 1e-6 of the mean, or of the largest std.
    """
    varies = std > 1e-6 * torch.maximum(mean.abs(), std.max())
    return (values - mean) * torch.where(varies, std, 1.0).reciprocal().mul_(varies)


class LossParts(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        total: L, with its gradient.
        layers: ℓ_l, the mean over the tasks, without weights and gradient, (L,).
        consistency: C, without λ_c and gradient.
        sparsity: S, without λ_s and gradient.
    """

    total: Tensor
    layers: Tensor
    consistency: Tensor
    sparsity: Tensor


class ReconstructionLoss(Part):
    """L = Σ_l w_l·ℓ_l + λ_c·C + λ_s·S, see above.

    Args:
        layout: of the adapters.
        target: 'delta_w', 'factors' or 'factors_zscore'.
        kind: 'mse', 'l1', 'huber' or 'cosine'.
        delta: δ of huber, in the units of what is compared.
        consistency: λ_c.
        sparsity: λ_s.

    Raises:
        ValueError: for a choice or number that is not allowed.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        target: Target = "delta_w",
        kind: Kind = "mse",
        delta: float = 1.0,
        consistency: float = 0.1,
        sparsity: float = 0.01,
    ) -> None:
        if target not in _TARGETS:
            raise ValueError(f"target={target}: must be one of {', '.join(_TARGETS)}")
        if kind not in _KINDS:
            raise ValueError(f"kind={kind}: must be one of {', '.join(_KINDS)}")
        if not 0 < delta < math.inf:
            raise ValueError(f"delta={delta}: must be above 0")
        for name, value in {"consistency": consistency, "sparsity": sparsity}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: must be 0 or more")
        self.layout = layout
        self.target: Target = target
        self.kind: Kind = kind
        self.delta = delta
        self.consistency = consistency
        self.sparsity = sparsity

    def __call__(
        self,
        predicted: Factors,
        target: Mapping[str, Tensor],
        weights: Tensor,
        statistics: Statistics | None = None,
        shares: Tensor | None = None,
    ) -> LossParts:
        """The loss of a batch.

        Args:
            predicted: (B, n, r, in) and (B, n, out, r) of each type.
            target: the same; may hold other keys, as a batch does.
            weights: w (L,), in the layout's order.
            statistics: mean and std of each key, asked for by 'factors_zscore' alone.
            shares: g (L,) of `Progressive`; None for all layers from the start.

        Raises:
            ValueError: for tensors that are missing or have another shape.
        """
        self._check(predicted, target, weights, shares)
        predicted = in_full(predicted)
        layers = self.layer_losses(predicted, target, statistics)
        counted = weights if shares is None else weights * shares
        total = (counted.to(layers) * layers).sum()
        added = []
        for coefficient, function in ((self.consistency, consistency), (self.sparsity, sparsity)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and coefficient > 0):
                added.append(function(self.layout, predicted, shares))
            if coefficient > 0:
                total = total + coefficient * added[-1]
        return LossParts(total, layers.detach(), added[0].detach(), added[1].detach())

    def layer_losses(
        self, predicted: Factors, target: Mapping[str, Tensor], statistics: Statistics | None = None
    ) -> Tensor:
        """ℓ_l, the mean over the tasks, with its gradient, (L,).

        Raises:
            ValueError: for 'factors_zscore' without statistics.
        """
        if self.target == "factors_zscore" and statistics is None:
            raise ValueError("target=factors_zscore: needs the statistics of the factors")
        found = []
        for t in self.layout.types:
            keys = f"A/{t.label}", f"B/{t.label}"
            (a_hat, b_hat), (a, b) = [predicted[key] for key in keys], [target[key].to(predicted[key]) for key in keys]
            if self.target == "delta_w":
                losses = product_loss(b_hat, a_hat, b, a, self.kind, self.delta)
            else:
                if statistics is not None and self.target == "factors_zscore":
                    (a_hat, a), (b_hat, b) = [
                        [zscore(values, *statistics[key]) for values in pair]
                        for key, pair in zip(keys, ((a_hat, a), (b_hat, b)), strict=True)
                    ]
                losses = (
                    matrix_loss(a_hat, a, self.kind, self.delta) + matrix_loss(b_hat, b, self.kind, self.delta)
                ) / 2
            found.append(losses.mean(0))
        return torch.cat(found)

    def _check(self, predicted: Factors, target: Mapping[str, Tensor], weights: Tensor, shares: Tensor | None) -> None:
        for key, shape in self.layout.shapes.items():
            for name, factors in (("predicted", predicted), ("target", target)):
                if key not in factors:
                    raise ValueError(f"{name}: {key} is missing")
                if factors[key].shape[1:] != shape or factors[key].shape != predicted[key].shape:
                    wanted = (len(predicted[key]), *shape)
                    raise ValueError(f"{name}: {key} has shape {tuple(factors[key].shape)}; must be {wanted}")
        for name, vector in (("weights", weights), ("shares", shares)):
            if vector is not None and vector.shape != (len(self.layout.names),):
                raise ValueError(f"{name}: shape {tuple(vector.shape)}; must be ({len(self.layout.names)},)")
