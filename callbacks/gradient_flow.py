"""How much gradient reaches each layer: numbers, a warning where it vanishes or explodes, and a picture.

    mean_abs   Σ|g| / n
    norm       ‖g‖
    zeros      the fraction of g that is exactly 0

A layer's gradient vanishes if its mean_abs is at most `vanishing` times the median of all layers, and explodes if it is
more than `exploding` times the median, or not finite. Layers are compared with those of the same optimizer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from trainerkit.callbacks._layers import Cadence, layers_of, loss_scale, measurable, optimizer_index
from trainerkit.callbacks._parameters import as_patterns, is_built, select
from trainerkit.callbacks._trainer import log_metrics, refuse_sharded, step_number
from trainerkit.extras import require
from trainerkit.files import replacing
from trainerkit.functional.statistics import Array, as_values, norms, stacked

KINDS = ("vanishing", "exploding")
_REMEMBERED = 20  # earlier measurements in the picture


@torch.no_grad()
def gradient_columns(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of absolute values, the norm and the number of values that are not 0 of n gradients: (3, n)."""
    values = [as_values(gradient) for gradient in gradients]
    nonzero = stacked([torch.count_nonzero(value) for value in values])
    first = norms(values, order=1.0)
    return torch.stack([first, norms(values), nonzero.to(first)])


def flow_of_layers(columns: Array, counts: Array, groups: Array, number: int) -> Array:
    """mean_abs, norm and zeros of groups of gradients, (3, number), NaN for a group of nothing.

    Args:
        columns: from `gradient_columns`, (3, n).
        counts: elements of each parameter, (n,).
        groups: which group each belongs to, (n,), integers.
        number: of groups.
    """
    with np.errstate(all="ignore"):
        total, first, nonzero = (np.bincount(groups, values, number) for values in (counts, columns[0], columns[2]))
        norm = np.where(total > 0, np.sqrt(np.bincount(groups, columns[1] ** 2, number)), np.nan)
        return np.stack([first / total, norm, 1 - nonzero / total])


def judge(mean_abs: Array, vanishing: float = 1e-3, exploding: float = 1e3) -> tuple[Array, Array]:
    """Which layers' gradients vanish, and which explode, measured by the median of those that are finite.

    Args:
        mean_abs: means of absolute gradients, (n,).
        vanishing: at most this many times the median vanishes; an exact 0 always does.
        exploding: more than this many times the median explodes; what is not finite always does.

    Returns:
        Two of booleans, (n,).
    """
    finite = np.isfinite(mean_abs)
    median = np.median(mean_abs[finite]) if finite.any() else 0.0
    gone = finite & (mean_abs <= vanishing * median)
    return gone, ~finite | ((median > 0) & (mean_abs > exploding * median))


