"""Plugins that are really installed, and what a config may build."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT, trainerkit
from trainerkit.errors import UserError
from trainerkit.plugins import AllowList


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example plugin, installed by pip into a folder; gives the environment that finds it."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "tests" / "plugin_package", folder / "source")
    target = folder / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(target), str(folder / "source")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {"PYTHONPATH": str(target)}


def test_its_task_is_listed_and_runs_by_name(installed, tmp_path):
    listing = trainerkit(cwd=tmp_path, env=installed).stdout
    assert "line             A line through noisy points, from a plugin." in listing
    assert "mae  " in listing
    answer = trainerkit("task=line", "out_dir=run", "trainer=cpu", cwd=tmp_path, env=installed)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "best_model.safetensors").is_file()
    wrong = trainerkit("task=line", "task.hidden=0", cwd=tmp_path, env=installed)
    assert wrong.returncode == 2
    assert "task.hidden=0: must be 1 or more" in wrong.stderr


def test_it_overrides_a_built_in_config_of_the_same_name(installed, tmp_path):
    answer = trainerkit("task=mae", "optimizer=sgd", "optimizer.lr=0.5", "--cfg", "job", cwd=tmp_path, env=installed)
    assert answer.returncode == 0, answer.stderr
    assert "momentum: 0.5" in answer.stdout
    assert "nesterov" not in answer.stdout


def test_without_it_its_task_is_unknown(tmp_path):
    answer = trainerkit("task=line", cwd=tmp_path)
    assert answer.returncode == 2
    assert "task=line: there is no such choice" in answer.stderr


def test_the_plugin_keeps_the_contract(installed, tmp_path):
    code = (
        "from pathlib import Path\nfrom trainerkit.testing import check_data, check_task\n"
        "from trainerkit_example import LineData, LineTask\n"
        "check_data(LineData)\ncheck_task(LineTask, LineData, Path('work'))\nprint('kept')"
    )
    environment = os.environ | installed
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.stdout.endswith("kept\n"), answer.stderr


@pytest.mark.parametrize(
    "target",
    [
        "trainerkit.callbacks.EMA",
        "trainerkit.optim.warmup_cosine",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.StepLR",
        "torch.nn.Linear",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.loggers.CSVLogger",
        "torchmetrics.MeanMetric",
    ],
)
def test_what_configs_are_for_is_allowed(target):
    assert AllowList().resolve(target, "key").__name__ == target.rpartition(".")[2]


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("os.system", "allow=os"),
        ("builtins.eval", "allow=builtins"),
        ("subprocess.Popen", "allow=subprocess"),
        ("numpy.load", "allow=numpy"),
        ("torch.os.system", "allow=posix"),
        ("torch.load", "of torch, configs may build only subclasses of Module"),
        ("torch.hub.load", "of torch, configs may build only subclasses of Module"),
        ("torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler", "of torch, configs may"),
        ("lightning.pytorch.cli.LightningCLI", "of lightning, configs may build only subclasses of Module"),
        ("trainerkit.facts.subprocess.run", "allow=subprocess"),
        ("trainerkit.cli.main", "of trainerkit, configs may build only subclasses of Module"),
        ("trainerkit.extras.require", "of trainerkit, configs may build only subclasses of Module"),
        ("trainerkit.files.write_json", "of trainerkit, configs may build only subclasses of Module"),
        ("trainerkit.plugins.AllowList", "of trainerkit, configs may build only subclasses of Module"),
        ("trainerkit.build.build", "of trainerkit, configs may build only subclasses of Module"),
        ("trainerkit.files.os.remove", "allow=posix"),
    ],
)
def test_everything_else_is_refused_with_the_way_to_allow_it(target, hint):
    with pytest.raises(UserError, match=f"key._target_={target}: ") as error:
        AllowList().resolve(target, "key")
    assert hint in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_command_line_and_the_environment_allow_but_no_config_does(tmp_path, monkeypatch):
    assert AllowList(["collections"]).resolve("collections.OrderedDict", "key")
    monkeypatch.setenv("TRAINERKIT_ALLOW", "collections, fractions")
    assert AllowList().resolve("fractions.Fraction", "key")
    monkeypatch.delenv("TRAINERKIT_ALLOW")
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    text = (
        "# @package _global_\n# Evil.\nallow: os\ntask:\n  augment:\n    _target_: os.system\n    command: touch ran\n"
    )
    (folder / "evil.yaml").write_text(text)
    arguments = ["--config-dir", "mine", "task=mae", "experiment=evil", "data.batch_size=8", "out_dir=run"]
    answer = trainerkit(*arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert "task.augment._target_=os.system: configs may build only from" in answer.stderr
    assert not (tmp_path / "ran").exists()


def test_a_name_that_is_not_there_is_said_so():
    with pytest.raises(UserError, match=r"key._target_=torch.nn.Linaer: there is no such class or function"):
        AllowList().resolve("torch.nn.Linaer", "key")
