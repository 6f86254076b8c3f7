import json

import pytest
import torch

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint, History


def fit(folder, epochs, ckpt_path=None, callbacks=(), **options):
    torch.manual_seed(0)  # of the initial weights
    trainer = toy_trainer(folder, [History(), *callbacks], max_epochs=epochs, **options)
    trainer.fit(ToyModule(), toy_loader(), toy_loader(), ckpt_path=ckpt_path)
    return trainer, json.loads((folder / "training_history.json").read_text())


def without_seconds(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_one_record_an_epoch_with_the_documented_keys(tmp_path):
    trainer, records = fit(tmp_path, 3)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert list(records[0]) == ["epoch", "train_loss", "val_loss", "lr", "seconds"]
    assert records[-1]["train_loss"] == pytest.approx(float(trainer.callback_metrics["train/loss"]))
    assert records[-1]["val_loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    assert records[-1]["lr"] == 0.1
    assert all(record["seconds"] >= 0 for record in records)


def test_epochs_without_validation_have_null(tmp_path):
    _, records = fit(tmp_path, 4, check_val_every_n_epoch=2)
    assert [record["val_loss"] is None for record in records] == [True, False, True, False]


def test_one_file_over_restarts_equals_the_uninterrupted_one(tmp_path):
    _, whole = fit(tmp_path / "whole", 5)
    cut = tmp_path / "cut"
    last = cut / "checkpoints" / "last.ckpt"
    fit(cut, 2, callbacks=[CrashSafeCheckpoint()])
    kept = last.read_bytes()
    fit(cut, 4, last, callbacks=[CrashSafeCheckpoint()])
    last.write_bytes(
        kept
    )  # as if killed before the later checkpoints: epochs 3 and 4 stand in the file, not in the run
    _, records = fit(cut, 5, last, callbacks=[CrashSafeCheckpoint()])
    assert without_seconds(records) == without_seconds(whole)


def test_another_runs_file_is_kept(tmp_path):
    _, first = fit(tmp_path, 2)
    fit(tmp_path, 1)
    assert json.loads((tmp_path / "training_history.previous.json").read_text()) == first