class GradientFlow(Callback):
    """Log how much gradient reaches each layer, warn where it vanishes or explodes, and draw it.

    - Gradients are those of `on_before_optimizer_step`: unscaled, not yet clipped.
    - Each optimizer's step measures the parameters it holds; one that makes no step when a measurement is due is
      measured at its next. Parameters without a gradient count for nothing.
    - A warning comes once for each layer and kind; what was warned of goes through a checkpoint.
    - The picture `gradient_flow.png` in `trainer.default_root_dir` is replaced at each measurement (needs
      matplotlib).

    Args:
        every_n_steps: optimizer steps between measurements.
        parameters: pattern or patterns for the names of what is measured.
        depth: how many components of a module's name make a layer; None for as many as give at most 150 layers.
        vanishing: what fraction of the median layer's mean absolute gradient counts as vanished, from 0 to below 1.
        exploding: how many times the median layer's counts as exploded, above 1.
        picture: whether to draw.
        prefix: what metric names begin with; give each its own where there are several of this callback.

    Attributes:
        flagged: layers that vanish and that explode, by kind, of the latest measurement.

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters and for a pattern that matches
            nothing.
        UserError: in `setup`, if matplotlib is not installed and there is to be a picture.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        parameters: str | Sequence[str] = "*",
        depth: int | None = None,
        vanishing: float = 1e-3,
        exploding: float = 1e3,
        picture: bool = True,
        prefix: str = "gradients",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be 1 or more")
        if depth is not None and depth < 1:
            raise ValueError(f"depth={depth}: must be 1 or more, or null to choose it by the number of layers")
        if not 0 <= vanishing < 1:
            raise ValueError(f"vanishing={vanishing}: must be from 0 to below 1")
        if not exploding > 1:
            raise ValueError(f"exploding={exploding}: must be above 1")
        if not prefix:
            raise ValueError(f"prefix={prefix!r}: must be a name")
        self.parameters = as_patterns(parameters)
        self.depth = depth
        self.vanishing = vanishing
        self.exploding = exploding
        self.picture = picture
        self.prefix = prefix
        self.flagged: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self._cadence = Cadence(every_n_steps)
        self._parameters: list[nn.Parameter] = []
        self._row: dict[int, int] = {}  # place by id of the parameter
        self._layers: list[str] = []
        self._layer_of = self._counts = np.zeros(0)
        self._measured: dict[int, tuple[list[int], Tensor]] = {}  # by optimizer, in this batch
        self._warned: list[list[str]] = []  # pairs of layer and kind
        self._latest: list[float] = []  # of each layer, for the picture
        self._earlier: list[list[float]] = []
        self._restored = False

    @property
    def state_key(self) -> str:
        """One for each prefix, so that a Trainer can have several."""
        return type(self).__qualname__ if self.prefix == "gradients" else f"{type(self).__qualname__}[{self.prefix}]"

    def state_dict(self) -> dict[str, Any]:
        """When each optimizer was last measured, what was warned of, and what the picture shows."""
        return {
            "last": list(self._cadence.last),
            "warned": [list(pair) for pair in self._warned],
            "layers": list(self._layers),
            "latest": list(self._latest),
            "earlier": [list(values) for values in self._earlier],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self._restored = True
        self._cadence.last = list(state_dict["last"])
        self._warned = [list(pair) for pair in state_dict["warned"]]
        self._layers = list(state_dict["layers"])
        self._latest, self._earlier = list(state_dict["latest"]), [list(v) for v in state_dict["earlier"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work while it is cheap."""
        if stage != "fit":
            return
        refuse_sharded(trainer, self)
        if self.picture and trainer.is_global_zero:
            require("matplotlib", "GradientFlow's picture (picture=false does without)")
        if is_built(pl_module):
            select(pl_module, self.parameters)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters and their layers; a picture of other layers is begun anew."""
        named = measurable(pl_module, self.parameters)
        of_parameters = layers_of(list(named), self.depth)
        layers = list(dict.fromkeys(of_parameters))
        self._parameters = list(named.values())
        self._row = {id(parameter): row for row, parameter in enumerate(self._parameters)}
        self._layer_of = np.array([layers.index(layer) for layer in of_parameters], dtype=int)
        self._counts = np.array([as_values(parameter).numel() for parameter in self._parameters], dtype=float)
        restored, self._restored = self._restored, False
        if not restored:
            self._warned = []
        if not restored or layers != self._layers:
            self._layers, self._latest, self._earlier = layers, [np.nan] * len(layers), []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rhythm of a run that is resumed."""
        self._cadence.start(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradients if it is time to."""
        index = optimizer_index(trainer, optimizer)
        if not self._cadence.due(index, step_number(trainer)):
            return
        held = (self._row.get(id(p)) for group in optimizer.param_groups for p in group["params"])
        found = {row: self._parameters[row].grad for row in held if row is not None}
        gradients = {row: gradient for row, gradient in found.items() if gradient is not None}
        if gradients:
            columns = gradient_columns(list(gradients.values()))
            scale = loss_scale(trainer, optimizer)
            if scale is not None:
                columns[:2] /= scale
            self._measured[index] = list(gradients), columns

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report what this batch's steps gave."""
        if self._measured:
            measured, self._measured = self._measured, {}
            self._report(trainer, measured)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget what an interrupted batch has left."""
        self._measured = {}

    def _report(self, trainer: Trainer, measured: Mapping[int, tuple[list[int], Tensor]]) -> None:
        device = next(iter(measured.values()))[1].device
        packed = torch.cat([columns.to(device) for _, columns in measured.values()], dim=1)
        columns = np.array(packed.tolist())  # everything in one copy
        rows = np.concatenate([np.array(rows, dtype=int) for rows, _ in measured.values()])
        owner = np.repeat(list(measured), [len(rows) for rows, _ in measured.values()])
        rows, first = np.unique(rows, return_index=True)  # what two optimizers hold counts once
        columns, owner, groups = columns[:, first], owner[first], self._layer_of[rows]
        flow = flow_of_layers(columns, self._counts[rows], groups, len(self._layers))
        there = np.unique(groups)
        metrics = {
            f"{self.prefix}/{name}/{self._layers[layer]}": float(values[layer])
            for name, values in zip(("mean_abs", "norm", "zeros"), flow, strict=True)
            for layer in there
        }
        self.flagged = {kind: [] for kind in KINDS}
        for index in measured:
            layers = [layer for layer in there if owner[groups == layer][0] == index]
            end = "" if len(trainer.optimizers) == 1 else f"_{index}"
            for kind, flags in zip(KINDS, judge(flow[0, layers], self.vanishing, self.exploding), strict=True):
                metrics[f"{self.prefix}/{kind}{end}"] = float(flags.sum())
                self.flagged[kind] += [self._layers[layer] for layer, flag in zip(layers, flags, strict=True) if flag]
        log_metrics(trainer, metrics)
        self._warn(step_number(trainer))
        self._remember(there, flow[0])
        if self.picture and trainer.is_global_zero:
            name = "gradient_flow.png" if self.prefix == "gradients" else f"{self.prefix}.png"
            title = f"Gradients at step {step_number(trainer):,}"
            draw(Path(trainer.default_root_dir) / name, self._layers, self._latest, self._earlier, self.flagged, title)

    def _warn(self, step: int) -> None:
        for kind in KINDS:
            new = [layer for layer in self.flagged[kind] if [layer, kind] not in self._warned]
            self._warned += [[layer, kind] for layer in new]
            if new:
                what = (
                    f"at most {self.vanishing:g} times the median layer's"
                    if kind == "vanishing"
                    else f"more than {self.exploding:g} times the median layer's, or not finite"
                )
                names = ", ".join(new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
                rank_zero_warn(f"GradientFlow: {kind} gradients at step {step}, {what}: {names}.")

    def _remember(self, there: Array, mean_abs: Array) -> None:
        self._earlier = [*self._earlier, list(self._latest)][-_REMEMBERED:] if np.isfinite(self._latest).any() else []
        for layer in there:
            self._latest[layer] = float(mean_abs[layer])


def draw(
    path: Path,
    layers: Sequence[str],
    latest: Sequence[float],
    earlier: Sequence[Sequence[float]],
    flagged: Mapping[str, Sequence[str]],
    title: str,
) -> None:
    """The mean absolute gradient of each layer, from the first layer at the left to the last; earlier ones pale.

    Args:
        path: the picture, .png.
        layers: names, n of them.
        latest: of each layer, (n,); NaN where there is none.
        earlier: the same of earlier measurements.
        flagged: names of layers that vanish and that explode, by kind.
        title: what stands above.
    """
    figure_class = require("matplotlib.figure", "GradientFlow's picture").Figure
    figure = figure_class(figsize=(min(max(6.0, 1.8 + 0.22 * len(layers)), 24.0), 5.2), layout="constrained")
    axis = figure.subplots()
    places, values = np.arange(len(layers)), np.array(latest)
    shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    for age, old in enumerate(reversed(earlier)):
        line = np.where(np.isfinite(old) & (np.array(old) > 0), old, np.nan)
        axis.plot(
            places,
            line,
            color="0.6",
            linewidth=0.8,
            alpha=max(0.12, 0.7 - 0.07 * age),
            zorder=1,
            label=None if age else "earlier",
        )
    axis.plot(places, shown, color="tab:blue", linewidth=1.2, marker="o", markersize=4, zorder=2, label="mean |g|")
    known = np.concatenate([shown, *(np.array(old) for old in earlier)])
    known = known[np.isfinite(known) & (known > 0)]
    low, high = (known.min(), known.max()) if len(known) else (1e-3, 1.0)
    axis.set_yscale("log")
    axis.set_ylim(low / 3, high * 3)
    for kind, colour, marker in (("vanishing", "tab:orange", "v"), ("exploding", "tab:red", "^")):
        marked = [place for place, layer in enumerate(layers) if layer in flagged.get(kind, ())]
        # A 0 or an infinity has no place on the scale: it stands at its end.
        edge = low / 2 if kind == "vanishing" else high * 2
        heights = [shown[place] if np.isfinite(shown[place]) else edge for place in marked]
        if marked:
            axis.scatter(marked, heights, color=colour, marker=marker, s=70, zorder=3, label=kind)
    if np.isfinite(shown).any():
        axis.axhline(float(np.nanmedian(shown)), color="0.4", linewidth=0.8, linestyle=":", label="median")
    axis.set_xticks(places, layers, rotation=90, fontsize=7 if len(layers) <= 110 else 4)
    axis.set_xlim(-0.7, len(layers) - 0.3)
    axis.set_ylabel("mean |gradient|")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0.2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
