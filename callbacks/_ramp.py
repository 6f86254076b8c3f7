"""Ramps of the learning rates of some parameters of an optimizer, on top of whatever its scheduler does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def ramp(steps: int, warmup_steps: int) -> float:
    """The multiplier of a learning rate after `steps` steps: min(1, steps/warmup_steps), and 1 without a warm-up."""
    return min(1.0, steps / warmup_steps) if warmup_steps else 1.0


def split_group(group: dict[str, Any], factor_of: Callable[[nn.Parameter], float]) -> list[dict[str, Any]]:
    """A parameter group as one group for each factor, whose learning rate is multiplied by it."""
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(factor_of(parameter), []).append(parameter)
    return [group | {"params": params, "lr": group["lr"] * factor} for factor, params in (parts or {1.0: []}).items()]


class Ramp:
    """Counts the steps of one optimizer, and within each scales the rates of what joined lately.

    Schedulers, checkpoints and whoever reads `param_groups` outside of a step see the groups as the user made them.
    """

    def __init__(self, optimizer: Optimizer, named: Mapping[str, nn.Parameter], warmup_steps: int) -> None:
        wraps = any(isinstance(getattr(optimizer, name, None), Optimizer) for name in ("optim", "optimizer"))
        if warmup_steps and (wraps or isinstance(optimizer, torch.optim.LBFGS)):
            raise ValueError(
                f"warmup_steps={warmup_steps}: must be 0 with {type(optimizer).__name__}, which has one learning rate "
                "for all parameters, or hands them to another optimizer"
            )
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.steps = 0
        self.joined: dict[str, int] = {}  # name of what joined later, to the steps made before
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._ids = {name: id(parameter) for name, parameter in named.items() if id(parameter) in held}
        self._since: dict[int, int] = {}  # as `joined`, by id
        self._end = 0  # the step from which all ramps are over
        self._groups: list[dict[str, Any]] | None = None  # the user's own, within a step
        self._parts: list[list[dict[str, Any]]] = []  # of each group
        before, after = optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)
        self._handles = [before, after]

    def join(self, names: Sequence[str]) -> None:
        """These begin their ramps now."""
        self.restore(self.steps, self.joined | {name: self.steps for name in names if name not in self.joined})

    def restore(self, steps: int, joined: Mapping[str, int]) -> None:
        """Go on from a checkpoint."""
        self.steps = steps
        self.joined = {name: since for name, since in joined.items() if name in self._ids}
        self._since = {self._ids[name]: since for name, since in self.joined.items()}
        self._end = max(self._since.values(), default=0) + self.warmup_steps

    def detach(self) -> None:
        """Leave the optimizer with its own groups."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._merge()

    def _factor(self, parameter: nn.Parameter) -> float:
        since = self._since.get(id(parameter))
        return 1.0 if since is None else ramp(self.steps - since, self.warmup_steps)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._since or self.steps >= self._end:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._split()
            return None

        def closure_then_split() -> Any:
            # Lightning's closure trains the batch; nothing in there should see groups that are not the user's.
            self._merge()
            result = closure()
            self._split()
            return result

        if len(args) > 1:
            return (args[0], closure_then_split, *args[2:]), kwargs
        return args, kwargs | {"closure": closure_then_split}

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._merge()
        self.steps += 1

    def _split(self) -> None:
        self._groups = self.optimizer.param_groups
        self._parts = [split_group(group, self._factor) for group in self._groups]
        self.optimizer.param_groups = [part for parts in self._parts for part in parts]

    def _merge(self) -> None:
        if self._groups is None:
            return
        for group, parts in zip(self._groups, self._parts, strict=True):
            # What the step itself keeps in a group, a count of steps say.
            kept = {key: value for key, value in parts[0].items() if key not in ("params", "lr")}
            group.update(kept)
        self.optimizer.param_groups, self._groups = self._groups, None
