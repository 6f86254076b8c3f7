"""The kill harness: that runs survive it, and that it finds what it is there to find."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tests.support import ROOT
from trainerkit.testing import kill
from trainerkit.testing._compare import differences, first_difference, unreadable
from trainerkit.testing._kill_harness import PHASES, Harness
from trainerkit.testing._kill_runs import CONFIGURATIONS, SMALL

TASKS = sorted(path.stem for path in (ROOT / "configs" / "task").glob("*.yaml"))


def table(screen):
    """The rows of the harness' table by configuration, each by column."""
    lines = [line.split() for line in screen.replace("left over", "left_over").splitlines()]
    header = next(line for line in lines if line[:1] == ["configuration"])
    rows = {line[0]: line for line in lines if len(line) == len(header) and line[0] in {*CONFIGURATIONS, "all"}}
    return {name: dict(zip(header[1:], map(int, row[1:]), strict=True)) for name, row in rows.items()}


def test_every_task_that_ships_has_a_small_run():
    assert TASKS
    assert sorted(SMALL) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_twenty_kills_lose_nothing(task, tmp_path, capsys):
    code = kill.main(["--task", task, "--kills", "20", "--seed", "4", "--keep", str(tmp_path)])
    screen = capsys.readouterr().out
    assert code == 0, screen
    found = table(screen)
    assert list(found) == [*CONFIGURATIONS, "all"]
    assert found["all"]["kills"] == 20
    for row in found.values():
        assert row["kills"] >= 2
        assert row["equal"] >= 1
        assert row["different"] == row["unreadable"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_hundred_kills_lose_nothing_whatever_the_run_is_doing(task, tmp_path, capsys):
    code = kill.main(["--task", task, "--kills", "200", "--seed", "4", "--fresh", "2", "--keep", str(tmp_path)])
    screen = capsys.readouterr().out
    assert code == 0, screen
    found = table(screen)["all"]
    assert found["kills"] == 200
    assert found["different"] == found["unreadable"] == 0
    assert all(found[phase] > 0 for phase in PHASES), found
    assert found["writing"] >= 20


# What it is there to find


class Torn(Callback):
    """Writes a checkpoint as one should not: under its final name, and not to the end."""

    def on_train_start(self, trainer, pl_module):
        folder = Path(trainer.default_root_dir) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.zeros(1000)}, folder / "torn.ckpt")
        os.truncate(folder / "torn.ckpt", 2000)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """One that kills in steps, for all tests here: each takes a configuration of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TRAINERKIT_ALLOW", "tests")
        with Harness("mae", tmp_path_factory.mktemp("broken"), aims={"step": 1}) as made:
            yield made


def test_a_plain_process_goes_on_as_a_forked_one(harness):
    """The first is `python -m trainerkit`, and killed; the second, and the run they are held against, are forks."""
    harness.overrides, harness.fresh = [], 1
    tally = harness.kill_runs("unfreezing_steps", 1)
    harness.fresh = 0
    # What it was doing when the signal arrived is chance: aimed at in a step, it may be writing already.
    assert (tally.kills, tally.equal, tally.problems, tally.unreadable) == (1, 1, [], [])


def test_a_resume_without_random_state_is_found_and_its_first_difference_named(harness):
    harness.overrides = ["callbacks.exact_resume=null"]
    tally = harness.kill_runs("plain", 1)
    assert tally.kills == 1
    assert tally.equal == 0
    assert not tally.is_good
    last = next(problem for problem in tally.problems if "last.ckpt: " in problem)
    assert re.search(r"last\.ckpt: [\w.\[\]]+\[[\d, ]+\] is -?[\d.e-]+ instead of -?[\d.e-]+$", last), last
    # The difference is the resume's: two uninterrupted runs were compared as well.
    assert not any("nobody killed" in problem for problem in tally.problems)


def test_a_checkpoint_that_cannot_be_read_is_counted(harness):
    harness.overrides = ["+callbacks.torn._target_=tests.test_kill.Torn"]
    tally = harness.kill_runs("validation_in_epoch", 1)
    assert tally.kills == 1
    assert len(tally.unreadable) == 1
    assert "checkpoints/torn.ckpt: RuntimeError: PytorchStreamReader" in tally.unreadable[0]
    assert not tally.is_good


def test_a_run_that_gives_something_else_each_time_is_not_blamed_on_the_resume(harness):
    harness.overrides = ["+callbacks.chance._target_=tests.test_kill.Chance"]
    tally = harness.kill_runs("early_stopping", 1)
    assert "but two runs that nobody killed differ too" in tally.problems[-1]


class Chance(Callback):
    """Has a state that no seed decides."""

    def state_dict(self):
        return {"chance": os.urandom(8).hex()}


def test_a_run_that_fails_is_shown_with_its_last_words(harness):
    harness.overrides = ["task.network.n_mask=99"]
    tally = harness.kill_runs("workers", 1)
    assert tally.kills == 0
    assert "ended with 2" in tally.problems[0]
    assert "task.network.n_mask=99: must be from 0 to 7" in tally.problems[0]


def processes_in(folder):
    """Numbers of the processes that work in a folder or below; zombies have no folder any more."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_every_process(tmp_path, signum):
    command = [sys.executable, "-m", "trainerkit.testing.kill", "--task", "mae", "--config", "workers"]
    with subprocess.Popen(
        [*command, "--keep", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs, and what they start, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        beacon = tmp_path / "workers" / "whole" / "run" / "beacon"
        while process.poll() is None and not beacon.exists():
            time.sleep(0.01)
        assert len(processes_in(tmp_path)) >= 2  # the one that forks and the run
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert processes_in(tmp_path) == []


# How two runs are compared


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"a": [1, {"b": torch.ones(2, 3)}]}, {"a": [1, {"b": torch.ones(2, 3)}]}, None),
        ({"a": torch.zeros(2, 2)}, {"a": torch.tensor([[0.0, 0.0], [1.5, 0.0]])}, "a[1, 0] is 1.5 instead of 0.0"),
        (torch.tensor(0.0), torch.tensor(-0.0), " is -0.0 instead of 0.0"),
        (torch.tensor(float("nan")), torch.tensor(float("nan")), None),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), " is torch.float64 (2,) instead of torch.float32 (2,)"),
        (torch.zeros(0), torch.zeros(0), None),
        ({"a": 1, "b": 2}, {"a": 1}, "b is missing"),
        ({"a": 1}, {"a": 1, "b": 2}, "b is there, and was not"),
        ({"a": (1, 2)}, {"a": (1, 3)}, "a[1] is 3 instead of 2"),
        ({"a": [1]}, {"a": [1, 2]}, "a has 2 entries instead of 1"),
        ({"a": 1}, {"a": 1.0}, "a is 1.0 (float) instead of 1 (int)"),
        ({"a": 0.1 + 0.2}, {"a": 0.3}, "a is 0.3 instead of 0.30000000000000004"),
        ({"a": float("nan")}, {"a": float("nan")}, None),
        ({"a": {"seconds": 1.0}}, {"a": {"seconds": 2.0}}, None),
    ],
)
def test_the_first_difference_is_named(ours, theirs, said):
    assert first_difference(ours, theirs) == said


