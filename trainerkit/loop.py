"""Lightning's training loop without what a small step pays for nothing.

In every batch Lightning calls each callback's every hook, whether it does anything or not, enters a context around
each of these calls, inspects the signature of `training_step`, and wraps the step into four closures. On a model of a
millisecond a step that is most of the time. `FastTrainingEpochLoop` looks once an epoch which hooks do anything and
calls those, in the same order and with the same counters; whatever is not the plain case goes through Lightning's own
code.

tests/test_loop.py holds the order of hooks, the weights, the metrics and the checkpoints of both against each other;
tests/benchmarks/small_steps.py prints what it saves. Written against the internals of lightning 2.6, which
pyproject.toml pins.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

Hook = Callable[..., Any]

_BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
# Of a module: where one of these is its own, Lightning's code runs the batch.
_OWN_WAYS = (
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)
_NO_HOOK_MODULES = ("callbacks.callback", "core.hooks", "core.module", "core.datamodule")


class FastTrainingEpochLoop(_TrainingEpochLoop):
    """Runs a batch of the plain case directly, any other as Lightning does.

    The plain case: automatic optimization with one optimizer on one device, full or bf16 precision, no profiler, and a
    module that leaves moving batches, backward and the optimizer's step to Lightning.
    """

    _plan: "_Plan | None" = None

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Look anew, once an epoch, at what is to be called."""
        super().on_run_start(data_fetcher)
        self._plan = _Plan(self) if _is_plain(self, data_fetcher) else None

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Run one training batch."""
        plan = self._plan
        if plan is None or self.restarting:
            super().advance(data_fetcher)
            return
        trainer = self.trainer
        # As in Lightning's advance(): a validation that begins now is not a restarted one.
        self.val_loop.restarting = False
        batch, _, _ = next(data_fetcher)
        batch_idx = self.batch_idx + 1
        progress = self.batch_progress
        progress.is_last_batch = data_fetcher.done
        if not _is_on(batch, plan.device):
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        progress.increment_ready()
        trainer._logger_connector.on_batch_start(batch)

        if plan.run("on_train_batch_start", batch, batch_idx) == -1:
            progress.increment_by(0, is_last_batch=True)
            progress.increment_processed()
            raise StopIteration
        progress.increment_started()
        output = self._optimize(plan, batch, batch_idx)
        progress.increment_processed()
        if trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if self._num_ready_batches_reached():
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        plan.run("on_train_batch_end", output, batch, batch_idx)
        trainer._logger_connector.on_batch_end()
        progress.increment_completed()
        trainer._logger_connector.update_train_step_metrics()

    def _optimize(self, plan: "_Plan", batch: Any, batch_idx: int) -> dict[str, Any]:
        """Forward, backward, and at the end of a window the optimizer's step."""
        trainer, module, optimizer = self.trainer, plan.module, plan.optimizer
        window = trainer.accumulate_grad_batches
        accumulating = self._should_accumulate()
        counts = self.automatic_optimization.optim_progress.optimizer
        if not accumulating:
            counts.step.increment_ready()

        module._current_fx_name = "training_step"
        with torch.enable_grad():
            with trainer.precision_plugin.train_step_context():
                raw = module.training_step(batch, batch_idx) if plan.takes_index else module.training_step(batch)
            module._current_fx_name = None
            result = ClosureResult.from_training_step_output(raw, window)
            if batch_idx % window == 0:
                counts.zero_grad.increment_ready()
                plan.run("on_before_zero_grad", optimizer)
                counts.zero_grad.increment_started()
                optimizer.zero_grad()
                counts.zero_grad.increment_completed()
            loss = result.closure_loss
            if loss is not None:  # None: the step was skipped on purpose
                plan.run("on_before_backward", loss)
                loss.backward()
                plan.run("on_after_backward")
        if not accumulating:
            plan.run("on_before_optimizer_step", optimizer)
            plan.clip()
            optimizer.step()
            counts.step.increment_completed()
        return {} if result.loss is None else result.asdict()


