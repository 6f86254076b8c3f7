"""Sweeps: the record of each job, the table and the picture, Optuna's draws, launchers in real processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests.support import SMALL_MAE, free_port, smooth_spectra, trainerkit
from trainerkit.compose import compose_config
from trainerkit.errors import UserError
from trainerkit.study import Study, distribution
from trainerkit.sweep import (
    Job,
    Objective,
    begin,
    check_folder,
    finish,
    objective,
    read_jobs,
    report,
    swept_keys,
    value_of,
)

SMALL = [word for word in SMALL_MAE if word != "trainer.max_epochs=3"]
SMALL += ["data.path=spectra.npy", "trainer.max_epochs=1", "callbacks.reconstruction_report=null"]
OPTUNA = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.startup_trials=2"]


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "spectra.npy", smooth_spectra())
    return tmp_path


def sweep(folder, *words, **options):
    return trainerkit(*SMALL, *words, cwd=folder, **options)


def table(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def parsed(*overrides):
    return OverridesParser.create().parse_overrides(list(overrides))


# What jobs are compared by


def config(**sweep):
    callbacks = {"crash_safe_checkpoint": {"monitor": "val/accuracy", "mode": "max"}}
    return OmegaConf.create({"callbacks": callbacks, "sweep": {"metric": None, "direction": None} | sweep})


def test_jobs_are_compared_by_what_the_best_checkpoint_is_chosen_by():
    assert objective(config()) == Objective("val/accuracy", "maximize")
    assert objective(config(metric="val/loss")) == Objective("val/loss", "minimize")
    assert objective(config(metric="val/f1", direction="maximize")) == Objective("val/f1", "maximize")
    assert objective(OmegaConf.create({})) == Objective("val/loss", "minimize")
    assert objective(compose_config(["task=mae"])) == Objective("val/loss", "minimize")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"direction": "down"}, "sweep.direction=down: must be one of minimize, maximize"),
        (
            {"direction": "minimize"},
            "sweep.direction=minimize: is the opposite of callbacks.crash_safe_checkpoint.mode",
        ),
    ],
)
def test_a_direction_that_cannot_be_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        objective(config(**given))


def test_the_value_is_the_best_epochs_where_it_is_known_else_what_the_run_ended_with():
    assert value_of("val/loss", {"val/loss": 2.0}, {"val/loss": 1.0}) == 1.0
    assert value_of("test/loss", {"test/loss": 3.0}, {"val/loss": 1.0}) == 3.0
    with pytest.raises(UserError, match=r"sweep.metric=val/los: .* Did you mean val/loss\?"):
        value_of("val/los", {"val/loss": 2.0}, {})
    for unfit in (float("nan"), float("inf"), None):
        with pytest.raises(UserError, match="val/loss came to"):
            value_of("val/loss", {"val/loss": unfit}, {})


@pytest.mark.parametrize(("direction", "order"), [("minimize", [2, 0, 3, 1]), ("maximize", [0, 3, 2, 1])])
def test_the_best_stands_on_top_and_what_failed_at_the_bottom(direction, order, tmp_path, capsys):
    values = [0.5, None, 0.25, 0.5]
    for number, value in enumerate(values):
        begin(tmp_path / str(number), number, {"optimizer.lr": str(number)})
        error = "lr=1: must be below 1\nmore" if value is None else None
        finish(tmp_path / str(number), Job(number, {"optimizer.lr": str(number)}, value, {"test/x": 1.0}, 2.0, error))
    jobs = report(tmp_path, Objective("val/loss", direction))
    assert [job.number for job in jobs] == order
    screen = capsys.readouterr().out
    assert screen.index("0.5") < screen.index("failed")
    assert "1: lr=1: must be below 1\n" in screen
    rows = table(tmp_path)
    assert [row["job"] for row in rows] == [str(number) for number in order]
    assert [row["val/loss"] for row in rows][-1] == ""
    assert rows[0]["end test/x"] == "1.0"
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_a_job_is_not_finished_until_it_says_so_and_its_folder_takes_no_other(tmp_path):
    begin(tmp_path / "0", 0, {"seed": "1"})
    begin(tmp_path / "0", 0, {"seed": "1"})
    assert read_jobs(tmp_path)[0].error == "not finished"
    with pytest.raises(UserError, match="holds another sweep, whose job 0 had seed=1; take another"):
        begin(tmp_path / "0", 0, {"seed": "2"})
    (tmp_path / "0" / "job.json").write_text("{")
    with pytest.raises(UserError, match=r"job.json: is not what a sweep writes"):
        read_jobs(tmp_path)


def test_what_is_swept_over():
    assert swept_keys(["a=1", "b=1,2", "c=range(3)", "d=interval(0,1)", "e=[1,2]"]) == ["b", "c", "d"]
    assert swept_keys(["a=1,2", "b=3", "a=1", "b=3,4"]) == ["b"]


def test_a_folder_takes_a_sweep_that_grows_at_its_end_and_no_other(tmp_path):
    check_folder(tmp_path, ["seed=1,2"], ["seed"])
    for number in (0, 1):
        begin(tmp_path / str(number), number, {"seed": str(number + 1)})
    for overrides in (["seed=1,2"], ["seed=range(1,9)"], ["task=x", "hydra/launcher=basic", "seed=1,2,7"]):
        check_folder(tmp_path, overrides, ["seed"])
    for overrides, swept in ((["seed=2,3"], ["seed"]), (["seed=1"], []), (["seed=1,2", "a=1,2"], ["seed", "a"])):
        with pytest.raises(UserError, match=r"holds another sweep, whose job [01] had seed="):
            check_folder(tmp_path, overrides, swept)


# The search space


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=interval(0.5,2)", ("FloatDistribution", 0.5, 2.0, False, None)),
        ("a=tag(log,interval(1e-5,1e-2))", ("FloatDistribution", 1e-5, 1e-2, True, None)),
        ("a=int(interval(1,5))", ("IntDistribution", 1, 5, False, 1)),
        ("a=tag(log,int(interval(1,64)))", ("IntDistribution", 1, 64, True, 1)),
        ("a=tag(int,interval(1,64))", ("IntDistribution", 1, 64, False, 1)),
        ("a=range(1,5)", ("IntDistribution", 1, 4, False, 1)),  # as in Python
        ("a=range(0,7,2)", ("IntDistribution", 0, 6, False, 2)),
        ("a=range(1,3,0.5)", ("FloatDistribution", 1.0, 2.5, False, 0.5)),
        ("a=range(0.1,0.9,0.3)", ("FloatDistribution", 0.1, 0.7, False, 0.3)),  # sums that are rounded
    ],
)
def test_ranges_become_distributions(text, expected):
    found = distribution(parsed(text)[0])
    assert (type(found).__name__, found.low, found.high, found.log, found.step) == expected


@pytest.mark.parametrize(
    ("text", "choices"),
    [("a=x,y", ("x", "y")), ("a=choice(1,2.5,x)", ("1", "2.5", "x")), ("a=[1,2],[3]", ("[1,2]", "[3]"))],
)
def test_choices_become_categories(text, choices):
    assert distribution(parsed(text)[0]).choices == choices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=tag(fast,interval(0,1))", "tags may be log and int"),
        ("a=tag(log,range(1,9))", "tags may be log and int, of an interval"),
        ("a=tag(log,interval(0,1))", r"a=tag\(log,interval\(0,1\)\): .*low"),
        ("a=range(5,5)", "this range is empty"),
        ("a=interval(1,inf)", "both ends must be finite numbers"),
    ],
)
def test_ranges_that_cannot_be_drawn_from_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        distribution(parsed(text)[0])


# Draws


SPACE = ["task=x", "lr=tag(log,interval(1e-4,1))", "width=int(interval(1,9))", "kind=a,b", "out_dir=here"]


def value(trial):
    given = dict(override.split("=") for override in trial.overrides)
    return abs(float(given["lr"]) - 0.01) + abs(int(given["width"]) - 4) + (given["kind"] == "b")


def drawn(folder, n_trials, n_jobs=1, stop=None, **options):
    """Each job's overrides; a job of which `stop` is the number is drawn, and not told."""
    study = Study(parsed(*SPACE), Objective("val/loss", "minimize"), folder, startup_trials=4, **options)
    found = {}
    for batch in study.batches(n_trials, n_jobs):
        for trial in batch:
            found[trial.number] = trial.overrides
            if trial.number == stop:
                return found
            study.tell(trial, None if trial.number == 2 else value(trial))
    return found


