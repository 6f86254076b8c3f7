"""A copy of a module that can run its `training_step` without any effect on the run.

The copy has weights, buffers and metrics of its own, logs nothing, and its optimizers do not step; hooks of callbacks
stay behind. Layers that `torch.compile` has wrapped run as they were written, so that hooks on them are called.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only


def left_by_a_step(pl_module: LightningModule) -> dict[int, Any]:
    """For `copy.deepcopy`: what a step left on the module may belong to a graph, which cannot be copied."""
    memo: dict[int, Any] = {}
    for module in pl_module.modules():
        for value in tree_leaves(dict(vars(module))):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return memo


def takes(step: Any, argument: str) -> bool:
    """Whether a step of a module takes the argument, which Lightning leaves out otherwise."""
    parameters = inspect.signature(step).parameters.values()
    return any(p.name == argument or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def make_twin(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Copy the module as it is now.

    Returns:
        A module of a class derived from the module's own; `twin.losses` collects the loss of each `manual_backward`.
    """
    memo = left_by_a_step(pl_module)
    kept = []
    for module in pl_module.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = getattr(module, kind)
            own = {key: hook for key, hook in hooks.items() if not _is_of_a_callback(hook, trainer)}
            if len(own) < len(hooks):
                memo[id(hooks)] = OrderedDict()
                kept.append((memo[id(hooks)], own))
    for hooks, own in kept:  # after all are in the memo: a hook may belong to a module and bring it along
        hooks.update({key: copy.deepcopy(hook, memo) for key, hook in own.items()})
    twin: Any = copy.deepcopy(pl_module, memo)
    twin.__class__ = type(type(pl_module).__name__, (_Silent, type(pl_module)), {})
    twin.trainer = trainer
    twin.losses = []
    for module in twin.modules():
        if module is not twin and hasattr(module, "log_dict"):
            for name in ("log", "log_dict"):
                object.__setattr__(module, name, _nothing)
    return twin


@contextmanager
def as_written() -> Iterator[None]:
    """Run compiled layers as they were written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unseen() -> Iterator[None]:
    """Compute aside from the run, so that whoever counts its operations (Throughput) does not count these."""
    with _disable_current_modes():
        yield


def run_step(twin: Any, batch: Any, batch_idx: int) -> Tensor | None:
    """The loss of one `training_step`; None where it gives none."""
    takes_index = is_param_in_hook_signature(twin.training_step, "batch_idx", min_args=2)
    with torch.enable_grad(), as_written():
        output = twin.training_step(batch, batch_idx) if takes_index else twin.training_step(batch)
    loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
    return loss


def clone_batch(batch: Any) -> Any:
    """The batch with tensors of its own: a step may change them in place."""
    return tree_map_only(Tensor, torch.clone, batch)


def _is_of_a_callback(hook: Any, trainer: Trainer) -> bool:
    """Whether a hook on a module is a method of a callback, or was made in one: it must not see what the twin does."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    classes = {(cls.__module__, cls.__qualname__) for callback in callbacks for cls in type(callback).__mro__}
    function = hook.func if isinstance(hook, partial) else hook
    owner = getattr(function, "__qualname__", "").partition(".<locals>")[0].rpartition(".")[0]
    return (getattr(function, "__module__", None), owner) in classes


def _nothing(*_: Any, **__: Any) -> None:
    return None


class _Silent:
    """What stands before the module's own class: everything by which a step acts on the run."""

    logger = DummyLogger()
    loggers = (logger,)
    losses: list[Tensor]
    trainer: Any
    log = log_dict = print = clip_gradients = toggle_optimizer = untoggle_optimizer = staticmethod(_nothing)

    def manual_backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        self.losses.append(loss.detach())
        loss.backward(*arguments, **options)

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        inert = [_Inert(optimizer) for optimizer in self.trainer.optimizers]
        return inert[0] if len(inert) == 1 else inert

    def lr_schedulers(self) -> Any:
        inert = [_Inert(config.scheduler) for config in self.trainer.lr_scheduler_configs]
        return inert[0] if len(inert) == 1 else inert or None


class _Inert:
    """An optimizer or schedule that can be asked but does not move."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, closure: Callable[[], Any] | None = None, *_: Any, **__: Any) -> Any:
        return closure() if callable(closure) else None

    zero_grad = staticmethod(_nothing)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [dict(group) for group in self._real.param_groups]

    def toggle_model(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
