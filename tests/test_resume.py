"""What a resumed run takes of a changed command line, in real runs."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.support import SMALL_MAE, smooth_spectra
from trainerkit.cli import main
from trainerkit.resume import overruled

RUN = [*SMALL_MAE, "data.path=spectra.npy", "callbacks.reconstruction_report=null", "scheduler=step", "out_dir=run"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a run of one epoch."""
    folder = tmp_path_factory.mktemp("begun")
    np.save(folder / "spectra.npy", smooth_spectra())
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        main([*RUN, "trainer.max_epochs=1"])
    return folder


@pytest.fixture
def resumed(begun, tmp_path, monkeypatch, capfd):
    """Trains a copy of the run for one more epoch; gives what was said of the optimizer, and the last epoch's lr."""
    shutil.copytree(begun, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")

    def run(*options):
        epochs = len(json.loads((tmp_path / "copy/run/training_history.json").read_text()))
        main([*RUN, f"trainer.max_epochs={epochs + 1}", *options])
        history = json.loads((tmp_path / "copy/run/training_history.json").read_text())
        assert len(history) == epochs + 1
        lines = capfd.readouterr().err.splitlines()
        return [line.strip() for line in lines if line.startswith(("  optimizer.", "  scheduler."))], history[-1]["lr"]

    return run


def test_values_that_the_checkpoint_decides_are_named_each_time(resumed):
    """The second resumed run finds them in the first one's config.yaml, and they are overruled all the same."""
    changed = ["optimizer.lr=0.01", "optimizer.betas=[0.8,0.9]", "scheduler.gamma=0.5"]
    for _ in range(2):
        said, lr = resumed(*changed)
        assert said == [
            "optimizer.lr=0.01: stays 0.003", "optimizer.betas=[0.8, 0.9]: stays [0.9, 0.95]",
            "scheduler.gamma=0.5: stays 0.1",
        ]  # fmt: skip
        assert lr == pytest.approx(0.003)


def test_nothing_is_said_of_an_unchanged_optimizer_and_of_what_takes_effect(resumed):
    said, _ = resumed("callbacks.ema.decay=0.9", "trainer.gradient_clip_val=0.5")
    assert said == []


def test_a_value_is_overruled_if_it_was_made_and_is_nowhere_any_more():
    made = [{"lr": 0.1, "initial_lr": 0.2, "weight_decay": 0.1}, {"lr": 0.1, "initial_lr": 0.2, "weight_decay": 0.0}]
    restored = [{"lr": 0.01, "initial_lr": 0.3, "weight_decay": 0.1}] * 2
    assert overruled({"lr": 0.2, "weight_decay": 0.1}, made, restored) == {"lr": (0.2, 0.3)}


@pytest.mark.parametrize("given", [{}, {"lr": None}, {"lr": 0.7}, {"unknown": 1}])
def test_what_was_not_given_or_not_taken_is_not_overruled(given):
    assert overruled(given, [{"lr": 0.1}], [{"lr": 0.2}]) == {}


def test_a_layer_whose_rate_a_callback_changed_is_not_a_change_of_the_command_line():
    made = [{"lr": 0.1, "initial_lr": 0.1}]
    restored = [{"lr": 0.05, "initial_lr": 0.1}, {"lr": 0.01, "initial_lr": 0.01}]
    assert overruled({"lr": 0.1}, made, restored) == {}


def test_the_rate_itself_is_compared_where_no_schedule_keeps_another():
    assert overruled({"lr": 0.1}, [{"lr": 0.1}], [{"lr": 0.2}]) == {"lr": (0.1, 0.2)}
