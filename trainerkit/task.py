"""Task: the LightningModule that trainerkit's tasks extend."""

import inspect
import math
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainerkit import fsdp
from trainerkit.networks import checkpoint_blocks, compile_networks
from trainerkit.optim import make_optimizer, make_scheduler

OptimizerFactory = Callable[..., Optimizer]
SchedulerFactory = Callable[..., LRScheduler]

# Losses wait on the device until somebody wants them; this bounds how many.
_MAX_PENDING = 1024


class Task(LightningModule):
    """A LightningModule that finishes optimizer and schedule partials, and tracks metrics without a cost per step.

    A subclass writes `training_step` and, as it likes, `validation_step`, `test_step` and `predict_step`. In them
    `self.track("train/loss", loss, weight=batch_size)` takes the place of `self.log`: the value stays on the device and
    nothing else happens until a logger wants it. What comes out:

    - `train/loss`: the mean over the epoch, weighted, the last smaller batch included; under DDP over all ranks.
    - `train/loss_step`: the mean since the last log step, every `trainer.log_every_n_steps`, in the progress bar.
    - `val/…`, `test/…`: the weighted mean over the whole evaluation, over all ranks.

    Args:
        optimizer: makes the optimizer from parameter groups; a class or a partial of one. Weight decay is left off
            biases, norms, embeddings and tokens (`trainerkit.optim.decays`).
        scheduler: makes the schedule from the optimizer, counted in optimizer steps; None keeps the rate constant.
    """

    def __init__(self, optimizer: OptimizerFactory = AdamW, scheduler: SchedulerFactory | None = None) -> None:
        super().__init__()
        self._optimizer_factory = optimizer
        self._scheduler_factory = scheduler
        self._meters: dict[str, _Meter] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the running hook in this attribute some forty times a step; nn.Module's own way of setting
        # attributes looks for parameters and modules first, which made up a fifth of a small step.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] | str | None = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """As Lightning's, without what JSON has no word for: modules, optimizers, partials, tensors.

        Lightning would pickle these into each checkpoint, which then no longer loads with `weights_only=True`. Give
        them again to `load_from_checkpoint(path, network=…)`. Tuples become lists.

        Raises:
            ValueError: if such a thing is asked for by its name.
        """
        current = inspect.currentframe()
        frame = frame or (current.f_back if current is not None else None)
        left_out = [ignore] if isinstance(ignore, str) else list(ignore or ())
        caller: FrameType | None = frame
        while caller is not None and caller.f_locals.get("self") is self:  # constructors of subclasses too
            known = inspect.getargvalues(caller)
            values = known.locals | (known.locals[known.keywords] if known.keywords else {})
            left_out += [name for name, value in values.items() if not _is_json(value)]
            caller = caller.f_back
        unfit = [name for name in args if isinstance(name, str) and name in left_out]
        if unfit:
            raise ValueError(f"{unfit[0]}: cannot be a hyperparameter, since JSON has no word for its value")
        super().save_hyperparameters(*args, ignore=left_out, frame=frame, logger=logger)
        saved: Any = (self._hparams, self._hparams_initial)
        for hparams in saved:  # what was given in a dict is still there
            plain = {name: _listed(value) for name, value in hparams.items() if _is_json(value)}
            hparams.clear()
            hparams.update(plain)

    def configure_model(self) -> None:
        """What the Trainer says: blocks that compute again, pieces where the strategy is FSDP2, compiled networks.

        Lightning calls it once a stage; what is done already is left alone.
        """
        if self._trainer is None:  # as in load_from_checkpoint
            return
        strategy: Any = self.trainer.strategy
        if getattr(self.trainer, "checkpoint_activations", False):
            checkpoint_blocks(self.networks())
        if isinstance(strategy, ModelParallelStrategy) and not fsdp.is_cut(self):
            if fsdp.same_batch(strategy) > 1:
                self.parallelize(strategy.device_mesh["tensor_parallel"])
            self.shard(strategy.device_mesh["data_parallel"])
        compiler = getattr(self.trainer, "compiler", None)
        if compiler is not None:
            compile_networks(self.networks(), compiler, strategy.root_device)

    def networks(self) -> list[nn.Module]:
        """What is called as a whole: the direct children that have parameters."""
        return [child for child in self.children() if next(child.parameters(), None) is not None]

    def parallelize(self, mesh: DeviceMesh) -> None:
        """Share matrix products out over devices, before `shard`; a subclass whose network can overrides it.

        Every parameter has to become a DTensor on `mesh`, also those that stay whole, or gradients cannot be clipped.

        Args:
            mesh: of a tensor-parallel group, one-dimensional; its processes see the same batches.

        Raises:
            ValueError: here always.
        """
        raise ValueError(
            f"trainer.strategy.tensor_parallel_size={mesh.size()}: must be 1 for {type(self).__name__}, whose network "
            "has no plan for tensor parallelism; take trainer=fsdp"
        )

    def shard(self, mesh: DeviceMesh) -> None:
        """Cut each of `networks` into pieces (`trainerkit.fsdp.shard`); a subclass may do it in its own way.

        Args:
            mesh: of the processes.

        Raises:
            ValueError: for parameters that the task holds itself, which nobody would gather.
        """
        own = [name for name, _ in self.named_parameters(recurse=False)]
        if own:
            raise ValueError(f"trainer.strategy=FSDP2: {type(self).__name__}.{own[0]} must be in a module of its own")
        for part in self.networks():
            fsdp.shard(part, mesh, str(self.trainer.precision))

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule stepped once per optimizer step."""
        # Lightning refuses to clip the gradients of a fused optimizer under mixed precision, scaler or not.
        allow_fused = "mixed" not in str(self.trainer.precision)
        optimizer = make_optimizer(self._optimizer_factory, self, allow_fused=allow_fused)
        if self._scheduler_factory is None:
            return optimizer
        self.trainer.fit_loop.setup_data()  # or the number of batches is not known
        total_steps, batches = (self.trainer.estimated_stepping_batches, self.trainer.num_training_batches)
        steps_per_epoch = None
        if batches != float("inf"):
            steps_per_epoch = max(1, -(-int(batches) // self.trainer.accumulate_grad_batches))
        scheduler = make_scheduler(
            self._scheduler_factory,
            optimizer,
            total_steps=None if total_steps == float("inf") else int(total_steps),
            steps_per_epoch=steps_per_epoch,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def track(
        self, name: str, value: Tensor, weight: float | Tensor = 1.0, reduction: Literal["mean", "sum"] = "mean"
    ) -> None:
        """Keep a scalar for its mean (or sum) over the epoch, without a copy to the host.

        Args:
            name: the metric, `stage/what`.
            value: a scalar tensor; detached here.
            weight: what it counts for in the mean, normally the number of samples; a scalar tensor where only the
                device knows it, such as the number of tokens that count.
            reduction: 'sum' adds the values up instead, so that the epoch has the value of one single batch.
        """
        meter = self._meters.get(name)
        if meter is None:
            meter = self._meters[name] = _Meter(reduction)
        meter.add(value.detach(), weight)

    def derived_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics that are computed from the means of an epoch; a subclass overrides it.

        Args:
            metrics: what was tracked in the epoch that ends, by name.

        Returns:
            What is logged beside it, by name.
        """
        return {}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand over what the loggers want; a subclass that overrides this calls it."""
        trainer = self.trainer
        if trainer._logger_connector.should_update_logs:
            for name, meter in self._meters.items():
                if name.startswith("train/") and meter.has_window:
                    options: Any = {"on_step": True, "on_epoch": False, "batch_size": 1}
                    self.log(f"{name}_step", meter.window(), prog_bar=_is_plain(name), **options)
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        if trainer.is_last_batch or stops or trainer.global_step == trainer.max_steps:
            self._log_epoch("train/", on_step=False, on_epoch=True, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log what was tracked in validation."""
        self._log_epoch("val/", in_bar=True)

    def on_test_epoch_end(self) -> None:
        """Log what was tracked in the test."""
        self._log_epoch("test/")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """An epoch that is interrupted goes on with the sums it had."""
        # A callback saves before `on_train_batch_end` here has ended the window of a log step. Lightning's
        # `should_update_logs` would speak of a validation's batches in one.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        ends = every > 0 and (self.trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0
        checkpoint["tracked"] = {
            name: meter.state(self._sum_over_ranks, ends)
            for name, meter in self._meters.items()
            if name.startswith("train/")
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the sums of an interrupted epoch back."""
        # The sums are those of all ranks: one of them takes them over. `load_from_checkpoint` has no Trainer.
        if self._trainer is not None and self.trainer.is_global_zero:
            for name, state in checkpoint.get("tracked", {}).items():
                self._meters[name] = _Meter.from_state(state)

    def _log_epoch(self, prefix: str, in_bar: bool = False, **options: Any) -> None:
        names = [name for name in self._meters if name.startswith(prefix)]
        metrics = {name: self._meters.pop(name).result(self._sum_over_ranks) for name in names}
        for name, value in (metrics | self.derived_metrics(metrics)).items():
            self.log(name, value, prog_bar=in_bar and _is_plain(name), **options)

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        if self.trainer.world_size == 1:
            return values
        # MPS has no float64, and never more than one process.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        reduced = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return [float(value) / fsdp.same_batch(self.trainer.strategy) for value in reduced.tolist()]


def _is_plain(name: str) -> bool:
    """Whether a metric is `stage/what`; those of parts, `stage/part/what`, may be hundreds and are in no bar."""
    return name.count("/") < 2


def _is_json(value: Any) -> bool:
    """Whether JSON has a word for a value; it has none for NaN and infinity."""
    if isinstance(value, dict):
        return all(type(key) is str and _is_json(part) for key, part in value.items())
    if type(value) in (list, tuple):
        return all(_is_json(part) for part in value)
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def _listed(value: Any) -> Any:
    """The same with lists for tuples, as JSON would give it back."""
    if isinstance(value, dict):
        return {key: _listed(part) for key, part in value.items()}
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value


class _Meter:
    """A weighted sum whose newest terms are still on the device.

    Terms are added one after the other in Python floats, so that the sum does not depend on when they were collected.
    """

    def __init__(self, reduction: Literal["mean", "sum"]) -> None:
        self.reduction = reduction
        self._pending: list[Tensor] = []
        self._weights: list[float | Tensor] = []
        self._sum = self._weight = 0.0
        self._window_sum = self._window_weight = 0.0
        self._window_terms = 0

    @property
    def has_window(self) -> bool:
        """Whether anything was added since the last call of `window`."""
        return bool(self._pending) or self._window_terms > 0

    def add(self, value: Tensor, weight: float | Tensor) -> None:
        self._pending.append(value)
        self._weights.append(weight)
        if len(self._pending) >= _MAX_PENDING:
            self._collect()

    def window(self) -> float:
        """The mean since the last call."""
        self._collect()
        mean = self._window_sum / self._window_weight if self._window_weight else float("nan")
        self._window_sum = self._window_weight = 0.0
        self._window_terms = 0
        return mean

    def result(self, sum_over_ranks: Callable[[list[float]], list[float]]) -> float:
        """The mean or sum of everything."""
        self._collect()
        total, weight = sum_over_ranks([self._sum, self._weight])
        if self.reduction == "sum":
            return total
        return total / weight if weight else float("nan")

    def state(self, sum_over_ranks: Callable[[list[float]], list[float]], window_ends: bool) -> dict[str, Any]:
        self._collect()
        # The first rank writes and reads this, and logs its own window.
        window = [0.0, 0.0, 0] if window_ends else [self._window_sum, self._window_weight, self._window_terms]
        return {"reduction": self.reduction, "numbers": [*sum_over_ranks([self._sum, self._weight]), *window]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "_Meter":
        meter = cls(state["reduction"])
        meter._sum, meter._weight, meter._window_sum, meter._window_weight, meter._window_terms = state["numbers"]
        return meter

    def _collect(self) -> None:
        if not self._pending:
            return
        values = torch.stack(self._pending).tolist()  # the one copy to the host
        counts = [weight for weight in self._weights if isinstance(weight, Tensor)]
        counted = iter(torch.stack(counts).tolist() if counts else ())  # and one for weights that the device knows
        weights = [next(counted) if isinstance(weight, Tensor) else weight for weight in self._weights]
        for value, weight in zip(values, weights, strict=True):
            term = value if self.reduction == "sum" else value * weight
            self._sum += term
            self._weight += weight
            self._window_sum += term
            self._window_terms += 1
            self._window_weight += 1 if self.reduction == "sum" else weight
        self._pending.clear()
        self._weights.clear()
