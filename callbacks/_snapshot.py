"""What a training step changes, kept in memory to be put back."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer


class Buffers:
    """The buffers of a module as they were at some moment."""

    def __init__(self, module: nn.Module) -> None:
        # Walking through all modules takes longer than a small step: once.
        self._places = [(m, key) for m in module.modules() for key in m._buffers]
        self._saved: list[Tensor | None] = []

    def _live(self) -> list[Tensor | None]:
        return [module._buffers.get(key) for module, key in self._places]

    @torch.no_grad()
    def save(self) -> None:
        """Keep a copy of them."""
        live = self._live()
        if len(self._saved) == len(live) and all(map(_alike, self._saved, live)):
            pairs = [
                (saved, b) for saved, b in zip(self._saved, live, strict=True) if saved is not None and b is not None
            ]
            if pairs:
                torch._foreach_copy_([saved for saved, _ in pairs], [buffer for _, buffer in pairs])
        else:
            self._saved = [None if buffer is None else buffer.detach().clone() for buffer in live]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back."""
        for (module, key), saved, live in zip(self._places, self._saved, self._live(), strict=True):
            if saved is not None and live is not None and _alike(saved, live):
                live.copy_(saved)
            else:
                module._buffers[key] = None if saved is None else saved.clone()


class Snapshot:
    """Weights, buffers, optimizer states and the scaler at some moment; schedules go on and are not in it."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = {id(p): p for optimizer in trainer.optimizers for p in held(optimizer)}
        self._weights = [(p, p.detach().clone()) for p in weights.values()]
        self._states = [(o, {p: copy.deepcopy(state) for p, state in o.state.items()}) for o in trainer.optimizers]
        self._buffers = Buffers(pl_module)
        self._buffers.save()
        self._scaler = scaler_of(trainer)
        self._of_scaler = self._scaler.state_dict() if self._scaler is not None else {}

    @torch.no_grad()
    def restore(self) -> None:
        """Go back; may be done again later."""
        torch._foreach_copy_([p for p, _ in self._weights], [saved for _, saved in self._weights])
        for optimizer, states in self._states:
            optimizer.state.clear()
            optimizer.state.update({p: copy.deepcopy(state) for p, state in states.items()})
        self._buffers.restore()
        if self._scaler is not None:
            self._scaler.load_state_dict(self._of_scaler)


def held(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """The parameters of all groups of an optimizer."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def scaler_of(trainer: Trainer) -> Any:
    """The gradient scaler, or None."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _alike(saved: Tensor | None, live: Tensor | None) -> bool:
    if saved is None or live is None:
        return saved is live
    return saved.shape == live.shape and saved.dtype == live.dtype and saved.device == live.device
