"""What ships, held against the tree."""

import re
import sys
import tomllib

import pytest

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_tree_is_listed():
    found = {"trainerkit", "hydra_plugins.trainerkit_sweeper"}
    for name in ("data", "functional", "nn", "testing"):
        if (ROOT / "trainerkit" / name / "__init__.py").exists():
            found.add(f"trainerkit.{name}")
    for top in ("callbacks", "tasks", "configs"):
        for folder in [ROOT / top, *(ROOT / top).rglob("*")]:
            if folder.is_dir() and folder.name != "__pycache__":
                found.add(".".join(["trainerkit", *folder.relative_to(ROOT).parts]))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_the_links_point_at_the_folders():
    for top in ("callbacks", "tasks", "configs"):
        assert (ROOT / "trainerkit" / top).resolve() == ROOT / top


def test_the_core_depends_on_nothing_else():
    names = {re.match(r"[\w-]+", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert names == {"lightning", "torch", "torchmetrics", "hydra-core", "omegaconf", "safetensors", "numpy"}


def test_the_constraints_satisfy_the_project():
    from packaging.requirements import Requirement
    from packaging.version import Version

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    requirements = [Requirement(line) for line in lines]
    checked = 0
    for requirement in requirements:
        if requirement.name in pins:
            assert Version(pins[requirement.name]) in requirement.specifier, requirement
            checked += 1
    assert checked >= 12


def test_the_version_is_the_same_everywhere():
    from trainerkit import __version__

    assert PROJECT["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("module", ["trainerkit", "trainerkit.cli", "trainerkit.errors", "trainerkit.plugins"])
def test_light_modules_stay_light(module):
    import subprocess

    code = f"import sys, {module}\nprint(sorted({{'torch', 'lightning', 'hydra'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
