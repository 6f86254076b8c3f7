"""Classification as a task: `python -m trainerkit task=classification`.

Any network that gives logits, by cross-entropy with what one may do to it: label smoothing, focal weights, class
weights, mixup. Shapes: B rows, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from trainerkit.task import OptimizerFactory, SchedulerFactory, Task
from trainerkit.tasks.classification.losses import balanced_weights, classification_loss, given_weights, mixed
from trainerkit.tasks.classification.metrics import classification_metrics

ClassWeights = Literal["balanced"] | Sequence[float] | Mapping[str, float] | None


class ClassificationTask(Task):
    """Trains a network to tell classes apart.

    A batch is a mapping with `x` (B, …), `y` (B,) int64 from 0 to K − 1, and to predict `index` (B,), the rows'
    numbers. Data modules of `trainerkit.data` give these.

    Logged: `train/loss`, what is minimized; `val/loss` and `test/loss`, the plain cross-entropy in nats, whatever is
    minimized; and of validation and test what `classification_metrics` names, such as `val/accuracy`.

    Predicted, for each row: `index`, `class` (B,) and `probability` (B, K).

    Args:
        network: from `x` to logits (B, K).
        classes: names of the K classes.
        class_counts: rows of each class in training, for class_weights='balanced'.
        class_weights: by which a row's loss is multiplied: 'balanced' takes N / (K·n_k) of its class; or a number for
            each class, or by name, where the others have 1. None: 1 each.
        label_smoothing: ε, from 0 to below 1: ε/K of the target goes to each class.
        focal_gamma: γ ≥ 0 of the focal loss, (1 − p)^γ times the cross-entropy.
        mixup: α ≥ 0: rows are mixed with others in a share drawn from Beta(α, α) for the batch, from torch's random
            state (`mixed`); 0 for none.
        augment: changes `x` (B, …) in training, before rows are mixed; None for nothing.
        metrics: further metrics by their names, each of probabilities (B, K) and classes (B,).
        calibration_bins: see `classification_metrics`.
        optimizer: see `Task`.
        scheduler: see `Task`.

    Raises:
        ValueError: for a number that is out of its range, or weights that do not fit the classes.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        class_counts: Sequence[int] = (),
        class_weights: ClassWeights = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        mixup: float = 0.0,
        augment: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
        calibration_bins: int = 15,
        optimizer: OptimizerFactory = AdamW,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters()
        if len(classes) < 2:
            raise ValueError(f"classes={list(classes)}: must be two or more")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: must be from 0 to below 1")
        for name, number in {"focal_gamma": focal_gamma, "mixup": mixup}.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"{name}={number}: must be 0 or more")
        if calibration_bins < 1:
            raise ValueError(f"calibration_bins={calibration_bins}: must be 1 or more")
        self.network = network
        self.classes = list(classes)
        self.mixup = mixup
        self.augment = augment
        self._loss: dict[str, Any] = {"label_smoothing": label_smoothing, "focal_gamma": focal_gamma}
        weights = None
        if isinstance(class_weights, str):
            if class_weights != "balanced":
                raise ValueError(f"class_weights={class_weights}: must be balanced, or a number for each class")
            weights = balanced_weights(class_counts)
        elif class_weights is not None:
            weights = given_weights(class_weights, self.classes)
        self.register_buffer("class_weights", weights, persistent=False)
        every = classification_metrics(len(self.classes), calibration_bins)
        every.add_metrics(dict(metrics or {}))
        self.metrics = nn.ModuleDict({"val": every, "test": every.clone()})
        self.confusion = MulticlassConfusionMatrix(len(self.classes))  # of the test; rows are the true classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Change the rows by chance, mix them, and compare with the classes."""
        x, y = batch["x"], batch["y"]
        if self.augment is not None:
            x = self.augment(x)
        other, share = None, 1.0
        if self.mixup > 0:
            share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
            order = torch.randperm(len(x)).to(x.device)
            x, other = mixed(x, order, share), y[order]
        logits = self.network(x)
        loss = classification_loss(logits, y, other, share, class_weights=self.class_weights, **self._loss)
        self.track("train/loss", loss, weight=len(x))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss and metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss and metrics, and which classes are taken for which."""
        self.confusion.update(self._evaluate("test", batch), batch["y"])

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Probabilities, and the likeliest class."""
        probability = self.network(batch["x"]).float().softmax(1)
        return {"index": batch["index"], "class": probability.argmax(1), "probability": probability}

    def on_validation_start(self) -> None:
        """Begin anew, also after a validation that was interrupted."""
        self._metrics_of("val").reset()

    def on_test_start(self) -> None:
        """Likewise."""
        self._metrics_of("test").reset()
        self.confusion.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the means and the metrics."""
        super().on_validation_epoch_end()
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the means and the metrics."""
        super().on_test_epoch_end()
        self._log_metrics("test")

    def _metrics_of(self, stage: str) -> MetricCollection:
        found = self.metrics[stage]
        assert isinstance(found, MetricCollection)
        return found

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> Tensor:
        """Probabilities (B, K)."""
        logits, y = self.network(batch["x"]).float(), batch["y"]
        self.track(f"{stage}/loss", F.cross_entropy(logits, y), weight=len(y))
        probability: Tensor = logits.softmax(1)
        self._metrics_of(stage).update(probability, y)
        return probability

    def _log_metrics(self, stage: str) -> None:
        # Values instead of the metrics themselves, whose names Lightning would look for among its attributes each step.
        for name, value in self._metrics_of(stage).compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=stage == "val" and name == "accuracy")
