"""Parameter groups for weight decay, and the schedules that torch does not have.

Every schedule counts optimizer steps, and is a factor on each group's own learning rate.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
_TOKEN_WORDS = ("token", "pos_embed", "embedding")


def decays(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Whether weight decay applies to a parameter: not to biases, norms, embeddings and learned tokens.

    Args:
        name: its full name.
        parameter: the parameter itself.
        owner: the module that holds it directly.

    Returns:
        False for any parameter with fewer than two dimensions (biases, norm weights, scales), for all parameters of
        norm and `nn.Embedding` modules, and for bare parameters whose own name contains 'token', 'pos_embed' or
        'embedding' (class and mask tokens, learned positions). True for everything else.
    """
    own_name = name.rpartition(".")[2]
    if parameter.ndim < 2 or own_name.endswith("bias"):
        return False
    if isinstance(owner, (*_NORMS, nn.Embedding, nn.EmbeddingBag)):
        return False
    return not any(word in own_name for word in _TOKEN_WORDS)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a module's trainable parameters into those that decay and those that do not.

    Args:
        module: its parameters are taken once each, tied ones too, in the order of `named_parameters()`.
        weight_decay: the decay of the first group; the second has 0.

    Returns:
        One or two groups, empty ones left out.

    Raises:
        ValueError: if nothing is trainable.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            owner = module.get_submodule(name.rpartition(".")[0])
            (decay if decays(name, parameter, owner) else keep).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("module: has no trainable parameter; at least one needs requires_grad=True")
    return groups


