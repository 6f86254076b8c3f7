"""What each adapted layer counts for in the loss, and how layers are named by patterns.

A pattern is a glob, or a plain name: it means every layer whose name it matches as a whole or from some dot on, so that
`q_proj` and `layers.0.*.q_proj` both mean `model.layers.0.self_attn.q_proj`.

L: layers, in the layout's order.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from trainerkit.adapter_layout import AdapterLayout
from trainerkit.errors import did_you_mean
from trainerkit.part import Part

Weighting = Literal["uniform", "by_parameter_count", "by_depth", "custom"]
_KINDS = ("uniform", "by_parameter_count", "by_depth", "custom")


def layer_weights(
    layout: AdapterLayout,
    kind: Weighting = "uniform",
    decay: float = 0.9,
    custom: Mapping[str, float] | None = None,
) -> Tensor:
    """Weights of the layers, with mean 1, (L,) float32.

    Args:
        layout: of the adapters.
        kind: 'uniform'; 'by_parameter_count', ∝ r·(in + out); 'by_depth', ∝ decay^depth, earlier layers heavier;
            'custom'.
        decay: of 'by_depth', above 0 up to 1.
        custom: for 'custom', patterns (see above) and their weights, 0 or more. Of several patterns that match a layer
            the longest counts, of equally long ones the last; a layer that none matches has weight 1, before all are
            divided by their mean.

    Raises:
        ValueError: for a choice or number that is not allowed, a pattern that matches no layer, or weights that are
            all 0.
    """
    _check(kind, decay, custom)
    if kind == "by_parameter_count":
        weights = [float(t.in_features + t.out_features) for t in layout.types for _ in t.names]
    elif kind == "by_depth":
        weights = [decay**depth for t in layout.types for depth in t.depths]
    elif kind == "custom":
        weights = _custom(layout.names, custom or {})
    else:
        weights = [1.0] * len(layout.names)
    mean = sum(weights) / len(weights)
    if not mean > 0:
        raise ValueError(f"custom={dict(custom or {})}: at least one layer must have a weight above 0")
    return torch.tensor([weight / mean for weight in weights])


class LayerWeighting(Part):
    """Makes the weights of the layers once the layout is known: `layer_weights` with these arguments.

    Raises:
        ValueError: as `layer_weights`; for a pattern that matches no layer, when called.
    """

    def __init__(
        self, kind: Weighting = "uniform", decay: float = 0.9, custom: Mapping[str, float] | None = None
    ) -> None:
        _check(kind, decay, custom)
        self.kind: Weighting = kind
        self.decay = decay
        self.custom = custom

    def __call__(self, layout: AdapterLayout) -> Tensor:
        """Weights of the layers, with mean 1, (L,) float32."""
        return layer_weights(layout, self.kind, self.decay, self.custom)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a layer."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def check_patterns(key: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse patterns that mean no layer.

    Args:
        key: of the setting, for the message.
        patterns: what was given.
        names: of all layers.

    Raises:
        ValueError: names the first one, and the layers whose names or endings resemble it.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parts = [name.split(".") for name in names]
            endings = dict.fromkeys(".".join(part[-count:]) for part in parts for count in range(1, len(part) + 1))
            hint = did_you_mean(pattern, endings) or f"The layers are {', '.join(names[:4])}{', …' * (len(names) > 4)}"
            raise ValueError(f"{key}={pattern}: matches none of the {len(names)} adapted layers. {hint}")


def _check(kind: str, decay: float, custom: Mapping[str, float] | None) -> None:
    if kind not in _KINDS:
        raise ValueError(f"kind={kind}: must be one of {', '.join(_KINDS)}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay}: must be above 0 up to 1")
    if bool(custom) != (kind == "custom"):
        problem = "needs patterns and weights" if kind == "custom" else "is for kind=custom alone"
        raise ValueError(f"custom={custom}: {problem}, kind={kind}")


def _custom(names: Sequence[str], custom: Mapping[str, float]) -> list[float]:
    for pattern, weight in custom.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"custom.{pattern}={weight}: must be 0 or more")
    check_patterns("custom", custom, names)
    by_length = sorted(custom, key=len)  # stable: of equally long ones the last stays last
    found = []
    for name in names:
        own = [pattern for pattern in by_length if matches(name, pattern)]
        found.append(float(custom[own[-1]]) if own else 1.0)
    return found
