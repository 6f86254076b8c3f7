import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import fsspec
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from tests.support import ROOT, ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import EMA, CheckpointError, CrashSafeCheckpoint, ExactResume, History, StopRequested
from trainerkit.callbacks._host_copy import HostCopy
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches


class Scripted(ToyModule):
    losses = (3.0, 1.0, 2.0)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(self.losses[self.current_epoch]))


def names(folder):
    return sorted(os.listdir(folder / "checkpoints"))


def load(path):
    return torch.load(path, weights_only=True)


def steps_of(folder):
    return [load(path)["global_step"] for path in sorted((folder / "checkpoints").glob("step-*.ckpt"))]


def test_last_and_best_are_links_to_the_right_epochs(tmp_path):
    callback = CrashSafeCheckpoint()
    toy_trainer(tmp_path, [callback]).fit(Scripted(), toy_loader(), toy_loader())
    folder = tmp_path / "checkpoints"
    stems = [f"step-{step:08d}" for step in (4, 8, 12)]
    assert names(tmp_path) == sorted(
        ["best.ckpt", "last.ckpt", *(f"{stem}{end}" for stem in stems for end in (".ckpt", ".json"))]
    )
    assert (os.readlink(folder / "last.ckpt"), os.readlink(folder / "best.ckpt")) == (
        "step-00000012.ckpt",
        "step-00000008.ckpt",
    )
    assert (load(folder / "last.ckpt")["global_step"], load(folder / "best.ckpt")["global_step"]) == (12, 8)
    assert callback.best_model_path == str(folder / "best.ckpt")
    assert callback.best_model_score == 1.0
    assert CrashSafeCheckpoint.latest(folder) == str(folder / "step-00000012.ckpt")


def test_a_manifest_says_what_the_file_is(tmp_path):
    toy_trainer(tmp_path, [CrashSafeCheckpoint()], max_epochs=2).fit(Scripted(), toy_loader(), toy_loader())
    path = tmp_path / "checkpoints" / "step-00000008.ckpt"
    manifest = json.loads(path.with_suffix(".json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["files"] == {path.name: {"size": path.stat().st_size, "sha256": digest}}
    kept = {key: manifest[key] for key in ("number", "step", "epoch", "monitor", "score", "resumable")}
    assert kept == {"number": 2, "step": 8, "epoch": 1, "monitor": "val/loss", "score": 1.0, "resumable": True}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4, 8, 12, 16, 20]),
        ({"every_n_epochs": 2}, [8, 16, 20]),
        ({"save_every": 3}, [3, 4, 6, 8, 9, 12, 15, 16, 18, 20]),
        ({"save_every": None, "save_every_minutes": 1e-9, "every_n_epochs": 9}, list(range(1, 21))),
        ({"save_every_minutes": 1000, "every_n_epochs": 9}, [20]),
    ],
)  # fmt: skip
def test_checkpoints_are_written_at_these_steps(tmp_path, options, steps):
    callback = CrashSafeCheckpoint(monitor=None, keep_checkpoints=99, **options)
    toy_trainer(tmp_path, [callback], max_epochs=5).fit(ToyModule(), toy_loader())
    assert steps_of(tmp_path) == steps


