"""What a classifier is worth, class by class and beside what needs no network: tables and a picture after each test.

Files in the run's folder: confusion_matrix.csv and .png, classes.csv. Figures, logged as `test/…`: precision, recall,
F1 and rows of each class, `test/CLASS/f1`; of the baselines `test/accuracy_nearest_neighbour` and `test/accuracy_svm`.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.errors import UserError
from trainerkit.extras import require
from trainerkit.files import replacing
from trainerkit.tasks.classification.baselines import baselines
from trainerkit.tasks.classification.metrics import of_each_class
from trainerkit.tasks.classification.pictures import draw_confusion
from trainerkit.tasks.classification.task import ClassificationTask

# Rows that the baselines look at, of larger data sets an even selection.
_MOST_TRAIN, _MOST_TEST = 10_000, 5_000


@runtime_checkable
class HasRows(Protocol):
    """A data module that can give a whole part at once."""

    def rows(self, part: Literal["train", "val", "test"], limit: int | None = None) -> dict[str, Tensor]:
        """At most `limit` rows of a part as one batch: `x` (N, …), `y` (N,)."""


class ClassificationReport(Callback):
    """Write the confusion matrix and compare with baselines after each test of a `ClassificationTask`.

    Args:
        baselines: classify the test rows by the nearest neighbour and by a support vector machine, trained on what the
            network was trained and validated on; nothing where the data cannot give a part at once.
        picture: write confusion_matrix.png.
    """

    def __init__(self, baselines: bool = True, picture: bool = True) -> None:
        self.baselines = baselines
        self.picture = picture

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the optional packages before anything is trained."""
        if self.baselines and isinstance(getattr(trainer, "datamodule", None), HasRows):
            require("sklearn", "callbacks.classification_report.baselines=true")
        if self.picture:
            require("matplotlib", "callbacks.classification_report.picture=true")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over the processes, write and judge on the first, log on all."""
        if not isinstance(pl_module, ClassificationTask):
            return
        confusion: Tensor = pl_module.confusion.compute().cpu()
        measured = of_each_class(confusion)
        for name, values in measured.items():
            for class_, value in zip(pl_module.classes, values.tolist(), strict=True):
                pl_module.log(f"test/{class_.replace('/', '|')}/{name}", value, rank_zero_only=True)
        found: dict[str, float] = {}
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            _write(folder / "confusion_matrix.csv", ["true", *pl_module.classes], pl_module.classes, confusion)
            columns = torch.stack(list(measured.values()), 1)
            _write(folder / "classes.csv", ["class", *measured], pl_module.classes, columns)
            if self.picture:
                draw_confusion(folder / "confusion_matrix.png", confusion, pl_module.classes)
            found = self._baselines(getattr(trainer, "datamodule", None))
        for name, value in trainer.strategy.broadcast(found).items():
            pl_module.log(f"test/accuracy_{name}", value, rank_zero_only=True)

    def _baselines(self, data: Any) -> dict[str, float]:
        if not self.baselines or not isinstance(data, HasRows):
            return {}
        train = data.rows("train", _MOST_TRAIN)
        try:
            val = data.rows("val", _MOST_TRAIN)
            train = {key: torch.cat([train[key], val[key]]) for key in ("x", "y")}
        except UserError:  # there is no such part
            pass
        return baselines(train, data.rows("test", _MOST_TEST))


def _write(path: Path, header: Sequence[str], classes: Sequence[str], rows: Tensor) -> None:
    """A line of names, then one for each class, whole numbers as such."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(header)
        for class_, row in zip(classes, rows.tolist(), strict=True):
            lines.writerow([class_, *(int(value) if float(value).is_integer() else value for value in row)])
