"""Packages that are not part of the core: found late, and named with the line that installs them."""

import importlib
import importlib.util
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType

from trainerkit.errors import UserError

# Packages whose import name is not their name on the registry.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "fontTools": "fonttools",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",
}


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: its import name, e.g. `sklearn.svm`.
        purpose: what needs it, the beginning of the message.

    Raises:
        UserError: if it is not installed; the message has the `pip install` line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, purpose) from error


def folder_of(package: str, purpose: str) -> Path:
    """Where an optional package is installed, without importing it; raises as `require`."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing(package, purpose)
    return Path(spec.submodule_search_locations[0])


def missing(module: str, purpose: str) -> UserError:
    """The error that says how to install the extra that brings `module`."""
    extra = extra_for(module)
    hint = f"\n  {install_line(extra)}" if extra else f"\n  pip install {_distribution(module)}"
    return UserError(f"{purpose} needs the package {module.partition('.')[0]}, which is not installed:{hint}")


def missing_in(error: ImportError, purpose: str) -> UserError:
    """The same for what an import raised; some libraries say only in words what they lack."""
    words = re.findall(r"\w+", str(error))
    name = error.name or next((word for word in words if extra_for(word)), None)
    return missing(name, purpose) if name else UserError(f"{purpose}: {error}")


def extra_for(module: str) -> str | None:
    """The extra of trainerkit that brings an importable module, from the installed metadata; None if none does."""
    for requirement in metadata.requires("trainerkit") or []:
        match = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if match and match[1].lower() == _distribution(module).lower():
            return match[2]
    return None


def install_line(extra: str) -> str:
    """What to type to get an extra of trainerkit."""
    return f"pip install -c constraints.txt -e '.[{extra}]'    (outside a clone: pip install 'trainerkit[{extra}]')"


def _distribution(module: str) -> str:
    root = module.partition(".")[0]
    return _DISTRIBUTIONS.get(root, root)
