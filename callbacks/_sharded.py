"""Parameters in pieces (FSDP2's DTensors): this process's piece, and the whole.

A tensor that is whole already is its own piece. What says 'all processes' waits for them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_piece(tensor: Any) -> bool:
    """Whether a tensor is one of which each process holds a piece."""
    return hasattr(tensor, "_local_tensor")


def piece(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found.detach()


def piece_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor that is cut as `like` is; nothing is sent."""
    if not is_piece(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    cut: Any = like
    moved = whole.to(cut.device_mesh.device_type)
    return piece(distribute_tensor(moved, cut.device_mesh, cut.placements, src_data_rank=None))


def assembled(mine: Tensor, like: Tensor) -> Tensor:
    """The tensor of which this process holds the piece `mine`, cut as `like` is."""
    if not is_piece(like):
        return mine
    from torch.distributed.tensor import DTensor

    cut: Any = like
    return DTensor.from_local(
        mine, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
    )


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the host of the first process, nothing on the others; all processes call it.

    One tensor after the other is gathered on the device. A tensor under two names stays one.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    seen: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in seen:
            cut: Any = tensor
            whole = cut.full_tensor() if is_piece(tensor) else tensor
            seen[id(tensor)] = whole.detach().cpu() if first else torch.empty(0)
    return {name: seen[id(tensor)] for name, tensor in tensors.items()} if first else {}


def let_go(module: nn.Module) -> None:
    """Free gathered parameters that FSDP2 keeps for the next forward pass, as after one without a backward pass.

    They would be used once more, whatever was written into the pieces since.
    """
    for part in module.modules():
        if type(part).__name__.startswith("FSDP"):
            reshard: Any = getattr(part, "reshard", None)
            if reshard is not None:
                reshard()
