"""`training_history.json`: one record an epoch.

{"epoch": 12, "train_loss": 0.0231, "val_loss": 0.0219, "lr": 0.0002, "seconds": 8.1}
"""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.callbacks._trainer import of_every_rank
from trainerkit.files import write_json

# How Lightning reduces what is logged to an epoch's value.
_REDUCTIONS = ("mean", "sum", "min", "max")


class History(Callback):
    """Write a JSON list of epochs, replaced as a whole after each.

    The records go through the checkpoint, and so does what is known of an epoch that is not over: a resumed run drops
    what was written after the checkpoint, and the file of a run with any number of restarts is that of a run without
    (but for the seconds), if the loader goes on where it was. A file that is there when a new run starts is kept as
    `….previous.json`.

    Args:
        filename: where to write, relative to `trainer.default_root_dir`.
        train_metric: what becomes `train_loss`.
        val_metric: what becomes `val_loss`.

    In a record: `epoch` counts from 1; what was not logged in this very epoch is null; `val_loss` is that of the
    epoch's last validation; `lr` is the first parameter group's rate when the epoch ends; `seconds` is the time of the
    epoch with its validation.
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
        self._before = 0.0  # seconds of this epoch in earlier processes
        self._started: float | None = None
        self._resumed = False
        self._begun: dict[str, Any] | None = None  # what an earlier process knew of this epoch
        self._old: dict[str, Tensor] = {}  # metrics of earlier epochs, still in `trainer.callback_metrics`
        self._is_first = False  # whether this process's first batch is still to end
        self._lacks_loss = False  # the last record, which the module may still log a loss for

    # The checkpoint

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The records, and what is known of an epoch that is not over."""
        self._complete(trainer)
        state: dict[str, Any] = {"records": [dict(record) for record in self.records], "seconds": self._seconds()}
        epoch = trainer.current_epoch + 1
        if not self.records or self.records[-1]["epoch"] != epoch:
            sums = self._begun["sums"] if self._begun is not None else None
            val = self._value(trainer, self.val_metric)
            state["begun"] = {"epoch": epoch, "sums": _sums(trainer, self.train_metric) or sums, "val_loss": val}
        checkpoint["callbacks"][self.state_key] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the records back if it is a fit that is resumed; an evaluation of older weights leaves them alone."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None and trainer.state.fn == "fit":
            self.records = [dict(record) for record in state["records"]]
            self._before = state["seconds"]
            self._begun = dict(state["begun"]) if state.get("begun") else None  # an older version's has none
            self._resumed = True

    # The run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with a resumed run's file, or keep another run's; start the clock."""
        path = self._path(trainer)
        self._old, self._lacks_loss, self._started = dict(trainer.callback_metrics), False, time.monotonic()
        self._is_first = True
        if not self._resumed:
            self.records, self._before, self._begun = [], 0.0, None
            if trainer.is_global_zero and path.exists():
                path.replace(path.with_suffix(".previous.json"))
        elif self._begun is not None and self._begun["epoch"] <= trainer.current_epoch:
            self._record(trainer, self._begun["epoch"])  # saved at its last batch, which Lightning takes for its end
        else:
            self._write(trainer)
        self._resumed = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was logged so far is none of this epoch's."""
        self._complete(trainer)
        self._old, self._lacks_loss, self._begun = dict(trainer.callback_metrics), False, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a resume in mid-epoch, let the epoch's value have the batches before it."""
        self._begin(trainer)
        if self._begun is not None and self._begun["sums"] is not None:
            metric = _running(trainer, self.train_metric)
            if metric is not None:
                if not hasattr(metric, "went_on"):  # by ExactResume
                    _add(metric, self._begun["sums"], trainer.global_rank, trainer.world_size)
                    metric.went_on = True
                self._begun["sums"] = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's record and write the file."""
        self._record(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch may lack its loss."""
        self._complete(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run may begin by a validation that was due."""
        self._begin(trainer)

    # The records

    def _begin(self, trainer: Trainer) -> None:
        """What callbacks have put back by now, of whichever epoch, was logged before; `_begun` has this one's."""
        if self._is_first:
            self._old, self._is_first = dict(trainer.callback_metrics), False

    def _record(self, trainer: Trainer, epoch: int) -> None:
        lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
        record = {
            "epoch": epoch,
            "train_loss": self._value(trainer, self.train_metric),
            "val_loss": self._value(trainer, self.val_metric),
            "lr": None if lr is None else float(lr),
            "seconds": round(self._seconds(), 3),
        }
        if self.records and self.records[-1]["epoch"] == epoch:  # ended once more by ExactResume, after its last batch
            record = self.records.pop() | {name: value for name, value in record.items() if value is not None}
        self.records.append(record)
        self._lacks_loss = record["train_loss"] is None
        self._old = dict(trainer.callback_metrics)
        self._begun, self._before, self._started = None, 0.0, time.monotonic()
        self._write(trainer)

    def _complete(self, trainer: Trainer) -> None:
        """Fill in what a module's own `on_train_epoch_end` logged, which comes after the callbacks'."""
        value = self._value(trainer, self.train_metric) if self._lacks_loss else None
        if value is not None:
            self.records[-1]["train_loss"], self._lacks_loss = value, False
            self._write(trainer)

    def _value(self, trainer: Trainer, name: str) -> float | None:
        """What was logged under the name in this epoch, by this process or an earlier one."""
        value = trainer.callback_metrics.get(name)
        if value is not None and value is not self._old.get(name):
            return float(value)
        if self._begun is None:
            return None
        if name == self.val_metric:
            known: float | None = self._begun["val_loss"]
            return known
        return None if self._begun["sums"] is None else _result(self._begun["sums"], trainer.global_rank)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            write_json(self._path(trainer), self.records)

    def _seconds(self) -> float:
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.filename


# What `self.log` has collected of a metric in this epoch, which Lightning does not save


def _running(trainer: Trainer, name: str) -> Any:
    """Lightning's collector of a training metric that has an epoch's value; None if there is none yet."""
    results = trainer.fit_loop.epoch_loop._results
    for metric in results.values():
        meta = metric.meta
        if meta.on_epoch and metric.is_tensor and not metric.has_reset and name in (meta.name, meta.forked_name(False)):
            return metric
    return None


def _sums(trainer: Trainer, name: str) -> dict[str, Any] | None:
    """A metric's reduction, whether it is one over all ranks, and each rank's [value, weight]; None if none has any."""
    metric = _running(trainer, name)
    own = None
    if metric is not None:
        reduction = next(kind for kind in _REDUCTIONS if getattr(metric.meta, f"is_{kind}_reduction"))
        weight = metric.cumulated_batch_size if reduction == "mean" else torch.tensor(1)
        own = {"reduction": reduction, "synced": metric.meta.sync.should, "ranks": [metric.value.cpu(), weight.cpu()]}
    ranks = of_every_rank(trainer, own)
    first: dict[str, Any] | None = ranks[0]
    return first and first | {"ranks": [rank and rank["ranks"] for rank in ranks]}


def _add(metric: Any, sums: dict[str, Any], rank: int, ranks: int) -> None:
    """Let a collector have what was collected before: the rank's own, or a share of all if there were more or fewer."""
    same = len(sums["ranks"]) == ranks
    for value, weight in filter(None, sums["ranks"][rank : rank + 1] if same else sums["ranks"]):
        value, weight = (tensor.to(metric.value.device) for tensor in (value, weight))
        if sums["reduction"] in ("min", "max"):
            metric.value = metric.meta.reduce_fx(metric.value, value)
            continue
        metric.value = metric.value + (value if same else value / ranks)
        if sums["reduction"] == "mean":
            metric.cumulated_batch_size = metric.cumulated_batch_size + (weight if same else weight / ranks)


def _result(sums: dict[str, Any], rank: int) -> float | None:
    """The value of an epoch of which nothing was left to do."""
    pairs = [pair for pair in (sums["ranks"] if sums["synced"] else sums["ranks"][rank : rank + 1]) if pair is not None]
    if not pairs:
        return None
    values, weights = (torch.stack(part) for part in zip(*pairs, strict=True))
    if sums["reduction"] == "mean":
        return float(values.sum() / weights.sum())
    return float(getattr(values, sums["reduction"])())
