"""A validation run a second time with other weights, batch by batch beside the first one."""

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from trainerkit.callbacks.exact_resume import random_state, set_random_state


class SecondValidation:
    """Gives each validation batch to a copy of the module as well, and collects what the copy logs.

    The copy shares all tensors but those in `weights`; its metrics and whatever else it keeps are its own. It draws the
    random numbers that the module drew for the batch, and the run's random state does not move.

    Args:
        trainer: whose precision and devices are used.
        pl_module: the module in validation.
        weights: `id` of a parameter or buffer of the module to what the copy has in its place.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, weights: dict[int, Tensor]) -> None:
        memo: dict[int, Any] = {id(p): p for p in pl_module.parameters()}
        memo |= {id(b): b for b in pl_module.buffers()}
        for parameter in pl_module.parameters():
            if id(parameter) in weights:
                memo[id(parameter)] = nn.Parameter(weights[id(parameter)], requires_grad=False)
        memo |= {id(b): weights[id(b)] for b in pl_module.buffers() if id(b) in weights}
        self._module = copy.deepcopy(pl_module, memo)
        self._module.trainer = trainer
        self._trainer = trainer
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._metrics: dict[str, Any] = {}
        self._batch: Any = None
        self._random: Any = None
        object.__setattr__(self._module, "log", self._collect)
        object.__setattr__(self._module, "log_dict", self._collect_dict)
        self._module.on_validation_epoch_start()

    def before_batch(self) -> None:
        """Note the random state that the module begins the batch with."""
        self._random = random_state()

    def batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Run the copy's `validation_step`."""
        after = random_state()
        set_random_state(self._random)
        self._batch = batch
        index = {"dataloader_idx": dataloader_idx} if len(self._trainer.num_val_batches) > 1 else {}
        with self._trainer.precision_plugin.val_step_context():
            self._module.validation_step(batch, batch_idx, **index)
        set_random_state(after)

    def result(self) -> dict[str, float]:
        """The mean of each metric over the batches, weighted by their size, and over all ranks."""
        self._module.on_validation_epoch_end()
        result = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        for name, total in self._sums.items():
            pair = torch.stack([total, torch.as_tensor(self._weights[name], dtype=total.dtype, device=total.device)])
            reduced = self._trainer.strategy.reduce(pair, reduce_op="sum")
            result[name] = float(reduced[0] / reduced[1])
        return result

    def _collect(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        if hasattr(value, "compute"):
            self._metrics[name] = value
            return
        size = batch_size if batch_size is not None else 1 if self._batch is None else extract_batch_size(self._batch)
        term = torch.as_tensor(value, dtype=torch.float32).detach() * size
        self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._weights[name] = self._weights.get(name, 0.0) + size

    def _collect_dict(self, values: dict[str, Any], *arguments: Any, **options: Any) -> None:
        for name, value in values.items():
            self._collect(name, value, *arguments, **options)
