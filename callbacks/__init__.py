"""Callbacks for any Lightning project: `from trainerkit.callbacks import EMA`.

They need torch and lightning only, take plain arguments, and know no task, data set or config.
"""

from trainerkit.callbacks.best_weights import BestWeights
from trainerkit.callbacks.crash_safe_checkpoint import CrashSafeCheckpoint, StopRequested
from trainerkit.callbacks.early_stopping import EarlyStopping
from trainerkit.callbacks.ema import EMA
from trainerkit.callbacks.exact_resume import ExactResume
from trainerkit.callbacks.history import History
from trainerkit.callbacks.save_predictions import SavePredictions

__all__ = [
    "EMA",
    "BestWeights",
    "CrashSafeCheckpoint",
    "EarlyStopping",
    "ExactResume",
    "History",
    "SavePredictions",
    "StopRequested",
]
