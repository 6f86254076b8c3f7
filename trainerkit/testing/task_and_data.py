"""What tasks and data modules must keep."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from trainerkit.callbacks import CrashSafeCheckpoint, ExactResume
from trainerkit.trainer import Trainer

_SEED = 17


def check_task(
    make_task: Callable[[], LightningModule], make_data: Callable[[], LightningDataModule], folder: Path
) -> None:
    """Train a task on a few batches and check what every task must keep.

    - the loss of every step is finite, and `train/loss` is logged; of a task that optimizes by itself, as one with
      several optimizers does, everything that it logs as `train/…` is finite, and there is something;
    - a gradient reaches every trainable parameter;
    - the weights after saving in mid-epoch and resuming in a new process' state equal the uninterrupted run's;
    - everything it puts into a checkpoint loads with `weights_only=True`;
    - validation, where there is any, logs `val/loss` (of a task that optimizes by itself anything), the same twice,
      and moves no random state.

    Args:
        make_task: makes a new task, always the same but for its initial weights.
        make_data: makes a new data module; its training loader must give 3 batches or more.
        folder: an empty folder.

    Raises:
        AssertionError: if one of these does not hold.
    """
    watch = _Watch()
    whole, trainer = _fit(make_task, make_data, folder / "whole", [watch])
    logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    if whole.automatic_optimization:
        assert watch.losses, "no training step ran"
        assert all(torch.isfinite(loss) for loss in watch.losses), f"a loss is not finite: {watch.losses}"
        assert "train/loss" in logged, "train/loss is not logged"
    else:
        assert logged, "nothing is logged as train/…"
        assert all(torch.isfinite(value) for value in logged.values()), f"a metric is not finite: {logged}"
    assert not watch.without_gradient, f"no gradient ever reached {sorted(watch.without_gradient)}"

    cut = folder / "cut"
    with suppress(_Killed):
        _fit(make_task, make_data, cut, [_Kill(2)])
    last = cut / "checkpoints" / "last.ckpt"
    torch.load(last, weights_only=True)
    resumed, _ = _fit(make_task, make_data, cut, [], last)
    different = [
        name
        for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert not different, f"after a resume in mid-epoch these weights differ: {different}"

    if trainer.enable_validation:
        _check_validation(whole, make_data())


def check_data(make_data: Callable[[], LightningDataModule]) -> None:
    """Check what every data module must keep.

    - a batch of each loader is a dict of tensors of one length;
    - two data modules give the same training batches, in another order in the next epoch;
    - validation and test come in the same order each time;
    - reading moves no global random state.

    Raises:
        AssertionError: if one of these does not hold.
    """
    state = torch.get_rng_state()
    first, second = _rows(make_data()), _rows(make_data())
    for name, batches in first.items():
        assert batches, f"{name} gives no batch"
        for batch in batches:
            assert isinstance(batch, dict), f"{name} gives {type(batch).__name__}, not a dict of tensors"
            lengths = {key: len(value) for key, value in batch.items()}
            assert len(set(lengths.values())) == 1, f"{name}: a batch has values of different lengths: {lengths}"
        same = all(_equal(a, b) for a, b in zip(batches, second[name], strict=True))
        assert same, f"{name}: two data modules give different batches"
    shuffled = any(not _equal(a, b) for a, b in zip(first["train epoch 0"], first["train epoch 1"], strict=True))
    assert shuffled, "training gives the same order in the first two epochs"
    assert torch.equal(torch.get_rng_state(), state), "reading the data moved torch's random state"


def _fit(
    make_task: Callable[[], LightningModule],
    make_data: Callable[[], LightningDataModule],
    folder: Path,
    callbacks: list[Callback],
    resume: Path | None = None,
) -> tuple[LightningModule, Trainer]:
    seed_everything(_SEED if resume is None else _SEED + 1, verbose=False)
    task = make_task()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=2,
        log_every_n_steps=1,
        callbacks=[ExactResume(), *callbacks, CrashSafeCheckpoint(monitor=None, stop_on_signal=False)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=make_data(), ckpt_path=resume)
    return task, trainer


def _check_validation(task: LightningModule, data: LightningDataModule) -> None:
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 2}
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, enable_model_summary=False, **options)
    state = torch.get_rng_state()
    values = [dict(trainer.validate(task, datamodule=data, verbose=False)[0]) for _ in range(2)]
    if task.automatic_optimization:
        values = [{name: found[name] for name in ("val/loss",) if name in found} for found in values]
    assert values[0], f"{'val/loss' if task.automatic_optimization else 'nothing as val/…'} is not logged"
    assert values[0] == values[1], f"validating twice gives {values[0]} and {values[1]}"
    assert torch.equal(torch.get_rng_state(), state), "validation moved torch's random state"


def _rows(data: LightningDataModule) -> dict[str, list[dict[str, Tensor]]]:
    data.prepare_data()
    data.setup("fit")
    train: Any = data.train_dataloader()
    found: dict[str, Any] = {}
    for epoch in (0, 1):
        if hasattr(getattr(train, "sampler", None), "set_epoch"):
            train.sampler.set_epoch(epoch)
        found[f"train epoch {epoch}"] = list(train)
    for name in ("val_dataloader", "test_dataloader"):
        loaders: Any = getattr(data, name)() if is_overridden(name, data) else []
        for number, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
            found[f"{name} {number}"] = list(loader)
    return found


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class _Killed(Exception):
    pass


class _Watch(Callback):
    """Collects losses, and the parameters that no gradient reached."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.without_gradient: set[str] = set()

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.without_gradient = {name for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                self.without_gradient.discard(name)

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if pl_module.automatic_optimization:
            self.losses.append(outputs["loss"] if isinstance(outputs, dict) else outputs)


class _Kill(Callback):
    """Writes a checkpoint after a given step and raises, as if the process had died there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            raise _Killed
