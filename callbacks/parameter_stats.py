"""How weights, gradients and updates stand to each other, layer by layer.

norm                 ‖θ‖
gradient_norm        ‖g‖, before clipping
gradient_to_weight   ‖g‖/‖θ‖, often called the update ratio, which it is not
update_to_weight     ‖Δθ‖/‖θ‖, what the step did: about 1e-3 is healthy
mean, std, max_abs, zeros
effective_rank       exp(−Σ p ln p), p = σ/Σσ
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from trainerkit.callbacks._layers import Cadence, layers_of, loss_scale, measurable, optimizer_index
from trainerkit.callbacks._parameters import as_patterns, is_built, match, select
from trainerkit.callbacks._trainer import StepHooks, log_metrics, refuse_sharded, step_number
from trainerkit.functional.rank import effective_rank
from trainerkit.functional.statistics import (
    Array,
    NormPlan,
    as_values,
    copied,
    histogram,
    mean_and_squares,
    norms,
    pooled_moments,
    stacked,
)

# What two passes over the memory give; the others need more, or a copy of the weights.
CHEAP = ("norm", "gradient_norm", "gradient_to_weight")
STATISTICS = (*CHEAP, "update_to_weight", "mean", "std", "max_abs", "zeros")
RATIOS = {"gradient_norm": "gradient_to_weight", "update_norm": "update_to_weight"}

_MOST_WAITING = 256  # batches
_MOST_PATTERNS = 256  # of parameters that have a gradient; what is known of them is forgotten then

Column = tuple[Array, Array]  # places among the parameters, and a value for each


class Groups:
    """Which group each parameter belongs to, and what follows for a choice of parameters, worked out once.

    Args:
        group: of each parameter, (n,), integers.
        number: of groups.
    """

    def __init__(self, group: Array, number: int) -> None:
        self.number = number
        self._group = group
        self._known: dict[int, tuple[Array, Array, Array]] = {}

    def of(self, rows: Array) -> tuple[Array, Array]:
        """The groups of these parameters (k,), and those that have any (g,); `rows` must not change afterwards."""
        known = self._known.get(id(rows))
        if known is None:
            mine = self._group[rows]
            known = self._known[id(rows)] = rows, mine, np.flatnonzero(np.bincount(mine, minlength=self.number))
        return known[1], known[2]


def weight_columns(weights: Sequence[Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """What the statistics of n weights are made of: a vector (n,) for each, on their device."""
    columns: dict[str, Tensor] = {}
    if wanted & {"mean", "std"}:
        moments = stacked([mean_and_squares(weight) for weight in weights])
        columns |= {"mean": moments[:, 0], "squares": moments[:, 1]}
    if "max_abs" in wanted:
        extremes = stacked([torch.stack(torch.aminmax(weight)) for weight in weights])
        columns["max_abs"] = extremes.abs().amax(1)
    if "zeros" in wanted:
        columns["zeros"] = stacked([1 - torch.count_nonzero(weight) / weight.numel() for weight in weights])
    return columns


@np.errstate(all="ignore")  # what is infinite or NaN is reported so
def summarize(columns: Mapping[str, Column], counts: Array, groups: Groups) -> dict[str, Column]:
    """The statistics of groups of parameters, from those of the parameters.

    Args:
        columns: which parameters were measured, and what was found, (k,) each: those of `weight_columns` for all
            parameters, `gradient_norm` and `update_norm` for those with a gradient, `effective_rank` for matrices.
        counts: elements of each parameter, (n,).
        groups: which group each belongs to.

    Returns:
        For each statistic the groups that have it, and what it is there, (g,) each. Ratios are over the parameters that
        have a gradient; the effective rank is the mean over the matrices; nothing out of zero is a ratio of 0.
    """
    result: dict[str, Column] = {}
    number = groups.number
    all_rows, all_norms = columns["norm"]
    squares = all_norms**2
    of_weights = np.bincount(groups.of(all_rows)[0], squares, number)
    for name, (rows, values) in columns.items():
        mine, there = groups.of(rows)
        if name == "norm":
            result[name] = there, np.sqrt(of_weights[there])
        elif name in RATIOS:
            above = np.sqrt(np.bincount(mine, values**2, number)[there])
            below = result["norm"][1]
            if rows is not all_rows:
                by_row = np.zeros(len(counts))
                by_row[all_rows] = squares
                below = np.sqrt(np.bincount(mine, by_row[rows], number)[there])
            if name == "gradient_norm":
                result[name] = there, above
            ratio = np.where(above == 0, 0.0, np.inf)
            result[RATIOS[name]] = there, np.divide(above, below, out=ratio, where=(above != 0) & (below != 0))
        elif name == "mean":
            moments = pooled_moments(counts[rows], values, columns["squares"][1], mine, number)
            result |= {key: (there, moment[there]) for key, moment in zip(("mean", "std"), moments, strict=True)}
        elif name == "max_abs":
            largest = np.zeros(number)
            np.maximum.at(largest, mine, values)
            result[name] = there, largest[there]
        elif name in ("zeros", "effective_rank"):
            weight = counts[rows] if name == "zeros" else np.ones(len(rows))
            total = np.bincount(mine, weight, number)[there]
            result[name] = there, np.bincount(mine, weight * values, number)[there] / total
    return result


@dataclass
class _Held:
    """One optimizer's parameters among ours, and how their norms and those of their gradients are made."""

    size: int  # parameters of the optimizer, ours or not
    rows: list[int]
    weights: list[nn.Parameter]
    odd: bool  # whether a weight is complex or sparse
    moving: list[int] | None = None  # rows with a gradient when the plan was made
    plan: NormPlan | None = None


