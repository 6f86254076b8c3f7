"""The fast loop against Lightning's own: the order of hooks, weights, metrics and checkpoints must be the same."""

import copy

import pytest
import torch
from lightning import pytorch as pl

from tests.support import ToyModule, toy_loader
from trainerkit.loop import FastTrainingEpochLoop
from trainerkit.trainer import Trainer

HOOKS = [name for name in dir(pl.Callback) if name.startswith("on_")]
MODULE_HOOKS = [
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_start", "on_validation_end",
]  # fmt: skip


def recorder(seen):
    """A callback that notes every hook, with what can be compared of its arguments."""

    def note(name):
        def hook(self, trainer, module, *arguments):
            steps = (trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
            values = [round(float(a.detach()), 6) for a in arguments if isinstance(a, torch.Tensor) and a.numel() == 1]
            values += [round(float(a["loss"]), 6) for a in arguments if isinstance(a, dict) and "loss" in a]
            seen.append((name, module._current_fx_name, *steps, *values))

        return hook

    return type("Recorder", (pl.Callback,), {name: note(name) for name in HOOKS})()


class Module(ToyModule):
    """Notes its own hooks among the callbacks', and logs on steps and epochs."""

    def __init__(self, seen, scheduled=False):
        super().__init__()
        self.noted = seen
        self.scheduled = scheduled

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("a", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if not self.scheduled:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def note_module(name):
    def hook(self, *arguments):
        self.noted.append(("module." + name, self._current_fx_name))

    return hook


for _name in MODULE_HOOKS:
    setattr(Module, _name, note_module(_name))


class AsDict(Module):
    def training_step(self, batch):  # without batch_idx, with something beside the loss
        return {"loss": self.loss(batch), "extra": 1}


class Skips(Module):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else self.loss(batch)


class Ends(Module):
    def on_train_batch_start(self, batch, batch_idx):
        self.noted.append(("module.on_train_batch_start", batch_idx))
        return -1 if batch_idx == 2 else None


class OwnStep(Module):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.noted.append(("own step", batch_idx))
        optimizer.step(closure=optimizer_closure)


class OwnClipping(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.noted.append(("own clipping", gradient_clip_val))
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")


class Manual(Module):
    def __init__(self, seen):
        super().__init__(seen)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def run(kind, tmp_path, make, trainer_options, resume=None, callbacks=()):
    seen = []
    torch.manual_seed(0)
    module = make(seen)
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    options |= {"log_every_n_steps": 2, "default_root_dir": tmp_path} | trainer_options
    trainer = kind(callbacks=[recorder(seen), *callbacks], **options)
    trainer.fit(module, toy_loader(rows=40), toy_loader(rows=16), ckpt_path=resume)
    return seen, module, trainer


def same(a, b):
    """Two nested structures with tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


CASES = {
    "plain": (Module, {}, True),
    "scheduled": (lambda seen: Module(seen, scheduled=True), {}, True),
    "clipped": (Module, {"gradient_clip_val": 0.1}, True),
    "clipped by value": (Module, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, True),
    "accumulating": (Module, {"accumulate_grad_batches": 3}, True),
    "accumulating and scheduled": (lambda seen: Module(seen, True), {"accumulate_grad_batches": 2}, True),
    "bf16": (Module, {"precision": "bf16-mixed"}, True),
    "validating within the epoch": (Module, {"val_check_interval": 2}, True),
    "max_steps": (Module, {"max_steps": 7, "max_epochs": -1}, True),
    "limited": (Module, {"limit_train_batches": 3}, True),
    "a dict of outputs": (AsDict, {}, True),
    "a step that returns None": (Skips, {}, True),
    "an epoch that is ended": (Ends, {}, True),
    "its own clipping": (OwnClipping, {}, True),
    "its own optimizer_step": (OwnStep, {}, False),
    "manual optimization": (Manual, {}, False),
    "float64": (Module, {"precision": "64-true"}, False),
    "a profiler": (Module, {"profiler": "simple"}, False),
}


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")
@pytest.mark.parametrize("case", CASES)
def test_it_does_what_lightnings_loop_does(case, tmp_path):
    make, options, fast = CASES[case]
    theirs = run(pl.Trainer, tmp_path, make, options)
    ours = run(Trainer, tmp_path, make, options)
    assert isinstance(ours[2].fit_loop.epoch_loop, FastTrainingEpochLoop)
    assert (ours[2].fit_loop.epoch_loop._plan is not None) == fast
    assert ours[0] == theirs[0]
    assert len(ours[0]) > 30
    assert same(ours[1].state_dict(), theirs[1].state_dict())
    assert same(dict(ours[2].callback_metrics), dict(theirs[2].callback_metrics))
    checkpoints = [trainer._checkpoint_connector.dump_checkpoint(False) for trainer in (ours[2], theirs[2])]
    assert same(checkpoints[0]["loops"], checkpoints[1]["loops"])
    assert same(checkpoints[0]["optimizer_states"], checkpoints[1]["optimizer_states"])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", range(1, 10))
def test_it_resumes_where_lightnings_loop_resumes(step, tmp_path):
    class Saves(pl.Callback):
        state_key = "saves"

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / f"{type(trainer).__module__}.ckpt")

    found = []
    for kind in (pl.Trainer, Trainer):
        run(kind, tmp_path, Module, {}, callbacks=[Saves()])
        path = tmp_path / f"{kind.__module__}.ckpt"
        found.append(run(kind, tmp_path, Module, {"max_epochs": 3}, resume=path))
    assert found[0][0] == found[1][0]
    assert same(found[0][1].state_dict(), found[1][1].state_dict())


def test_a_foreign_callback_that_is_no_lightning_class_is_called(tmp_path):
    """A hook set on the instance counts as well."""
    called = []

    class Other(pl.Callback):
        pass

    other = Other()
    other.on_train_batch_end = lambda trainer, module, outputs, batch, batch_idx: called.append(batch_idx)
    run(Trainer, tmp_path, Module, {"max_epochs": 1}, callbacks=[other])
    assert called == [0, 1, 2, 3, 4]


def test_enable_tf32_and_negative_clipping():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        Trainer(accelerator="cpu", logger=False, enable_tf32=True)
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    with pytest.raises(ValueError, match="gradient_clip_val=-1: must be 0 or more, or null not to clip"):
        Trainer(gradient_clip_val=-1)


def test_modules_can_be_copied_with_the_trainer_attached(tmp_path):
    _, module, _ = run(Trainer, tmp_path, Module, {"max_epochs": 1})
    assert same(copy.deepcopy(module.layer).state_dict(), module.layer.state_dict())
