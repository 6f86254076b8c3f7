"""Compare the gradient that backward gives with the numeric one, in float64, before training begins.

For sampled coordinates w_i of the parameters the derivative of the loss is taken as a central difference,
D(h) = (L(w_i + h) − L(w_i − h)) / 2h with h = 6e-6 · max(1, |w_i|) and with h/2; (4·D(h/2) − D(h))/3 has an error of
order h⁴. |D(h/2) − D(h)|, and the same of second differences, say how far it can be trusted. A backward that was
written by hand and is wrong (`torch.autograd.Function`, a kernel, a `detach()` in the wrong place) is off by far more.

Source: W. H. Press et al., 'Numerical Recipes', section 5.7; as in `torch.autograd.gradcheck`, but of a whole training
step.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trainerkit.callbacks._parameters import as_patterns, is_built, select
from trainerkit.callbacks._trainer import of_every_rank, refuse_sharded
from trainerkit.callbacks._twin import clone_batch, make_twin, run_step, unseen
from trainerkit.callbacks.exact_resume import random_state, set_random_state

_STEP = 6e-6  # about the cube root of float64's resolution, where cutting off and rounding cost the same
_ROUNDING = 1e-15  # of a loss in float64, relative


class GradientMismatch(ValueError):
    """The gradient that backward gives is not the derivative of the loss."""


@dataclass(frozen=True)
class Coordinate:
    """One element of one parameter, and the derivative of the loss by it in two ways.

    Attributes:
        name: of the parameter.
        index: of the element.
        analytic: what backward gives.
        numeric: what differences of the loss give.
        uncertainty: how far `numeric` may be off.
    """

    name: str
    index: tuple[int, ...]
    analytic: float
    numeric: float
    uncertainty: float

    @property
    def scale(self) -> float:
        """The larger of both derivatives, absolute."""
        return max(abs(self.analytic), abs(self.numeric))

    @property
    def relative_error(self) -> float:
        """The difference of both relative to the larger one; 0 where both are 0."""
        return abs(self.analytic - self.numeric) / self.scale if self.scale else 0.0

    def differs(self, rtol: float) -> bool:
        """Whether they differ by more than `rtol` and more than the uncertainty; NaN differs."""
        return not abs(self.analytic - self.numeric) <= rtol * self.scale + self.uncertainty

    def is_decided(self, rtol: float, largest: float) -> bool:
        """Whether the uncertainty is below `rtol` of the `largest` derivative of all; at a kink it is not."""
        return self.differs(rtol) or self.analytic == self.numeric or self.uncertainty <= rtol * largest


def check_gradients(
    loss: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter], n_parameters: int, seed: int = 0
) -> list[Coordinate]:
    """Both derivatives of `loss()` at sampled coordinates.

    The coordinates go round the parameters in random order; in each tensor the first one is that of the largest
    gradient, further ones are drawn evenly.

    Args:
        loss: gives the same loss, one float64 number, for the same parameters each time.
        parameters: by name, in float64; their `grad` is overwritten, their values come back.
        n_parameters: how many coordinates, or all of them where there are fewer.
        seed: of the sample.

    Raises:
        ValueError: if `loss()` gives something else, or not the same twice.
    """
    for parameter in parameters.values():
        parameter.grad = None
    value = loss()
    if value.dtype != torch.float64 or value.numel() != 1:
        raise ValueError(f"the loss of a float64 copy is {value.dtype} of shape {tuple(value.shape)}, not one float64")
    if value.grad_fn is not None:
        value.backward()
    with torch.no_grad():
        first, second = float(value), float(loss())
        if not abs(first - second) <= 1e-9 * max(abs(first), 1e-3):
            raise ValueError(f"two runs of one step from one random state give {first!r} and {second!r}")
        noise = abs(first - second) + _ROUNDING * abs(first)
        found = [_compare(loss, parameters, *one, first, noise) for one in _sample(parameters, n_parameters, seed)]
    # What rounds in the step (float32 somewhere) shows at all coordinates, if not at each one alike.
    common = 4 * statistics.median(one.uncertainty for one in found) if found else 0.0
    return [replace(one, uncertainty=one.uncertainty + common) for one in found]


def _sample(parameters: Mapping[str, nn.Parameter], n: int, seed: int) -> list[tuple[str, int]]:
    """Name and place in the flattened tensor of each coordinate."""
    generator = random.Random(seed)
    places: list[list[tuple[str, int]]] = []
    for name, parameter in parameters.items():
        drawn = generator.sample(range(parameter.numel()), min(n, parameter.numel()))
        if drawn and parameter.grad is not None:
            drawn.insert(0, int(parameter.grad.abs().argmax()))
        places.append([(name, place) for place in dict.fromkeys(drawn)])
    generator.shuffle(places)
    return [one for turn in zip_longest(*places) for one in turn if one is not None][:n]


def _compare(
    loss: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter],
    name: str,
    place: int,
    middle: float,
    noise: float,
) -> Coordinate:
    parameter = parameters[name]
    index = tuple(int(i) for i in np.unravel_index(place, parameter.shape))
    value = parameter[index].clone()
    step = _STEP * max(1.0, abs(float(value)))
    slopes, bends = [], []
    for width in (step, step / 2):
        ends = []
        for end in (value + width, value - width):
            parameter[index] = end
            ends.append(float(loss()))
        parameter[index] = value
        slopes.append((ends[0] - ends[1]) / float((value + width) - (value - width)))
        bends.append(ends[0] - 2 * middle + ends[1])
    (wide, narrow), (bend, narrow_bend) = slopes, bends
    # For a smooth loss both are near 0; the second one sees a kink in the very middle, which the first one cannot.
    spread = abs(narrow - wide) + abs(4 * narrow_bend - bend) / step
    analytic = 0.0 if parameter.grad is None else float(parameter.grad[index])
    return Coordinate(name, index, analytic, (4 * narrow - wide) / 3, 2 * spread + 4 * noise / step)


class GradientCheck(Callback):
    """Check the gradients of the first batch of each fit numerically, and stop where they are wrong.

    A copy of the module in float64 runs the `training_step` of the module's own first batch again and again, from one
    random state, so that dropout and noise are the same each time. The run itself is not touched: its weights, buffers,
    random numbers, metrics and loggers are what they would be without.

    With manual optimization each loss that is given to `manual_backward` is checked by itself, at the parameters that
    its backward reaches; no optimizer steps in between. Under DDP each rank checks its own batch, and all stop where
    one finds something.

    Args:
        n_parameters: how many coordinates of the parameters are checked, for each loss; each takes four forward passes.
        rtol: the relative error that is allowed.
        parameters: pattern or patterns for the names of what is checked.
        seed: of the sample of coordinates.

    Attributes:
        coordinates: what was compared in the last check.

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters and for a pattern that matches
            nothing; at the first batch if the step cannot be checked.
        GradientMismatch: at the first batch, with the names, indices and both derivatives of what is wrong.
    """

    def __init__(
        self, n_parameters: int = 20, rtol: float = 1e-4, parameters: str | Sequence[str] = "*", seed: int = 0
    ) -> None:
        if n_parameters < 1:
            raise ValueError(f"n_parameters={n_parameters}: must be 1 or more")
        if not 0 < rtol < 1:
            raise ValueError(f"rtol={rtol}: must be between 0 and 1")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be 0 or more")
        self.n_parameters = n_parameters
        self.rtol = rtol
        self.parameters = as_patterns(parameters)
        self.seed = seed
        self.coordinates: list[Coordinate] = []
        self._is_due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work while it is cheap."""
        refuse_sharded(trainer, self)
        if stage == "fit" and is_built(pl_module):
            select(pl_module, self.parameters)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the check due."""
        select(pl_module, self.parameters)
        if trainer.world_size > 1 and any("SyncBatchNorm" in type(m).__name__ for m in pl_module.modules()):
            raise ValueError("GradientCheck does not work where batch norm joins processes; check on one process")
        self._is_due = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check on the first batch."""
        if not self._is_due:
            return
        self._is_due = False
        before, default = random_state(), torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with unseen():
                found = self._check(trainer, pl_module, batch, batch_idx)
        finally:
            torch.set_default_dtype(default)
            set_random_state(before)
        self._judge(trainer, found)

    def _check(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> list[Coordinate] | str:
        """What was compared, or why nothing could be."""
        try:
            step = _DoubleStep(trainer, pl_module, batch, batch_idx)
            chosen = select(step.twin, self.parameters, trainable=True)
            found: list[Coordinate] = []
            losses = len(step.losses())
            for number in range(losses):
                # A new run: the values of the parameters, though back, were written since.
                reached = chosen if pl_module.automatic_optimization else _reached(step.loss(number), chosen)
                part = check_gradients(partial(step.loss, number), reached, self.n_parameters, self.seed)
                found += part if losses == 1 else [replace(c, name=f"loss {number + 1}: {c.name}") for c in part]
            return found
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _judge(self, trainer: Trainer, found: list[Coordinate] | str) -> None:
        self.coordinates = [] if isinstance(found, str) else found
        for rank, other in enumerate(of_every_rank(trainer, found)):
            where = f"on rank {rank}: " if trainer.world_size > 1 else ""
            if isinstance(other, str):
                advice = ""
                if "dtype" in other or "Float" in other:
                    advice = (
                        "; does the step go through float32 (.float(), a tensor that is neither parameter nor buffer)?"
                    )
                raise ValueError(f"{where}GradientCheck cannot run the training step in float64: {other}{advice}")
            wrong = [one for one in other if one.differs(self.rtol)]
            if wrong:
                raise GradientMismatch(where + self._describe(wrong, len(other)))
            if other and not _decided(other, self.rtol):
                raise ValueError(
                    f"{where}GradientCheck can decide none of {len(other)} derivatives: differences of the loss depend "
                    "on their width; does the step go through float32 (`.float()`, autocast) or rounding?"
                )
        self._report()

    def _describe(self, wrong: Sequence[Coordinate], checked: int) -> str:
        worst = sorted(wrong, key=lambda one: -one.relative_error)[:5]
        lines = [
            f"  {one.name}[{', '.join(map(str, one.index))}]: backward gives {one.analytic:.6g}, differences of the "
            f"loss give {one.numeric:.6g}: relative error {one.relative_error:.2g}"
            for one in worst
        ]
        return (
            f"{len(wrong)} of {checked} checked derivatives are wrong (rtol={self.rtol}); the worst are\n"
            + "\n".join(lines)
            + "\nA backward between these parameters and the loss is wrong, or the graph is cut (detach, no_grad). What"
            "\nis meant to be so (straight-through estimators, target networks) can be left out by parameters=."
        )

    def _report(self) -> None:
        decided = _decided(self.coordinates, self.rtol)
        # Two zeros may differ by rounding.
        worst = max((one.relative_error for one in decided if one.scale > one.uncertainty), default=0.0)
        rank_zero_info(
            f"GradientCheck: {len(decided)} of {len(self.coordinates)} derivatives agree to {worst:.1g} or better"
            + ("." if len(decided) == len(self.coordinates) else "; at the others the loss has a kink.")
        )


class _DoubleStep:
    """A float64 copy of a module that runs one training step again and again, from one state."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.twin = make_twin(trainer, pl_module).double()
        self.batch = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
        self.batch_idx = batch_idx
        self._buffers = {name: buffer.detach().clone() for name, buffer in self.twin.named_buffers()}
        self._random = random_state()
        object.__setattr__(self.twin, "manual_backward", lambda loss, *_, **__: self.twin.losses.append(loss))

    def loss(self, number: int) -> Tensor:
        """One of the losses, from a new run."""
        return self.losses()[number]

    def losses(self) -> list[Tensor]:
        """The loss, or with manual optimization those of each backward."""
        for name, buffer in self._buffers.items():
            self.twin.get_buffer(name).detach().copy_(buffer)
        set_random_state(self._random)
        self.twin.losses = []
        loss = run_step(self.twin, clone_batch(self.batch), self.batch_idx)
        losses: list[Any] = [loss] if self.twin.automatic_optimization else self.twin.losses
        if not losses or losses[0] is None:
            raise ValueError("training_step gives no loss")
        return losses


def _reached(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters that backward of this loss gives a gradient."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: parameters[name] for name, g in zip(parameters, gradients, strict=True) if g is not None}


def _decided(coordinates: Sequence[Coordinate], rtol: float) -> list[Coordinate]:
    largest = max((one.scale for one in coordinates), default=0.0)
    return [one for one in coordinates if one.is_decided(rtol, largest)]
