"""What Hydra itself would build and set for a sweep, checked before it is handed over.

The node `hydra` of a config names launchers, sweepers, callbacks, logging handlers and environment variables. All of
them run code, and a choice from a stranger's folder may bring its own (`# @package _global_`). So every choice that the
command line names, also those that a sweep would come to later, is composed and looked at first.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from trainerkit.compose import CONFIG_NAME, config_loader
from trainerkit.errors import UserError, first_lines
from trainerkit.plugins import AllowList

# What a logging config may build. Named one by one: `logging` also leads to `logging.os.system`.
_LOGGING = frozenset(
    {
        "logging.Formatter",
        "logging.StreamHandler",
        "logging.FileHandler",
        "logging.NullHandler",
        "logging.handlers.RotatingFileHandler",
        "logging.handlers.TimedRotatingFileHandler",
        "colorlog.ColoredFormatter",
        "rich.logging.RichHandler",
    }
)
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_search_path(config_dir: str) -> None:
    """Refuse a folder whose `train.yaml`, which takes the place of trainerkit's, would import further packages."""
    path = Path(config_dir) / f"{CONFIG_NAME}.yaml"
    if not path.exists():
        return
    try:
        primary = OmegaConf.load(path)
        found = OmegaConf.select(primary, "hydra.searchpath", default=None)
    except Exception as error:  # yaml's and OmegaConf's errors share no base; also what is no text
        raise UserError(f"--config-dir {config_dir}: {path.name} cannot be read ({first_lines(error)}).") from error
    if found:
        raise UserError(
            f"--config-dir {config_dir}: {path.name} sets hydra.searchpath, which would import packages and read other "
            "folders; only the command line may."
        )


def check_hydra(overrides: list[str], allow: AllowList, config_dir: str | None = None) -> None:
    """Check the node `hydra` for every choice of a command line.

    Args:
        overrides: of the command line, sweeps too.
        allow: decides what may be built.
        config_dir: a folder of the user's own config groups, or None.

    Raises:
        UserError: for a target or a logging class that may not be built, a variable of the environment that a config
            sets, or a sweep over Hydra's own keys.
    """
    with config_loader(config_dir) as loader:
        parser = OverridesParser.create(config_loader=loader)
        try:
            parsed = parser.parse_overrides(overrides)
            first = _composed([_texts(override)[0] for override in parsed])
            swept = [*parsed, *_of_sweeper(parser, first)]
            for override in swept:
                if override.is_sweep_override() and override.is_hydra_override():
                    raise UserError(f"{override.input_line}: Hydra's own keys cannot be swept over.")
            check_node(first, allow, overrides)
            for position, override in enumerate(swept):
                for text in _texts(override)[1 if position < len(parsed) else 0 :]:
                    rest = [_texts(other)[0] for other in parsed if other.key_or_group != override.key_or_group]
                    check_node(_composed([*rest, text]), allow, overrides)
        except UserError:
            raise
        except Exception as error:  # as in compose.py
            raise UserError(first_lines(error)) from error


def _composed(overrides: list[str]) -> dict[str, Any]:
    node = compose(CONFIG_NAME, overrides=overrides, return_hydra_config=True).hydra
    found: Any = OmegaConf.to_container(node, resolve=False)
    return dict(found)


def _of_sweeper(parser: OverridesParser, found: dict[str, Any]) -> list[Override]:
    """The overrides that stand in `hydra.sweeper.params`; other sweepers' own notations choose no groups."""
    params = (found.get("sweeper") or {}).get("params") or {}
    parsed = []
    for name, value in params.items() if isinstance(params, dict) else ():
        parsed += parser.parse_overrides([f"{name}={value}"])
    return parsed


def _texts(override: Override) -> list[str]:
    """An override as text, or one for each value that a sweep gives it."""
    text = str(override.input_line)
    if not override.is_sweep_override():
        return [text]
    key = text.partition("=")[0]
    if not override.is_discrete_sweep():
        return [f"{key}=0"]  # a range of numbers, for a sweeper that draws: no choice of a group
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def check_node(hydra: dict[str, Any], allow: AllowList, overrides: list[str]) -> None:
    """Check one composed node `hydra`; arguments and errors as of `check_hydra`."""
    for key, node in _mappings(hydra, "hydra"):
        if "_target_" in node:
            allow.resolve_for_hydra(str(node["_target_"]), key)
        if key.startswith(("hydra.job_logging", "hydra.hydra_logging")):
            _check_logging(node, key)
    job = hydra.get("job") or {}
    for name in (*(job.get("env_set") or {}), *(job.get("env_copy") or [])):
        if not any(str(name) in override and "hydra.job.env_" in override for override in overrides):
            raise UserError(f"hydra.job.env_set: a config sets the variable {name} of the environment; only you may.")


def _check_logging(node: dict[str, Any], key: str) -> None:
    for name, value in node.items():
        if name in ("()", "class") and value not in _LOGGING:
            raise UserError(f"{key}.{name}={value}: must be one of {', '.join(sorted(_LOGGING))}.")
        outside = isinstance(value, str) and ("ext://" in value or "${" in value) and value not in _STREAMS
        if name == "." or (outside and not value.startswith("${hydra.")):
            raise UserError(f"{key}.{name}={value}: is not read from a config, since it can run code.")


def _mappings(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        yield key, node
        for name, child in node.items():
            yield from _mappings(child, f"{key}.{name}")
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from _mappings(child, f"{key}[{position}]")
