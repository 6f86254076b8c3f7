"""`python -m trainerkit replay`: real runs, what the screen says, exit codes."""

import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import SMALL_MAE, smooth_spectra, trainerkit
from trainerkit.callbacks import StepHashes
from trainerkit.callbacks._step_records import rank_files, read_records
from trainerkit.cli import main

# The report at the end of a run is not what is tested; dropout, so that random numbers matter.
RUN = [
    *SMALL_MAE, "data.path=spectra.npy", "callbacks=[default,step_hashes]", "callbacks.reconstruction_report=null",
    "task.network.dropout=0.1", "trainer.max_epochs=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs: a, the same again, and with another learning rate; and a's checkpoint after step 4."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "spectra.npy", smooth_spectra())
    torch.set_num_threads(1)
    original = StepHashes.on_train_batch_end

    def saving(self, trainer, *arguments):
        original(self, trainer, *arguments)
        if self._step == 4:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "step4.ckpt")

    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        context.setattr(StepHashes, "on_train_batch_end", saving)
        for options in (["out_dir=a"], ["out_dir=same"], ["out_dir=faster", "optimizer.lr=0.01"]):
            main([*RUN, *options])
    return folder


@pytest.fixture
def replay(runs, monkeypatch, capfd):
    """Runs `python -m trainerkit replay …` in this process, among the runs; gives exit code, screen and errors."""

    def run(*arguments):
        monkeypatch.chdir(runs)
        code = 0
        try:
            main(["replay", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        screen = capfd.readouterr()
        return code, screen.out, screen.err

    return run


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_equal_runs(replay, runs):
    steps = max(read_records(runs / "a" / "step_hashes" / "rank0.jsonl"))
    assert steps > 10
    assert replay("a", "same") == (0, f"{steps} steps equal\n", "")


def test_two_runs_of_which_one_had_another_learning_rate(replay):
    code, screen, _ = replay("a", "faster")
    assert code == 1
    assert re.match(
        r"step 1: optimizer 0 group 0 lr is [0-9a-f]{8} in a/step_hashes/rank0\.jsonl:\d+, [0-9a-f]{8} in "
        r"faster/step_hashes/rank0\.jsonl:\d+; \d+ more parts",
        screen,
    )


def test_a_run_trained_again_is_equal_and_stays_as_it_is(replay, runs):
    before = files(runs)
    steps = max(read_records(runs / "a" / "step_hashes" / "rank0.jsonl"))
    code, screen, _ = replay("a", "--from-start")
    assert (code, screen.splitlines()[-1]) == (0, f"{steps} steps equal")
    assert "fit from the start" in screen
    assert "Results" not in screen  # it ends after the last recorded step
    assert files(runs) == before


def stopped_after_step_4(runs, tmp_path):
    """A copy of run a with no other checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(runs / "a", run, symlinks=True)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    os.rename(run / "step4.ckpt", run / "checkpoints" / "last.ckpt")
    (run / "results.json").unlink()
    return run


def test_a_run_trained_again_from_its_checkpoint(replay, runs, tmp_path):
    run = stopped_after_step_4(runs, tmp_path)
    steps = max(read_records(run / "step_hashes" / "rank0.jsonl")) - 4
    code, screen, _ = replay(run)
    assert f"fit from {run}/checkpoints/last.ckpt" in screen
    assert (code, screen.splitlines()[-1]) == (0, f"{steps} steps equal")
    # A file that cannot be read is no checkpoint to begin from.
    (run / "checkpoints" / "last.ckpt").write_bytes(b"no")
    assert "fit from the start" in replay(run)[1]


def test_data_that_was_changed_since(replay, runs):
    rows = np.load(runs / "spectra.npy")
    try:
        np.save(runs / "spectra.npy", rows * (1 + 1e-6))
        code, screen, _ = replay("a", "--from-start")
    finally:
        np.save(runs / "spectra.npy", rows)
    assert code == 1
    assert re.match(
        r"rank 0, step 1: batch\.x is [0-9a-f]{8} in a/step_hashes/rank0\.jsonl:\d+", screen.splitlines()[-1]
    )


WRONG = [
    ([], "replay: needs the folder of a run, or of two"),
    (["a", "b", "c"], "replay: needs the folder of a run, or of two"),
    (["a", "--start"], "--start: there is no such flag; replay has --from-start and trust=true."),
    (["a", "trust=yes"], "trust=yes: there is no such flag; replay has --from-start and trust=true."),
    (["none"], "none: has no config.yaml, so it cannot be trained again; name two runs to compare them."),
    (["a", "none"], "none: has no records of steps; train with callbacks=[default,step_hashes] to have them."),
    (["plain"], "plain: was trained without step_hashes; train it with callbacks=[default,step_hashes]."),
    (["bare"], "bare: was trained without step_hashes; train it with callbacks=[default,step_hashes]."),
    (["damaged"], "damaged/config.yaml: cannot be read ("),
    (["listed"], "listed/config.yaml: must hold a run's config, as names and values."),
    (["broken"], "broken/step_hashes/rank0.jsonl: line 1 is no record of StepHashes"),
    (["a", "broken"], "broken/step_hashes/rank0.jsonl: line 1 is no record of StepHashes"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_what_cannot_be_found_out_is_exit_code_2_and_a_sentence(replay, runs, arguments, message):
    configs = {
        "plain": "callbacks: {ema: null}\nout_dir: plain\n",
        "bare": "seed: 1\n",
        "damaged": "a: {",
        "listed": "[1]",
    }
    for name, text in configs.items():
        (runs / name).mkdir(exist_ok=True)
        (runs / name / "config.yaml").write_text(text)
    (runs / "broken" / "step_hashes").mkdir(exist_ok=True, parents=True)
    (runs / "broken" / "step_hashes" / "rank0.jsonl").write_text("no\n")
    shutil.copy(runs / "a" / "config.yaml", runs / "broken")
    code, _, errors = replay(*arguments)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_records_that_hold_nothing_after_the_start_are_refused(replay, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "a", run, symlinks=True)
    file = rank_files(run / "step_hashes")["rank0.jsonl"]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))  # before the first step
    code, _, errors = replay(run, "--from-start")
    assert code == 2
    assert "replay: there is no step of which there are two records." in errors


def test_a_checkpoint_of_another_history_is_not_compared(replay, runs, tmp_path):
    run = stopped_after_step_4(runs, tmp_path)
    shutil.copy(runs / "faster" / "step4.ckpt", run / "checkpoints" / "last.ckpt")
    with pytest.warns(UserWarning, match="of step 4 is not what the checkpoint was saved after"):
        code, _, errors = replay(run)
    assert code == 2
    assert "replay: there is no step of which there are two records." in errors


def test_a_killed_run_that_records_goes_on_and_equals_the_uninterrupted_one(runs, replay, monkeypatch):
    """SIGKILL to a process; what it made after its last checkpoint is compared when it is made again."""
    monkeypatch.chdir(runs)
    options = [*RUN, "trainer.max_epochs=8", "out_dir=cut"]
    process = multiprocessing.get_context("fork").Process(target=main, args=(options,))
    process.start()
    last, records = runs / "cut" / "checkpoints" / "last.ckpt", runs / "cut" / "step_hashes" / "rank0.jsonl"
    while not last.exists():
        assert process.is_alive()
        time.sleep(0.002)
    size = records.stat().st_size
    while records.stat().st_size == size:  # a step after it
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    made = max(read_records(records))
    assert 0 < made < 8 * 12
    main(options)
    whole = read_records(records)
    assert max(whole) > made
    assert sum('"step":' in line for line in records.read_text().splitlines()) == len(whole)  # none was written again
    code, screen, _ = replay("cut", "--from-start")
    assert (code, screen.splitlines()[-1]) == (0, f"{max(whole)} steps equal")


def test_a_resume_that_is_not_the_recorded_run_ends_with_the_step_and_the_part(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    run = stopped_after_step_4(runs, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*RUN, f"out_dir={run}", "task.network.dropout=0.3"])
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert "trainerkit: the resumed run is not the one that was recorded:\nrank 0, step 5: output.loss is " in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_two_ranks_trained_again(runs):
    """Processes that Lightning starts: they run the same command line."""
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1"]
    answer = trainerkit(*RUN, *two, "out_dir=two", cwd=runs)
    assert answer.returncode == 0, answer.stderr
    assert set(rank_files(runs / "two" / "step_hashes")) == {"rank0.jsonl", "rank1.jsonl"}
    answer = trainerkit("replay", "two", "--from-start", cwd=runs)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count(" steps equal") == 1
