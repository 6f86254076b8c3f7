import importlib
import json
import re
import warnings

import pytest
import torch
from lightning.pytorch import Callback

from tests.support import ROOT, ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint, ExactResume, History
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches


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


def stateful_loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(38, 4, generator=generator)
    # Batches of 8, and a last one of 6.
    return BatchLoader(ArrayDataset({"x": x, "y": x.sum(1)}), EpochBatches(38, 8, shuffle=True, seed=1))


class Dicts(ToyModule):
    def loss(self, batch):
        return super().loss((batch["x"], batch["y"]))

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["x"]))
        return loss


class SavesAt(Callback):
    """Saves a checkpoint in the given hook of the given batch (from 1, over the run)."""

    def __init__(self, hook, batch):
        self.batch = batch
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        path = f"{trainer.default_root_dir}/{done}.ckpt"
        if done == self.batch and not trainer.sanity_checking:
            trainer.save_checkpoint(path)


def whole_and_resumed(tmp_path, hook, batch, module=Dicts, before=(), more=(), **options):
    options = {"max_epochs": 3, "val_check_interval": 2} | options
    files = []
    for folder, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / f"{batch}.ckpt")):
        torch.manual_seed(0)
        callbacks = [make() for make in (*before, History, *more)] + [SavesAt(hook, batch)]
        trainer = toy_trainer(tmp_path / folder, callbacks, **options)
        trainer.fit(module(), stateful_loader(), stateful_loader(), ckpt_path=checkpoint)
        files.append(without_seconds(json.loads((tmp_path / folder / "training_history.json").read_text())))
    torch.load(tmp_path / "whole" / f"{batch}.ckpt", weights_only=True)
    return files


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 8])
def test_a_resume_in_mid_epoch_gives_the_uninterrupted_file_to_the_bit(tmp_path, batch):
    whole, resumed = whole_and_resumed(tmp_path, "on_train_batch_end", batch)
    assert len(whole) == 3
    assert resumed == whole


def test_a_validation_that_lightning_leaves_out_is_not_in_the_record(tmp_path):
    """It was due right after the batch at which the checkpoint was saved; the epoch's last one is that before."""
    whole, resumed = whole_and_resumed(tmp_path, "on_train_batch_end", 4)
    other, _ = whole_and_resumed(tmp_path / "one_validation", "on_train_batch_end", 1, limit_train_batches=3)
    assert resumed[0]["val_loss"] == other[0]["val_loss"] != whole[0]["val_loss"]
    assert [record | {"val_loss": 0} for record in resumed] == [record | {"val_loss": 0} for record in whole]


@pytest.mark.parametrize("batch", [2, 4, 5, 7, 10])
def test_a_resume_from_the_end_of_a_validation_does_too(tmp_path, batch):
    interval = {"val_check_interval": 1.0} if batch % 5 == 0 else {}
    whole, resumed = whole_and_resumed(tmp_path, "on_validation_end", batch, **interval)
    assert resumed == whole


def test_an_epoch_whose_last_batch_was_saved_has_its_record_all_the_same(tmp_path):
    """Lightning goes on with the next epoch; of that one's end, a validation would be lost."""
    whole, resumed = whole_and_resumed(tmp_path, "on_train_batch_end", 5)
    assert resumed == whole


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("batch", range(6, 20))
def test_what_exact_resume_puts_back_is_counted_once_and_is_none_of_an_epoch_without_a_validation(
    tmp_path, batch, is_first
):
    """A validation every 7 batches, epochs of 5: the second and third epoch have one, the first and fourth none."""
    steps = {"val_check_interval": 7, "check_val_every_n_epoch": None, "max_epochs": 4}
    more = {"before" if is_first else "more": [ExactResume]}
    whole, resumed = whole_and_resumed(tmp_path, "on_train_batch_end", batch, **more, **steps)
    assert [record["val_loss"] is None for record in whole] == [True, False, False, True]
    assert resumed == whole


@pytest.mark.parametrize("reduction", ["sum", "min", "max"])
def test_other_reductions_go_on_too(tmp_path, reduction):
    class Reduced(Dicts):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train/loss", loss, on_step=False, on_epoch=True, reduce_fx=reduction)
            return loss

    for batch in (3, 5):
        whole, resumed = whole_and_resumed(tmp_path / str(batch), "on_train_batch_end", batch, Reduced)
        assert resumed == whole


def test_a_record_never_holds_an_earlier_epochs_value(tmp_path):
    class Fickle(ToyModule):
        """Logs its loss in the first epoch only, as one does that logs at the last batch and is stopped before."""

        def training_step(self, batch, batch_idx):
            if self.current_epoch == 0:
                self.log("train/loss", 1.0, on_epoch=True, on_step=False)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            if self.current_epoch != 1:
                self.log("val/loss", float(self.current_epoch))

    toy_trainer(tmp_path, [History()], max_epochs=3).fit(Fickle(), toy_loader(), toy_loader())
    records = json.loads((tmp_path / "training_history.json").read_text())
    assert [record["train_loss"] for record in records] == [1.0, None, None]
    assert [record["val_loss"] for record in records] == [0.0, None, 2.0]


