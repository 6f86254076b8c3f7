"""Classification of pictures and tables: `python -m trainerkit task=classification`."""

from trainerkit.tasks.classification.augment import PictureAugment
from trainerkit.tasks.classification.losses import balanced_weights, classification_loss, mixed
from trainerkit.tasks.classification.metrics import MacroAUROC, classification_metrics
from trainerkit.tasks.classification.network import Classifier, PictureCNN, TableMLP
from trainerkit.tasks.classification.report import ClassificationReport
from trainerkit.tasks.classification.task import ClassificationTask

__all__ = [
    "ClassificationReport",
    "ClassificationTask",
    "Classifier",
    "MacroAUROC",
    "PictureAugment",
    "PictureCNN",
    "TableMLP",
    "balanced_weights",
    "classification_loss",
    "classification_metrics",
    "mixed",
]
