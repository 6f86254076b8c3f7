"""The weights that won, as one safetensors file for whoever uses the model."""

import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor

from trainerkit.callbacks._trainer import validates
from trainerkit.files import replacing


class BestWeights(Callback):
    """Export the weights whenever a validation gives the best `monitor` so far.

    What is exported is what was scored: the weights that the module held during the validation, the average's where
    `EMA` is on, in whatever order the callbacks stand. Without validation the metric is read after each epoch.

    Args:
        monitor: a logged metric.
        mode: 'min' if smaller is better, else 'max'.
        filename: where to write, relative to `trainer.default_root_dir`.

    The file's header has `monitor`, `value`, `epoch` (from 1) and `step`, as text. It loads with
    `safetensors.torch.load_file`, and as `weights=` of a network.

    Raises:
        ValueError: for another mode.
    """

    def __init__(
        self, monitor: str = "val/loss", mode: Literal["min", "max"] = "min", filename: str = "best_model.safetensors"
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode}: must be min or max")
        self.monitor = monitor
        self.mode = mode
        self.filename = filename
        self.best = math.inf if mode == "min" else -math.inf
        self._scored: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value."""
        self.best = state_dict["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the best's file is not, as in the new folder of a resumed run, the best value does not count."""
        if not (Path(trainer.default_root_dir) / self.filename).exists():
            self.best = math.inf if self.mode == "min" else -math.inf

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold on to the tensors that were just scored; when the metric is known, EMA may have left."""
        self._scored = {name: tensor.detach() for name, tensor in pl_module.state_dict().items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what was scored if it is the best."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._export_if_best(trainer)
        self._scored = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation: export the weights of the epoch's end."""
        if not validates(trainer):
            self._scored = {name: tensor.detach() for name, tensor in pl_module.state_dict().items()}
            self._export_if_best(trainer)
            self._scored = {}

    def _export_if_best(self, trainer: Trainer) -> None:
        if self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        better = value < self.best if self.mode == "min" else value > self.best
        if not better:
            return
        self.best = value
        if trainer.is_global_zero:
            facts = {"monitor": self.monitor, "value": value, "epoch": trainer.current_epoch + 1}
            facts["step"] = trainer.global_step
            with replacing(Path(trainer.default_root_dir) / self.filename) as temporary:
                save_file(_apart(self._scored), temporary, {key: str(fact) for key, fact in facts.items()})


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and without shared memory, which safetensors refuses; tied weights stand twice."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return apart