@pytest.fixture
def two_runs(tmp_path):
    """Two folders with the same run in them."""
    for name in ("whole", "other"):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "logs" / "version_0").mkdir(parents=True)
        moments = {"exp_avg": torch.arange(6.0).reshape(2, 3), "path": f"{folder}/checkpoints/best.ckpt"}
        for kind in ("last", "best"):
            torch.save(
                {"optimizer_states": [{"state": {3: moments}}], "global_step": 5}, folder / f"checkpoints/{kind}.ckpt"
            )
        (folder / "results.json").write_text(json.dumps({"metrics": {"val/loss": 0.5}}))
        (folder / "training_history.json").write_text(json.dumps([{"epoch": 1, "seconds": len(name)}]))
        (folder / "logs/version_0/metrics.csv").write_text("epoch,step,loss\n0,2,0.5\n0,5,0.25\n")
    return tmp_path / "whole", tmp_path / "other"


def test_the_versions_of_a_state_dict_are_compared(two_runs):
    for folder, version in zip(two_runs, (1, 2), strict=True):
        weights = torch.nn.BatchNorm1d(2).state_dict()
        weights._metadata[""]["version"] = version
        torch.save({"state_dict": weights}, folder / "checkpoints/last.ckpt")
    assert differences(*two_runs) == ["checkpoints/last.ckpt: state_dict._metadata..version is 2 instead of 1"]


