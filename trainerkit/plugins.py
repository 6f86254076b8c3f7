"""Installed plugins: their configs on Hydra's search path, and what a config may build.

A plugin is an installed package that declares the entry-point group `trainerkit.configs`; the value names a package
that holds YAML groups (`my_plugin.configs` with `task/mine.yaml` in it). Its configs are found by name, and override
a built-in of the same name. trainerkit's own tasks use nothing that a plugin cannot use.

A config names what to build by `_target_`, and a config may be a stranger's. So a target is built only if the object
it names *was defined* in a package that is trusted, wherever it was reached from (`torch.os.system` is not torch's):

- installed plugins, and packages named by `allow=` on the command line or in `TRAINERKIT_ALLOW`: classes and
  functions;
- trainerkit itself, torch, lightning, torchmetrics: only classes of the kinds that configs are for (modules,
  optimizers, callbacks, `trainerkit.part.Part`, …) and trainerkit's schedules, because these packages also hold
  functions that read pickles, import modules and start processes.
"""

import importlib
import os
import re
from collections.abc import Iterable
from importlib import metadata
from types import ModuleType
from typing import Any

from trainerkit.errors import UserError

# Without __main__, whose import runs a program, and without what Python keeps under double underscores.
_DOTTED_NAME = re.compile(r"(?!__)[^\W\d]\w*(\.(?!__)[^\W\d]\w*)+")

ENTRY_POINT_GROUP = "trainerkit.configs"
ALLOW_VARIABLE = "TRAINERKIT_ALLOW"

_LIBRARIES = ("trainerkit", "torch", "lightning", "torchmetrics")
# What may be built from these. Named by path, so that they load only when asked.
_KINDS = (
    "torch.nn.Module",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
    "torch.utils.data.Dataset",
    "torch.utils.data.Sampler",
    "torchmetrics.Metric",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.Callback",
    "lightning.pytorch.LightningDataModule",
    "lightning.pytorch.loggers.Logger",
    "lightning.pytorch.profilers.Profiler",
    "lightning.pytorch.strategies.Strategy",
    "lightning.pytorch.plugins.Precision",
    "trainerkit.part.Part",
)
_SCHEDULES = (
    "trainerkit.optim.warmup_cosine",
    "trainerkit.optim.warmup_linear",
    "trainerkit.optim.warmup_stable_decay",
)


def config_packages() -> list[str]:
    """The packages with YAML groups that installed plugins declare, in order of their entry points' names."""
    points = metadata.entry_points(group=ENTRY_POINT_GROUP)
    return list(dict.fromkeys(point.value for point in sorted(points, key=lambda point: point.name)))


def register_search_path(config_dir: str | None = None) -> None:
    """Put plugins' configs, and the user's own folder, before trainerkit's on Hydra's search path.

    Hydra itself reads no entry points; a search-path plugin registered before the config is composed can prepend, so
    that a plugin may also override a built-in config of the same name.

    Args:
        config_dir: a folder of YAML groups that wins over everything, or None.
    """
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class TrainerkitSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for package in config_packages():
                search_path.prepend("trainerkit-plugin", f"pkg://{package}", anchor="main")
            if config_dir is not None:
                search_path.prepend("user", f"file://{os.path.abspath(config_dir)}")

    Plugins.instance().register(TrainerkitSearchPath)


class AllowList:
    """Decides which `_target_`s may be built.

    Args:
        extra: packages that the user trusts, from the command line; those in `TRAINERKIT_ALLOW` (separated by commas)
            are added. Never taken from a config file.
    """

    def __init__(self, extra: Iterable[str] = ()) -> None:
        from_environment = [name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",") if name.strip()]
        plugins = [package.partition(".")[0] for package in config_packages()]
        self.packages = {*plugins, *filter(None, extra), *from_environment}

    def resolve(self, target: str, key: str) -> Any:
        """Import the object that `target` names, if it may be built.

        Args:
            target: a dotted path, as in `_target_`.
            key: where in the config it stands, for the message.

        Returns:
            The class or function.

        Raises:
            UserError: if it is not allowed, or does not exist.
        """
        if not _DOTTED_NAME.fullmatch(target):
            raise UserError(f"{key}._target_={target}: must be the dotted name of a class or function.")
        root = target.partition(".")[0]
        if root not in self.packages and root not in _LIBRARIES:
            raise UserError(self._refusal(target, key, root))
        found = _locate(target, key)
        home = str(getattr(found, "__module__", "")).partition(".")[0]
        if home in self.packages or (home in _LIBRARIES and _is_for_configs(found)):
            return found
        raise UserError(self._refusal(target, key, home or root))

    def resolve_for_hydra(self, target: str, key: str) -> Any:
        """The same for what Hydra itself builds for a sweep: its launchers, sweepers and callbacks may be built too."""
        if target.partition(".")[0] not in ("hydra", "hydra_plugins"):
            return self.resolve(target, key)
        from hydra.experimental.callback import Callback
        from hydra.plugins.plugin import Plugin

        found = _locate(target, key) if _DOTTED_NAME.fullmatch(target) else None
        if not isinstance(found, type) or not issubclass(found, (Plugin, Callback)):
            raise UserError(f"{key}._target_={target}: must be a launcher, a sweeper or a callback of Hydra.")
        return found

    def _refusal(self, target: str, key: str, package: str) -> str:
        if package in _LIBRARIES:
            kinds = ", ".join(name.rpartition(".")[2] for name in _KINDS)
            return (
                f"{key}._target_={target}: of {package}, configs may build only subclasses of {kinds}. "
                f"If you trust this config, add allow={package} to the command line."
            )
        trusted = ", ".join([*sorted(self.packages), *_LIBRARIES[:-1]])
        return (
            f"{key}._target_={target}: configs may build only from {trusted} and {_LIBRARIES[-1]}. "
            f"If you trust this config, add allow={package} to the command line (or set {ALLOW_VARIABLE}={package})."
        )


def _is_for_configs(found: Any) -> bool:
    if isinstance(found, type):
        return issubclass(found, tuple(_import_path(path) for path in _KINDS))
    return f"{found.__module__}.{getattr(found, '__qualname__', '')}" in _SCHEDULES


def _locate(target: str, key: str) -> Any:
    try:
        return _import_path(target)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not target.startswith(error.name):
            raise  # the target's own module exists, and needs a package that is missing: build.py names the extra
        raise UserError(f"{key}._target_={target}: there is no such class or function ({error}).") from error
    except Exception as error:  # whatever a module raises that cannot be imported here
        raise UserError(f"{key}._target_={target}: cannot be imported ({type(error).__name__}: {error}).") from error


def _import_path(path: str) -> Any:
    """Import the longest prefix that is a module, then walk the attributes."""
    parts = path.split(".")
    found: ModuleType | Any = importlib.import_module(parts[0])
    for position, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part) and isinstance(found, ModuleType):
            found = importlib.import_module(".".join(parts[: position + 1]))
        else:
            found = getattr(found, part)
    return found
