"""How alike predicted and target adapters are, for each task and layer, through their factors only.

- alignment: cos([Â; B̂], [A; B]). It is high for adapters that share their initial A whether they do the same or not:
  read it beside the mean adapter's alignment.
- ΔW cosine and magnitude ratio, cos(B̂Â, BA) and ‖B̂Â‖/‖BA‖: the same in every gauge, (RA, BR⁻¹).
- effective rank of ΔW, exp(−Σ p ln p) with p = σ/Σσ.
- layer accuracy: whether ‖B̂Â − BA‖ is below ‖B̄Ā − BA‖ of the mean adapter.

All values are (B, L), B tasks and L layers in the layout's order, so that means over batches weighted by B, over ranks
too, are those of the whole set.
"""

import torch
from torch import Tensor

from trainerkit.adapter_layout import AdapterLayout, Factors
from trainerkit.functional.rank import effective_rank_of_product
from trainerkit.tasks.t2l.delta_w import cosine, dot, inner, squared_difference
from trainerkit.tasks.t2l.losses import in_full


@torch.no_grad()
def adapter_metrics(
    layout: AdapterLayout,
    predicted: Factors,
    target: Factors,
    mean: Factors | None = None,
    *,
    alignment: bool = True,
    effective_rank: bool = False,
    layer_accuracy: bool = True,
) -> dict[str, Tensor]:
    """Every measure of a batch, (B, L) each.

    Args:
        layout: of the adapters.
        predicted: (B, n, r, in) and (B, n, out, r) of each type.
        target: the same; may hold other keys.
        mean: the mean adapter's factors, (n, r, in) and (n, out, r), for what is compared with it.
        alignment: also `alignment`, and with `mean` `mean_alignment`.
        effective_rank: also `effective_rank` and `target_effective_rank`; a QR decomposition of each factor.
        layer_accuracy: with `mean` also `layer_accuracy`.

    Returns:
        `delta_w_cosine`, `magnitude_ratio`, with `mean` also `mean_delta_w_cosine`, and what was asked for.
    """
    found: dict[str, list[Tensor]] = {}
    predicted = in_full({key: predicted[key] for key in layout.keys})
    for t in layout.types:
        keys = f"A/{t.label}", f"B/{t.label}"
        a_hat, b_hat = (predicted[key] for key in keys)
        a, b = (target[key].to(predicted[key]) for key in keys)
        measured = product_measures(b_hat, a_hat, b, a)
        if alignment:
            measured["alignment"] = factor_alignment(b_hat, a_hat, b, a)
        if effective_rank:
            measured["effective_rank"] = effective_rank_of_product(b_hat, a_hat)
            measured["target_effective_rank"] = effective_rank_of_product(b, a)
        if mean is not None:
            mean_a, mean_b = (mean[key].to(predicted[key]).expand_as(predicted[key]) for key in keys)
            measured["mean_delta_w_cosine"] = product_measures(mean_b, mean_a, b, a)["delta_w_cosine"]
            if alignment:
                measured["mean_alignment"] = factor_alignment(mean_b, mean_a, b, a)
            if layer_accuracy:
                own, means = squared_difference(b_hat, a_hat, b, a), squared_difference(mean_b, mean_a, b, a)
                measured["layer_accuracy"] = (own < means).to(own.dtype)
        for name, values in measured.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values, dim=1) for name, values in found.items()}


def factor_alignment(b_hat: Tensor, a_hat: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """cos([Â; B̂], [A; B]) (…,), 0 where one of the two is zero; depends on the gauge.

    Args:
        b_hat: (…, out, r).
        a_hat: (…, r, in).
        b: as `b_hat`.
        a: as `a_hat`.
    """
    return cosine(dot(a_hat, a) + dot(b_hat, b), dot(a_hat, a_hat) + dot(b_hat, b_hat), dot(a, a) + dot(b, b))


def product_measures(b_hat: Tensor, a_hat: Tensor, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    """`delta_w_cosine`, 0 where a ΔW is zero, and `magnitude_ratio`, ‖B̂Â‖/‖BA‖, 1 where both are zero; (…,) each.

    Args:
        b_hat: (…, out, r).
        a_hat: (…, r, in).
        b: as `b_hat`.
        a: as `a_hat`.
    """
    squares, target_squares = inner(b_hat, a_hat, b_hat, a_hat), inner(b, a, b, a)
    ratio = squares.clamp_min(0).sqrt() / target_squares.clamp_min(0).sqrt()
    both_zero = (squares <= 0) & (target_squares <= 0)
    return {
        "delta_w_cosine": cosine(inner(b_hat, a_hat, b, a), squares, target_squares),
        "magnitude_ratio": torch.where(both_zero, 1.0, ratio),
    }


def change_gauge(layout: AdapterLayout, factors: Factors, rotations: Tensor) -> Factors:
    """(RA, BR⁻¹): other factors of the same ΔW.

    Args:
        layout: of the adapters.
        factors: (…, n, r, in) and (…, n, out, r) of each type.
        rotations: R, any invertible matrices, (r, r), or (L, r, r) with one for each layer.
    """
    rotations = rotations.expand(len(layout.names), -1, -1)
    changed: Factors = {}
    for t, own in zip(layout.types, rotations.split([len(t.names) for t in layout.types]), strict=True):
        changed[f"A/{t.label}"] = own @ factors[f"A/{t.label}"]
        changed[f"B/{t.label}"] = factors[f"B/{t.label}"] @ torch.linalg.inv(own)
    return changed


def gauge_note(alignment: float, delta_w_cosine: float) -> str | None:
    """A sentence where products agree and factors do not, or None: cosines above 0.9, and at least 0.1 below that.

    Args:
        alignment: cosine of the factors, a mean over layers and tasks.
        delta_w_cosine: of the products.
    """
    if not (delta_w_cosine > 0.9 and alignment < delta_w_cosine - 0.1):
        return None
    return (
        f"The adapters agree in ΔW (cosine {delta_w_cosine:.2f}) and not in their factors (alignment {alignment:.2f}): "
        "they are written in another gauge, (RA, BR⁻¹) for (A, B), which changes nothing in what they do. "
        "Judge them by ΔW, and train with target=delta_w."
    )
