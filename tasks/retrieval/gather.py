"""Embeddings of all processes on each of them, with their gradient, so that a loss compares the rows of all.

Every process computes the loss of the whole batch, and takes from its gradient the part of its own rows, times the
number of processes: DistributedDataParallel divides by that when it takes the mean over processes, which leaves the
gradient that one process with all rows has. Nothing is sent in the backward pass.

Source: A. Radford et al., 'Learning transferable visual models from natural language supervision', ICML 2021
(arXiv:2103.00020), whose batches are gathered so.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from trainerkit.tasks.retrieval.trees import padded


def gather(tensor: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks, with the gradient described at the top of the file.

    Processes may have different numbers of rows, and of vectors in late interaction, where zeros fill up the end. Every
    process must call it equally often. The sizes travel first, for which a GPU's host waits.

    Args:
        tensor: (B, …) of any type, with as many dimensions everywhere; without a process group it is given back.

    Returns:
        (sum of all B, …).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    processes, rank = dist.get_world_size(), dist.get_rank()
    shape = torch.tensor(tensor.shape, device=tensor.device)
    shapes = [torch.empty_like(shape) for _ in range(processes)]
    dist.all_gather(shapes, shape)
    sizes = torch.stack(shapes).tolist()
    largest = [max(size) for size in zip(*sizes, strict=True)]
    sent = padded(tensor.detach(), largest).contiguous()
    received = [torch.empty_like(sent) for _ in range(processes)]
    dist.all_gather(received, sent)
    pieces = [piece[: size[0]] for piece, size in zip(received, sizes, strict=True)]
    pieces[rank] = _scaled_gradient(padded(tensor, [len(tensor), *largest[1:]]), processes)
    return torch.cat(pieces)


def first_row(tensor: Tensor) -> int:
    """Where this process' rows (B, …) begin in what `gather` makes of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    numbers = gather(torch.tensor([len(tensor)], device=tensor.device))
    return int(numbers[: dist.get_rank()].sum())


def _scaled_gradient(tensor: Tensor, factor: int) -> Tensor:
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    view = tensor.view_as(tensor)  # not the tensor itself, which may be used elsewhere as well
    view.register_hook(lambda gradient: gradient * factor)
    return view
