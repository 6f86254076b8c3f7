"""Progressive training: some layers first, the others added group by group, each by a ramp.

Group 0, the initial layers, counts fully from the first step. Every `layer_addition_interval` epochs the next group is
added, and its share of the loss goes from 0 in the step that adds it to 1 after `layer_warmup_steps` optimizer steps:

    g(step) = clamp((step − start)/layer_warmup_steps, 0, 1)

A layer that is not there yet has share 0: it is not in the loss, nor in consistency and sparsity, and the weights of
the others stay what they are (`ReconstructionLoss`). All depends on the step and on the steps at which groups were
added, which a checkpoint keeps as plain numbers.

L: layers, in the layout's order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from trainerkit.adapter_layout import AdapterLayout
from trainerkit.part import Part
from trainerkit.tasks.t2l.layer_weights import check_patterns, matches

Order = Literal["type", "depth"]


def layer_groups(layout: AdapterLayout, initial_layers: Sequence[str], order: Order = "type") -> list[int]:
    """The number of each layer's group, (L,): 0 for the initial layers, the others 1, 2, … in the order they are added.

    Args:
        layout: of the adapters.
        initial_layers: patterns, see `trainerkit.tasks.t2l.layer_weights`.
        order: 'type', a group for each module type in the layout's order; 'depth', one for each depth from the first.

    Raises:
        ValueError: for a pattern that matches no layer.
    """
    check_patterns("initial_layers", initial_layers, layout.names)
    places = []
    for number, t in enumerate(layout.types):
        for name, depth in zip(t.names, t.depths, strict=True):
            is_initial = any(matches(name, pattern) for pattern in initial_layers)
            places.append(None if is_initial else number if order == "type" else depth)
    later = sorted({place for place in places if place is not None})
    return [0 if place is None else 1 + later.index(place) for place in places]


def ramp(step: int, start: int | None, warmup_steps: int) -> float:
    """The share of a group added at step `start`, 0 if it is not there yet (None)."""
    if start is None or step < start:
        return 0.0
    return 1.0 if warmup_steps == 0 else min(1.0, (step - start) / warmup_steps)


class Progressive(Part):
    """Which layers count how much, at each step; see above.

    A task calls `bind` once, `begin_epoch` when an epoch begins, and asks for `shares` in each step.

    Args:
        initial_layers: patterns of the layers that are there from the start.
        layer_addition_interval: epochs between additions.
        layer_warmup_steps: optimizer steps of a ramp; 0 for none.
        order: 'type' or 'depth', by which the others are added.

    Raises:
        ValueError: for a choice or number that is not allowed.
    """

    def __init__(
        self,
        initial_layers: Sequence[str],
        layer_addition_interval: int = 2,
        layer_warmup_steps: int = 100,
        order: Order = "type",
    ) -> None:
        if isinstance(initial_layers, str) or len(initial_layers) == 0:
            raise ValueError(f"initial_layers={initial_layers!r}: must be a list of at least one pattern")
        if layer_addition_interval < 1:
            raise ValueError(f"layer_addition_interval={layer_addition_interval}: must be 1 or more")
        if layer_warmup_steps < 0:
            raise ValueError(f"layer_warmup_steps={layer_warmup_steps}: must be 0 (at once) or more")
        if order not in ("type", "depth"):
            raise ValueError(f"order={order}: must be type or depth")
        self.initial_layers = list(initial_layers)
        self.layer_addition_interval = layer_addition_interval
        self.layer_warmup_steps = layer_warmup_steps
        self.order: Order = order
        self.groups: list[int] = []
        # The steps at which groups 1, 2, … were added.
        self._starts: list[int] = []

    def bind(self, layout: AdapterLayout) -> None:
        """Sort the layers into groups.

        Raises:
            ValueError: for a pattern that matches no layer.
        """
        self.groups = layer_groups(layout, self.initial_layers, self.order)

    def begin_epoch(self, epoch: int, step: int) -> list[int]:
        """Add the groups that are due; what has been added already stays as it is.

        Args:
            epoch: that begins, counted from 0.
            step: optimizer steps so far.

        Returns:
            The numbers of the groups that were added now.
        """
        due = min(epoch // self.layer_addition_interval, max(self.groups, default=0))
        added = list(range(len(self._starts) + 1, due + 1))
        self._starts += [step] * len(added)
        return added

    def shares(self, step: int, device: torch.device | str = "cpu") -> Tensor:
        """g of each layer, (L,) float32.

        Args:
            step: optimizer steps so far.
            device: where to.
        """
        starts: list[int | None] = [*self._starts, *[None] * max(self.groups, default=0)]
        of_group = [1.0] + [ramp(step, start, self.layer_warmup_steps) for start in starts]
        return torch.tensor([of_group[group] for group in self.groups], device=device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the steps at which groups were added."""
        return {"starts": list(self._starts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._starts = [int(start) for start in state["starts"]]
