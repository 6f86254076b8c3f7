"""Parameters and modules by name: what the `parameters=` and `modules=` patterns of the callbacks mean."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn


def as_patterns(value: str | Sequence[str], argument: str = "parameters") -> list[str]:
    """One pattern or several as a list.

    Raises:
        ValueError: if there is none, or one is not a string.
    """
    patterns = [value] if isinstance(value, str) else list(value)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"{argument}={value!r}: must be a pattern for names, like 'encoder.*', or a list of them")
    return patterns


def plain_name(name: str) -> str:
    """A name as it was before `torch.compile` wrapped a module, so that patterns and checkpoints fit either way."""
    return name.replace("_orig_mod.", "")


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its plain name, a tied one once, under its first name."""
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def select(
    module: nn.Module, patterns: Sequence[str], argument: str = "parameters", trainable: bool = False
) -> dict[str, nn.Parameter]:
    """The parameters whose names match any of the patterns; '*' matches dots too.

    Args:
        module: where to look.
        patterns: shell patterns (`fnmatch`).
        argument: what the patterns are called in an error.
        trainable: leave out what needs no gradient.

    Raises:
        ValueError: for a pattern that matches nothing; it lists the nearest names.
    """
    named = named_parameters(module)
    chosen = match(named, patterns, argument, "parameter")
    return {name: named[name] for name in chosen if named[name].requires_grad or not trainable}


def match(names: Iterable[str], patterns: Sequence[str], argument: str, kind: str) -> list[str]:
    """The names that any pattern matches, in their own order.

    Raises:
        ValueError: for a pattern that matches nothing; it lists the nearest names.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0) or names[:5]
            raise ValueError(
                f"{argument}={pattern}: matches no {kind}; the nearest are {', '.join(near) or 'none at all'}"
            )
    return [name for name in names if matches(name, patterns)]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the patterns matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_built(pl_module: LightningModule) -> bool:
    """Whether the layers are there in `setup`; a module with a `configure_model` of its own makes them later."""
    home = type(pl_module).configure_model.__module__
    return home == "trainerkit.task" or home.startswith(("lightning.pytorch.", "pytorch_lightning."))


def owners(optimizers: Sequence[Any], named: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """For each named parameter that an optimizer holds: the index of the first optimizer that does."""
    index: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                index.setdefault(id(parameter), number)
    return {name: index[id(parameter)] for name, parameter in named.items() if id(parameter) in index}
