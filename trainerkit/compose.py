"""From command-line overrides to a config, with every misspelling answered by the nearest right word."""

import re
from collections.abc import Iterator
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from trainerkit.errors import UserError, did_you_mean, either, first_lines, nearest
from trainerkit.extras import install_line
from trainerkit.plugins import register_search_path

CONFIG_MODULE = "trainerkit.configs"
CONFIG_NAME = "train"
# Keys whose values are prose or code, in which commas, brackets and spaces at the end mean themselves.
_TEXT_KEYS = {
    "prompt": "; put it into a file, data.prompt_file=FILE",
    "description": "; put it into a file, data.description_file=FILE",
    "query": "",
}

# Choices of Hydra's own groups that are there once an extra is installed.
_FROM_EXTRAS = {
    "hydra/launcher": {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"},
    "hydra/sweeper": {},
}


def compose_config(overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """Compose `configs/train.yaml` with `overrides`.

    Args:
        overrides: Hydra overrides, as on the command line. Of a sweep (`a=1,2`) the first value is taken.
        config_dir: a folder of the user's own config groups, or None.

    Returns:
        The composed config; interpolations are not resolved yet.

    Raises:
        UserError: for a misspelt group, choice or key (with the nearest right ones), or a malformed override.
    """
    with config_loader(config_dir) as loader:
        try:
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
        except Exception as error:  # as below
            raise UserError(first_lines(error)) from error
        groups = set(all_groups(loader))
        for override in parsed:
            _check_group(override, groups, loader)
        chosen = [next(texts(override)) for override in parsed]
        _check_keys(parsed, chosen, groups, loader)
        try:
            return compose(CONFIG_NAME, overrides=chosen)
        except Exception as error:  # also ValueError and AssertionError, for what its grammar lets through
            _check_keys_of_hydra(parsed, chosen, loader)
            raise _of_composing(error, parsed) from error


def with_text_quoted(override: str) -> str:
    """An override of a key that holds text, quoted for Hydra so that it stands for itself; any other as it is.

    Raises:
        UserError: for what OmegaConf takes for something else, quoted or not: a text with `${`, and `???` alone.
    """
    key, equals, text = override.partition("=")
    if key.lstrip("+") not in _TEXT_KEYS or not equals or text == "null":
        return override
    if "${" in text or text == "???":
        raise UserError(f"{override}: this text has another meaning here{_TEXT_KEYS[key.lstrip('+')]}.")
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


class config_loader:
    """Context manager around Hydra's global state: gives the loader that lists groups and choices."""

    def __init__(self, config_dir: str | None = None) -> None:
        self._config_dir = config_dir

    def __enter__(self) -> ConfigLoader:
        register_search_path(self._config_dir)
        self._hydra = initialize_config_module(CONFIG_MODULE, version_base="1.3")
        self._hydra.__enter__()
        return GlobalHydra.instance().config_loader()

    def __exit__(self, *exception: object) -> None:
        self._hydra.__exit__(*exception)


def choices(loader: ConfigLoader, group: str) -> list[str]:
    """The names that `group=` takes, in alphabetical order; those with a leading underscore are for other configs."""
    names: list[str] = loader.get_group_options(group, results_filter=ObjectType.CONFIG)
    return sorted(name for name in names if not name.startswith("_"))


def summary(loader: ConfigLoader, group: str, choice: str) -> str:
    """The first comment line of a config: what this choice is, in one line."""
    assert isinstance(loader, ConfigLoaderImpl)
    for element in loader.config_search_path.get_path():
        text = _read_config(element.path, f"{group}/{choice}.yaml")
        if text is not None:
            lines = (line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
            return next((line for line in lines if not line.startswith("@")), "")
    return ""


def _read_config(root: str | None, name: str) -> str | None:
    from importlib import resources
    from pathlib import Path

    scheme, _, place = (root or "").partition("://")
    if scheme == "pkg":
        file = resources.files(place).joinpath(name)
    elif scheme == "file":
        file = Path(place) / name
    else:
        return None
    return file.read_text(encoding="utf-8") if file.is_file() else None


def all_groups(loader: ConfigLoader, parent: str = "") -> Iterator[str]:
    """The config groups, those within others too: `optimizer`, `hydra/launcher`."""
    for name in loader.list_groups(parent):
        group = f"{parent}/{name}" if parent else name
        yield group
        yield from all_groups(loader, group)


def _check_group(override: Override, groups: set[str], loader: ConfigLoader) -> None:
    group = override.key_or_group
    own = override.is_hydra_override() and group not in _FROM_EXTRAS
    if group not in groups or override.is_delete() or own:
        return
    allowed = choices(loader, group)
    for value in _chosen(override):
        if value is None:
            raise UserError(f"{group}=null: must be one of {', '.join(allowed)}")
        if value not in allowed:
            known = dict.fromkeys([*allowed, *_FROM_EXTRAS.get(group, {})])
            raise UserError(
                f"{group}={value}: there is no such choice. {did_you_mean(str(value), known)}\n"
                f"{group} takes: {', '.join(allowed)}{_to_install(group, allowed)}"
            )


def _to_install(group: str, allowed: list[str]) -> str:
    """What else a group of Hydra's own would take, and how to get it."""
    lacking = {name: extra for name, extra in _FROM_EXTRAS.get(group, {}).items() if name not in allowed}
    return "".join(f"\n{name} comes with   {install_line(extra)}" for name, extra in lacking.items())


def _chosen(override: Override) -> Iterator[Any]:
    """Every choice that an override of a group names: one, a list, or the values of a sweep."""
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise UserError(f"{override.input_line}: must be a choice, or several separated by commas.")
        for text in override.sweep_string_iterator():
            yield from str(text).strip("[]").split(",")
        return
    value = override.value()
    yield from value if isinstance(value, list) else [value]


def texts(override: Override) -> Iterator[str]:
    """An override as text, or one for each value that a sweep gives it."""
    text = str(override.input_line)
    key = text.partition("=")[0]
    if not override.is_sweep_override():
        yield text
    elif not override.is_discrete_sweep():
        yield f"{key}=0"  # a range of numbers, for a sweeper that draws: no choice of a group
    else:
        yield from (f"{key}={value}" for value in override.sweep_string_iterator())


def _check_keys(parsed: list[Override], chosen: list[str], groups: set[str], loader: ConfigLoader) -> None:
    """Every key that is overridden must be there once the groups are chosen; `+key=` adds on purpose."""

    def is_choice(override: Override) -> bool:
        return override.key_or_group in groups or override.is_hydra_override()

    values = [override for override in parsed if not is_choice(override)]
    if not values:
        return
    tops = {group.partition("/")[0] for group in groups}
    try:
        config = compose(CONFIG_NAME, overrides=[text for o, text in zip(parsed, chosen, strict=True) if is_choice(o)])
    except Exception as error:  # as above
        _check_keys_of_hydra(parsed, chosen, loader)
        raise _of_composing(error, parsed) from error
    keys = list(_keys(config))
    for override in values:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or key in keys:
            continue
        raise UserError(f"{key}: there is no such key. {_suggestion(key, config, [*keys, *tops])}")


def _of_composing(error: Exception, parsed: list[Override]) -> UserError:
    """What Hydra could not compose; a group that only other tasks have is named in our own words."""
    match = re.match(r"Could not override '([\w/]+)'", str(error))
    if match:
        given = {override.key_or_group: override.input_line for override in parsed}
        task = str(given.get("task")).partition("=")[2]
        return UserError(f"{given.get(match[1], match[1])}: the task {task} has no {match[1]} to choose.")
    return UserError(first_lines(error))


def _check_keys_of_hydra(parsed: list[Override], chosen: list[str], loader: ConfigLoader) -> None:
    """The same for `hydra.…`, which `compose` leaves out of what it gives."""
    own = [override for override in parsed if override.key_or_group.startswith("hydra.") and not override.is_add()]
    others = [text for override, text in zip(parsed, chosen, strict=True) if override not in own]
    if not own:
        return
    config = loader.load_configuration(CONFIG_NAME, others, RunMode.RUN)
    keys = list(_keys(config))
    for override in own:
        key = override.key_or_group
        if key not in keys:
            raise UserError(f"{key}: there is no such key. {_suggestion(key, config, keys)}")


def _suggestion(key: str, config: DictConfig, keys: list[str]) -> str:
    """The nearest keys; failing that, what stands beside the part of the key that is right."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    beside = [str(name) for name in node] if isinstance(node, DictConfig) else []
    prefix = f"{parent}." if parent else ""
    near = [prefix + name for name in nearest(last, beside)]
    near += [name for name in nearest(key, keys) if name not in near]
    near += [name for name in keys if name.rpartition(".")[2] == last and name not in near]
    if near:
        return f"Did you mean {either(near[:4])}?"
    listing = f" {parent or 'At the top'} has: {', '.join(beside)}." if beside else ""
    return f"{listing} To add a new key, write +{key}=…".strip()


def _keys(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, interpolations unresolved."""
    if not isinstance(node, DictConfig):
        return
    for name in map(str, node):
        key = f"{prefix}{name}"
        yield key
        child = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from _keys(child, f"{key}.")
