import os
import signal

import pytest
import torch

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint, History, StopRequested


class Scripted(ToyModule):
    losses = (3.0, 1.0, 2.0)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(self.losses[self.current_epoch]))


def test_last_and_best_hold_the_right_epochs(tmp_path):
    callback = CrashSafeCheckpoint()
    toy_trainer(tmp_path, [callback]).fit(Scripted(), toy_loader(), toy_loader())
    folder = tmp_path / "checkpoints"
    assert sorted(os.listdir(folder)) == ["best.ckpt", "last.ckpt"]
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.ckpt", "best.ckpt"))
    assert (last["global_step"], best["global_step"]) == (12, 8)
    assert callback.best_model_path == str(folder / "best.ckpt")
    assert callback.best_model_score == 1.0


def test_every_n_epochs_and_the_last_one(tmp_path):
    written = []

    class Notes(CrashSafeCheckpoint):
        def _save(self, trainer, name):
            written.append((name, trainer.current_epoch + 1))
            return super()._save(trainer, name)

    toy_trainer(tmp_path, [Notes(monitor=None, every_n_epochs=2)], max_epochs=5).fit(ToyModule(), toy_loader())
    assert written == [("last.ckpt", 2), ("last.ckpt", 4), ("last.ckpt", 5)]


def test_a_failure_while_writing_leaves_the_old_file_whole(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    toy_trainer(tmp_path, [CrashSafeCheckpoint(monitor=None)], max_epochs=1).fit(ToyModule(), toy_loader())
    before = (folder / "last.ckpt").read_bytes()

    def half(trainer, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    trainer = toy_trainer(tmp_path, [CrashSafeCheckpoint(monitor=None)], max_epochs=2)
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path: half(trainer, path))
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(ToyModule(), toy_loader())
    assert (folder / "last.ckpt").read_bytes() == before
    assert os.listdir(folder) == ["last.ckpt"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["training_step", "validation_step"])
def test_a_signal_finishes_the_step_saves_and_stops_with_its_exit_code(tmp_path, signum, place, capsys):
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

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = toy_trainer(tmp_path, [CrashSafeCheckpoint()])
    with pytest.raises(StopRequested) as stop:
        trainer.fit(Interrupted(), toy_loader(), toy_loader())
    assert stop.value.code == 128 + signum
    assert stop.value.signal == signal.Signals(signum).name
    content = torch.load(stop.value.path, weights_only=True)
    assert content["global_step"] == {"training_step": 6, "validation_step": 8}[place]
    assert "finishing this step and saving" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_handlers_are_given_back_after_a_normal_run(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    toy_trainer(tmp_path, [CrashSafeCheckpoint(monitor=None)], max_epochs=1).fit(ToyModule(), toy_loader())
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("options", "message"), [({"mode": "x"}, "mode=x: must be min or max"), ({"every_n_epochs": 0}, "every_n_epochs=0")]
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
