"""A validation run a second time with other weights, batch by batch beside the first one."""

import copy
import inspect
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from trainerkit.callbacks._twin import left_by_a_step, takes
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
        memo |= left_by_a_step(pl_module)
        self._module = copy.deepcopy(pl_module, memo)
        self._module.trainer = trainer
        self._trainer = trainer
        self._values: dict[str, list[tuple[Tensor, int]]] = {}  # with the size of the batch
        self._reductions: dict[str, str] = {}
        self._metrics: dict[str, Any] = {}
        self._dataloader = 0
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
        self._dataloader = dataloader_idx
        arguments = {"batch_idx": batch_idx, "dataloader_idx": dataloader_idx}
        wanted = {name: v for name, v in arguments.items() if takes(self._module.validation_step, name)}
        with self._trainer.precision_plugin.val_step_context():
            self._module.validation_step(batch, **wanted)
        self._batch = None
        set_random_state(after)

    def result(self) -> dict[str, float]:
        """Each metric over all batches and ranks, as it was asked to be reduced; a mean is weighted by batch size."""
        self._module.on_validation_epoch_end()
        result = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        return result | {name: self._reduced(values, self._reductions[name]) for name, values in self._values.items()}

    def _reduced(self, values: list[tuple[Tensor, int]], reduction: str) -> float:
        numbers = torch.stack([value for value, _ in values])
        if reduction in ("min", "max"):
            extreme = numbers.min() if reduction == "min" else numbers.max()
            return float(self._trainer.strategy.reduce(extreme, reduce_op=reduction))
        sizes = numbers.new_tensor([size for _, size in values])
        weights = sizes if reduction == "mean" else torch.ones_like(sizes)
        total, weight = self._trainer.strategy.reduce(
            torch.stack([(numbers * weights).sum(), weights.sum()]), reduce_op="sum"
        )
        return float(total / weight) if reduction == "mean" else float(total)

    def _collect(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        given = inspect.signature(LightningModule.log).bind(self._module, name, value, *arguments, **options).arguments
        if len(self._trainer.num_val_batches) > 1 and given.get("add_dataloader_idx", True) and self._batch is not None:
            name = f"{name}/dataloader_idx_{self._dataloader}"
        if hasattr(value, "compute"):
            self._metrics[name] = value
            return
        reduction = given.get("reduce_fx", "mean")
        self._reductions[name] = getattr(reduction, "__name__", reduction).removeprefix("a")  # torch.amax is max too
        if self._reductions[name] not in ("mean", "min", "max", "sum"):
            raise ValueError(f"reduce_fx={reduction} of {name}: must be mean, min, max or sum with several EMA decays")
        size = given.get("batch_size")
        if size is None:
            size = 1 if self._batch is None else extract_batch_size(self._batch)
        device = self._trainer.strategy.root_device
        number = torch.as_tensor(value, dtype=torch.float32, device=device).detach().mean()
        self._values.setdefault(name, []).append((number, size))

    def _collect_dict(self, values: dict[str, Any], *arguments: Any, **options: Any) -> None:
        for name, value in values.items():
            self._collect(name, value, *arguments, **options)
