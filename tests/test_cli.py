"""The command line as a user has it: real processes, what the screen says, exit codes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support import ROOT, SMALL_MAE, smooth_spectra, trainerkit
from trainerkit.cli import GROUPS


def small(*arguments, folder, **options):
    return trainerkit(*SMALL_MAE, "data.path=spectra.npy", *arguments, cwd=folder, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in `run/`, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "spectra.npy", smooth_spectra())
    answer = small("out_dir=run", folder=folder)
    assert answer.returncode == 0, answer.stderr
    return folder, answer


def test_help_shows_groups_choices_and_examples_without_torch(tmp_path):
    answer = trainerkit("--help", cwd=tmp_path)
    assert answer.returncode == 0
    for group in GROUPS:
        assert f"\n  {group}" in answer.stdout
    assert "callbacks=[default,NAME]" in answer.stdout
    assert "callbacks.NAME=null" in answer.stdout
    assert answer.stdout.count("\n  python -m trainerkit") == 3
    assert len(answer.stdout.splitlines()) <= 40


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["task=nothing"], ["task=mae", "lr=1"]])
def test_help_listings_and_config_errors_import_neither_torch_nor_lightning(tmp_path, arguments):
    code = (
        "import sys\nfrom trainerkit.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


def test_alone_it_lists_the_tasks_with_a_line_each(tmp_path):
    answer = trainerkit(cwd=tmp_path)
    assert answer.returncode == 0
    assert "  mae              Masked autoencoder for spectra" in answer.stdout
    assert "python -m trainerkit task=NAME" in answer.stdout


def test_the_console_script_is_the_same(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), "trainerkit")
    answer = subprocess.run([script, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert answer.stdout == trainerkit("--help", cwd=tmp_path).stdout


WRONG = [
    (["task=maee"], "task=maee: there is no such choice. Did you mean mae?"),
    (["taks=mae"], "taks: there is no such key. Did you mean task?"),
    (["mae"], "mae: must be key=value; did you mean task=mae?"),
    (["stage=fit"], "no task was chosen"),
    (["--hlep"], "--hlep: there is no such flag"),
    (["--config-dir", "nowhere", "task=mae"], "--config-dir nowhere: there is no such folder"),
    (["task=mae", "optimiser=adamw"], "optimiser: there is no such key. Did you mean optimizer"),
    (["task=mae", "optimizer=adamm"], "optimizer=adamm: there is no such choice. Did you mean adam, adamw or"),
    (["task=mae", "callbacks=[default,exact_resum]"], "callbacks=exact_resum: there is no such choice. Did you mean exact_resume"),
    (["task=mae", "lr=3"], "lr: there is no such key. Did you mean optimizer.lr?"),
    (["task=mae", "task.network.n_msk=3"], "task.network.n_msk: there is no such key. Did you mean task.network.n_mask"),
    (["task=mae", "callbacks.emma=null"], "callbacks.emma: there is no such key. Did you mean callbacks.ema"),
    (["task=mae", "a=b]"], "Error parsing override 'a=b]'"),
    (["task=mae", "stage=fitt"], "stage=fitt: must be one of fit, validate, test, predict"),
    (["task=mae", "seed=x"], "seed=x: must be a whole number from 0"),
    (["task=mae", "resume=none.ckpt"], "resume=none.ckpt: there is no such file; must be auto, null or the path"),
    (["task=mae", "stage=test"], "stage=test needs trained weights"),
    (["task=mae", "data=null"], "data=null: must be one of digits, glyphs, indian_pines"),
    (["task=mae", "data=spectra"], "data.path: needs a value; give it by data.path="),
    (["task=mae", "data=spectra", "data.path=none.npy"], "none.npy: there is no such file"),
    (["task=mae", "task.network.n_mask=99"], "task.network.n_mask=99: must be from 0 to 19, since one of n_patches=20"),
    (["task=mae", "task.network.n_mask=abc"], "task.network.n_mask=abc: must be a whole number."),
    (["task=mae", "task.network.n_patches=16"], "task.network.n_patches=16: must divide seq_len=200; take one of 8, 10, 20"),
    (["task=mae", "+task.network.depth=3"], "task.network.depth: trainerkit.tasks.mae.network.MaskedAutoencoder has no such"),
    (["task=mae", "task.loss=mae"], "task.loss=mae: must be one of mse, sse."),
    (["task=mae", "optimizer.lr=fast"], "optimizer.lr=fast: must be a number."),
    (["task=mae", "optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: must be a list of 2"),
    (["task=mae", "callbacks.ema.decay=1.5"], "callbacks.ema.decay=1.5: must be from 0 to below 1"),
    (["task=mae", "trainer.precision=bf17"], "trainer.precision=bf17: must be one of 64, 32, 16, "),
    (["task=mae", "trainer.max_epochs=two"], "trainer.max_epochs=two: must be a whole number or null."),
    (["task=mae", "trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1: must be 0 or more"),
    (["task=mae", "out_dir=s3://b/run"], "out_dir=s3://b/run: must be a folder of this machine; callbacks.crash_safe_checkpoint.dirname=s3://b/run"),
    (["task=mae", "seed=-1"], "seed=-1: must be a whole number from 0"),
    (["task=mae", "callbacks.ema=false"], "callbacks.ema=False: must be null to remove it"),
    (["-m", "task=mae", "task.network.n_mask=99"], "task.network.n_mask=99: must be from 0 to 19"),
    (["-m", "task=mae", "+hydra.callbacks.x._target_=os.system"], "add allow=os to the command line"),
    (["task=mae", "task._target_=os.system"], "add allow=os to the command line (or set TRAINERKIT_ALLOW=os)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_what_is_wrong_is_said_in_one_screen(tmp_path, arguments, message, capsys, monkeypatch):
    """In this process, for speed; what the process returns is tested once below."""
    from trainerkit.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    screen = capsys.readouterr()
    assert stop.value.code == 2
    assert message in screen.err
    assert "Traceback" not in screen.err
    assert len(screen.err.splitlines()) <= 12
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".json", ".safetensors")]
    assert [path.name for path in left] == (["job.json"] if "-m" in arguments and "n_mask=99" in message else [])


def test_an_error_is_exit_code_2_without_a_traceback(tmp_path):
    answer = trainerkit("task=mae", "task.network.n_mask=99", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.startswith("trainerkit: task.network.n_mask=99: must be from 0 to 19")
    assert "Traceback" not in answer.stderr + answer.stdout


def test_a_missing_extra_is_named_with_the_line_that_installs_it(tmp_path, capsys, monkeypatch):
    from trainerkit.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["task=mae"])
    screen = capsys.readouterr().err
    assert "data=indian_pines needs the package tensorly, which is not installed:" in screen
    assert "pip install -c constraints.txt -e '.[examples]'" in screen


def test_a_run_leaves_what_it_promised(finished):
    folder, answer = finished
    run = folder / "run"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files >= {
        "config.yaml", "overrides.txt", "environment.json", "training_history.json", "results.json",
        "checkpoints/last.ckpt", "checkpoints/best.ckpt", "best_model.safetensors",
        "reconstruction.png", "history.png",
    }  # fmt: skip
    assert not [name for name in files if name.endswith(".tmp")]
    for name in files:
        if "/logs/" not in name:
            assert name in answer.stdout
    history = json.loads((run / "training_history.json").read_text())
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    environment = json.loads((run / "environment.json").read_text())
    assert set(environment["versions"]) >= {"torch", "lightning", "hydra-core", "python", "trainerkit"}
    assert "seq_len: 40" in (run / "config.yaml").read_text()  # resolved: asked of the data
    assert "test/gaussian_conditional" in answer.stdout


def test_advertisements_and_device_lines_do_not_appear(finished):
    screen = finished[1].stdout + finished[1].stderr
    for word in ("litlogger", "GPU available", "TPU", "Tip:", "num_workers", "Warning"):
        assert word not in screen


def test_a_finished_run_says_so_and_changes_nothing(finished):
    folder, _ = finished
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    answer = small("out_dir=run", folder=folder)
    assert answer.returncode == 0, answer.stderr
    assert "run holds a finished run (3 epochs, the whole length); nothing was changed." in answer.stdout
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_a_folder_with_a_run_is_not_overwritten(finished):
    answer = small("out_dir=run", "resume=null", folder=finished[0])
    assert answer.returncode == 2
    assert "resume=null: run already holds a run, which would be overwritten" in answer.stderr


def test_a_checkpoint_of_another_network_says_what_differs(finished):
    folder, _ = finished
    answer = small("out_dir=other", "resume=run/checkpoints/last.ckpt", "task.network.latent_dim=5", folder=folder)
    assert answer.returncode == 2
    assert "run/checkpoints/last.ckpt does not fit this config" in answer.stderr
    assert "task.network.latent_dim was 4, is 5" in answer.stderr


def test_a_resume_that_does_not_fit_leaves_the_runs_files_as_they_are(finished):
    folder, _ = finished
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    answer = small("out_dir=run", "task.network.latent_dim=5", "trainer.max_epochs=9", folder=folder)
    assert answer.returncode == 2
    assert "task.network.latent_dim was 4, is 5" in answer.stderr
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_from_elsewhere_does_not_overwrite_another_run(finished, tmp_path):
    folder, _ = finished
    foreign = tmp_path / "foreign.ckpt"
    foreign.write_bytes((folder / "run" / "checkpoints" / "last.ckpt").read_bytes())
    answer = small("out_dir=run", f"resume={foreign}", folder=folder)
    assert answer.returncode == 2
    assert "run holds another run, which would be overwritten" in answer.stderr


def test_a_run_without_validation_or_callbacks_of_ours_still_ends(tmp_path):
    np.save(tmp_path / "spectra.npy", smooth_spectra())
    last = ["callbacks.early_stopping.monitor=train/loss", "callbacks.best_weights.monitor=train/loss"]
    last.append("callbacks.crash_safe_checkpoint.monitor=train/loss")
    answer = small("data.val_fraction=0.0", *last, "out_dir=run", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "best_model.safetensors").exists()
    assert "test/mse" in answer.stdout
    bare = [option for option in SMALL_MAE if not option.startswith("callbacks")]
    answer = trainerkit(*bare, "data.path=spectra.npy", "callbacks=none", "out_dir=bare", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert not list((tmp_path / "bare").rglob("*.ckpt"))


def test_evaluation_of_a_run_needs_only_its_folder_and_tells_the_same_number(finished):
    folder, _ = finished
    results = json.loads((folder / "run" / "results.json").read_text())["metrics"]
    answer = trainerkit("stage=validate", "out_dir=run", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    line = next(line for line in answer.stdout.splitlines() if "val/loss" in line)
    history = json.loads((folder / "run" / "training_history.json").read_text())
    best = min(record["val_loss"] for record in history)
    assert float(line.split()[-1]) == pytest.approx(best, rel=1e-4)
    answer = trainerkit("stage=test", "out_dir=run", cwd=folder)
    line = next(line for line in answer.stdout.splitlines() if "test/mse" in line)
    assert float(line.split()[-1]) == pytest.approx(results["test/mse"], rel=1e-4)
    # The exported weights are the same: test them through task.network.weights, without the checkpoint.
    weights = "task.network.weights=run/best_model.safetensors"
    answer = small("stage=test", "out_dir=fresh", weights, folder=folder)
    line = next(line for line in answer.stdout.splitlines() if "test/mse" in line)
    assert float(line.split()[-1]) == pytest.approx(results["test/mse"], rel=1e-4)


def test_predictions_are_written_in_the_order_of_the_rows(finished):
    folder, _ = finished
    answer = trainerkit("stage=predict", "out_dir=run", "callbacks=[default,latent_clusters]", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    predictions = folder / "run" / "predictions"
    assert np.load(predictions / "index.npy").tolist() == list(range(400))
    latents = np.load(predictions / "latent.npy")
    assert latents.shape == (400, 4)
    np.testing.assert_allclose(np.linalg.norm(latents, axis=1), 1, rtol=1e-5)
    assert np.load(predictions / "error.npy").shape == (400,)
    assert np.load(predictions / "clusters.npy").shape == np.load(predictions / "vmf_clusters.npy").shape == (400,)
    chosen = json.loads((folder / "run" / "clusters.json").read_text())["chosen"]
    assert set(chosen) == {"inertia", "silhouette", "vmf_bic"}


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_ends_as_if_never_stopped(tmp_path, signum):
    np.save(tmp_path / "spectra.npy", smooth_spectra())
    options = [*SMALL_MAE, "data.path=spectra.npy", "trainer.max_epochs=40"]
    whole = trainerkit(*options, "out_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "trainerkit", *options, "out_dir=cut"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(tmp_path / "cut" / "training_history.json", process)
    time.sleep(0.05)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if signum == signal.SIGINT else 75), err
    assert "Traceback" not in err
    assert f"Stopped by {signum.name} in epoch" in out
    command = out.strip().splitlines()[-1].split()
    assert command[:3] == ["python", "-m", "trainerkit"]
    assert command[-1] == "out_dir=cut"
    done = len(json.loads((tmp_path / "cut" / "training_history.json").read_text()))
    assert done < 40
    resumed = trainerkit(*command[3:], cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "from cut/checkpoints/step-" in resumed.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_died_after_its_last_epoch_is_tested_and_finished(finished, tmp_path):
    import shutil

    source, _ = finished
    shutil.copytree(source / "run", tmp_path / "run")
    np.save(tmp_path / "spectra.npy", smooth_spectra())
    (tmp_path / "run" / "results.json").unlink()
    answer = small("out_dir=run", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert_same_run(source / "run", tmp_path / "run")


def assert_same_run(one, other):
    """The same weights to the last bit, metrics, and history but for the seconds."""
    a, b = (load_file(folder / "best_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name].numpy(), b[name].numpy()) for name in a)
    histories = [json.loads((folder / "training_history.json").read_text()) for folder in (one, other)]
    for history in histories:
        for record in history:
            del record["seconds"]
    assert histories[0] == histories[1]
    results = [json.loads((folder / "results.json").read_text())["metrics"] for folder in (one, other)]
    assert results[0] == results[1]


def test_a_multirun_makes_a_folder_a_job(tmp_path):
    np.save(tmp_path / "spectra.npy", smooth_spectra())
    answer = small(
        "-m", "task.network.latent_dim=2,3", "trainer.max_epochs=1", "out_dir=sweep", folder=tmp_path
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    for number, size in enumerate((2, 3)):
        assert load_file(tmp_path / "sweep" / str(number) / "best_model.safetensors")[
            "network.encoder.to_latent.weight"
        ].shape == (size, 16)


def test_a_folder_of_the_users_own_adds_choices_and_overrides_built_in_ones(tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "optimizer").mkdir()
    (tmp_path / "mine" / "experiment" / "tiny.yaml").write_text(
        "# @package _global_\n# Tiny.\ntrainer:\n  max_epochs: 7\n"
    )
    (tmp_path / "mine" / "optimizer" / "adamw.yaml").write_text(
        "_target_: torch.optim.AdamW\n_partial_: true\nlr: 0.5\n"
    )
    arguments = ["--config-dir", "mine", "task=mae", "experiment=tiny", "optimizer.lr=0.25", "--cfg", "job"]
    answer = trainerkit(*arguments, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "max_epochs: 7" in answer.stdout
    assert "lr: 0.25" in answer.stdout
    assert "amsgrad" not in answer.stdout


def test_two_processes_train_and_test_the_same_as_one(tmp_path):
    np.save(tmp_path / "spectra.npy", smooth_spectra())
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    answer = small(*two, "trainer.max_epochs=1", "data.batch_size=16", "out_dir=run", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("Results") == 1  # only the first process speaks
    values = []
    for way in (two, ["trainer=cpu"]):
        answer = trainerkit("stage=test", "out_dir=run", *way, cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr
        values += [float(line.split()[-1]) for line in answer.stdout.splitlines() if "test/mse" in line]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_importing_callbacks_needs_neither_hydra_nor_a_task(tmp_path):
    code = "import sys, trainerkit.callbacks\nprint([m for m in sys.modules if m.startswith(('hydra', 'safetensors', 'trainerkit.'))])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "hydra" not in answer.stdout
    assert "safetensors" not in answer.stdout
    assert "trainerkit.tasks" not in answer.stdout
    assert "trainerkit.data" not in answer.stdout


def test_results_leave_out_the_statistics_of_single_layers():
    from types import SimpleNamespace

    from trainerkit.run import _metrics

    logged = {
        "val/loss": 1.0, "val/loss/dataloader_idx_0": 2.0, "throughput/samples": 3.0, "accuracy": 4.0,
        "train/loss_step": 5.0, "parameters/norm/encoder.0": 6.0,
    }  # fmt: skip
    assert list(_metrics(SimpleNamespace(callback_metrics=logged))) == list(logged)[:4]


def test_the_root_is_where_the_tests_think():
    assert (ROOT / "configs" / "train.yaml").is_file()


def test_a_command_that_does_not_end_tells_where_each_process_is(tmp_path):
    os.mkfifo(tmp_path / "never.npy")
    with pytest.raises(AssertionError, match=r"no end after 5 s(.|\n)*most recent call first"):
        trainerkit(*SMALL_MAE, "data.path=never.npy", "out_dir=run", cwd=tmp_path, timeout=5)


def test_a_first_process_that_cannot_meet_the_others_ends_them(spectra_file):
    """They would wait for an answer at its port for half an hour, or look in vain for the config that it left them."""
    options = ["data.path=spectra.npy", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "out_dir=run"]
    with socket.create_server(("", 0)) as taken:
        port = {"MASTER_PORT": str(taken.getsockname()[1])}
        answer = trainerkit(*SMALL_MAE, *options, cwd=spectra_file.parent, env=port)  # reads until the last has ended
    assert answer.returncode == 1
    assert "EADDRINUSE" in answer.stderr
    assert answer.stderr.count("Traceback") == 1
