"""From a config node to the object it describes: checked first, so that an error names the key and the value.

Before anything is built, every `_target_` in the node must be allowed (`plugins.AllowList`), every key must be a
parameter of its target, and every value must fit the parameter's annotation. What the constructor itself refuses
(`ValueError` that begins with the parameter's name) is reported under the key's full path.

Interpolations are resolved once, into plain dicts and lists; what was checked is what is built. (Hydra's `instantiate`
resolves again, so that an escaped interpolation could turn into a target after the check.)
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainerkit.errors import UserError, did_you_mean, first_lines
from trainerkit.extras import missing_in
from trainerkit.plugins import AllowList
from trainerkit.signatures import describe, fits, is_open, parameters, required

_SPECIAL_KEYS = frozenset({"_target_", "_partial_", "_args_", "_recursive_", "_convert_"})
_MISSING = "???"
_CONVERSIONS = ("none", "partial", "object", "all")


def build(node: Any, key: str, allow: AllowList, **extra: Any) -> Any:
    """Build the object that a config node describes, after checking all of it.

    Hydra's keys mean what they mean there: `_partial_`, `_args_`, `_recursive_`; `_convert_` changes nothing, since
    every value is plain.

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
    node = _plain(node, key)
    if not _is_node(node):
        raise UserError(f"{key}={_show(node)}: must be keys with a _target_.")
    check(node, key, allow, given=frozenset(extra))
    return _build(node, key, allow, extra)


def check(node: Any, key: str, allow: AllowList, given: frozenset[str] = frozenset()) -> None:
    """Check a config node and everything below it without building anything; raises `UserError`."""
    for place, child in mappings(_plain(node, key), key):
        if "_target_" in child:
            _check_target(child, place, allow, given if place == key else frozenset())


def _plain(node: Any, key: str) -> Any:
    """Dicts, lists and scalars, with every interpolation resolved."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{key}: {first_lines(error, 1)}.") from error


def _build(node: Any, key: str, allow: AllowList, extra: Mapping[str, Any]) -> Any:
    """Build what was checked, from the inside out."""
    if isinstance(node, list):
        return [_build(child, f"{key}[{position}]", allow, {}) for position, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {name: _build(child, f"{key}.{name}", allow, {}) for name, child in node.items()}
    target = allow.resolve(node["_target_"], key)
    values = {name: value for name, value in node.items() if name not in _SPECIAL_KEYS} | dict(extra)
    positional = node.get("_args_", [])
    if node.get("_recursive_", True):
        positional = _build(positional, f"{key}._args_", allow, {})
        values |= {name: _build(node[name], f"{key}.{name}", allow, {}) for name in values if name not in extra}
    if node.get("_partial_", False):
        return functools.partial(target, *positional, **values)
    try:
        return target(*positional, **values)
    except Exception as error:
        raise _as_user_error(error, key, node) from error


def mappings(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping in a node, itself included, with its key; the outer one first."""
    if isinstance(node, dict):
        yield key, node
        for name, child in node.items():
            yield from mappings(child, f"{key}.{name}")
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from mappings(child, f"{key}[{position}]")


def _check_special(node: dict[str, Any], key: str) -> None:
    """Hydra's own keys."""
    if not isinstance(node["_target_"], str):
        raise UserError(f"{key}._target_={_show(node['_target_'])}: must be the dotted name of a class or function.")
    for name in ("_partial_", "_recursive_"):
        if not isinstance(node.get(name, False), bool):
            raise UserError(f"{key}.{name}={_show(node[name])}: must be true or false.")
    if not isinstance(node.get("_args_", []), list):
        raise UserError(f"{key}._args_={_show(node['_args_'])}: must be a list.")
    if str(node.get("_convert_", "all")).lower() not in _CONVERSIONS:
        raise UserError(f"{key}._convert_={_show(node['_convert_'])}: must be one of {', '.join(_CONVERSIONS)}.")
    for name in node:
        if not isinstance(name, str):
            raise UserError(f"{key}.{_show(name)}: must be the name of a parameter.")


def _check_target(node: dict[str, Any], key: str, allow: AllowList, given: frozenset[str]) -> None:
    _check_special(node, key)
    try:
        target = allow.resolve(node["_target_"], key)
    except ImportError as error:
        raise missing_in(error, key) from error
    hints = parameters(target)
    values = {name: value for name, value in node.items() if name not in _SPECIAL_KEYS}
    for name, value in values.items():
        if value == _MISSING:
            raise UserError(f"{key}.{name}: needs a value; give it by {key}.{name}=…")
        if name not in hints and is_open(target):
            continue
        if name not in hints:
            raise UserError(f"{key}.{name}: {_name(target)} has no such parameter. {did_you_mean(name, hints)}")
        hint = hints[name].annotation
        if value is None and node.get("_partial_", False):
            continue  # left open, to be filled in when the object is finished
        if not _is_node(value) and not fits(value, hint):
            raise UserError(f"{key}.{name}={_show(value)}: must be {describe(hint)}.")
    if not node.get("_partial_", False) and not node.get("_args_"):
        missing_values = [name for name in required(target) if name not in values and name not in given]
        if missing_values:
            raise UserError(f"{key}: {_name(target)} needs a value for {', '.join(missing_values)}.")


def _as_user_error(error: Exception, key: str, node: dict[str, Any]) -> Exception:
    """What a constructor raised, under the full key; an error that is not about values is passed on as it is."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, ImportError):
        return missing_in(error, key)
    kinds = (ValueError, TypeError, OSError, OverflowError, MemoryError, RuntimeError)
    if isinstance(error, kinds) or type(error).__name__ == "MisconfigurationException":
        return UserError(_at_key(str(error) or type(error).__name__, key, node))
    return error


def _at_key(message: str, key: str, node: dict[str, Any]) -> str:
    """'n_mask=99: must be …' becomes 'task.network.n_mask=99: must be …'."""
    match = re.match(r"\w+", message)
    if match and match[0] in node:
        return f"{key}.{message}"
    return f"{key}: {message}"


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def _name(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"
