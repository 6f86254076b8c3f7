"""What is done to a Task's networks in place: compiled code, and activations that are computed again in backward.

Neither changes a name in a checkpoint.

T. Chen et al., 'Training deep nets with sublinear memory cost', 2016, arXiv:1604.06174.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainerkit import fsdp


def compile_networks(networks: Sequence[nn.Module], compiler: Mapping[str, Any], device: torch.device) -> None:
    """Compile networks by `torch.compile`; those in pieces block by block. What is compiled already is left alone.

    Where no compiler works they stay as they are, and a warning of one line says why.

    Args:
        networks: what is called as a whole.
        compiler: keyword arguments of torch.compile.
        device: where they will run.
    """
    # FSDP2 gathers each block in hooks, which no graph goes through.
    parts = [part for network in networks for part in (fsdp.blocks(network) if fsdp.is_cut(network) else (network,))]
    waiting = [part for part in parts if part._compiled_call_impl is None]
    if not waiting:
        return
    if compiler.get("backend", "inductor") == "inductor" and _says_why_not(device.type):
        return
    for part in waiting:
        part.compile(**compiler)


@functools.cache
def _says_why_not(device: str) -> bool:
    """Warn once, not in each stage of a run, if no compiler works."""
    reason = why_not(device)
    if reason is not None:
        warnings.warn(f"trainer.compile: no compiler works here ({reason}); training goes on uncompiled", stacklevel=3)
    return reason is not None


def why_not(device: str) -> str | None:
    """Compile a sum of sines with torch's own compiler; None if that works, else the error's first line."""
    try:
        x = torch.ones(4, device=device)
        torch.compile(_sines)(x)
    except Exception as error:  # the compiler's, Triton's, the system's
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return None


def _sines(x: Tensor) -> Tensor:
    return x.sin().sum()


def checkpoint_blocks(networks: Sequence[nn.Module]) -> None:
    """In training, have each repeated block (`trainerkit.fsdp.blocks`) keep its input only.

    The rest is computed again in the backward pass: less memory, about a third more time, the same gradient. Dropout
    draws what it drew. Blocks that do so already are left alone.

    Args:
        networks: with their blocks in `nn.ModuleList`s.

    Raises:
        ValueError: if there is no block, or one counts batches (BatchNorm), which would count each twice.
    """
    found = [block for network in networks for block in fsdp.blocks(network)]
    if not found:
        raise ValueError(
            "checkpoint_activations=True: must be false for these networks, which have no repeated blocks in an "
            "nn.ModuleList"
        )
    counting = [m for block in found for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if counting:
        raise ValueError(
            f"checkpoint_activations=True: must be false with {type(counting[0]).__name__}, which would count each "
            "batch twice"
        )
    for block in found:
        if not getattr(block, "computes_again", False):
            # A class of its own, as FSDP2 does it: names and copies of the block stay what they are.
            block.__class__ = _computing_again(type(block))  # type: ignore[arg-type] # a class has a hash


@functools.cache
def _computing_again(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ordinary = functools.partial(kind.forward, self)
        if self.training and torch.is_grad_enabled():
            return checkpoint(ordinary, *args, use_reentrant=False, **kwargs)
        return ordinary(*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "computes_again": True, "__module__": kind.__module__})
