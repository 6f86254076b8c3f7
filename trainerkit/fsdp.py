"""Parameters, gradients and optimizer state in pieces, one a process: torch's FSDP2 (`fully_shard`) under Lightning.

Each process keeps a piece of every parameter, as a DTensor. A block's parameters are gathered before its forward pass
and before its backward pass, and let go after each; gradients are reduced into pieces. What a step computes is what
DistributedDataParallel computes, in 1/N of its memory for parameters, gradients and optimizer state.

    python -m trainerkit task=mae trainer=fsdp

With tensor parallelism (`trainer=fsdp_tp`) the devices form a grid: those of a row share each matrix product out among
them and see the same batch, those of a column see different batches and keep pieces of the same part.

Source: Y. Zhao et al., 'PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel', 2023;
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections import Counter
from collections.abc import Iterator

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all devices in one data-parallel group, or in a grid of them.

    The LightningModule cuts its network in `configure_model`, as `trainerkit.task.Task` does.

    Args:
        save_distributed_checkpoint: each process writes its pieces, into a folder that any number of processes reads.
            False gathers everything in the first process's memory, for a checkpoint of one file.
        process_group_backend: None for NCCL between GPUs and gloo between CPUs.
        tensor_parallel_size: devices that share each matrix product out, neighbours in rank; must divide their number.

    Raises:
        ValueError: for a size below 1; when a stage starts with one device, or a number that the size does not divide.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        tensor_parallel_size: int = 1,
    ) -> None:
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size={tensor_parallel_size}: must be 1 or more")
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )
        self._beside = tensor_parallel_size

    def setup_environment(self) -> None:
        """Start the processes' group."""
        processes = self.num_nodes * self.num_processes
        if processes < 2:
            raise ValueError(
                f"trainer.devices={processes}: trainer=fsdp shares parameters out over devices and needs 2 or more; "
                "take trainer=auto for one"
            )
        if processes % self._beside:
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size={self._beside}: must divide the number of devices, {processes}"
            )
        self._data_parallel_size, self._tensor_parallel_size = processes // self._beside, self._beside
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


def same_batch(strategy: object) -> int:
    """How many processes see each batch: those of a tensor-parallel group; 1 without."""
    return strategy.device_mesh["tensor_parallel"].size() if isinstance(strategy, ModelParallelStrategy) else 1


def check_same_batch(batch: object, mesh: DeviceMesh) -> None:
    """Compare the first numbers of each tensor of a batch over a tensor-parallel group.

    Raises:
        ValueError: on every process, if two of them have different ones.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    numbers = [torch.tensor([float(size) for size in leaf.shape]) for leaf in tensors]
    numbers += [leaf.detach().flatten()[:64].double().cpu() for leaf in tensors]
    mine = [number.tolist() for number in numbers]
    everybodys: list[object] = [None] * mesh.size()
    torch.distributed.all_gather_object(everybodys, mine, group=mesh.get_group())
    if any(other != mine for other in everybodys):
        raise ValueError(
            f"tensor_parallel_size={mesh.size()}: must be 1 with these data, which give the devices of a group "
            "different batches; a loader takes its share by trainer.strategy.distributed_sampler_kwargs"
        )


def local(parameter: Tensor) -> Tensor:
    """A parameter that every device of a tensor-parallel group holds whole, as a plain tensor; others as they are."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def is_cut(module: nn.Module) -> bool:
    """Whether a module's parameters are pieces."""
    return any(hasattr(parameter, "_local_tensor") for parameter in module.parameters())