@dataclass
class _Measured:
    """Measurements of one optimizer's parameters, on their device; rows are places among all parameters."""

    rows: list[int]
    full: bool
    columns: dict[str, tuple[list[int], Tensor]]
    histograms: dict[str, Tensor] = field(default_factory=dict)
    moving: list[int] = field(default_factory=list)  # whose update is to be measured
    before: list[Tensor] | None = None  # their weights before the step, until it was made


@dataclass
class _Batch:
    """What one batch's steps gave, on the device until the Trainer logs."""

    step: int  # on the loggers' axis
    measured: dict[int, _Measured]  # by optimizer
    parts: list[_Measured]  # these, and what no optimizer holds


class ParameterStats(Callback):
    """Log norms, ratios and moments of the parameters, for each layer and in total.

    - Gradients are those of `on_before_optimizer_step`: unscaled, not yet clipped. Weights are those before the step.
    - Each optimizer's step measures the parameters it holds; one that makes no step when a measurement is due is
      measured at its next. Parameters that no optimizer holds, or without a gradient, have no gradient or update.
    - The total is over all parameters; with several optimizers there is one for each (`total_0`, `total_1`).
    - A step that the gradient scaler skipped has infinite or NaN gradients and an update of 0.
    - Where nothing is measured a step costs next to nothing. What was measured stays on the device until the Trainer
      logs (`log_every_n_steps`), the epoch ends, or a validation or a checkpoint begins; then all of it comes to the
      host in one copy, each measurement under its own step. The host never waits at any other time.

    Args:
        every_n_steps: optimizer steps between measurements of `norm`, `gradient_norm` and `gradient_to_weight`.
        full_every_n_steps: steps between measurements of all the rest, which costs several times as much; made at the
            first measurement at or after each multiple.
        parameters: pattern or patterns for the names of what is measured.
        statistics: pattern or patterns for the names of the statistics: norm, gradient_norm, gradient_to_weight,
            update_to_weight, mean, std, max_abs, zeros.
        depth: how many components of a module's name make a layer; None for as many as give at most 150 layers.
        effective_rank: also the effective rank of matrices, from their singular values.
        histograms: also histograms of each parameter and its gradient, for loggers that take them (TensorBoard).
        prefix: what metric names begin with; give each its own where there are several of this callback.

    Attributes:
        histograms: the latest of each, `weight/NAME` and `gradient/NAME`, as edges and counts.

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters and for a pattern that matches
            nothing.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        full_every_n_steps: int = 100,
        parameters: str | Sequence[str] = "*",
        statistics: str | Sequence[str] = "*",
        depth: int | None = None,
        effective_rank: bool = False,
        histograms: bool = False,
        prefix: str = "parameters",
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("full_every_n_steps", full_every_n_steps)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        if depth is not None and depth < 1:
            raise ValueError(f"depth={depth}: must be 1 or more, or null to choose it by the number of layers")
        if not prefix:
            raise ValueError(f"prefix={prefix!r}: must be a name")
        self.parameters = as_patterns(parameters)
        self.statistics = set(match(STATISTICS, as_patterns(statistics, "statistics"), "statistics", "statistic"))
        self.depth = depth
        self.effective_rank = effective_rank
        self.keeps_histograms = histograms
        self.prefix = prefix
        self.histograms: dict[str, tuple[Tensor, Tensor]] = {}
        self._often, self._fully = Cadence(every_n_steps), Cadence(full_every_n_steps)
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        self._row: dict[int, int] = {}  # place by id of the parameter
        self._held: dict[int, _Held] = {}  # by optimizer
        self._places: dict[tuple[int, ...], Array] = {}  # of rows: each parameter's place twice, see `_to_host`
        self._groups: Groups | None = None  # of one optimizer that holds all
        self._layers: list[str] = []
        self._labels: dict[str, list[str]] = {}  # by statistic: what each group's metric is called
        self._layer_of = self._counts = np.zeros(0)
        self._measured: dict[int, _Measured] = {}  # by optimizer, in this batch
        self._waiting: list[_Batch] = []  # until the Trainer logs
        self._hooks = StepHooks()

    @property
    def state_key(self) -> str:
        """One for each prefix, so that a Trainer can have several."""
        return type(self).__qualname__ if self.prefix == "parameters" else f"{type(self).__qualname__}[{self.prefix}]"

    def state_dict(self) -> dict[str, Any]:
        """When each optimizer was last measured."""
        return {"often": list(self._often.last), "fully": list(self._fully.last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the rhythm."""
        self._often.last, self._fully.last = list(state_dict["often"]), list(state_dict["fully"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work while it is cheap."""
        if stage == "fit":
            refuse_sharded(trainer, self)
            if is_built(pl_module):
                select(pl_module, self.parameters)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters and their layers."""
        named = measurable(pl_module, self.parameters)
        layers = layers_of(list(named), self.depth)
        self._names, self._parameters = list(named), list(named.values())
        self._row = {id(parameter): row for row, parameter in enumerate(self._parameters)}
        self._layers, self._labels = list(dict.fromkeys(layers)), {}
        self._layer_of = np.array([self._layers.index(layer) for layer in layers], dtype=int)
        self._counts = np.array([as_values(parameter).numel() for parameter in self._parameters], dtype=float)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow the optimizers."""
        self._held, self._places, self._groups, self._waiting = {}, {}, None, []
        self._often.start(trainer)
        self._fully.start(trainer)
        self._hooks.attach(trainer, self._after_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure weights and gradients if it is time to."""
        index, step = optimizer_index(trainer, optimizer), step_number(trainer)
        if self._often.due(index, step):
            full = self._fully.due(index, step)
            held = self._of(index, optimizer)
            if held.rows and (full or self.statistics.intersection(CHEAP)):
                self._measured[index] = self._measure(held, full, loss_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what this batch's steps gave, and log where the Trainer does."""
        if self._measured:
            self._waiting.append(self._of_batch(trainer))
        epoch = trainer.fit_loop.epoch_loop
        if self._waiting and (
            trainer._logger_connector.should_update_logs
            or epoch._is_training_done
            or len(self._waiting) >= _MOST_WAITING
        ):
            self._log_waiting(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, for what validates may ask for a metric."""
        self._log_waiting(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Log: a run that goes on from here measures none of it again."""
        self._log_waiting(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left where another callback ended the run."""
        self._log_waiting(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log what is left, and leave the optimizers."""
        with suppress(RuntimeError):  # the device may be what failed
            self._log_waiting(trainer)
        self._leave()

    def _leave(self) -> None:
        self._hooks.detach()
        self._measured, self._waiting = {}, []

    def _of(self, index: int, optimizer: Optimizer) -> _Held:
        """Of one optimizer's parameters, looked up when their number changes, as by an unfreezing."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        held = self._held.get(index)
        if held is None or held.size != size:
            held = self._held[index] = self._holding(self._held_by([optimizer]), size)
        return held

    def _holding(self, rows: list[int], size: int = 0) -> _Held:
        weights = [self._parameters[row] for row in rows]
        odd = any(weight.layout is not torch.strided or weight.is_complex() for weight in weights)
        return _Held(size, rows, weights, odd)

    def _held_by(self, optimizers: Sequence[Optimizer]) -> list[int]:
        """The rows of the parameters that these optimizers hold now."""
        held = (self._row.get(id(p)) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"])
        return [row for row in dict.fromkeys(held) if row is not None]

    @torch.inference_mode()
    def _measure(self, held: _Held, full: bool, scale: Tensor | None = None, gradients: bool = True) -> _Measured:
        """Measure weights, and gradients unless told otherwise, which are still to be divided by the scale."""
        rows, weights = held.rows, held.weights
        found = [weight.grad if gradients else None for weight in weights]
        slopes = [slope for slope in found if slope is not None]
        moving = rows if len(slopes) == len(rows) else [r for r, s in zip(rows, found, strict=True) if s is not None]
        tensors: list[Tensor] = [*weights, *slopes]
        if held.odd or any(slope.layout is not torch.strided for slope in slopes):
            tensors = [as_values(tensor) for tensor in tensors]
            all_norms = norms(tensors)  # no plan: a sparse gradient has another size each time
        else:
            if held.plan is None or held.moving != moving:
                held.plan, held.moving = NormPlan(tensors), moving
            all_norms = norms(tensors, plan=held.plan)
        of_gradients = all_norms[len(rows) :] if scale is None else all_norms[len(rows) :] / scale
        measured = _Measured(rows, full, {"norm": (rows, all_norms[: len(rows)])})
        if slopes:
            measured.columns["gradient_norm"] = moving, of_gradients
        if full:
            weights_, slopes = tensors[: len(rows)], tensors[len(rows) :]
            self._measure_fully(measured, weights_, dict(zip(moving, slopes, strict=True)), scale)
        return measured

    def _measure_fully(
        self, measured: _Measured, weights: list[Tensor], slopes: dict[int, Tensor], scale: Tensor | None
    ) -> None:
        rows = measured.rows
        columns = weight_columns(weights, self.statistics)
        measured.columns |= {name: (rows, column) for name, column in columns.items()}
        if "update_to_weight" in self.statistics and slopes:
            measured.moving = list(slopes)
            measured.before = [copied(as_values(self._parameters[row])) for row in slopes]
        matrices = [row for row in rows if self._parameters[row].ndim > 1]
        if self.effective_rank and matrices:
            ranks = stacked([effective_rank(self._parameters[row]) for row in matrices])
            measured.columns["effective_rank"] = matrices, ranks
        if self.keeps_histograms:
            for row, weight in zip(rows, weights, strict=True):
                measured.histograms[f"weight/{self._names[row]}"] = histogram(weight)
            for row, slope in slopes.items():
                values = slope if scale is None else slope / scale
                measured.histograms[f"gradient/{self._names[row]}"] = histogram(values)

    @torch.inference_mode()
    def _after_step(self, index: int, optimizer: Optimizer) -> None:
        measured = self._measured.get(index)
        if measured is not None and measured.before is not None:
            before, measured.before = measured.before, None
            torch._foreach_sub_(before, [as_values(self._parameters[row]) for row in measured.moving])
            measured.columns["update_norm"] = measured.moving, norms(before)

    # The host's part

    def _of_batch(self, trainer: Trainer) -> _Batch:
        measured, self._measured = self._measured, {}
        for one in measured.values():
            if one.before is not None:  # no step was made
                one.columns["update_norm"] = one.moving, torch.zeros(len(one.moving), device=one.before[0].device)
                one.before = None
        parts = list(measured.values())
        if sum(len(one.rows) for one in parts) < len(self._parameters):
            held = set(self._held_by(trainer.optimizers))
            others = [row for row in range(len(self._parameters)) if row not in held]
            if others:
                parts.append(self._measure(self._holding(others), any(one.full for one in parts), gradients=False))
        return _Batch(step_number(trainer) - 1, measured, parts)

    def _log_waiting(self, trainer: Trainer) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            pieces = self._to_host([part for batch in waiting for part in batch.parts])
            for batch in waiting:
                self._log(trainer, batch, pieces)

    def _log(self, trainer: Trainer, batch: _Batch, pieces: Iterator[Array]) -> None:
        columns = self._placed(trainer, batch, pieces)
        joined = {name: _joined([part[name] for part in columns if name in part]) for name in _names(columns)}
        optimizers = len(trainer.optimizers)
        groups = self._groups
        if groups is None or len(batch.parts) > 1:
            groups = self._grouped(batch.measured, optimizers)
            self._groups = groups if optimizers == len(batch.parts) == 1 else None
        found = summarize(joined, np.concatenate([self._counts, self._counts]), groups)
        names = [*self._layers, *(["total"] if optimizers == 1 else [f"total_{i}" for i in range(optimizers)])]
        log_metrics(trainer, self._named(found, names), batch.step)

    def _grouped(self, measured: Mapping[int, _Measured], optimizers: int) -> Groups:
        """Every parameter counts twice, for its layer and for its total; the last group is of what is in no total."""
        number, size = len(self._layers), len(self._counts)
        total = np.zeros(size, dtype=int) if optimizers == 1 else np.full(size, optimizers)
        if optimizers > 1:
            for index, one in measured.items():
                total[one.rows] = index
        return Groups(np.concatenate([self._layer_of, number + total]), number + optimizers + 1)

    def _named(self, found: Mapping[str, Column], names: Sequence[str]) -> dict[str, float]:
        named: dict[str, float] = {}
        for statistic, (groups, values) in found.items():
            if statistic in self.statistics or statistic == "effective_rank":
                labels = self._labels.get(statistic)
                if labels is None:
                    labels = self._labels[statistic] = [f"{self.prefix}/{statistic}/{name}" for name in names]
                pairs = zip(groups.tolist(), values.tolist(), strict=True)
                named |= {labels[group]: value for group, value in pairs if group < len(labels)}
        return named

    @staticmethod
    def _to_host(parts: Sequence[_Measured]) -> Iterator[Array]:
        """Everything in one copy; then part by part, in their order, the columns and the histograms."""
        found = [
            tensor
            for part in parts
            for tensor in (*(column for _, column in part.columns.values()), *part.histograms.values())
        ]
        if any(tensor.device != found[0].device for tensor in found):
            found = [tensor.to(found[0].device) for tensor in found]
        values = torch.cat(found).numpy(force=True).astype(float)
        ends = accumulate(len(tensor) for tensor in found)
        return (values[end - len(tensor) : end] for tensor, end in zip(found, ends, strict=True))

    def _placed(self, trainer: Trainer, batch: _Batch, pieces: Iterator[Array]) -> list[dict[str, Column]]:
        """The columns of a batch's parts; each parameter twice, as places r and r + n."""
        if len(self._places) > _MOST_PATTERNS:
            self._places, self._groups = {}, None
        columns: list[dict[str, Column]] = []
        for part in batch.parts:
            columns.append({})
            for name, (rows, _) in part.columns.items():
                key = tuple(rows)
                if key not in self._places:
                    place = np.array(rows)
                    self._places[key] = np.concatenate([place, place + len(self._parameters)])
                piece = next(pieces)
                columns[-1][name] = self._places[key], np.concatenate([piece, piece])
            for name in part.histograms:
                self._keep_histogram(trainer, name, next(pieces), batch.step)
        return columns

    def _keep_histogram(self, trainer: Trainer, name: str, found: Array, step: int) -> None:
        low, high, total, squares = found[:4].tolist()
        if not (np.isfinite(low) and np.isfinite(high)):
            return
        counts = found[4:]
        edges = np.linspace(low, high, len(counts) + 1)
        self.histograms[name] = torch.from_numpy(edges), torch.from_numpy(counts.copy())
        for logger in trainer.loggers:
            add = getattr(getattr(logger, "experiment", None), "add_histogram_raw", None)
            if callable(add):
                add(
                    f"{self.prefix}/{name}", low, high, int(counts.sum()), total, squares,
                    edges[1:].tolist(), counts.tolist(), step,
                )  # fmt: skip


def _names(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for part in columns for name in part))


def _joined(parts: Sequence[Column]) -> Column:
    """Measurements of several optimizers as one; what two of them hold counts once."""
    if len(parts) == 1:
        return parts[0]
    rows, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows, first = np.unique(rows, return_index=True)
    return rows, values[first]
