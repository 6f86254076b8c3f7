"""Keep the norm of each weight tensor below a bound.

w ← w · min(1, max_norm / ‖w‖₂) after every optimizer step, each tensor by its own norm over all its elements.

Source: N. Srebro, J. Rennie, T. Jaakkola, 'Maximum-Margin Matrix Factorization', NIPS 2004, and as a regulariser of
networks N. Srivastava et al., 'Dropout', JMLR 15, 2014, section 5.1. There the norm is that of each unit's incoming
weights; here that of the whole tensor.
"""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from trainerkit.callbacks._parameters import as_patterns, is_built, select
from trainerkit.callbacks._trainer import StepHooks, refuse_sharded


@torch.no_grad()
def clip_norms_(tensors: Sequence[Tensor], max_norm: float) -> None:
    """Scale each tensor whose 2-norm is over `max_norm` back to it, in place; the others keep their bits.

    Nothing is copied to the host. Norms of half-precision tensors are taken in float32.

    Args:
        tensors: of any shapes, types and devices, and of any number.
        max_norm: the bound, above 0.
    """
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (_, dtype), bucket in buckets.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        norms = torch.stack(torch._foreach_norm(bucket, 2, wide))
        # A norm of 0 gives max_norm / 0 = inf, and the factor 1.
        factors = (max_norm / norms).clamp(max=1)
        torch._foreach_mul_(bucket, list(factors.unbind()))


class ParameterNormClip(Callback):
    """Scale any weight tensor over `max_norm` back to it after each optimizer step.

    Only what the optimizer has just stepped is looked at: frozen parameters, those without a gradient, and those of an
    optimizer that did not step keep their bits, and so does everything in a step that the gradient scaler skips. Tied
    weights are scaled once. Callbacks that read the weights after a step see the scaled ones.

    Args:
        max_norm: the largest 2-norm that a tensor may have.
        parameters: pattern or patterns for the names of what is bounded (`decoder.*.weight`).

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters and for a pattern that matches
            nothing (at the start of fit where the module is built late).
    """

    def __init__(self, max_norm: float = 1.0, parameters: str | Sequence[str] = "*") -> None:
        if not 0 < max_norm < math.inf:
            raise ValueError(f"max_norm={max_norm}: must be above 0 and finite")
        self.max_norm = max_norm
        self.parameters = as_patterns(parameters)
        self._chosen: set[int] = set()  # id of each parameter
        self._hooks = StepHooks()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work while it is cheap."""
        refuse_sharded(trainer, self)
        if stage == "fit" and is_built(pl_module):
            select(pl_module, self.parameters)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the parameters and follow the optimizers."""
        self._chosen = {id(parameter) for parameter in select(pl_module, self.parameters).values()}
        self._hooks.attach(trainer, self._after_step)

    def _after_step(self, index: int, optimizer: Optimizer) -> None:
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        clip_norms_([p for p in held if p.grad is not None and id(p) in self._chosen], self.max_norm)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers."""
        self._hooks.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers."""
        self._hooks.detach()