def test_the_same_command_draws_the_same_and_another_seed_others(tmp_path):
    first = drawn(tmp_path / "a", 10)
    assert drawn(tmp_path / "b", 10) == first
    assert drawn(tmp_path / "c", 10, seed=1) != first
    assert all(overrides[:2] == ["task=x", "out_dir=here"] for overrides in first.values())
    assert len({tuple(overrides) for overrides in first.values()}) == 10


@pytest.mark.parametrize(("stop", "n_jobs"), [(1, 1), (7, 1), (6, 3)])
def test_a_sweep_that_was_killed_repeats_what_was_running_and_ends_as_it_would_have(stop, n_jobs, tmp_path):
    whole = drawn(tmp_path / "whole", 9, n_jobs)
    before = drawn(tmp_path / "cut", 9, n_jobs, stop=stop)
    after = drawn(tmp_path / "cut", 9, n_jobs)
    assert before | after == whole
    assert min(after) == stop  # what ended is kept, what failed too
    assert drawn(tmp_path / "cut", 9, n_jobs) == {}
    assert list(drawn(tmp_path / "cut", 10, n_jobs)) == [9]  # n_trials counts the whole


def test_a_sweep_that_was_killed_while_it_drew_draws_the_same(tmp_path):
    whole = drawn(tmp_path / "whole", 6)
    drawn(tmp_path / "cut", 3)
    study = Study(parsed(*SPACE), Objective("val/loss", "minimize"), tmp_path / "cut", startup_trials=4)
    study._study.ask({"lr": study.space["lr"]})
    assert drawn(tmp_path / "cut", 6) == {number: whole[number] for number in (3, 4, 5)}


