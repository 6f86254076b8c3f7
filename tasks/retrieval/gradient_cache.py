"""Batches far larger than memory for losses that compare the rows of a batch with each other: the gradient cache.

A contrastive loss needs the embeddings of all rows at once, but not their activations. So the encoder goes over the batch
in chunks without a graph; the loss is computed of all embeddings; and in the backward pass, where the gradient of the
loss by each embedding has arrived, the encoder goes over the chunks again with a graph, one at a time, and each chunk's
gradient is taken at once. The gradient is that of the whole batch; what remains in memory of a row is its embedding; the
price is a second forward pass.

    cache = GradientCache(chunk_size=32)
    loss = info_nce(cache(encoder, queries), cache(encoder, documents))
    loss.backward()

Both passes are one node of autograd's graph, between the encoder's parameters and the embeddings. Optimization stays
automatic, and a parameter is handed its gradient once a step: one reduction over processes, one call of its hooks.

Source: L. Gao et al., 'Scaling deep contrastive learning batch size under memory limited setup', RepL4NLP 2021
(arXiv:2101.06983).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from trainerkit.fsdp import is_cut
from trainerkit.functional.random import random_state, set_random_state
from trainerkit.tasks.retrieval.gather import concatenated


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

    def __call__(self, encoder: nn.Module, inputs: Any) -> Any:
        """`encoder(inputs)` with its gradient, in the memory of a chunk."""
        return encode_in_chunks(encoder, inputs, self.chunk_size)


@torch.compiler.disable(recursive=False)  # the encoder alone is compiled, if it is
def encode_in_chunks(encoder: nn.Module, inputs: Any, chunk_size: int) -> Any:
    """`encoder(inputs)`, whose backward pass runs the encoder again, chunk by chunk.

    Random numbers, autocast and the encoder's buffers are in the second pass as they were in the first, and afterwards as
    if there had been none: dropout has the same masks, running statistics move once. Batch normalization normalizes over a
    chunk. The encoder and the inputs must not change in between. Parameters that are frozen, not reached, or not the
    encoder's own get no gradient; without trainable ones, or without gradients, there is no second pass. Parameters in
    pieces (FSDP2) are gathered by hooks of their own, so that each chunk is a checkpointed forward pass instead.

    Args:
        encoder: called with inputs of fewer rows; gives a tensor, or a tree of tensors, with as many rows.
        inputs: tensors and lists with rows first, and None, in any nesting of dicts and tuples.
        chunk_size: rows of a chunk, 1 or more; the last may have fewer.

    Returns:
        What the encoder gives, of all rows; zeros fill up what is shorter in one chunk than in another.

    Raises:
        ValueError: for an encoder that is wrapped in DistributedDataParallel; for inputs without rows, with different
            numbers of them, or that require a gradient; for outputs whose rows are not those of the inputs.
        RuntimeError: in the backward pass, for inputs that were written to since they were given.
    """
    if isinstance(encoder, DistributedDataParallel):
        raise ValueError(
            "encoder: is wrapped in DistributedDataParallel; wrap what computes the loss, and give its module"
        )
    rows = _number_of_rows(inputs)
    if rows <= chunk_size:
        return encoder(inputs)
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    passes = _Passes(encoder, inputs, rows, chunk_size, parameters)
    if not (parameters and torch.is_grad_enabled()):
        leaves = passes.first()
    elif is_cut(encoder):
        leaves = passes.checkpointed()
    else:
        leaves = _TwoPasses.apply(passes, *parameters)  # type: ignore[no-untyped-call]
    return tree_unflatten(leaves, passes.structure)


class _TwoPasses(torch.autograd.Function):
    """From the parameters to the leaves of the encoder's output."""

    @staticmethod
    def forward(ctx: Any, passes: "_Passes", *parameters: Tensor) -> tuple[Any, ...]:
        ctx.passes = passes
        ctx.set_materialize_grads(False)
        passes.remember()
        leaves = passes.first()
        # Before torch 2.10 weights that were cast without a graph would be taken where a graph is needed.
        torch.clear_autocast_cache()
        return tuple(leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.passes.second(gradients)


class _Passes:
    """An encoder and a batch, chunk by chunk."""

    def __init__(
        self, encoder: nn.Module, inputs: Any, rows: int, chunk_size: int, parameters: list[nn.Parameter]
    ) -> None:
        self.encoder, self.inputs, self.parameters = encoder, inputs, parameters
        self.chunks = [slice(start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]
        self.structure: Any = None

    def remember(self) -> None:
        """What the first pass begins with."""
        self.versions = _versions(self.inputs)
        self.random = random_state()  # one for all chunks, since both passes go over them in the same order
        self.buffers = _copied_buffers(self.encoder)
        self.autocast = _autocast_options(self.parameters)

    def first(self) -> list[Any]:
        return _joined([self._leaves(chunk) for chunk in self.chunks])

    def checkpointed(self) -> list[Any]:
        return _joined([checkpoint(self._leaves, chunk, use_reentrant=False) for chunk in self.chunks])

    def second(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The parameters' gradients, of those of the output's leaves."""
        if _versions(self.inputs) != self.versions:
            raise RuntimeError("inputs: were written to after they were given to the gradient cache")
        sums: list[Tensor | None] = [None] * len(self.parameters)
        with _replayed(self.encoder, self.random, self.buffers), _without_hooks(self.parameters):
            for chunk in self.chunks:
                for place, gradient in enumerate(self._chunk_gradients(chunk, gradients)):
                    sums[place] = _added(sums[place], gradient)
        pairs = zip(sums, self.parameters, strict=True)
        return [None if total is None else total.to(parameter.dtype) for total, parameter in pairs]

    def _chunk_gradients(self, chunk: slice, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for options in self.autocast:
                stack.enter_context(torch.autocast(**options))
            leaves = self._leaves(chunk)
        reached = [
            (leaf, gradient[(chunk, *map(slice, leaf.shape[1:]))])
            for leaf, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None and leaf.requires_grad
        ]
        if not reached:
            return []
        outputs, cached = zip(*reached, strict=True)
        return torch.autograd.grad(outputs, self.parameters, cached, allow_unused=True)

    def _leaves(self, chunk: slice) -> list[Any]:
        leaves, self.structure = tree_flatten(self.encoder(_part(self.inputs, chunk)))
        rows = chunk.stop - chunk.start
        for leaf in leaves:
            if leaf is not None and not (isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows):
                found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(f"encoder: gave {found} for {rows} rows; must give tensors with as many rows")
        return leaves


def _joined(chunks: Sequence[Sequence[Any]]) -> list[Any]:
    return [None if pieces[0] is None else concatenated(pieces) for pieces in zip(*chunks, strict=True)]


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Their sum, in float32 or wider, for a sum of hundreds in bfloat16 would lose what is added late."""
    if gradient is None:
        return total
    if total is None:  # a copy: the gradients of two parameters may be one tensor
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    return total.add_(gradient)


@contextmanager
def _replayed(encoder: nn.Module, random: dict[str, Any], buffers: dict[str, Tensor]) -> Iterator[None]:
    """Random state and buffers as given, and afterwards as they are now."""
    random_now, buffers_now = random_state(), _copied_buffers(encoder)
    set_random_state(random)
    _set_buffers(encoder, buffers)
    try:
        yield
    finally:
        set_random_state(random_now)
        _set_buffers(encoder, buffers_now)


def _copied_buffers(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in encoder.named_buffers()}


def _set_buffers(encoder: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, buffer in encoder.named_buffers():
        if name in values and values[name].shape == buffer.shape:
            buffer.data.copy_(values[name])  # .data: other graphs may hold the buffer, and it ends as they know it


@contextmanager
def _without_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hooks are called once, by the backward pass that is given the sum."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def _autocast_options(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Of the devices in use, for a backward pass runs outside of the forward pass's autocast, or in another thread."""
    devices = sorted({parameter.device.type for parameter in parameters} | {"cpu"})
    return [
        {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for device in devices
        if torch.amp.is_autocast_available(device)
    ]


def _entries(inputs: Any, name: str = "inputs") -> Iterator[tuple[str, Any]]:
    """The tensors and lists of rows in a tree, with the way to them."""
    if isinstance(inputs, Mapping | tuple):
        named = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
        for key, value in named:
            yield from _entries(value, f"{name}[{key!r}]")
    elif isinstance(inputs, list) or (isinstance(inputs, Tensor) and inputs.ndim):
        yield name, inputs
    elif inputs is not None:
        raise ValueError(f"{name}={inputs!r}: must be a tensor or a list with rows first, or None")


def _number_of_rows(inputs: Any) -> int:
    entries = list(_entries(inputs))
    if not entries:
        raise ValueError("inputs: must hold a tensor or a list with rows first")
    first, rows = entries[0][0], len(entries[0][1])
    for name, value in entries:
        if len(value) != rows:
            raise ValueError(f"{name}: has {len(value)} rows, and {first} has {rows}; must have as many")
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name}: requires a gradient; only the encoder's parameters get one")
    return rows


def _part(inputs: Any, chunk: slice) -> Any:
    if isinstance(inputs, Mapping):
        return type(inputs)({key: _part(value, chunk) for key, value in inputs.items()})  # type: ignore[call-arg]
    if isinstance(inputs, tuple):
        parts = [_part(value, chunk) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else tuple(parts)
    return None if inputs is None else inputs[chunk]


def _versions(inputs: Any) -> list[int]:
    return [value._version for _, value in _entries(inputs) if isinstance(value, Tensor) and not value.is_inference()]
