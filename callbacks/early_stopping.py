"""Stop when a metric has not improved for a number of epochs, counted only after a part of the run.

Epochs count from 1. With E epochs in all, epochs from max(1, int(E·start_ratio)) on count; the best value is taken from
the whole run. Patience 3, ratio 0.5, E = 10, best at epoch 2: epochs 5, 6 and 7 count, and 7 is the last.
"""

import math
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer

from trainerkit.callbacks._trainer import validates


class EarlyStopping(Callback):
    """Stop training when `monitor` has stopped improving.

    What is counted, and the best value, go through a checkpoint; arguments given anew win over the checkpoint.
    `trainer.min_epochs` and `min_steps` are respected. After each validation, or each epoch where there is none.

    Args:
        monitor: a logged metric.
        patience: epochs (validations) without improvement after which to stop, 1 or more; None never stops.
        start_ratio: fraction of the run before which nothing counts, 0 to 1; of `max_epochs` or `max_steps`, whichever
            is reached first.
        min_delta: an improvement must be larger than this.
        mode: 'min' if smaller is better, else 'max'.

    Raises:
        ValueError: for a value that is not possible; during fit, if `monitor` was not logged: it lists what was.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        patience: int | None = 20,
        start_ratio: float = 0.5,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience={patience}: must be 1 or more, or null never to stop early")
        if not 0 <= start_ratio <= 1:
            raise ValueError(f"start_ratio={start_ratio}: must be from 0 to 1")
        if min_delta < 0:
            raise ValueError(f"min_delta={min_delta}: must be 0 or more")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode}: must be min or max")
        self.monitor = monitor
        self.patience = patience
        self.start_ratio = start_ratio
        self.min_delta = min_delta
        self.mode = mode
        self.best = math.inf if mode == "min" else -math.inf
        self.waited = 0
        self.reason: str | None = None  # why the run was stopped, or None

    def state_dict(self) -> dict[str, Any]:
        """The best value and how many epochs have counted since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.best = state_dict["best"]
        self.waited = state_dict["waited"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was killed after its patience had run out is not trained further; a new run counts anew."""
        self.reason = None
        if trainer.global_step == 0:
            self.best, self.waited = math.inf if self.mode == "min" else -math.inf, 0
        if self.patience is not None:
            self._stop_if_spent(trainer, trainer.current_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric after a validation within fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric after the epoch if there is no validation."""
        if not validates(trainer):
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if self.patience is None:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"monitor={self.monitor}: was not logged; logged are: {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        if self._improves(value):
            self.best, self.waited = value, 0
        elif self._counts(trainer):
            self.waited += 1
        self._stop_if_spent(trainer, trainer.current_epoch + 1)

    def _improves(self, value: float) -> bool:
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta

    def _counts(self, trainer: Trainer) -> bool:
        """Whether the part of the run is over, by whichever of its ends comes first; one without an end has no part."""
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        by_epochs = epochs > 0 and trainer.current_epoch + 1 >= max(1, int(epochs * self.start_ratio))
        by_steps = steps > 0 and trainer.global_step >= max(1, int(steps * self.start_ratio))
        return by_epochs or by_steps or (epochs <= 0 and steps <= 0)

    def _stop_if_spent(self, trainer: Trainer, epochs: int) -> None:
        early = epochs < (trainer.min_epochs or 0) or trainer.global_step < (trainer.min_steps or 0)
        spent = self.patience is not None and self.waited >= self.patience and not early
        # Every rank asks, and stops if one does: a metric that was logged without a reduction differs between them.
        if not trainer.strategy.reduce_boolean_decision(spent, all=False):
            return
        trainer.should_stop = True
        self.reason = f"{self.monitor} has not improved on {self.best:.6g} for {self.waited} epochs"
        rank_zero_info(f"Stopping after epoch {epochs}: {self.reason}.")