@pytest.mark.parametrize(("keep", "steps"), [(1, [4, 20]), (2, [4, 16, 20]), (9, [4, 8, 12, 16, 20])])
def test_the_newest_and_the_best_are_kept(tmp_path, keep, steps):
    class FirstIsBest(Scripted):
        losses = (1.0, 2.0, 3.0, 4.0, 5.0)

    callback = CrashSafeCheckpoint(keep_checkpoints=keep)
    toy_trainer(tmp_path, [callback], max_epochs=5).fit(FirstIsBest(), toy_loader(), toy_loader())
    assert steps_of(tmp_path) == steps
    assert len(names(tmp_path)) == 2 * len(steps) + 2
    assert load(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == 4


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 3}])
def test_a_run_resumed_from_any_checkpoint_validates_as_often_and_ends_with_the_same_bits(tmp_path, options):
    """Validations within an epoch, some due at the step of a checkpoint, some within an accumulation window."""

    class Validations(ToyModule):
        def __init__(self):
            super().__init__()
            self.validated = []

        def loss(self, batch):
            return super().loss((batch["x"], batch["y"]))

        def on_validation_end(self):
            self.validated.append((self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_idx))

    def fit(folder, checkpoint=None):
        x = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
        data = ArrayDataset({"x": x, "y": x.sum(1)})
        train, val = (BatchLoader(data, EpochBatches(96, 8, shuffle=shuffle)) for shuffle in (True, False))
        module = Validations()
        callbacks = [CrashSafeCheckpoint(save_every=1, keep_checkpoints=99), ExactResume()]
        trainer = toy_trainer(folder, callbacks, max_epochs=2, val_check_interval=5, **options)
        trainer.fit(module, train, val, ckpt_path=checkpoint)
        return module

    torch.manual_seed(1)
    whole = fit(tmp_path / "whole")
    assert len(whole.validated) == 4
    folder = tmp_path / "whole" / "checkpoints"
    manifests = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    resumable = [next(iter(manifest["files"])) for manifest in manifests if manifest["resumable"]]
    assert len(resumable) == {1: 24, 2: 12, 3: 8}[options.get("accumulate_grad_batches", 1)]
    for number, name in enumerate(resumable):
        loops = load(folder / name)["loops"]["fit_loop"]
        epoch, batch = (loops[key]["current"] for key in ("epoch_progress", "epoch_loop.batch_progress"))
        begun = epoch["completed"], batch["ready"] - 1
        resumed = fit(tmp_path / f"resumed{number}", folder / name)
        assert torch.equal(resumed.layer.weight, whole.layer.weight), name
        assert resumed.validated == [place for place in whole.validated if place > begun], name


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("place", ["training_step", "validation_step"])
def test_a_signal_finishes_the_step_saves_and_stops_with_its_exit_code(tmp_path, signum, place, capfd):
    class Interrupted(ToyModule):
        def training_step(self, batch, batch_idx):
            if place == "training_step" and self.global_step == 5:
                os.kill(os.getpid(), signum)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if place == "validation_step" and self.current_epoch == 1:
                signal.getsignal(signum)  # the handler is ours until the run ends
                if batch_idx == 0:
                    os.kill(os.getpid(), signum)
            super().validation_step(batch, batch_idx)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    trainer = toy_trainer(tmp_path, [CrashSafeCheckpoint()])
    with pytest.raises(StopRequested) as stop:
        trainer.fit(Interrupted(), toy_loader(), toy_loader())
    assert stop.value.code == (130 if signum == signal.SIGINT else 75)
    assert stop.value.signal == signal.Signals(signum).name
    assert load(stop.value.path)["global_step"] == {"training_step": 6, "validation_step": 8}[place]
    assert "finishing this step and saving" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in numbers] == handlers


