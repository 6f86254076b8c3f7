"""Batches far larger than memory, for losses that compare the rows of a batch with each other: the gradient cache.

A contrastive loss needs the embeddings of all rows at once, but not their activations. So the encoder goes over the
batch in chunks without a graph; the loss is computed of all embeddings; and in the backward pass, when the gradient of
the loss by each embedding has arrived, the encoder goes over the chunks again with a graph, and the gradient of each
chunk is taken at once. The gradient is that of the whole batch; what stays in memory of a row is its embedding; the
price is a second forward pass.

    cache = GradientCache(chunk_size=32)
    loss = info_nce(*cache(encoder, queries, documents))
    loss.backward()

Both passes are one node of autograd's graph, between the encoder's parameters and the embeddings. So optimization stays
automatic, and a parameter is handed its gradient once a step: one reduction over processes, one call of its hooks.

Source: L. Gao et al., 'Scaling deep contrastive learning batch size under memory limited setup', RepL4NLP 2021
(arXiv:2101.06983).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from trainerkit.fsdp import is_cut
from trainerkit.functional.random import random_state, set_random_state
from trainerkit.tasks.retrieval.trees import concatenated, entries, number_of_rows, part

_FEW = 8  # chunks: with more, a kept graph saves little time, and the loss needs its memory
_SMALL = 2**13  # numbers of a parameter whose gradient may wait until the others of a chunk are there


class GradientCache:
    """Calls encoders chunk by chunk; see `encode_in_chunks`.

    Args:
        chunk_size: rows whose activations are in memory at a time, 1 or more.

    Raises:
        ValueError: for another `chunk_size`.
    """

    def __init__(self, chunk_size: int = 32) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be 1 or more")
        self.chunk_size = chunk_size

    def __call__(self, encoder: nn.Module, *inputs: Any) -> Any:
        """`encoder(inputs)` with its gradient, in the memory of a chunk; a tuple for several inputs."""
        found = encode_in_chunks(encoder, inputs, self.chunk_size)
        return found[0] if len(found) == 1 else found


@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # the encoder alone is compiled, if it is
def encode_in_chunks(encoder: nn.Module, batches: Sequence[Any], chunk_size: int) -> tuple[Any, ...]:
    """`encoder(batch)` of each batch, whose backward pass runs the encoder again, chunk by chunk.

    Random numbers, autocast and the encoder's buffers are in the second pass what they were in the first, and after it
    as if there had been none: dropout has the same masks, running statistics move once. Batch normalization normalizes
    over a chunk. Parameters that are frozen, not reached, or not the encoder's own get no gradient; without trainable
    ones, or under `torch.no_grad()`, there is no second pass. Parameters in pieces (FSDP2) are gathered by hooks of
    their own, so there each chunk is a checkpointed forward pass instead, whose buffers change in both.

    Args:
        encoder: called with inputs of fewer rows; gives a tensor, or a tree of tensors, with as many rows.
        batches: each of tensors and lists with rows first, and None, in any nesting of dicts and tuples; not to be
            changed before the backward pass. Several, such as queries and documents, cost one sum of the parameters'
            gradients, where a call for each holds one sum for each.
        chunk_size: rows of a chunk, 1 or more; the last may have fewer.

    Returns:
        What the encoder gives, of all rows, for each batch; zeros fill up what is shorter in one chunk than in another.

    Raises:
        ValueError: for an encoder that is wrapped in DistributedDataParallel; for inputs without rows, with different
            numbers of them, or that require a gradient; for embeddings with sparse gradients; for outputs whose rows
            are not those of the inputs.
        RuntimeError: in the backward pass, for inputs or parameters that were written to since they were given.
    """
    if isinstance(encoder, DistributedDataParallel):
        raise ValueError(
            "encoder: is wrapped in DistributedDataParallel; wrap the module that computes the loss, and give this one "
            "bare"
        )
    rows = [number_of_rows(batch) for batch in batches]
    for name, value in (entry for batch in batches for entry in entries(batch)):
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient; only the encoder's parameters get one")
    if torch.is_grad_enabled():
        _no_sparse_gradients(encoder)
    if max(rows) <= chunk_size:
        return tuple(encoder(batch) for batch in batches)
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    chunks = _Chunks(encoder, batches, rows, chunk_size)
    if not (parameters and torch.is_grad_enabled()):
        leaves = chunks.joined()
    elif is_cut(encoder):
        leaves = chunks.joined(checkpointed=True)
    else:
        leaves = _TwoPasses.apply(chunks, *parameters)  # type: ignore[no-untyped-call]
    return tuple(
        tree_unflatten(leaves[chunks.places(batch)], structure) for batch, structure in enumerate(chunks.structures)
    )


def _no_sparse_gradients(encoder: nn.Module) -> None:
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(f"encoder: {name or type(module).__name__} has sparse=True; the sum over chunks is dense")


class _Chunks:
    """An encoder and batches, chunk by chunk."""

    def __init__(self, encoder: nn.Module, batches: Sequence[Any], rows: Sequence[int], chunk_size: int) -> None:
        self.encoder, self.batches = encoder, batches
        self.slices = [  # the number of a batch, and some of its rows; at least one of a batch without any
            (batch, slice(start, min(start + chunk_size, number)))
            for batch, number in enumerate(rows)
            for start in range(0, max(1, number), chunk_size)
        ]
        self.structures: list[Any] = [None] * len(batches)
        self.kept: list[Any] | None = None  # the leaves of the last chunk with their graph

    def joined(self, checkpointed: bool = False, keep_last: bool = False) -> list[Any]:
        """The leaves of the encoder's outputs, of all rows, batch after batch; those of the last chunk in `kept`."""
        chunks: list[list[list[Any]]] = [[] for _ in self.batches]
        run = partial(checkpoint, self.leaves, use_reentrant=False) if checkpointed else self.leaves
        for batch, rows in self.slices[:-1] if keep_last else self.slices:
            chunks[batch].append(run(batch, rows))
        if keep_last:
            # Where autocast keeps weights that it cast without a graph, they would be taken where one is needed.
            torch.clear_autocast_cache()
            with torch.enable_grad():
                self.kept = self.leaves(*self.slices[-1])
            chunks[self.slices[-1][0]].append(self.kept)
        return [
            None if pieces[0] is None else concatenated(pieces)
            for of_batch in chunks
            for pieces in zip(*of_batch, strict=True)
        ]

    def places(self, batch: int) -> slice:
        """Where a batch's leaves stand among those of all."""
        start = sum(structure.num_leaves for structure in self.structures[:batch])
        return slice(start, start + self.structures[batch].num_leaves)

    def leaves(self, batch: int, rows: slice) -> list[Any]:
        """Those of one chunk."""
        leaves, self.structures[batch] = tree_flatten(self.encoder(part(self.batches[batch], rows)))
        number = rows.stop - rows.start
        for leaf in leaves:
            if leaf is not None and not (isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == number):
                found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(f"encoder: gave {found} for {number} rows; must give tensors with as many rows")
        return leaves


