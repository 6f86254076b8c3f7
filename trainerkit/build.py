"""From a config node to the object it describes: checked first, so that an error names the key and the value.

Before anything is built, every `_target_` in the node must be allowed (`plugins.AllowList`), every key must be a
parameter of its target, and every value must fit the parameter's annotation. What the constructor itself refuses
(`ValueError` that begins with the parameter's name) is reported under the key's full path.
"""

import re
from collections.abc import Iterator
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from trainerkit.errors import UserError, did_you_mean
from trainerkit.extras import missing_in
from trainerkit.plugins import AllowList
from trainerkit.signatures import describe, fits, is_open, parameters, required

_SPECIAL_KEYS = frozenset({"_target_", "_partial_", "_args_", "_recursive_", "_convert_"})


def build(node: Any, key: str, allow: AllowList, **extra: Any) -> Any:
    """Build the object that a config node describes, after checking all of it.

    Args:
        node: a config with a `_target_`.
        key: its place in the whole config, for messages (`task`, `callbacks.ema`).
        allow: decides which targets may be built.
        **extra: arguments given beside those in the node.

    Returns:
        The object, or a `functools.partial` where the node says `_partial_: true`.

    Raises:
        UserError: for a target that is not allowed, a key that the target does not take, a value of the wrong type,
            a value that the constructor refuses, or a missing package; the message names the full key.
    """
    check(node, key, allow, given=frozenset(extra))
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        raise _as_user_error(error, key, node) from error


def check(node: Any, key: str, allow: AllowList, given: frozenset[str] = frozenset()) -> None:
    """Check a config node and everything below it without building anything; raises `UserError`."""
    for place, child in _targets(node, key):
        _check_target(child, place, allow, given if place == key else frozenset())


def _targets(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        for name in map(str, node):
            if not OmegaConf.is_missing(node, name):
                yield from _targets(node[name], f"{key}.{name}")
    elif isinstance(node, ListConfig):
        for position, child in enumerate(node):
            yield from _targets(child, f"{key}[{position}]")


def _check_target(node: DictConfig, key: str, allow: AllowList, given: frozenset[str]) -> None:
    try:
        target = allow.resolve(str(node["_target_"]), key)
    except ImportError as error:
        raise missing_in(error, key) from error
    hints = parameters(target)
    for name in map(str, node):
        if OmegaConf.is_missing(node, name):
            raise UserError(f"{key}.{name}: needs a value; give it by {key}.{name}=…")
    values = {str(name): node[name] for name in node if name not in _SPECIAL_KEYS}
    for name, value in values.items():
        if name not in hints and is_open(target):
            continue
        if name not in hints:
            raise UserError(f"{key}.{name}: {_name(target)} has no such parameter. {did_you_mean(name, hints)}")
        hint = hints[name].annotation
        if value is None and node.get("_partial_", False):
            continue  # left open, to be filled in when the object is finished
        if not _is_node(value) and not fits(_plain(value), hint):
            raise UserError(f"{key}.{name}={_show(value)}: must be {describe(hint)}.")
    if not node.get("_partial_", False):
        missing_values = [name for name in required(target) if name not in values and name not in given]
        if missing_values:
            raise UserError(f"{key}: {_name(target)} needs a value for {', '.join(missing_values)}.")


def _as_user_error(error: InstantiationException, key: str, node: Any) -> Exception:
    """What a constructor raised, under the full key; an error that is not about values is passed on as it is."""
    cause = error.__cause__
    full_key = _full_key(error, key)
    if isinstance(cause, UserError):
        return cause
    if isinstance(cause, ImportError):
        return missing_in(cause, full_key)
    if isinstance(cause, ValueError | TypeError | OSError) or type(cause).__name__ == "MisconfigurationException":
        inner = OmegaConf.select(node, full_key.removeprefix(key).lstrip(".")) if full_key != key else node
        return UserError(_at_key(str(cause), full_key, inner))
    return cause if isinstance(cause, Exception) else error


def _full_key(error: InstantiationException, key: str) -> str:
    match = re.search(r"full_key: (\S+)", str(error))
    if match is None:
        return key
    found = match[1]
    # Hydra counts from the root of the whole config if the node has parents, else from the node.
    return found if found == key or found.startswith(f"{key}.") else f"{key}.{found}"


def _at_key(message: str, key: str, node: Any) -> str:
    """'n_mask=99: must be …' becomes 'task.network.n_mask=99: must be …'."""
    match = re.match(r"\w+", message)
    if match and isinstance(node, DictConfig) and match[0] in node:
        return f"{key}.{message}"
    return f"{key}: {message}"


def _is_node(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def _show(value: Any) -> str:
    return "null" if value is None else str(_plain(value))


def _name(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"