def test_stopped_by_a_validation_in_mid_epoch_the_record_has_the_part_that_was_trained(tmp_path):
    losses = []

    class Remembers(ToyModule):
        def loss(self, batch):
            loss = super().loss(batch)
            if self.training:
                losses.append(float(loss.detach()))
            return loss

    class Stops(Callback):
        def on_validation_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 6

    trainer = toy_trainer(tmp_path, [Stops(), History()], max_epochs=3, val_check_interval=2)
    trainer.fit(Remembers(), toy_loader(), toy_loader())
    records = json.loads((tmp_path / "training_history.json").read_text())
    assert [record["train_loss"] for record in records] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:6]) / 2])
    assert records[-1]["val_loss"] == float(trainer.callback_metrics["val/loss"])


def test_what_the_module_logs_at_the_epochs_end_is_in_record_and_checkpoint(tmp_path):
    class AtTheEnd(ToyModule):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def on_train_epoch_end(self):
            self.log("train/loss", 10.0 + self.current_epoch)

    saver = CrashSafeCheckpoint()
    toy_trainer(tmp_path, [History(), saver], max_epochs=2).fit(AtTheEnd(), toy_loader(), toy_loader())
    records = json.loads((tmp_path / "training_history.json").read_text())
    assert [record["train_loss"] for record in records] == [10.0, 11.0]
    saved = torch.load(saver.last_model_path, weights_only=True)["callbacks"]["History"]["records"]
    assert [record["train_loss"] for record in saved] == [10.0, 11.0]


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_runs_in_both_namespaces_with_manual_optimization(tmp_path, name):
    lightning = importlib.import_module(name)

    class Manual(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(ToyModule.loss(self, batch))
                optimizer.step()
            self.log("train/loss", 2.0, on_epoch=True)

        def configure_optimizers(self):
            # A rate that is a tensor, as compiled optimizers have it.
            return [
                torch.optim.Adam(self.parameters(), lr=torch.tensor(0.5), capturable=False, foreach=False),
                torch.optim.SGD(self.parameters(), lr=0.1),
            ]

    lightning.Trainer(
        default_root_dir=tmp_path, callbacks=[History()], max_epochs=2, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(Manual(), toy_loader())  # fmt: skip
    records = without_seconds(json.loads((tmp_path / "training_history.json").read_text()))
    assert records == [{"epoch": e, "train_loss": 2.0, "val_loss": None, "lr": 0.5} for e in (1, 2)]


@pytest.mark.parametrize("sync_dist", [True, False])
def test_two_ranks_write_one_file_and_resume_to_the_same(tmp_path, sync_dist):
    class Ranks(Dicts):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.log(
                    "train/loss", loss, on_step=False, on_epoch=True, sync_dist=sync_dist, batch_size=len(batch["x"])
                )
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.loss(batch), sync_dist=True, batch_size=len(batch["x"]))

        def train_dataloader(self):
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(32, 4, generator=generator)
            rank = self.trainer.global_rank
            return BatchLoader(
                ArrayDataset({"x": x, "y": x.sum(1)}), EpochBatches(32, 4, shuffle=False, num_replicas=2, rank=rank)
            )

        val_dataloader = train_dataloader

    files = []
    for folder, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "6.ckpt")):
        torch.manual_seed(0)
        callbacks = [History(), SavesAt("on_train_batch_end", 6)]
        trainer = toy_trainer(tmp_path / folder, callbacks, max_epochs=2, devices=2, strategy="ddp_fork")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*recommended to use.*sync_dist")
            trainer.fit(Ranks(), ckpt_path=checkpoint)
        files.append(without_seconds(json.loads((tmp_path / folder / "training_history.json").read_text())))
    assert files[0] == files[1]
    assert len(files[0]) == 2


def test_testing_an_older_checkpoint_leaves_the_records_alone(tmp_path):
    history = History()
    trainer = toy_trainer(tmp_path, [history, SavesAt("on_train_batch_end", 6)], max_epochs=3)
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    records = list(history.records)
    trainer.test(ToyModule(), toy_loader(), ckpt_path=tmp_path / "6.ckpt", verbose=False)
    assert history.records == records
    assert len(records) == 3


def test_a_second_run_of_the_same_callback_begins_anew(tmp_path):
    history = History()
    for folder, epochs in (("one", 3), ("two", 2)):
        torch.manual_seed(0)
        toy_trainer(tmp_path / folder, [history], max_epochs=epochs).fit(ToyModule(), toy_loader(), toy_loader())
    one, two = (json.loads((tmp_path / folder / "training_history.json").read_text()) for folder in ("one", "two"))
    assert without_seconds(two) == without_seconds(one)[:2]


def test_a_resumed_run_drops_later_rows_at_once(tmp_path):
    saver = CrashSafeCheckpoint()
    fit(tmp_path, 2, callbacks=[saver])
    kept = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    fit(tmp_path, 3, tmp_path / "checkpoints" / "last.ckpt", callbacks=[CrashSafeCheckpoint()])
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(kept)

    class Fails(Callback):
        def on_train_batch_start(self, *_):
            raise RuntimeError("killed at once")

    with pytest.raises(RuntimeError, match="killed at once"):
        fit(tmp_path, 3, tmp_path / "checkpoints" / "last.ckpt", callbacks=[CrashSafeCheckpoint(), Fails()])
    records = json.loads((tmp_path / "training_history.json").read_text())
    assert [record["epoch"] for record in records] == [1, 2]


def test_the_pages_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "callbacks" / "history.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "history.md", "exec"), {})