def test_equal_runs_have_no_differences(two_runs):
    assert differences(*two_runs) == []


def test_each_file_that_differs_is_named_with_the_place(two_runs):
    whole, other = two_runs
    content = torch.load(other / "checkpoints/last.ckpt", weights_only=True)
    content["optimizer_states"][0]["state"][3]["exp_avg"][1, 2] = 7
    torch.save(content, other / "checkpoints/last.ckpt")
    (other / "checkpoints/best.ckpt").unlink()
    (other / "results.json").write_text(json.dumps({"metrics": {"val/loss": 0.25}}))
    (other / "training_history.json").write_text(json.dumps([{"epoch": 2, "seconds": 0}]))
    assert differences(whole, other) == [
        "checkpoints/best.ckpt: not in the run that was killed",
        "checkpoints/last.ckpt: optimizer_states[0].state.3.exp_avg[1, 2] is 7.0 instead of 5.0",
        "results.json: metrics.val/loss is 0.25 instead of 0.5",
        "training_history.json: [0].epoch is 2 instead of 1",
    ]


def test_logged_rows_may_be_lost_or_cut_or_said_again_but_not_be_others(two_runs):
    whole, other = two_runs
    log = other / "logs/version_0/metrics.csv"
    log.write_text("epoch,step,loss\n0,2,0.5\n0,5,0.2")  # killed in the middle of a line
    (other / "logs/version_1").mkdir()
    (other / "logs/version_1/metrics.csv").write_text("epoch,step,loss\n0,3,0.5\n")  # the last value, at the resume
    assert differences(whole, other) == []
    log.write_text("epoch,step,loss\n0,2,0.5\n0,5,0.75\n")
    assert differences(whole, other) == ["logs: loss is 0.75 at step 5 instead of 0.25 or 0.5"]


# What is readable


@pytest.fixture
def checkpoints(tmp_path):
    """A run's folder with a checkpoint, its manifest and a link."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    path = folder / "step-00000005.ckpt"
    torch.save({"weight": torch.zeros(2000)}, path)
    facts = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "step-00000005.json").write_text(json.dumps({"files": {path.name: facts}}))
    (folder / "last.ckpt").symlink_to(path.name)
    return folder


def test_whole_files_and_staged_ones_are_no_complaint(checkpoints):
    (checkpoints / ".step-00000006.ckpt").write_bytes(b"half")
    assert unreadable(checkpoints.parent) == []


def test_a_cut_checkpoint_is_found_by_its_content_its_link_and_its_manifest(checkpoints):
    path = checkpoints / "step-00000005.ckpt"
    path.write_bytes(path.read_bytes()[:4096])
    found = unreadable(checkpoints.parent)
    names = [complaint.partition(":")[0] for complaint in found]
    assert names == ["checkpoints/last.ckpt", "checkpoints/step-00000005.ckpt", "checkpoints/step-00000005.json"]
    assert found[2].endswith("step-00000005.ckpt is not what the manifest says")


def test_a_flipped_byte_is_found_by_the_manifest(checkpoints):
    path = checkpoints / "step-00000005.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert any("is not what the manifest says" in complaint for complaint in unreadable(checkpoints.parent))


def test_a_link_to_nothing_and_half_of_a_record_are_found(checkpoints):
    (checkpoints / "step-00000005.ckpt").unlink()
    (checkpoints.parent / "training_history.json").write_text('[{"epoch": 1')
    found = unreadable(checkpoints.parent)
    assert found[0] == "checkpoints/last.ckpt: a link to nothing"
    assert found[1].startswith("training_history.json: JSONDecodeError")
    assert len(found) == 2


# The command


def test_documented_commands_are_commands():
    text = (ROOT / "docs" / "kill_harness.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m trainerkit\.testing\.kill (.*?)(?:  #.*)?$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        kill._parser().parse_args(shlex.split(command))


def test_a_folder_with_something_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit):
        kill.main(["--task", "mae", "--keep", str(tmp_path)])
    assert "must be a new or an empty folder" in capsys.readouterr().err
