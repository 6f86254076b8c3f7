"""Exponential moving average of the weights.

shadow ← d·shadow + (1 − d)·w after every optimizer step. The shadow starts at the initial weights, so that a fixed
d = 0.999 would still hold a third of them after 1,000 steps; therefore d warms up as min(decay, (1 + n)/(10 + n))
with n updates made before (the rule of TensorFlow's ExponentialMovingAverage with `num_updates`).

Source: B. T. Polyak, A. B. Juditsky, 'Acceleration of stochastic approximation by averaging', 1992.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def ema_decay(decay: float, updates: int, warmup: bool = True) -> float:
    """The decay of the next update: `decay`, or with warm-up min(decay, (1 + n)/(10 + n)) with n = `updates` so far."""
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


@torch.no_grad()
def ema_update_(shadow: Sequence[Tensor], live: Sequence[Tensor], decay: float) -> None:
    """shadow ← decay·shadow + (1 − decay)·live in place, tensor by tensor, in one call for all of them."""
    torch._foreach_lerp_(list(shadow), list(live), 1 - decay)


class EMA(Callback):
    """Keep an exponential moving average of the weights, and use it to validate, test, predict and save.

    - Evaluation sees the average: pointers are swapped, nothing is copied, and the live weights come back at the end,
      by an exception too.
    - A checkpoint's `state_dict` holds the average, so that whoever loads the file gets the weights that were scored;
      the live weights stand in the callback's state, and training resumes from them.
    - Evaluation of weights from a file (`trainer.test(ckpt_path=…)`) uses those as they are.
    - Before the first update the live weights are used.

    Buffers are not averaged: evaluation uses the live ones.

    Args:
        decay: d, from 0 to below 1.
        warmup: let d grow as min(decay, (1 + n)/(10 + n)).
        every_n_steps: optimizer steps between updates.
        start_step: optimizer steps before the first update; the shadow starts from the weights of that moment.
        parameters: pattern or patterns for the names of what is averaged (`encoder.*`).
        device: where the average is kept, e.g. 'cpu'; None for beside the weights.

    Raises:
        ValueError: for a value that is not possible; at the start of fit for a pattern that matches nothing.
    """

    def __init__(
        self,
        decay: float = 0.999,
        warmup: bool = True,
        every_n_steps: int = 1,
        start_step: int = 0,
        parameters: str | Sequence[str] = "*",
        device: str | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: must be from 0 to below 1")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be 1 or more")
        if start_step < 0:
            raise ValueError(f"start_step={start_step}: must be 0 or more")
        self.decay = decay
        self.warmup = warmup
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.parameters = [parameters] if isinstance(parameters, str) else list(parameters)
        self.device = None if device is None else torch.device(device)
        self.updates = 0
        self._live: dict[str, nn.Parameter] = {}
        self._shadow: dict[str, Tensor] = {}
        self._stash: list[Tensor] | None = None  # the live weights' storage while the average is in its place
        self._restored: dict[str, Any] | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse sharded parameters, whose local pieces could not be swapped."""
        if type(trainer.strategy).__name__ in _SHARDED:
            raise ValueError(f"strategy={type(trainer.strategy).__name__}: EMA does not average sharded parameters yet")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed fit needs; evaluation takes the file's weights as they are."""
        if trainer.state.fn == "fit":
            self._restored = checkpoint["callbacks"].get(self.state_key)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the parameters; after a resume put average and live weights where they belong."""
        self._live = _select(pl_module, self.parameters)
        self._shadow, self.updates = {}, 0
        restored, self._restored = self._restored, None
        if restored is None:
            return
        self.updates = restored["updates"]
        self._start_shadow()
        with torch.no_grad():
            for name, tensor in restored["live"].items():
                if name in self._live:
                    self._live[name].copy_(tensor)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count steps; the trainer's own count is restored only now."""
        self._step = trainer.global_step
        if not self._shadow:
            self._start_shadow()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once per optimizer step, however many batches it took."""
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        if step <= self.start_step:
            self._start_shadow()
        elif (step - self.start_step) % self.every_n_steps == 0:
            self._update()

    def _update(self) -> None:
        live = [parameter.detach() for parameter in self._live.values()]
        if self.device is not None:
            live = [tensor.to(self.device) for tensor in live]
        ema_update_(list(self._shadow.values()), live, ema_decay(self.decay, self.updates, self.warmup))
        self.updates += 1

    def _start_shadow(self) -> None:
        self._shadow = {
            name: parameter.detach().to(self.device or parameter.device, copy=True)
            for name, parameter in self._live.items()
        }

    def _swap_in(self, trainer: Trainer) -> None:
        from_file = trainer.state.fn != "fit" and trainer.ckpt_path is not None
        if self.updates == 0 or self._stash is not None or from_file:
            return
        self._stash = [parameter.data for parameter in self._live.values()]
        for name, parameter in self._live.items():
            parameter.data = self._shadow[name].to(parameter.device)

    def _swap_out(self) -> None:
        if self._stash is None:
            return
        for parameter, tensor in zip(self._live.values(), self._stash, strict=True):
            parameter.data = tensor
        self._stash = None

    def state_dict(self) -> dict[str, Any]:
        """Number of updates and the live weights; the average itself is the checkpoint's `state_dict`."""
        if self.updates == 0:
            return {}
        tensors = self._stash or [parameter.detach() for parameter in self._live.values()]
        return {"updates": self.updates, "live": dict(zip(self._live, tensors, strict=True))}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average into the checkpoint's `state_dict`."""
        if self.updates == 0 or self._stash is not None:
            return  # nothing averaged yet, or the module holds the average at this moment
        self._swap_in(trainer)
        try:
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        finally:
            self._swap_out()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._swap_in(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the live weights."""
        self._swap_out()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self._swap_in(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the live weights back."""
        self._swap_out()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the average."""
        self._swap_in(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the live weights back."""
        self._swap_out()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the live weights back, whatever happened during an evaluation."""
        self._swap_out()


def _select(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters whose names match any of the patterns; each pattern must match."""
    named = dict(module.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            near = difflib.get_close_matches(pattern, named, n=5, cutoff=0) or list(named)[:5]
            raise ValueError(f"parameters={pattern}: matches no parameter; the nearest are {', '.join(near)}")
    return {name: p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
