"""Checks what a built wheel and sdist hold: `python tests/check_distributions.py dist/`."""

import sys
import tarfile
import zipfile
from pathlib import Path


def check(folder: Path) -> None:
    wheel, sdist = next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    root = Path(__file__).resolve().parents[1]
    configs = {str(path.relative_to(root)) for path in (root / "configs").rglob("*.yaml")}
    modules = {str(path.relative_to(root)) for top in ("callbacks", "tasks") for path in (root / top).rglob("*.py")}
    assert len(configs) > 30
    missing = {f"trainerkit/{name}" for name in configs | modules} - in_wheel
    assert not missing, f"not in the wheel: {sorted(missing)}"
    missing = (configs | modules) - in_sdist
    assert not missing, f"not in the sdist: {sorted(missing)}"
    for licence in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f"licenses/{licence}") for name in in_wheel), f"{licence} is not in the wheel"
        assert licence in in_sdist, f"{licence} is not in the sdist"
    assert "trainerkit/py.typed" in in_wheel
    tests = [name for name in in_wheel | in_sdist if "tests/" in name or name.startswith("tests")]
    assert not tests, f"tests are shipped: {tests[:5]}"
    print(
        f"{wheel.name}: {len(in_wheel)} files, {sdist.name}: {len(in_sdist)} files; configs and licences in, tests out"
    )


if __name__ == "__main__":
    check(Path(sys.argv[1]))