def make_optimizer(factory: Callable[..., Optimizer], module: nn.Module, *, allow_fused: bool = True) -> Optimizer:
    """Finish an optimizer partial: give it parameter groups, and its fused kernel where that is right.

    Args:
        factory: an optimizer class, or a `functools.partial` of one; its `weight_decay` applies by `decays`. A class
            with a `parameter_groups(module, weight_decay)` of its own, such as `Muon`, divides the parameters itself.
        module: what to optimize.
        allow_fused: False under mixed precision: fused optimizers unscale by themselves, so gradients could not be
            clipped before the step.

    Returns:
        The optimizer. `fused` is switched on where the class has it, the partial leaves it at None, and all parameters
        are floating point on one kind of device; where they are in pieces (FSDP2), only Adam's.
    """
    given = dict(getattr(factory, "keywords", {}))
    known = inspect.signature(factory).parameters
    weight_decay = given.get("weight_decay", _default(known, "weight_decay"))
    split = getattr(getattr(factory, "func", factory), "parameter_groups", parameter_groups)
    groups = (
        split(module, weight_decay)
        if weight_decay is not None
        else [{"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}]
    )
    chosen_otherwise = any(given.get(name) for name in ("foreach", "capturable", "differentiable"))
    extra: dict[str, Any] = {}
    if "fused" in known and given.get("fused") is None and not chosen_otherwise:
        every = [parameter for group in groups for parameter in group["params"]]
        kind = getattr(factory, "func", factory)
        # Of the fused kernels torch cuts Adam's alone.
        can_cut = isinstance(kind, type) and issubclass(kind, (Adam, AdamW))
        whole = not any(hasattr(parameter, "_local_tensor") for parameter in every)
        devices = {parameter.device.type for parameter in every}
        extra["fused"] = allow_fused and (whole or can_cut) and devices in ({"cpu"}, {"cuda"})
    return factory(groups, **extra)


def make_scheduler(
    factory: Callable[..., LRScheduler], optimizer: Optimizer, *, total_steps: int | None, steps_per_epoch: int | None
) -> LRScheduler:
    """Finish a scheduler partial: the lengths that only the trainer knows are filled in where they were left open.

    Args:
        factory: a scheduler class or function, or a partial of one.
        optimizer: what it schedules.
        total_steps: optimizer steps of the whole run, None for a run without an end; fills `total_steps` and `T_max` if
            the factory has them as None.
        steps_per_epoch: optimizer steps of an epoch, None if not known; fills `steps_per_epoch` likewise.

    Returns:
        The scheduler, to be stepped once per optimizer step.

    Raises:
        ValueError: if the schedule needs the length of a run that has none.
    """
    given = dict(getattr(factory, "keywords", {}))
    known = inspect.signature(factory).parameters
    lengths = {"total_steps": total_steps, "T_max": total_steps, "steps_per_epoch": steps_per_epoch}
    extra = {name: value for name, value in lengths.items() if name in known and given.get(name) is None}
    if total_steps is None and {"total_steps", "T_max"} & set(extra):
        raise ValueError(
            "max_epochs=-1: this schedule needs to know the length of the run; set max_epochs or max_steps"
        )
    return factory(optimizer, **extra)


# How a decay runs: from 1 at t = 0 to 0 at t = 1.
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "1-sqrt": lambda t: 1 - math.sqrt(t),
}


def schedule_factor(
    step: int, *, warmup_steps: int, decay_start: int, total_steps: int, min_lr_scale: float, decay: str
) -> float:
    """Linear warm-up, a constant, and a decay down to `min_lr_scale`.

    With s the step, W the warm-up, D the start of the decay, T the total and m the minimum: (s+1)/W while s < W,
    1 while s < D, then m + (1−m)·d(t) with t = min(1, (s−D)/(T−D)). d(t) is 1 − t for the decay 'linear',
    ½(1 + cos πt) for 'cosine', 1 − √t for '1-sqrt'.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step < decay_start:
        return 1.0
    progress = min(1.0, (step - decay_start) / max(1, total_steps - decay_start))
    return min_lr_scale + (1 - min_lr_scale) * _DECAYS[decay](progress)


def warmup_cosine(
    optimizer: Optimizer,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    warmup_epochs: float = 1.0,
    warmup_ratio: float | None = None,
    warmup_steps: int | None = None,
    min_lr_scale: float = 0.0,
) -> LambdaLR:
    """Warm-up, then a cosine decay over the rest of the run: `schedule_factor` on every group's learning rate.

    Args:
        optimizer: what to schedule.
        total_steps: optimizer steps of the run; a Task fills it in.
        steps_per_epoch: optimizer steps of an epoch, needed for `warmup_epochs`; a Task fills it in.
        warmup_epochs: length of the warm-up in epochs, 1 by default; fractions are allowed. Rounded down to steps.
        warmup_ratio: length of the warm-up as a part of the run, from 0 to 1; wins over `warmup_epochs`.
        warmup_steps: length of the warm-up in steps; wins over both.
        min_lr_scale: the factor at the end, from 0 to 1.

    Raises:
        ValueError: for a factor or ratio outside [0, 1], a negative warm-up, or a length that is still open.
    """
    lengths = total_steps, steps_per_epoch, warmup_epochs, warmup_ratio, warmup_steps
    return _schedule(optimizer, *lengths, decay_fraction=1.0, decay="cosine", min_lr_scale=min_lr_scale)


def warmup_linear(
    optimizer: Optimizer,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    warmup_epochs: float = 1.0,
    warmup_ratio: float | None = None,
    warmup_steps: int | None = None,
    min_lr_scale: float = 0.0,
) -> LambdaLR:
    """Warm-up, then a straight line down over the rest of the run; arguments as `warmup_cosine`."""
    lengths = total_steps, steps_per_epoch, warmup_epochs, warmup_ratio, warmup_steps
    return _schedule(optimizer, *lengths, decay_fraction=1.0, decay="linear", min_lr_scale=min_lr_scale)


def warmup_stable_decay(
    optimizer: Optimizer,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    warmup_epochs: float = 1.0,
    warmup_ratio: float | None = None,
    warmup_steps: int | None = None,
    decay_fraction: float = 0.2,
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear",
    min_lr_scale: float = 0.0,
) -> LambdaLR:
    """Warm-up, a constant rate, and a decay over the last part of the run; other arguments as `warmup_cosine`.

    Until the decay begins, the run may be made longer without training anything again. Sources: S. Hu et al.,
    'MiniCPM', 2024 (arXiv:2404.06395); 1 − √t: A. Hägele et al., 'Scaling laws and compute-optimal training beyond
    fixed training durations', NeurIPS 2024 (arXiv:2405.18392).

    Args:
        optimizer: what to schedule.
        total_steps: as there.
        steps_per_epoch: as there.
        warmup_epochs: as there.
        warmup_ratio: as there.
        warmup_steps: as there.
        decay_fraction: the last part of all steps, from 0 to 1, rounded to steps; it never begins within the warm-up.
        decay: 'linear', 'cosine' or '1-sqrt'.
        min_lr_scale: as there.

    Raises:
        ValueError: as there, for a fraction outside [0, 1], or for another decay.
    """
    lengths = total_steps, steps_per_epoch, warmup_epochs, warmup_ratio, warmup_steps
    return _schedule(optimizer, *lengths, decay_fraction=decay_fraction, decay=decay, min_lr_scale=min_lr_scale)


def _schedule(
    optimizer: Optimizer,
    total_steps: int | None,
    steps_per_epoch: int | None,
    warmup_epochs: float,
    warmup_ratio: float | None,
    warmup_steps: int | None,
    *,
    decay_fraction: float,
    decay: str,
    min_lr_scale: float,
) -> LambdaLR:
    parts = {"decay_fraction": decay_fraction, "min_lr_scale": min_lr_scale, "warmup_ratio": warmup_ratio}
    for name, value in parts.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must be from 0 to 1")
    if decay not in _DECAYS:
        raise ValueError(f"decay={decay}: must be one of {', '.join(_DECAYS)}")
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs={warmup_epochs}: must be 0 or more")
    if warmup_steps is not None and warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps}: must be 0 or more, or null to use warmup_epochs")
    if total_steps is None or total_steps < 1:
        raise ValueError(f"total_steps={total_steps}: must be 1 or more; set trainer.max_epochs or trainer.max_steps")
    if warmup_steps is None and warmup_ratio is not None:
        warmup_steps = int(warmup_ratio * total_steps)
    if warmup_steps is None:
        if warmup_epochs and steps_per_epoch is None:
            raise ValueError(f"warmup_epochs={warmup_epochs}: needs steps_per_epoch as well, or give warmup_steps")
        warmup_steps = int(warmup_epochs * (steps_per_epoch or 0))
    start = max(warmup_steps, total_steps - round(decay_fraction * total_steps))
    knots = {"warmup_steps": warmup_steps, "decay_start": start, "total_steps": total_steps}
    return LambdaLR(optimizer, lambda step: schedule_factor(step, **knots, min_lr_scale=min_lr_scale, decay=decay))


def _default(known: Mapping[str, inspect.Parameter], name: str) -> Any:
    return known[name].default if name in known else None
