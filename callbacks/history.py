"""`training_history.json`: one record an epoch.

{"epoch": 12, "train_loss": 0.0231, "val_loss": 0.0219, "lr": 0.0002, "seconds": 8.1}
"""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainerkit.files import write_json


class History(Callback):
    """Write a JSON list of epochs, replaced as a whole after each.

    The records go through the checkpoint: a resumed run drops what was written after the checkpoint, and the file of a
    run with any number of restarts is that of a run without (but for the seconds). A file that is there when a new run
    starts is kept as `….previous.json`.

    Args:
        filename: where to write, relative to `trainer.default_root_dir`.
        train_metric: what becomes `train_loss`.
        val_metric: what becomes `val_loss`; null in epochs without validation.

    In a record: `epoch` counts from 1; `lr` is the first parameter group's rate when the epoch ends; `seconds` is the
    time of the epoch with its validation.
    """

    def __init__(
        self,
        filename: str = "training_history.json",
        train_metric: str = "train/loss",
        val_metric: str = "val/loss",
    ) -> None:
        self.filename = filename
        self.train_metric = train_metric
        self.val_metric = val_metric
        self.records: list[dict[str, Any]] = []
        self._validated = False
        self._before = 0.0  # seconds of this epoch in earlier processes
        self._started: float | None = None
        self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        """The records, and the time already spent on an unfinished epoch."""
        return {"records": [dict(record) for record in self.records], "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the records back."""
        self.records = state_dict["records"]
        self._before = state_dict["seconds"]
        self._resumed = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep another run's file."""
        path = self._path(trainer)
        if not self._resumed:
            self.records, self._before = [], 0.0
            if trainer.is_global_zero and path.exists():
                path.replace(path.with_suffix(".previous.json"))
        self._resumed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a resumed run may be in the middle of an epoch."""
        self._started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that this epoch has a validation."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's record and write the file."""
        metrics = trainer.callback_metrics
        train, val = metrics.get(self.train_metric), metrics.get(self.val_metric)
        record = {
            "epoch": trainer.current_epoch + 1,
            "train_loss": None if train is None else float(train),
            "val_loss": None if val is None or not self._validated else float(val),
            "lr": trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None,
            "seconds": round(self._seconds(), 3),
        }
        self.records.append(record)
        self._validated, self._before, self._started = False, 0.0, time.monotonic()
        if trainer.is_global_zero:
            write_json(self._path(trainer), self.records)

    def _seconds(self) -> float:
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.filename
