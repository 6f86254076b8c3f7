"""What samples are worth, beside real pictures that nobody was trained on: figures after validations and tests.

A judge, a small classifier, is trained on the training pictures when it is first needed. Then

- after each validation, of as many samples as there are validation pictures: `val/frechet_distance` from them, and
  `val/judge_accuracy`, the share of samples that it takes for the class that they were to be;
- after the test, in a table, `test/samples/…` beside `test/real/…`. The test pictures are parted into two halves. Real
  pictures of one half are compared with the other half, and so are as many samples of the same classes; the figures
  are the means over both ways round. So all that differs between the two rows is who made the pictures.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.tasks.gan.judge import Judge, train_judge
from trainerkit.tasks.gan.metrics import (
    class_shares,
    coverage,
    frechet_distance,
    nearest_distance,
    precision_and_recall,
    relative_entropy,
)
from trainerkit.tasks.gan.task import GanTask

_AT_ONCE = 250  # samples


@runtime_checkable
class HasPictures(Protocol):
    """A data module that can give a whole part at once."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty without labels."""

    def rows(self, part: Any, limit: int | None = None) -> dict[str, Tensor]:
        """At most `limit` rows of 'train', 'val' or 'test' as one batch: `x`, `index`, and `y` with classes."""


class SampleReport(Callback):
    """Compare samples with real pictures, see the module; data without classes have no judge, and nothing is done.

    In the table: `frechet_distance`, `precision` and `recall` in the judge's features; `judge_accuracy`, of the real
    ones how good the judge is; `class_coverage`, see `coverage`; `class_entropy`, see `relative_entropy`; and
    `nearest_training`, the mean distance of a picture (its numbers in 0..1) to the nearest training picture, which is
    small for samples that are copies. A generator without classes has no `judge_accuracy`.

    Args:
        validation: compare after validations too.
        neighbours: k of `precision_and_recall`.
        judge_steps: optimizer steps of the judge, each with 64 pictures.
        limit: of pictures of each part, evenly thinned out.

    Raises:
        ValueError: for a number below 1, fewer than 2 steps, or a limit below 16.
    """

    def __init__(
        self, validation: bool = True, neighbours: int = 3, judge_steps: int = 700, limit: int = 10_000
    ) -> None:
        for name, number, least in (
            ("neighbours", neighbours, 1),
            ("judge_steps", judge_steps, 2),
            ("limit", limit, 16),
        ):
            if number < least:
                raise ValueError(f"{name}={number}: must be {least} or more")
        self.validation = validation
        self.neighbours = neighbours
        self.judge_steps = judge_steps
        self.limit = limit
        self._judge: Judge | None = None
        # What it sees in the validation pictures, and their classes.
        self._held_out: tuple[Tensor, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew: the data may be others."""
        self._judge = self._held_out = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The two figures of a validation."""
        if self.validation and not trainer.sanity_checking:
            self._log(trainer, pl_module, "val", self._of_validation)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table."""
        self._log(trainer, pl_module, "test", self._of_test)

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str, compute: Any) -> None:
        """Compute on the first process, log on all."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, GanTask) or not isinstance(data, HasPictures):
            return
        if not data.classes:
            rank_zero_warn("SampleReport: these data have no classes, so that there is no judge and no figure")
            return
        figures: dict[str, float] = compute(pl_module, data) if trainer.is_global_zero else {}
        for name, value in trainer.strategy.broadcast(figures).items():
            pl_module.log(f"{stage}/{name}", value, rank_zero_only=True, prog_bar=stage == "val")

    def _of_validation(self, task: GanTask, data: HasPictures) -> dict[str, float]:
        judge = self._judge_of(task, data)
        part = self._part(task, data, "val")
        if self._held_out is None:
            self._held_out = judge.look_at(part["x"])[0], part["y"]
        features, logits = judge.look_at(samples(task, part))
        figures = {"frechet_distance": frechet_distance(self._held_out[0], features)}
        return figures | _accuracy(task, logits, part["y"])

    def _of_test(self, task: GanTask, data: HasPictures) -> dict[str, float]:
        judge = self._judge_of(task, data)
        train, test = self._part(task, data, "train"), self._part(task, data, "test")
        seen = judge.look_at(test["x"])
        made = samples(task, test)
        seen_made = judge.look_at(made)
        halves = [torch.arange(first, len(test["y"]), 2, device=task.device) for first in (0, 1)]
        figures: dict[str, float] = {}
        for name, (features, logits) in (("samples", seen_made), ("real", seen)):
            found = self._compare(features, logits, seen[0], test["y"], halves, len(data.classes))
            pictures = made if name == "samples" else test["x"]
            found["nearest_training"] = nearest_distance(pictures.flatten(1), train["x"].flatten(1))
            # What a class is to be is known of real pictures, whatever the generator knows.
            found |= _accuracy(task, logits, test["y"], known=name == "real")
            figures |= {f"{name}/{what}": value for what, value in found.items()}
        return figures

    def _compare(
        self, features: Tensor, logits: Tensor, real: Tensor, y: Tensor, halves: list[Tensor], n_classes: int
    ) -> dict[str, float]:
        both = []
        for here, there in (halves, halves[::-1]):
            precision, recall = precision_and_recall(real[there], features[here], self.neighbours)
            both.append((frechet_distance(real[there], features[here]), precision, recall))
        names = ("frechet_distance", "precision", "recall")
        means = {name: sum(values) / 2 for name, values in zip(names, zip(*both, strict=True), strict=True)}
        shares = class_shares(logits.argmax(1), n_classes)
        means["class_coverage"] = coverage(shares, class_shares(y, n_classes))
        return means | {"class_entropy": relative_entropy(shares)}

    def _judge_of(self, task: GanTask, data: HasPictures) -> Judge:
        if self._judge is None:
            train = self._part(task, data, "train")
            self._judge = train_judge(train["x"], train["y"], len(data.classes), self.judge_steps)
        return self._judge

    def _part(self, task: GanTask, data: HasPictures, name: str) -> dict[str, Tensor]:
        return {key: value.to(task.device) for key, value in data.rows(name, self.limit).items()}


@torch.no_grad()
def samples(task: GanTask, rows: dict[str, Tensor]) -> Tensor:
    """A sample for each row, (N, C, H, W) in 0..1: of its class, if the generator knows classes."""
    index, y = rows["index"].split(_AT_ONCE), rows["y"].split(_AT_ONCE)
    made = [task(*part) for part in zip(index, y, strict=True)] if task.class_names else [task(part) for part in index]
    return torch.cat(made)


def _accuracy(task: GanTask, logits: Tensor, y: Tensor, known: bool = False) -> dict[str, float]:
    if not task.class_names and not known:
        return {}
    return {"judge_accuracy": float((logits.argmax(1) == y).double().mean())}
