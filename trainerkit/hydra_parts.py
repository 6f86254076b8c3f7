"""What Hydra itself would build and set for a sweep, checked before it is handed over.

The node `hydra` of a config names launchers, sweepers, callbacks, logging handlers and environment variables. All of
them run code, and a choice from a stranger's folder may bring its own (`# @package _global_`), or two choices together
one that neither brings alone. So every combination that a sweep would come to is composed and looked at first.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import OmegaConf

from trainerkit.build import mappings
from trainerkit.compose import CONFIG_NAME, all_groups, config_loader, texts
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
_MOST_COMBINATIONS = 2000  # of choices; each takes some hundredths of a second to compose
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
    """Check the node `hydra` for every combination of choices of a command line.

    Args:
        overrides: of the command line, sweeps too.
        allow: decides what may be built.
        config_dir: a folder of the user's own config groups, or None.

    Raises:
        UserError: for a target or a logging class that may not be built, a variable of the environment that a config
            sets, a sweep over Hydra's own keys, or more combinations than can be looked at.
    """
    with config_loader(config_dir) as loader:
        parser = OverridesParser.create(config_loader=loader)
        try:
            # What the launcher and the sweeper come from, where groups that are swept over are as the defaults say.
            first = _composed(loader, overrides, RunMode.MULTIRUN)
            check_node(first, allow, overrides)
            _check_ranges(parser.parse_overrides(overrides), first)
            swept = [*parser.parse_overrides(overrides), *_of_sweeper(parser, first)]
            for combination in _combinations(swept, set(all_groups(loader))):
                check_node(_composed(loader, combination, RunMode.RUN), allow, overrides)
        except UserError:
            raise
        except Exception as error:  # as in compose.py
            raise UserError(first_lines(error)) from error


def _check_ranges(overrides: list[Override], found: dict[str, Any]) -> None:
    """Hydra's own sweeper tries every value, which an interval does not have."""
    if not str((found.get("sweeper") or {}).get("_target_")).endswith("BasicSweeper"):
        return
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(
                f"{override.input_line}: has no end of values; add hydra/sweeper=optuna, or give some: "
                f"{override.key_or_group}=a,b"
            )


def _composed(loader: ConfigLoader, overrides: list[str], mode: RunMode) -> dict[str, Any]:
    node = loader.load_configuration(CONFIG_NAME, overrides, mode).hydra
    found: Any = OmegaConf.to_container(node, resolve=False)
    return dict(found)


def _of_sweeper(parser: OverridesParser, found: dict[str, Any]) -> list[Override]:
    """The overrides that stand in `hydra.sweeper.params`; other sweepers' own notations choose no groups."""
    params = (found.get("sweeper") or {}).get("params") or {}
    parsed = []
    for name, value in params.items() if isinstance(params, dict) else ():
        parsed += parser.parse_overrides([f"{name}={value}"])
    return parsed


def _combinations(swept: list[Override], groups: set[str]) -> Iterator[list[str]]:
    """The overrides of each job, but for sweeps over values: of these the first, since no value chooses a config."""
    values: dict[str, list[str]] = {}  # by key: what the command line and the sweeper's own config give it
    for override in swept:
        own = override.is_hydra_override() or override.key_or_group == "hydra"
        if own and override.is_sweep_override():
            raise UserError(f"{override.input_line}: Hydra's own keys cannot be swept over.")
        found = texts(override) if override.key_or_group in groups else itertools.islice(texts(override), 1)
        values.setdefault(override.get_key_element(), []).extend(found)
    if (count := math.prod(map(len, values.values()))) > _MOST_COMBINATIONS:
        raise UserError(
            f"This sweep has {count} combinations of choices, and at most {_MOST_COMBINATIONS} are looked at before "
            "the first job; make several sweeps of it."
        )
    for combination in itertools.product(*values.values()):
        yield list(combination)


def check_node(hydra: dict[str, Any], allow: AllowList, overrides: list[str]) -> None:
    """Check one composed node `hydra`; arguments and errors as of `check_hydra`."""
    for key, node in mappings(hydra, "hydra"):
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