def test_a_signal_within_an_accumulation_window_waits_for_its_step(tmp_path):
    class Interrupted(ToyModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    trainer = toy_trainer(tmp_path, [CrashSafeCheckpoint(requeue_code=99)], accumulate_grad_batches=3)
    with pytest.raises(StopRequested) as stop:
        trainer.fit(Interrupted(), toy_loader(rows=72))
    loops = load(stop.value.path)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["current"]["ready"] == 6
    assert stop.value.code == 99


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    script = f"""
import os, signal
from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint
class Twice(ToyModule):
    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still alive")
toy_trainer({str(tmp_path)!r}, [CrashSafeCheckpoint()]).fit(Twice(), toy_loader())
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == -signal.SIGTERM, answer.stderr


def test_slurm_requeues_with_lightnings_checkpoint_of_a_whole_step(tmp_path, monkeypatch):
    """There is no SLURM here: its variables, and a command `scontrol` that notes its arguments, take its place."""
    for name, value in {
        "JOB_ID": "41",
        "JOB_NAME": "fit",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")

    class Preempted(ToyModule):
        def training_step(self, batch, batch_idx):
            if self.global_step in (5, 9):
                os.kill(os.getpid(), signal.SIGUSR1 if self.global_step == 5 else signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)
    trainer = toy_trainer(tmp_path, [CrashSafeCheckpoint()], plugins=[environment])
    with pytest.raises(StopRequested) as stop:
        trainer.fit(Preempted(), toy_loader(), toy_loader())
    assert (tmp_path / "asked").read_text() == "requeue 41\n"
    of_lightning, ours = load(tmp_path / "hpc_ckpt_1.ckpt"), load(tmp_path / "checkpoints" / "step-00000006.ckpt")
    assert of_lightning["global_step"] == ours["global_step"] == 6
    assert torch.equal(of_lightning["state_dict"]["layer.weight"], ours["state_dict"]["layer.weight"])
    assert load(stop.value.path)["global_step"] == 10  # training went on until SLURM ended it


def test_written_behind_the_files_are_those_written_at_once(tmp_path):
    for name, asynchronous in (("at_once", False), ("behind", True)):
        torch.manual_seed(1)
        callbacks = [
            EMA(0.9),
            History(),
            CrashSafeCheckpoint(save_every=1, keep_checkpoints=99, asynchronous=asynchronous),
        ]
        toy_trainer(tmp_path / name, callbacks).fit(ToyModule(), toy_loader(), toy_loader())
    assert names(tmp_path / "behind") == names(tmp_path / "at_once")
    for path in sorted((tmp_path / "at_once" / "checkpoints").glob("step-*.ckpt")):
        one, other = load(path), load(tmp_path / "behind" / "checkpoints" / path.name)
        for content in (one, other):
            history = content["callbacks"]["History"]
            history |= {"seconds": 0, "records": [record | {"seconds": 0} for record in history["records"]]}
        assert differing(one, other) == []


def differing(one, other, key=""):
    """The places where two checkpoints are not the same."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for name in one for place in differing(one[name], other[name], f"{key}.{name}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            place
            for number, pair in enumerate(zip(one, other, strict=True))
            for place in differing(*pair, f"{key}.{number}")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [key]


def test_a_host_copy_shares_memory_as_the_original_and_is_reused():
    weight = torch.arange(6.0).view(2, 3)
    content = {"a": weight, "tied": weight, "part": weight[1], "list": [1, (weight.t(),)], "half": torch.ones(3).half()}
    copy = HostCopy()
    first = copy.of(content)
    weight.zero_()
    assert torch.equal(first["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(first["part"], torch.tensor([3.0, 4, 5]))
    assert torch.equal(first["list"][1][0], torch.arange(6.0).view(2, 3).t())
    assert first["half"].dtype == torch.float16
    places = {first[name].untyped_storage().data_ptr() for name in ("a", "tied", "part")}
    assert len(places) == 1
    second = copy.of(content)
    assert second["a"].untyped_storage().data_ptr() in places
    assert torch.equal(second["a"], torch.zeros(2, 3))


def test_a_host_copy_forgets_nothing_and_shares_nothing_that_changes():
    state = torch.nn.Linear(2, 1).state_dict()
    numbers = torch.tensor([1 - 2j]).conj()
    array, named = np.zeros(2), NamedTuple("Pair", [("a", torch.Tensor)])(torch.zeros(1))
    content = {"state": state, "conjugate": numbers, "array": array, "named": named, "text": "x"}
    copied = HostCopy().of(content)
    array += 1
    named.a.add_(1)
    assert copied["state"]._metadata == state._metadata
    assert torch.equal(copied["conjugate"], torch.tensor([1 + 2j]))
    assert copied["array"].tolist() == [0, 0]
    assert copied["named"].a.item() == 0


def test_at_a_url_it_is_written_found_and_resumed(tmp_path):
    url = f"memory://{tmp_path.name}"
    torch.manual_seed(1)
    whole = ToyModule()
    toy_trainer(tmp_path, [CrashSafeCheckpoint(dirname=f"{url}/whole")], max_epochs=4).fit(
        whole, toy_loader(), toy_loader()
    )
    torch.manual_seed(1)
    callback = CrashSafeCheckpoint(dirname=f"{url}/cut", keep_checkpoints=2)
    toy_trainer(tmp_path, [callback]).fit(ToyModule(), toy_loader(), toy_loader())
    last = CrashSafeCheckpoint.latest(f"{url}/cut")
    assert last == callback.last_model_path == f"{url}/cut/step-00000012.ckpt"
    resumed = ToyModule()
    toy_trainer(tmp_path, [CrashSafeCheckpoint(dirname=f"{url}/cut")], max_epochs=4).fit(
        resumed, toy_loader(), toy_loader(), ckpt_path=last
    )
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    files = fsspec.filesystem("memory")
    files.pipe_file(f"/{tmp_path.name}/cut/step-00000016.ckpt", b"half")
    with pytest.warns(UserWarning, match="skipped step-00000016.ckpt: step-00000016.ckpt has 4 bytes, must have"):
        assert CrashSafeCheckpoint.latest(f"{url}/cut") == f"{url}/cut/step-00000012.ckpt"
    assert not list(tmp_path.iterdir())


def test_in_two_processes_one_writes_and_both_learn_of_a_failure(tmp_path):
    class Fails(ToyModule):
        def on_train_epoch_start(self):
            if self.current_epoch == 1 and self.global_rank == 0:
                (tmp_path / "checkpoints").rename(tmp_path / "moved")
                (tmp_path / "checkpoints").write_text("a file is in the way")

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    class Notes(CrashSafeCheckpoint):
        def _settle(self, trainer, error, what):
            try:
                return super()._settle(trainer, error, what)
            except CheckpointError as failure:
                (tmp_path / f"rank{trainer.global_rank}").write_text(str(failure))
                deadline = time.monotonic() + 30
                while not (tmp_path / "rank1").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)  # the process that ends first has the other one killed
                raise

    trainer = toy_trainer(tmp_path, [Notes(monitor=None)], devices=2, strategy="ddp_fork")
    with pytest.raises(Exception, match="could not be written"):
        trainer.fit(Fails(), toy_loader())
    for rank in (0, 1):
        assert "step-00000004.ckpt could not be written: File exists" in (tmp_path / f"rank{rank}").read_text()
    assert sorted(path.name for path in (tmp_path / "moved").glob("step*")) == [
        "step-00000002.ckpt",
        "step-00000002.json",
    ]


def test_a_signal_to_a_process_group_is_one_signal_to_each_rank(tmp_path):
    """GNU timeout and systemd send it to all; the first process passes it on as well."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, time
from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint
class Slow(ToyModule):
    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            open({str(tmp_path)!r} + f"/ready{{self.global_rank}}", "w").close()
            time.sleep(1.5)
        return self.loss(batch)
if __name__ == "__main__":
    callback = CrashSafeCheckpoint(monitor=None)
    toy_trainer({str(tmp_path)!r}, [callback], max_epochs=500, devices=2, strategy="ddp", log_every_n_steps=2).fit(
        Slow(), toy_loader()
    )
""")
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=90)[1]
    assert process.returncode == 75, err
    found = CrashSafeCheckpoint.latest(tmp_path / "checkpoints")
    assert load(found)["global_step"] == 4


