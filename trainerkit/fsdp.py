"""Parameters, gradients and optimizer state in pieces, one a process: torch's FSDP2 (`fully_shard`) under Lightning.

Each process keeps a piece of every parameter, as a DTensor. A block's parameters are gathered before its forward pass
and before its backward pass, and let go after each; gradients are reduced into pieces. What a step computes is what
DistributedDataParallel computes, in 1/N of its memory for parameters, gradients and optimizer state.

    python -m trainerkit task=mae trainer=fsdp

Source: Y. Zhao et al., 'PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel', 2023;
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections import Counter
from collections.abc import Iterator

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all devices in one data-parallel group.

    The LightningModule cuts its network in `configure_model`, as `trainerkit.task.Task` does.

    Args:
        save_distributed_checkpoint: each process writes its pieces, into a folder that any number of processes reads.
            False gathers everything in the first process's memory, for a checkpoint of one file.
        process_group_backend: None for NCCL between GPUs and gloo between CPUs.

    Raises:
        ValueError: when a stage starts with one device.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        """Start the processes' group."""
        processes = self.num_nodes * self.num_processes
        if processes < 2:
            raise ValueError(
                f"trainer.devices={processes}: trainer=fsdp shares parameters out over devices and needs 2 or more; "
                "take trainer=auto for one"
            )
        self._data_parallel_size, self._tensor_parallel_size = processes, 1
        super().setup_environment()


def shard(module: nn.Module, mesh: DeviceMesh, precision: str = "32-true") -> None:
    """Cut a module's parameters into pieces, in place: block by block (`blocks`), then what is left.

    From then on it is to be called as a module, by all processes equally often; for a method beside `forward` see
    `torch.distributed.fsdp.register_fsdp_forward_method`.

    Args:
        module: what is called as a whole; every process has the same weights in it.
        mesh: of the processes, one-dimensional.
        precision: Lightning's name; see `policy`.
    """
    for part in (*blocks(module), module):
        fully_shard(part, mesh=mesh, mp_policy=policy(precision))


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks: entries of the outermost `nn.ModuleList`s that hold parameters, all of them their own.

    A block whose parameters are tied to something outside stays with the rest, since both are gathered together.
    """
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for part in _entries(module):
        own = Counter(id(parameter) for _, parameter in part.named_parameters(remove_duplicate=False))
        if own and all(uses[parameter] == count for parameter, count in own.items()):
            yield part


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(module, nn.ModuleList) or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _entries(child)
        else:
            yield child


def policy(precision: str) -> MixedPrecisionPolicy:
    """The numbers in which parameters are gathered and gradients added up.

    With `bf16-mixed` parameters are kept in float32 and gathered in bfloat16, half the traffic; gradients are added up
    over the processes in float32 with every precision.

    Args:
        precision: 32-true, bf16-mixed or bf16-true.

    Raises:
        ValueError: for another one.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: must be one of {', '.join(PRECISIONS)} with trainer=fsdp")
    gathered = torch.bfloat16 if precision == "bf16-mixed" else None
    # Autocast chooses the inputs' type for each operation.
    return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)


def is_cut(module: nn.Module) -> bool:
    """Whether a module's parameters are pieces."""
    return any(hasattr(parameter, "_local_tensor") for parameter in module.parameters())
