"""What a classifier is judged by, all by torchmetrics: sums over batches and processes, never means of means.

K: classes.
"""

import warnings

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.functional.classification import multiclass_auroc
from torchmetrics.utilities import dim_zero_cat


class MacroAUROC(Metric):
    """Area under the ROC curve of each class against the rest, the mean over the classes that have a curve.

    A class without a row, or with all of them, has none; torchmetrics would count it as 0. NaN if no class has one.
    All probabilities are kept until the end of an evaluation, K numbers a row: the area is exact.
    """

    full_state_update = False
    probabilities: list[Tensor]
    targets: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, probability: Tensor, y: Tensor) -> None:
        """Keep (B, K) and (B,)."""
        self.probabilities.append(probability)
        self.targets.append(y)

    def compute(self) -> Tensor:
        """A scalar."""
        y = dim_zero_cat(self.targets)
        counts = y.bincount(minlength=self.num_classes)
        has_curve = (counts > 0) & (counts < counts.sum())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the classes that are left out
            areas = multiclass_auroc(dim_zero_cat(self.probabilities), y, self.num_classes, average="none")
        return areas[has_curve].mean()


def classification_metrics(n_classes: int, calibration_bins: int = 15) -> MetricCollection:
    """Metrics of probabilities (B, K) and classes (B,).

    Args:
        n_classes: K.
        calibration_bins: of the calibration error: bins of equal width, by the probability of the predicted class.

    Returns:
        `accuracy`, a share of the rows; `f1`, `precision` and `recall`, means over the classes that a row has or is
        predicted to have (macro); `auroc` (`MacroAUROC`); `calibration_error`, the mean over the rows of
        |accuracy − probability| of their bin.

    Source of the last: C. Guo et al., 'On calibration of modern neural networks', ICML 2017, arXiv:1706.04599.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "accuracy": MulticlassAccuracy(n_classes, average="micro"),
        "f1": MulticlassF1Score(n_classes, average="macro"),
        "precision": MulticlassPrecision(n_classes, average="macro"),
        "recall": MulticlassRecall(n_classes, average="macro"),
        "auroc": MacroAUROC(n_classes),
        "calibration_error": MulticlassCalibrationError(n_classes, n_bins=calibration_bins, norm="l1"),
    }
    return MetricCollection(metrics)


def of_each_class(confusion: Tensor) -> dict[str, Tensor]:
    """`precision`, `recall`, `f1` (0 where they would be 0/0) and `rows` of each class, (K,) each.

    Args:
        confusion: (K, K) counts, a row a true class, a column a predicted one.
    """
    right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)

    def share(of: Tensor, whole: Tensor) -> Tensor:
        return torch.where(whole > 0, of.double() / whole.clamp_min(1), 0.0)

    return {
        "precision": share(right, predicted),
        "recall": share(right, true),
        "f1": share(2 * right, true + predicted),
        "rows": true.double(),
    }