def test_who_read_the_screen_may_be_gone_by_the_same_signal(tmp_path):
    script = f"""
import os, signal
from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint
class Interrupted(ToyModule):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 2)
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, batch_idx)
toy_trainer({str(tmp_path)!r}, [CrashSafeCheckpoint()]).fit(Interrupted(), toy_loader())
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    assert answer.returncode == 130
    assert steps_of(tmp_path) == [3]


def test_a_signal_after_the_last_checkpoint_is_answered_too(tmp_path):
    class Late(Callback):
        def on_train_end(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested) as stop:
        toy_trainer(tmp_path, [Late(), CrashSafeCheckpoint()]).fit(ToyModule(), toy_loader(), toy_loader())
    assert load(stop.value.path)["global_step"] == 12
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_trial_run_writes_nothing(tmp_path):
    toy_trainer(tmp_path, [CrashSafeCheckpoint()], fast_dev_run=True).fit(ToyModule(), toy_loader(), toy_loader())
    assert not list(tmp_path.iterdir())


def test_a_new_run_in_a_used_folder_says_so_and_removes_nothing(tmp_path):
    toy_trainer(tmp_path, [CrashSafeCheckpoint(monitor=None)]).fit(ToyModule(), toy_loader())
    with pytest.warns(UserWarning, match="holds checkpoints of another run, which stay"):
        toy_trainer(tmp_path, [CrashSafeCheckpoint(monitor=None, save_every=1, keep_checkpoints=1)], max_epochs=2).fit(
            ToyModule(), toy_loader()
        )
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step*.ckpt")) == [
        "step-00000004.ckpt", "step-00000008-1.ckpt", "step-00000008.ckpt", "step-00000012.ckpt",
    ]  # fmt: skip
    assert CrashSafeCheckpoint.latest(folder) == str(folder / "step-00000008-1.ckpt")


def test_what_cannot_be_crash_safe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="plugins=AsyncCheckpointIO: .* take asynchronous=True instead"):
        toy_trainer(tmp_path, [CrashSafeCheckpoint()], plugins=[AsyncCheckpointIO()]).fit(ToyModule(), toy_loader())
    trainer = toy_trainer(tmp_path, [CrashSafeCheckpoint()])
    trainer.strategy.__class__ = type("DeepSpeedStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match="strategy=DeepSpeedStrategy: must be another one"):
        trainer.fit(ToyModule(), toy_loader())


def test_a_file_url_is_a_folder(tmp_path):
    callback = CrashSafeCheckpoint(monitor=None, dirname=f"file://{tmp_path}/there")
    toy_trainer(tmp_path, [callback]).fit(ToyModule(), toy_loader())
    assert CrashSafeCheckpoint.latest(f"file://{tmp_path}/there") == str(tmp_path / "there" / "step-00000012.ckpt")


def test_handlers_are_given_back_after_a_normal_run(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    toy_trainer(tmp_path, [CrashSafeCheckpoint(monitor=None)], max_epochs=1).fit(ToyModule(), toy_loader())
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "x"}, "mode=x: must be min or max"),
        ({"every_n_epochs": 0}, "every_n_epochs=0: must be 1 or more"),
        ({"save_every": 0}, "save_every=0: must be 1 or more steps, or null"),
        ({"save_every_minutes": 0}, "save_every_minutes=0: must be above 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0: must be 1 or more"),
        ({"on_failure": "retry"}, "on_failure=retry: must be stop or continue"),
        ({"requeue_code": 0}, "requeue_code=0: must be from 1 to 255"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        CrashSafeCheckpoint(**options)


def test_under_the_other_namespace_it_is_written_after_the_other_callbacks_too(tmp_path):
    import pytorch_lightning
    from torch.utils.data import DataLoader

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callbacks = [CrashSafeCheckpoint(monitor=None), History()]
    trainer = pytorch_lightning.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=callbacks, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Other(), DataLoader(torch.randn(8, 2), batch_size=4))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert [record["epoch"] for record in saved["callbacks"]["History"]["records"]] == [1, 2, 3]


def test_a_second_run_with_the_same_callback_has_a_best_of_its_own(tmp_path):
    callback = CrashSafeCheckpoint()
    toy_trainer(tmp_path, [callback]).fit(Scripted(), toy_loader(), toy_loader())
    assert callback.best_model_score == 1.0

    class Worse(Scripted):
        losses = (9.0, 8.0, 7.0)

    toy_trainer(tmp_path / "second", [callback]).fit(Worse(), toy_loader(), toy_loader())
    assert callback.best_model_score == 7.0
    assert callback.best_model_path == str(tmp_path / "second" / "checkpoints" / "best.ckpt")


def test_a_monitor_that_is_never_logged_is_said(tmp_path):
    message = "monitor=val_loss was never logged, so there is no best.ckpt; the nearest that were logged are: val/loss"
    with pytest.warns(UserWarning, match=message):
        toy_trainer(tmp_path, [CrashSafeCheckpoint("val_loss")], max_epochs=1).fit(
            Scripted(), toy_loader(), toy_loader()
        )
