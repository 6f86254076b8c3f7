"""A `GPT` over the devices of a tensor-parallel group: each has some heads, and a part of every feed-forward layer.

M. Shoeybi et al., 'Megatron-LM: Training multi-billion parameter language models using model parallelism', 2019,
arXiv:1909.08053: the first matrix of each half of a block is cut by output features, the second by input features, so
that one sum over the devices ends each half. `qkv`, and `up` with swiglu, hold several matrices in one: their rows are
cut as they lie, so that a checkpoint stays whole, and what they give is gathered before each device takes its heads.
Embeddings, norms and the output layer are whole on each device.

Shapes: B batch, T tokens, F features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from trainerkit.tasks.lm.attention import CausalAttention, HeadNorm
from trainerkit.tasks.lm.block import Block, FeedForward
from trainerkit.tasks.lm.network import GPT


def parallelize(network: GPT, mesh: DeviceMesh) -> None:
    """Share a network out, in place; every parameter becomes a DTensor on `mesh`.

    Args:
        network: the same on every process.
        mesh: of the group, one-dimensional.

    Raises:
        ValueError: if the heads or the feed-forward width cannot be divided, or the network has adapters.
    """
    devices = mesh.size()
    for block in network.blocks:
        assert isinstance(block, Block)
        _check(block, devices)
    plan: dict[str, ParallelStyle] = {}
    for number, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        plan |= {f"blocks.{number}.{name}": style for name, style in _plan(block).items()}
    for name, child in network.named_modules():
        if name not in plan and any(True for _ in child.parameters(recurse=False)):
            # Normed heads are this device's own, so that the gain's gradient is a sum over the devices.
            plan[name] = _Whole(Shard(2) if isinstance(child, HeadNorm) else Replicate())
    parallelize_module(network, mesh, plan)
    for block in network.blocks:
        assert isinstance(block, Block)
        block.attention.n_heads //= devices
        block.attention.n_kv_heads //= devices


def _check(block: Block, devices: int) -> None:
    attention, feed_forward = block.attention, block.feed_forward
    if not all(
        type(layer) is nn.Linear for layer in (attention.qkv, attention.out, feed_forward.up, feed_forward.down)
    ):
        raise ValueError(
            "task.network.lora: must be null with trainer=fsdp_tp; adapters train with trainer=fsdp or ddp"
        )
    sizes = {"n_heads": attention.n_heads, "n_kv_heads": attention.n_kv_heads, "d_ff": feed_forward.down.in_features}
    for name, size in sizes.items():
        if size % devices:
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size={devices}: must divide task.network.{name}, which is {size}"
            )


def _plan(block: Block) -> dict[str, ParallelStyle]:
    attention, feed_forward = block.attention, block.feed_forward
    return {
        "attention.qkv": _Several(_widths(attention)),
        "attention.out": RowwiseParallel(),
        "feed_forward.up": _first(feed_forward),
        "feed_forward.down": RowwiseParallel(),
    }


def _widths(attention: CausalAttention) -> list[int]:
    """Features of the queries, the keys and the values."""
    heads = (attention.n_heads, attention.n_kv_heads, attention.n_kv_heads)
    return [number * attention.head_dim for number in heads]


def _first(feed_forward: FeedForward) -> ParallelStyle:
    inside = feed_forward.down.in_features
    return _Several([inside, inside]) if feed_forward.activation == "swiglu" else ColwiseParallel()


class _Several(ColwiseParallel):
    """A linear layer of several matrices; each device goes on with its share of what each of them gives.

    Args:
        widths: output features of the matrices.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(output_layouts=Replicate(), use_local_output=False)
        self.widths = list(widths)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        made: nn.Module = super()._apply(module, device_mesh)
        rank, devices = device_mesh.get_local_rank(), device_mesh.size()

        def own(layer: nn.Module, inputs: Any, output: DTensor) -> Tensor:
            # Every other device's gradient of this share is zero, so that the whole one is the sum.
            whole = output.to_local(grad_placements=[Partial()])
            parts = whole.split(self.widths, dim=-1)
            return torch.cat([part.chunk(devices, dim=-1)[rank] for part in parts], dim=-1)

        made.register_forward_hook(own)
        return made


class _Whole(ParallelStyle):
    """A module whose parameters every device holds whole.

    Args:
        placement: of its input and output: Replicate where all devices have the same, Shard(d) where each has its own
            part along dimension d.
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def distribute(layer: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(DTensor.from_local(part, mesh, [self.placement], run_check=False) for part in inputs)

        def collect(layer: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.redistribute(placements=[self.placement]).to_local()

        return distribute_module(module, device_mesh, None, distribute, collect)  # type: ignore[arg-type]