class _TwoPasses(torch.autograd.Function):
    """From an encoder's parameters to the leaves of its output."""

    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, *parameters: Tensor) -> tuple[Any, ...]:
        ctx.chunks, ctx.parameters = chunks, parameters
        ctx.surroundings = _Surroundings(chunks)
        ctx.set_materialize_grads(False)
        leaves = chunks.joined(keep_last=len(chunks.slices) <= _FEW)
        # Before torch 2.10, weights that were cast without a graph would be taken where a graph is needed.
        torch.clear_autocast_cache()
        return tuple(leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        chunks, slices = ctx.chunks, list(ctx.chunks.slices)
        with ctx.surroundings.kept(), _Sums(ctx.parameters) as sums:
            if chunks.kept is not None:
                batch, rows = slices.pop()
                leaves, chunks.kept = chunks.kept, None  # a graph that is kept is gone back through once
                sums.add_from(leaves, gradients[chunks.places(batch)], rows)
                del leaves
            ctx.surroundings.restore()
            for batch, rows in slices:
                with ctx.surroundings.autocast(), torch.enable_grad():
                    leaves = chunks.leaves(batch, rows)
                sums.add_from(leaves, gradients[chunks.places(batch)], rows)
        pairs = zip(sums.totals, ctx.parameters, strict=True)
        return None, *(None if total is None else total.to(parameter.dtype) for total, parameter in pairs)


class _Sums:
    """Sums over chunks of the gradients of parameters; None for parameters that are not reached.

    A large parameter's is added by a hook as it arrives, and let go: those of a chunk together are as large as the
    sums. The small ones' are added in one call, for each hook costs ten microseconds. The parameters' own hooks are not
    called inside `with`: they are for the sums, which go through them afterwards.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.totals: list[Tensor | None] = [None] * len(parameters)
        self._parameters = parameters
        self._small = [place for place, parameter in enumerate(parameters) if parameter.numel() <= _SMALL]
        self._hooks = [parameter._backward_hooks for parameter in parameters]

    def __enter__(self) -> "_Sums":
        small = set(self._small)
        for place, parameter in enumerate(self._parameters):
            parameter._backward_hooks = None
            if place not in small:
                parameter.register_hook(partial(self._taken, place))
        return self

    def __exit__(self, *error: object) -> None:
        for parameter, before in zip(self._parameters, self._hooks, strict=True):
            parameter._backward_hooks = before

    def add_from(self, leaves: Sequence[Any], gradients: Sequence[Tensor | None], rows: slice) -> None:
        """Add what a chunk gives, whose leaves' gradients are these rows of `gradients`."""
        reached = [
            (leaf, gradient[(rows, *map(slice, leaf.shape[1:]))])
            for leaf, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None and leaf.requires_grad
        ]
        if not reached:
            return
        outputs, cached = zip(*reached, strict=True)
        # Not backward(), which would hand each chunk's to what waits for the sum: .grad, and reductions over processes.
        found = torch.autograd.grad(outputs, self._parameters, cached, allow_unused=True)
        totals, more = [], []
        for place in self._small:
            total, gradient = self.totals[place], found[place]
            if total is not None and gradient is not None:
                totals.append(total)
                more.append(gradient)
            elif gradient is not None:
                self.totals[place] = _added(None, gradient)
        if totals:
            torch._foreach_add_(totals, more)

    def _taken(self, place: int, gradient: Tensor) -> Tensor:
        self.totals[place] = _added(self.totals[place], gradient)
        return gradient.new_zeros(()).expand_as(gradient)  # takes the gradient's place and no memory


def _added(total: Tensor | None, gradient: Tensor) -> Tensor:
    """Their sum, in float32 or wider: in bfloat16 a sum of hundreds would lose what comes late."""
    if total is None:  # a copy, for the gradients of two parameters may be one tensor
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    return total.add_(gradient)


class _Surroundings:
    """What a pass begins with beside its inputs and parameters, taken down before the first for the second."""

    def __init__(self, chunks: _Chunks) -> None:
        self._encoder, self._inputs = chunks.encoder, tuple(chunks.batches)
        self._parameters = tuple(chunks.encoder.parameters())
        self._versions = _versions(self._inputs), _versions(self._parameters)
        # Once for all chunks: both passes go over them in the same order.
        self._random = random_state()
        self._buffers = _copied_buffers(chunks.encoder)
        devices = sorted({parameter.device.type for parameter in chunks.encoder.parameters()} | {"cpu"})
        self._autocast: list[dict[str, Any]] = [
            {
                "device_type": device,
                "enabled": torch.is_autocast_enabled(device),
                "dtype": torch.get_autocast_dtype(device),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for device in devices
            if torch.amp.is_autocast_available(device)
        ]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Afterwards random state and buffers are as they are now."""
        inputs, parameters = self._versions
        if _versions(self._inputs) != inputs:
            raise RuntimeError("inputs: were written to after they were given to the gradient cache")
        if _versions(self._parameters) != parameters:
            raise RuntimeError("parameters: were written to between the forward and the backward pass")
        random_now, buffers_now = random_state(), _copied_buffers(self._encoder)
        try:
            yield
        finally:
            set_random_state(random_now)
            _set_buffers(self._encoder, buffers_now)

    def restore(self) -> None:
        """Random state and buffers as they were then."""
        set_random_state(self._random)
        _set_buffers(self._encoder, self._buffers)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast as it was then: a backward pass runs outside of it, and on GPUs in another thread."""
        with ExitStack() as stack:
            for options in self._autocast:
                stack.enter_context(torch.autocast(**options))
            yield


def _versions(inputs: Any) -> list[int]:
    return [value._version for _, value in entries(inputs) if isinstance(value, Tensor) and not value.is_inference()]


def _copied_buffers(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in encoder.named_buffers()}


def _set_buffers(encoder: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, buffer in encoder.named_buffers():
        if name in values and values[name].shape == buffer.shape:
            buffer.data.copy_(values[name])  # .data: another graph may hold the buffer, and gets it back unchanged
