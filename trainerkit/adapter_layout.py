"""Which layers of a base model LoRA adapters change, and the order of everything that is 'per layer'.

Shapes: n layers of a type, r the rank, in and out the features of a layer, L layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# "A/up": (n, r, in) and "B/up": (n, out, r) for the label of each type; more dimensions may stand before these.
Factors = dict[str, Tensor]
# A (r, in) and B (out, r) of each layer.
LayerFactors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModuleType:
    """All layers of one shape whose names differ in numbers alone.

    Args:
        label: short name, different for each type, as 'q_proj'.
        pattern: the layers' name with * for the numbers, as 'model.layers.*.self_attn.q_proj'.
        names: of the layers, by depth.
        depths: of the layers, counted from 0 among all that occur in the layout.
        in_features: of each.
        out_features: of each.
    """

    label: str
    pattern: str
    names: tuple[str, ...]
    depths: tuple[int, ...]
    in_features: int
    out_features: int


class AdapterLayout:
    """What adapters change in a base model, and in which order everything 'per layer' stands: type by type, by depth.

    A layer's depth is the rank of the numbers in its name, (3,) in 'blocks.3.up', among those that occur; one without
    any, such as 'lm_head', comes first.

    Args:
        layers: (name, in_features, out_features) of each.
        rank: of the adapters.
        scaling: what B·A is multiplied with.

    Raises:
        ValueError: for no layers, a name twice, or impossible numbers.
    """

    def __init__(self, layers: Sequence[Sequence[Any]], rank: int, scaling: float = 1.0) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank}: must be 1 or more")
        if not math.isfinite(scaling) or scaling == 0:
            raise ValueError(f"scaling={scaling}: must be a number other than 0")
        if len(layers) == 0:
            raise ValueError("layers=[]: an adapter changes at least one layer")
        self.rank = rank
        self.scaling = float(scaling)
        self.types = _types([_checked(layer) for layer in layers])
        self.depths = 1 + max(depth for one in self.types for depth in one.depths)

    @property
    def names(self) -> list[str]:
        """Of all layers, in their order, (L,)."""
        return [name for one in self.types for name in one.names]

    @property
    def layers(self) -> list[list[Any]]:
        """[name, in_features, out_features] of each layer, in their order; makes the same layout again."""
        return [[name, one.in_features, one.out_features] for one in self.types for name in one.names]

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of the factors of one adapter: "A/LABEL" (n, r, in) and "B/LABEL" (n, out, r) of each type."""
        shapes = {}
        for one in self.types:
            shapes[f"A/{one.label}"] = (len(one.names), self.rank, one.in_features)
            shapes[f"B/{one.label}"] = (len(one.names), one.out_features, self.rank)
        return shapes

    @property
    def keys(self) -> list[str]:
        """Of the factors."""
        return list(self.shapes)

    @property
    def numel(self) -> int:
        """Numbers of one adapter."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def pack(self, layers: Mapping[str, tuple[Tensor, Tensor]]) -> Factors:
        """One adapter's factors, (n, r, in) and (n, out, r) for each type, from A and B of each layer."""
        packed = {}
        for one in self.types:
            for place, side in enumerate("AB"):
                packed[f"{side}/{one.label}"] = torch.stack([layers[name][place] for name in one.names])
        return packed

    def unpack(self, factors: Factors) -> LayerFactors:
        """A (…, r, in) and B (…, out, r) of each layer, views of `factors`, whose other dimensions stand before."""
        return {
            name: (factors[f"A/{one.label}"][..., place, :, :], factors[f"B/{one.label}"][..., place, :, :])
            for one in self.types
            for place, name in enumerate(one.names)
        }


def _checked(layer: Sequence[Any]) -> tuple[str, int, int]:
    name, *sizes = layer
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes)
    if not isinstance(name, str) or not all(name.split(".")) or len(sizes) != 2 or not whole:
        raise ValueError(f"layers={list(layer)}: each must be a name and two sizes, in_features and out_features")
    return name, sizes[0], sizes[1]


def _types(layers: Sequence[tuple[str, int, int]]) -> tuple[ModuleType, ...]:
    """The types in the order in which they first occur."""
    depth_of = {numbers: depth for depth, numbers in enumerate(sorted({_numbers(name) for name, _, _ in layers}))}
    groups: dict[str, dict[tuple[int, int], list[str]]] = {}  # by pattern and shape
    known: set[str] = set()
    for name, width_in, width_out in layers:
        if name in known:
            raise ValueError(f"layers={name}: is named twice")
        known.add(name)
        groups.setdefault(_pattern(name), {}).setdefault((width_in, width_out), []).append(name)
    types: list[ModuleType] = []
    for (pattern, of_shape), label in zip(groups.items(), _labels(list(groups)), strict=True):
        for shape, group in of_shape.items():
            names = tuple(sorted(group, key=_numbers))
            depths = tuple(depth_of[_numbers(name)] for name in names)
            own = label if len(of_shape) == 1 else f"{label}_{shape[0]}x{shape[1]}"
            while any(own == other.label for other in types):
                own += "_"
            types.append(ModuleType(own, pattern, names, depths, *shape))
    return tuple(types)


def _labels(patterns: list[str]) -> list[str]:
    """As many last words of each pattern as no other one ends with."""
    words = [[part for part in pattern.split(".") if part != "*"] for pattern in patterns]
    labels: list[str] = []
    for pattern, own in zip(patterns, words, strict=True):
        others = [other for other in words if other is not own]
        endings = ("_".join(own[-count:]) for count in range(1, len(own) + 1))
        free = (
            label
            for count, label in enumerate(endings, start=1)
            if label not in labels and all("_".join(other[-count:]) != label for other in others)
        )
        # There is none for 'a.b' and 'a.*.b', which differ in the place of their numbers alone.
        label = next(free, pattern.replace("*", "n").replace(".", "_"))
        while label in labels:
            label += "_"
        labels.append(label)
    return labels


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())