class _Plan:
    """What a batch calls, found out once."""

    def __init__(self, loop: FastTrainingEpochLoop) -> None:
        trainer = loop.trainer
        self.trainer = trainer
        self.module = trainer.lightning_module
        self.optimizer = trainer.optimizers[0]
        self.device = trainer.strategy.root_device
        self.takes_index = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        # A callback's hook takes trainer and module first, the module's own takes neither.
        self.hooks: dict[str, tuple[list[Hook], Hook | None]] = {}
        for name in _BATCH_HOOKS:
            of_callbacks = [hook for hook in (getattr(c, name) for c in trainer.callbacks) if _does_something(hook)]
            of_module = getattr(self.module, name)
            self.hooks[name] = of_callbacks, of_module if _does_something(of_module) else None
        self.clips = trainer.gradient_clip_val is not None or _is_own(self.module, "configure_gradient_clipping")

    def run(self, name: str, *arguments: Any) -> Any:
        """Call a hook of the callbacks that have it, then the module's, whose answer is given back."""
        of_callbacks, of_module = self.hooks[name]
        if not of_callbacks and of_module is None:
            return None
        module = self.module
        module._current_fx_name = name
        for hook in of_callbacks:
            hook(self.trainer, module, *arguments)
        answer = of_module(*arguments) if of_module is not None else None
        module._current_fx_name = None
        return answer

    def clip(self) -> None:
        """Clip gradients as the module does it."""
        if self.clips:
            trainer = self.trainer
            trainer.precision_plugin._clip_gradients(
                self.module,
                self.optimizer,
                trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )


def _is_plain(loop: FastTrainingEpochLoop, data_fetcher: _DataFetcher) -> bool:
    trainer = loop.trainer
    module, precision = trainer.lightning_module, trainer.precision_plugin
    full = type(precision) is Precision or (type(precision) is MixedPrecision and precision.scaler is None)
    data = trainer.datamodule
    return (
        module.automatic_optimization
        and len(trainer.optimizers) == 1
        and not isinstance(trainer.optimizers[0], torch.optim.LBFGS)
        and type(trainer.strategy) is SingleDeviceStrategy
        and full
        and isinstance(trainer.profiler, NoProfiler)
        and isinstance(data_fetcher, _PrefetchDataFetcher)
        and not any(_is_own(module, name) for name in _OWN_WAYS)
        and not (data is not None and any(_is_own(data, name) for name in _OWN_WAYS if hasattr(data, name)))
    )


def _is_own(owner: Any, name: str) -> bool:
    return _does_something(getattr(owner, name))


def _does_something(hook: Hook) -> bool:
    """Whether a hook is anything but the one that Lightning's base classes (in either of its packages) define."""
    home = getattr(getattr(hook, "__func__", hook), "__module__", "") or ""
    return not (home.startswith(("lightning.pytorch.", "pytorch_lightning.")) and home.endswith(_NO_HOOK_MODULES))


def _is_on(batch: Any, device: torch.device) -> bool:
    """Whether a batch, a tensor or a flat dict or sequence of tensors, is on the device already."""
    if isinstance(batch, Tensor):
        return batch.device == device
    if isinstance(batch, dict):
        return all(isinstance(value, Tensor) and value.device == device for value in batch.values())
    return type(batch) in (list, tuple) and all(isinstance(v, Tensor) and v.device == device for v in batch)


class NoProfiler(Profiler):
    """Measures nothing, at no cost.

    Lightning enters a generator-based context about sixty times a step even when nothing is profiled; one shared
    `nullcontext` takes a tenth of that time.
    """

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """The shared empty context."""
        return self._nothing

    def start(self, action_name: str) -> None:
        """Nothing to start."""

    def stop(self, action_name: str) -> None:
        """Nothing to stop."""
