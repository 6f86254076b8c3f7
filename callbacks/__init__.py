"""Callbacks for any Lightning project: `from trainerkit.callbacks import EMA`.

They need torch and lightning only, take plain arguments, and know no task, data set or config.
"""

from trainerkit.callbacks._stop_signals import StopRequested
from trainerkit.callbacks.activation_stats import ActivationStats
from trainerkit.callbacks.best_weights import BestWeights, load_best_weights
from trainerkit.callbacks.crash_safe_checkpoint import CheckpointError, CrashSafeCheckpoint
from trainerkit.callbacks.early_stopping import EarlyStopping
from trainerkit.callbacks.ema import EMA
from trainerkit.callbacks.exact_resume import ExactResume
from trainerkit.callbacks.gradient_accumulation import GradientAccumulation
from trainerkit.callbacks.gradient_check import GradientCheck, GradientMismatch
from trainerkit.callbacks.gradient_flow import GradientFlow
from trainerkit.callbacks.history import History
from trainerkit.callbacks.memory_monitor import MemoryMonitor
from trainerkit.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from trainerkit.callbacks.parameter_norm_clip import ParameterNormClip
from trainerkit.callbacks.parameter_stats import ParameterStats
from trainerkit.callbacks.progressive_unfreezing import ProgressiveUnfreezing
from trainerkit.callbacks.rank_consensus import RankConsensus, RanksDiffer
from trainerkit.callbacks.save_predictions import SavePredictions
from trainerkit.callbacks.step_hashes import StepHashes, StepsDiffer
from trainerkit.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "ActivationStats",
    "BestWeights",
    "CheckpointError",
    "CrashSafeCheckpoint",
    "EarlyStopping",
    "ExactResume",
    "GradientAccumulation",
    "GradientCheck",
    "GradientFlow",
    "GradientMismatch",
    "History",
    "MemoryMonitor",
    "NonFiniteError",
    "NonFiniteGuard",
    "ParameterNormClip",
    "ParameterStats",
    "ProgressiveUnfreezing",
    "RankConsensus",
    "RanksDiffer",
    "SavePredictions",
    "StepHashes",
    "StepsDiffer",
    "StopRequested",
    "Throughput",
    "load_best_weights",
]
