import pytest
import torch

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint, EarlyStopping


class Scripted(ToyModule):
    """Logs a given loss for each epoch, 1-based."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(float(self.losses[self.current_epoch])))


def epochs_run(tmp_path, losses, stopping, ckpt_path=None, callbacks=(), **options):
    trainer = toy_trainer(tmp_path, [stopping, *callbacks], **{"max_epochs": len(losses)} | options)
    trainer.fit(Scripted(losses), toy_loader(), toy_loader(), ckpt_path=ckpt_path)
    return trainer.current_epoch


BEST_AT_2 = [2, 1] + [3] * 8


def test_the_documented_example_stops_at_epoch_7(tmp_path):
    stopping = EarlyStopping(patience=3, start_ratio=0.5)
    assert epochs_run(tmp_path, BEST_AT_2, stopping) == 7
    assert stopping.reason == "val/loss has not improved on 1 for 3 epochs"


@pytest.mark.parametrize("cut", range(1, 7))
def test_patience_goes_through_a_resume_at_every_epoch(tmp_path, cut):
    """The original forgot its patience on resume."""

    class Stops(CrashSafeCheckpoint):
        state_key = "CrashSafeCheckpoint"

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch + 1 == cut:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        epochs_run(tmp_path, BEST_AT_2, EarlyStopping(patience=3), callbacks=[Stops(monitor=None)])
    last = tmp_path / "checkpoints" / "last.ckpt"
    stopping = EarlyStopping(patience=3)
    assert epochs_run(tmp_path, BEST_AT_2, stopping, last, [CrashSafeCheckpoint(monitor=None)]) == 7


def test_a_run_killed_after_its_patience_ran_out_is_not_trained_further(tmp_path):
    epochs_run(tmp_path, BEST_AT_2, EarlyStopping(patience=3), callbacks=[CrashSafeCheckpoint(monitor=None)])
    last = tmp_path / "checkpoints" / "last.ckpt"
    checkpoints = [CrashSafeCheckpoint(monitor=None)]
    assert epochs_run(tmp_path, BEST_AT_2, EarlyStopping(patience=3), last, checkpoints) == 7
    # A newly given patience wins over the checkpoint.
    assert epochs_run(tmp_path, BEST_AT_2, EarlyStopping(patience=5), last, checkpoints) == 9


def test_null_patience_never_stops(tmp_path):
    assert epochs_run(tmp_path, BEST_AT_2, EarlyStopping(patience=None)) == 10


def test_epochs_without_a_validation_do_not_count_the_first_included(tmp_path):
    """The patience is in validations: of epochs 2, 4, 6, 8 the second was the best."""
    stopping = EarlyStopping(patience=2, start_ratio=0.0)
    checkpoint = CrashSafeCheckpoint()
    losses = [9, 2, 9, 1, 0, 3, 0, 3, 0, 3]
    assert epochs_run(tmp_path, losses, stopping, callbacks=[checkpoint], check_val_every_n_epoch=2) == 8
    assert stopping.best == 1
    assert checkpoint.best_model_path.endswith("best.ckpt")


def test_min_delta_and_mode(tmp_path):
    slow = [1.0, 0.99, 0.98, 0.97, 0.96]
    assert epochs_run(tmp_path, slow, EarlyStopping(patience=2, start_ratio=0, min_delta=0.5)) == 3
    assert epochs_run(tmp_path, slow, EarlyStopping(patience=2, start_ratio=0)) == 5
    assert epochs_run(tmp_path, slow, EarlyStopping(patience=2, start_ratio=0, mode="max")) == 3


def test_min_epochs_is_respected_without_latching(tmp_path):
    assert epochs_run(tmp_path, [1, 2, 2, 2, 2, 0.5], EarlyStopping(patience=2, start_ratio=0), min_epochs=5) == 5
    assert epochs_run(tmp_path, [1, 2, 2, 2, 0.5, 2, 2, 2], EarlyStopping(patience=2, start_ratio=0), min_epochs=5) == 7


def test_without_validation_the_training_metric_is_read(tmp_path):
    class Trains(ToyModule):
        def training_step(self, batch, batch_idx):
            self.log("train/loss", torch.tensor(1.0), on_epoch=True, on_step=False)
            return self.loss(batch)

    trainer = toy_trainer(tmp_path, [EarlyStopping("train/loss", patience=2, start_ratio=0)], max_epochs=9)
    trainer.fit(Trains(), toy_loader())
    assert trainer.current_epoch == 3


def test_a_metric_that_is_not_logged_is_an_error_that_lists_what_is(tmp_path):
    with pytest.raises(ValueError, match="monitor=val/los: was not logged; logged are: .*val/loss"):
        epochs_run(tmp_path, BEST_AT_2, EarlyStopping("val/los"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience=0: must be 1 or more"),
        ({"start_ratio": 1.5}, "start_ratio=1.5: must be from 0 to 1"),
        ({"min_delta": -1}, "min_delta=-1: must be 0 or more"),
        ({"mode": "up"}, "mode=up: must be min or max"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**options)


def test_with_epochs_and_steps_given_it_counts_from_whichever_part_is_over_first(tmp_path):
    class Worse(ToyModule):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

    stopper = EarlyStopping(patience=2, start_ratio=0.2)
    trainer = toy_trainer(tmp_path, [stopper], max_epochs=1000, max_steps=80)  # 20 epochs of 4 steps
    trainer.fit(Worse(), toy_loader(), toy_loader())
    assert trainer.global_step == 4 * 5  # steps from 16 on count: epochs 4 and 5
    assert stopper.reason is not None
