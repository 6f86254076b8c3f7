"""What a class or function takes, and whether a value from YAML fits it."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function, with annotations resolved.

    A constructor that passes `**kwargs` on to its base class has the base's parameters as well.
    """
    found: dict[str, inspect.Parameter] = {}
    functions: list[Callable[..., Any]] = [target]
    if isinstance(target, type):
        functions = [vars(owner)["__init__"] for owner in target.__mro__ if "__init__" in vars(owner)]
    for function in functions:
        signature = inspect.signature(function)
        hints = _hints(inspect.unwrap(function))
        passes_on = False
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                passes_on = True
            elif name != "self" and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                found.setdefault(name, parameter.replace(annotation=hints.get(name, Any)))
        if not passes_on:
            break
    return found


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    # Annotations may name things imported for type checkers only; such parameters are then not checked.
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value from YAML fits a type annotation; annotations that YAML cannot express always fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str or (isinstance(hint, type) and issubclass(hint, Path)):
        return isinstance(value, str)
    if origin is tuple:
        return _fits_tuple(value, arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    # Any other class is something that YAML cannot write down as a plain value; it is built by a _target_ instead.
    return not isinstance(hint, type) or isinstance(value, hint)


def _fits_tuple(value: Any, arguments: tuple[Any, ...]) -> bool:
    if not isinstance(value, list):
        return False
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(fits(item, arguments[0]) for item in value)
    return len(value) == len(arguments) and all(fits(item, hint) for item, hint in zip(value, arguments, strict=True))


def describe(hint: Any) -> str:
    """An annotation in words for people: 'a whole number or null', 'one of mse, sse'."""
    alternatives = _alternatives(hint)
    choices = [str(choice) for choice in alternatives if get_origin(choice) is None and not _is_type(choice)]
    words = [_words(alternative) for alternative in alternatives if get_origin(alternative) or _is_type(alternative)]
    if choices:
        words.insert(0, f"one of {', '.join(dict.fromkeys(choices))}")
    return " or ".join(dict.fromkeys(filter(None, words))) or "built by a _target_"


def _alternatives(hint: Any) -> list[Any]:
    """A union's parts, a literal's values, or the annotation itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return [part for argument in get_args(hint) for part in _alternatives(argument)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [hint]


def _is_type(hint: Any) -> bool:
    return hint is None or isinstance(hint, type) or hint is Any


def _words(hint: Any) -> str:
    """One alternative in words; empty for what YAML cannot write down."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}: [{', '.join(describe(argument) for argument in arguments)}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {describe(arguments[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    words |= {None: "null", type(None): "null"}  # type: ignore[dict-item]
    return words.get(hint, "")


def is_open(target: Callable[..., Any]) -> bool:
    """Whether a class or function takes any keyword, beyond what its base classes name."""
    function = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds and not target.__module__.startswith("trainerkit.")


def required(target: Callable[..., Any]) -> list[str]:
    """The named parameters that a class or function cannot do without."""
    function = getattr(target, "__init__") if isinstance(target, type) else target  # noqa: B009
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind not in kinds and parameter.default is inspect.Parameter.empty
    ]