def test_a_database_holds_a_study_for_each_folder(tmp_path):
    storage = str(tmp_path / "all.db")
    assert drawn(tmp_path / "a", 3, storage=storage) == drawn(tmp_path / "b", 3, storage=storage)
    assert drawn(tmp_path / "a", 3, storage=storage) == {}


def test_tpe_comes_nearer_than_chance(tmp_path):
    best = {}
    for sampler in ("tpe", "random"):
        found = []
        for seed in range(3):
            options = {"storage": "sqlite:///:memory:", "sampler": sampler, "seed": seed}
            study = Study(parsed(*SPACE), Objective("x", "minimize"), tmp_path, **options)
            values = []
            for batch in study.batches(30, 1):
                values.append(value(batch[0]))
                study.tell(batch[0], values[-1])
            found.append(sum(values[15:]) / 15)
        best[sampler] = sum(found) / len(found)
    assert best["tpe"] < 0.6 * best["random"]


def test_another_command_in_the_same_folder_is_refused(tmp_path):
    drawn(tmp_path, 2)
    with pytest.raises(UserError, match=r"out_dir: holds another sweep(.|\n)*seed: was 0, is 3"):
        drawn(tmp_path, 2, seed=3)
    with pytest.raises(UserError, match=r"overrides: was kind=a,b lr=\S+ width=\S+, is lr=1,2$"):
        Study(parsed("task=x", "lr=1,2"), Objective("val/loss", "minimize"), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "grid"}, "hydra.sweeper.sampler=grid: must be one of tpe, random"),
        ({"seed": -1}, "hydra.sweeper.seed=-1: must be a whole number, 0 or more"),
        ({"storage": "nosql://x"}, "hydra.sweeper.storage=nosql://x: cannot be opened"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        drawn(tmp_path, 2, **options)


def test_a_search_needs_something_to_search_and_a_number_of_jobs(tmp_path):
    with pytest.raises(UserError, match="nothing to search"):
        Study(parsed("task=x"), Objective("val/loss", "minimize"), tmp_path)
    for n_trials, n_jobs, name in ((0, 1, "n_trials"), (1, 0, "n_jobs")):
        with pytest.raises(UserError, match=f"hydra.sweeper.{name}=0: must be a whole number, 1 or more"):
            drawn(tmp_path, n_trials, n_jobs)


# The command line, in real processes


def test_every_combination_runs_one_that_fails_ends_none_and_the_table_has_all(folder):
    answer = sweep(folder, "-m", "task.network.latent_dim=2,3", "task.network.dropout=0,2", "out_dir=sweep")
    assert answer.returncode == 0, answer.stderr
    rows = table(folder / "sweep")
    assert len(rows) == 4
    assert [row["error"].partition(":")[0] for row in rows] == ["", "", *["task.network.dropout=2"] * 2]
    for row in rows[:2]:
        results = json.loads((folder / "sweep" / row["job"] / "results.json").read_text())
        assert float(row["val/loss"]) == results["best"]["val/loss"]
        assert float(row["end test/loss"]) == results["metrics"]["test/loss"]
    assert float(rows[0]["val/loss"]) < float(rows[1]["val/loss"])
    assert "Job 2: task.network.latent_dim=3 task.network.dropout=0\n" in answer.stdout
    assert "Sweep in sweep, by val/loss (minimize)" in answer.stdout
    again = sweep(folder, "-m", "task.network.latent_dim=2,3", "task.network.dropout=0,2", "out_dir=sweep")
    assert again.stdout.count("holds a finished run") == 2
    other = sweep(folder, "-m", "task.network.latent_dim=4,5", "out_dir=sweep")
    assert "holds another sweep, whose job 0 had" in other.stderr


def test_a_sweep_of_which_every_job_fails_exits_with_2(folder):
    answer = sweep(folder, "-m", "task.network.dropout=2,3", "out_dir=sweep")
    assert answer.returncode == 2
    assert "all 2 jobs of the sweep failed; the first: task.network.dropout=2: must be" in answer.stderr


def test_what_a_sweep_cannot_be_is_answered_before_its_first_job(folder):
    refused = {
        ("optimizer.lr=interval(0,1)",): "add hydra/sweeper=optuna, or give some: optimizer.lr=a,b",
        ("out_dir=a,b",): "out_dir: a sweep has one folder",
        ("hydra/launcher=joblb",): "Did you mean joblib?",
        ("hydra/sweeper=optuna", "hydra.sweeper.n_trails=2", "seed=1,2"): "Did you mean hydra.sweeper.n_trials, ",
        ("hydra/sweeper=optuna", "seed=1"): "hydra/sweeper=optuna: nothing to search",
        ("--cfg", "job", "seed=1,2"): "-m with --cfg: what prints a config starts no sweep",
        ("sweep.direction=up", "seed=1,2"): "sweep.direction=up: must be one of",
    }
    for words, message in refused.items():
        answer = sweep(folder, "-m", *words)
        assert answer.returncode == 2
        assert message in answer.stderr
        assert "Traceback" not in answer.stderr
    answer = sweep(folder, "-m", "seed=1,2", env={"WORLD_SIZE": "2"})
    assert "-m under torchrun with 2 processes" in answer.stderr


def test_an_extra_that_lacks_is_named_for_the_launchers_it_brings(monkeypatch):
    from trainerkit import compose

    listed = compose.choices
    monkeypatch.setattr(
        compose, "choices", lambda loader, group: listed(loader, group) if "/" not in group else ["basic"]
    )
    with pytest.raises(UserError, match=r"Did you mean joblib\?(.|\n)*joblib comes with   pip install .*\[joblib\]"):
        compose.compose_config(["task=mae", "hydra/launcher=joblib2"])


SEARCH = [
    *OPTUNA,
    "hydra.sweeper.n_trials=3",
    "optimizer.lr=tag(log,interval(1e-4,1e-1))",
    "task.network.latent_dim=2,4",
]


def test_optuna_killed_goes_on_and_ends_as_it_would_have(folder):
    whole = sweep(folder, *SEARCH, "out_dir=whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "trainerkit", *SMALL, *SEARCH, "out_dir=cut"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, cwd=folder, env=settings, **quiet)
    while process.poll() is None and not (folder / "cut" / "1" / "job.json").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = sweep(folder, *SEARCH, "out_dir=cut")
    assert again.returncode == 0, again.stderr
    assert "in cut/0" not in again.stdout  # it was told already
    kept = ("job", "val/loss", "optimizer.lr", "task.network.latent_dim", "end test/loss")
    ends = [[[row[key] for key in kept] for row in table(folder / name)] for name in ("whole", "cut")]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 3


@pytest.mark.parametrize("launcher", [pytest.param("joblib", marks=pytest.mark.slow), "submitit_local"])
def test_jobs_in_other_processes_give_the_table_of_jobs_one_after_the_other(launcher, folder):
    values = ["-m", "task.network.latent_dim=2,3", "seed=1"]
    alone = sweep(folder, *values, "out_dir=alone")
    assert alone.returncode == 0, alone.stderr
    options = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": ["hydra.launcher.timeout_min=10"]}[launcher]
    answer = sweep(folder, *values, f"hydra/launcher={launcher}", *options, "out_dir=beside")
    assert answer.returncode == 0, answer.stderr
    kept = ("job", "val/loss", "task.network.latent_dim", "end test/loss", "error")
    tables = [[[row[key] for key in kept] for row in table(folder / name)] for name in ("alone", "beside")]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_jobs_of_two_processes_each_get_the_same_draw(launcher, folder):
    """RankConsensus, in the default callbacks, would refuse another one."""
    words = [*OPTUNA, "hydra.sweeper.n_trials=2", "optimizer.lr=interval(1e-4,1e-1)", f"hydra/launcher={launcher}"]
    devices = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    small = [word for word in SMALL if word != "trainer=cpu"]
    answer = trainerkit(*words, *small, *devices, "out_dir=sweep", cwd=folder, timeout=300)
    assert answer.returncode == 0, answer.stderr
    rows = table(folder / "sweep")
    assert [row["error"] for row in rows] == ["", ""]


@pytest.mark.slow
def test_torchrun_starts_the_ranks_of_one_run(folder):
    devices = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    small = [word for word in SMALL if word != "trainer=cpu"]
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, "-m", *torchrun, "-m"]
    answer = subprocess.run(
        [*command, "trainerkit", *small, *devices, "out_dir=run"], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=180, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    started = trainerkit(*small, *devices, "out_dir=started", cwd=folder)
    assert started.returncode == 0, started.stderr
    metrics = [json.loads((folder / name / "results.json").read_text())["metrics"] for name in ("run", "started")]
    assert metrics[0] == metrics[1]
