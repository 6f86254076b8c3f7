import random

import numpy as np
import pytest
import torch

from tests.support import ToyModule, toy_trainer
from trainerkit.callbacks import EMA, CrashSafeCheckpoint, ExactResume, History
from trainerkit.callbacks.exact_resume import random_state, set_random_state
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches


class Noisy(ToyModule):
    """Draws from all three generators in every step."""

    def training_step(self, batch, batch_idx):
        x = batch["x"] * (torch.rand_like(batch["x"]) < 0.8)
        noise = random.random() + float(np.random.rand())
        return super().training_step((x, batch["y"] + 0.1 * noise), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch["x"], batch["y"]), batch_idx)


class Scheduled(Noisy):
    """Asks for the length of the run, which sets the loaders up before the checkpoint's loops are restored."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders(num_workers=0):
    generator = torch.Generator().manual_seed(2)
    data = ArrayDataset({"x": torch.randn(40, 4, generator=generator), "y": torch.randn(40, generator=generator)})
    train = BatchLoader(data, EpochBatches(40, 8, shuffle=True, seed=1), num_workers=num_workers)
    return train, BatchLoader(data, EpochBatches(40, 16, shuffle=False))


class Killed(CrashSafeCheckpoint):
    """Saves after a given step and fails, as a killed process would leave it."""

    state_key = "CrashSafeCheckpoint"

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer, *arguments):
        super().on_train_batch_end(trainer, *arguments)
        if trainer.global_step == self.step:
            self._save(trainer, "last.ckpt")
            raise RuntimeError("killed")


def fit(folder, checkpoint, ckpt_path=None, accumulate=1, workers=0, kind=Noisy):
    module = kind()
    callbacks = [EMA(decay=0.9), ExactResume(), History(), checkpoint]
    trainer = toy_trainer(folder, callbacks, max_epochs=3, accumulate_grad_batches=accumulate)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    train, val = loaders(workers)
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("kind", [Noisy, Scheduled])
@pytest.mark.parametrize("step", range(1, 15))
def test_resuming_after_any_step_equals_the_uninterrupted_run(tmp_path, step, kind):
    torch.manual_seed(0)
    whole, trainer = fit(tmp_path / "whole", CrashSafeCheckpoint(), kind=kind)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut", Killed(step), kind=kind)
    torch.manual_seed(123)  # other initial weights: all must come from the checkpoint
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    resumed, again = fit(tmp_path / "cut", CrashSafeCheckpoint(), last, kind=kind)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert torch.equal(resumed.seen[-1], whole.seen[-1])
    assert again.global_step == trainer.global_step == 15
    assert again.callback_metrics["val/loss"] == trainer.callback_metrics["val/loss"]


@pytest.mark.parametrize("step", [2, 5])
def test_resuming_is_exact_with_workers_too(tmp_path, step):
    torch.manual_seed(0)
    whole, _ = fit(tmp_path / "whole", CrashSafeCheckpoint())
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut", Killed(step), workers=2)
    resumed, _ = fit(tmp_path / "cut", CrashSafeCheckpoint(), tmp_path / "cut" / "checkpoints" / "last.ckpt", workers=2)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_without_it_the_result_is_another(tmp_path, monkeypatch):
    """The tests above can fail."""
    monkeypatch.setattr(ExactResume, "on_train_batch_start", lambda *_: None)
    torch.manual_seed(0)
    whole, _ = fit(tmp_path / "whole", CrashSafeCheckpoint())
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut", Killed(4))
    torch.manual_seed(123)
    resumed, _ = fit(tmp_path / "cut", CrashSafeCheckpoint(), tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert not torch.equal(resumed.layer.weight, whole.layer.weight)


def test_the_state_of_all_generators_comes_back_through_a_safe_file(tmp_path):
    torch.save(random_state(), tmp_path / "state")
    first = (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item())
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()) == first
