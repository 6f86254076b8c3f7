"""A batch in parts, one after the other, with the gradient and the loss of the whole.

The gradient of each part is taken on its own, so that only one part's activations are in memory, and none of it
touches `parameter.grad`. What the training step then gives back is a loss of the whole batch's value whose backward
hands the sum over, so that all that follows is as ever: setting gradients to zero, accumulation, the gradient scaler,
one reduction over data-parallel processes, hooks on parameters.
"""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from trainerkit.callbacks._accumulation import Weight, amount, loss_scale, rows_of
from trainerkit.callbacks.exact_resume import random_state, set_random_state

_CONTAINERS = (Mapping, list, tuple)
_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("sum", sum, torch.sum), torch.sum),
    **dict.fromkeys(("max", max, torch.max), torch.amax),
    **dict.fromkeys(("min", min, torch.min), torch.amin),
}


def part_of(batch: Any, start: int, stop: int, rows: int) -> Any:
    """Rows `start` to `stop` of a batch of so many: of tensors and lists of that length; what has another is whole."""
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.dim() > 0 and len(batch) == rows else batch
    if isinstance(batch, Mapping):
        parts = {key: part_of(value, start, stop, rows) for key, value in batch.items()}
        return parts if type(batch) is dict else type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)):
        if not any(isinstance(value, (Tensor, *_CONTAINERS)) for value in batch):
            return batch[start:stop] if len(batch) == rows else batch
        values = [part_of(value, start, stop, rows) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def split(batch: Any, number: int) -> list[Any]:
    """A batch in `number` parts whose rows differ by one at most.

    Raises:
        ValueError: if there is no tensor with rows in it.
    """
    rows = rows_of(batch)
    edges = [rows * place // number for place in range(number + 1)]
    return [part_of(batch, start, stop, rows) for start, stop in pairwise(edges)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def free_memory() -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # other C libraries than glibc have no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


class MicroBatches:
    """Runs a module's training step on parts of each batch.

    Args:
        weight: what a part counts for; None for its rows.

    Attributes:
        number: parts of a batch; an allocation that fails doubles it, and the batch is begun anew.
    """

    def __init__(self, weight: Weight | None) -> None:
        self.weight = weight
        self.number = 1
        self._trainer: Trainer
        self._module: LightningModule
        self._attached: Any = None
        self._constant: set[str] = set()  # buffers that the last batch did not write to

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of the module's training step until `detach`."""
        self.detach()
        self._trainer, self._module, self._constant = trainer, pl_module, set()
        original = pl_module.training_step

        # A function and no method: a copy of the module must not copy this object and the trainer with it.
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(lambda part: original(part, *args, **kwargs), batch)

        # Lightning looks at the signature behind it to know which arguments to pass.
        training_step.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
        self._attached = _replaced(pl_module, "training_step", training_step)
        self._attached.__enter__()

    def detach(self) -> None:
        """Give the module its training step back."""
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.__exit__(None, None, None)

    def _run(self, step: Callable[[Any], Any], batch: Any) -> Any:
        rows = rows_of(batch)
        before = random_state()
        buffers = dict(self._module.named_buffers())
        versions = {name: buffer._version for name, buffer in buffers.items()}
        kept = {name: buffer.clone() for name, buffer in buffers.items() if name not in self._constant}
        while True:
            number = min(self.number, rows)
            try:
                output = self._attempt(step, split(batch, number))
                break
            except (RuntimeError, MemoryError) as error:
                if number == rows or not is_out_of_memory(error):
                    raise
            # Outside of `except`, where the error no longer holds on to the activations.
            self.number = 2 * number
            free_memory()
            set_random_state(before)
            self._restore(buffers, kept)
        self._constant = {name for name, buffer in buffers.items() if buffer._version == versions[name]}
        return output

    @torch.no_grad()
    def _restore(self, buffers: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            self._module.get_submodule(owner)._buffers[leaf] = buffer  # the step may have put another in its place
        for name, value in kept.items():
            buffers[name].copy_(value)

    def _attempt(self, step: Callable[[Any], Any], parts: list[Any]) -> Any:
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        gradients: list[Tensor | None] = [None] * len(parameters)
        scale = loss_scale(self._trainer, self._module.device)  # float16 gradients without it would vanish
        shares = _shares([amount(part, self.weight) for part in parts])
        outputs: list[Any] = []
        whole: Any = 0.0  # the loss
        log = _LogOnce(self._module, len(parts))
        with _replaced(self._module, "log", log.collect):
            for part, share in zip(parts, shares, strict=True):
                log.share = share
                output = step(part)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if loss is None:
                    return None
                _add(gradients, self._gradients(loss * share * scale, parameters))
                whole = whole + loss.detach() * share
                outputs.append(_detached(output))
        log.release()
        reached = [place for place, gradient in enumerate(gradients) if gradient is not None]
        handed = [gradients[place] for place in reached]
        loss = _Hand.apply(  # type: ignore[no-untyped-call]
            whole, handed, scale, *(parameters[place] for place in reached)
        )
        return _joined(outputs, shares) | {"loss": loss} if isinstance(outputs[0], Mapping) else loss

    def _gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
        # Hooks on parameters are called once a batch, with the whole gradient, in the backward of the result.
        hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
        for parameter, _ in hooked:
            parameter._backward_hooks = None
        try:
            with torch.autocast(loss.device.type, enabled=False):  # a backward pass has the types of its forward pass
                return torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            for parameter, hooks in hooked:
                parameter._backward_hooks = hooks


class _Hand(torch.autograd.Function):
    """A value whose backward hands over gradients that are known already, times what comes in."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], scale: Tensor | float, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        factor = factor / ctx.scale
        handed = []
        for place, gradient in enumerate(ctx.gradients):
            ctx.gradients[place] = None  # one by one, so that there are never two copies of all of them
            handed.append(gradient * factor.to(gradient.device))
        return None, None, None, *handed


class _LogOnce:
    """Collects what the parts log, and logs it once with the value of the whole batch."""

    def __init__(self, module: LightningModule, parts: int) -> None:
        self.share: Tensor | float = 1.0  # of the part at hand
        self._parts = parts
        self._original = module.log
        self._values: dict[str, list[tuple[Any, Any]]] = {}
        self._arguments: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._sizes: dict[str, int] = {}

    def collect(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        value = value.detach() if type(value) is Tensor else value
        self._values.setdefault(name, []).append((value, self.share))
        self._arguments[name] = args, kwargs
        if kwargs.get("batch_size") is not None:
            self._sizes[name] = self._sizes.get(name, 0) + kwargs["batch_size"]

    def release(self) -> None:
        for name, values in self._values.items():
            args, kwargs = self._arguments[name]
            if name in self._sizes:
                kwargs = kwargs | {"batch_size": self._sizes[name]}
            self._original(name, self._whole(values, kwargs.get("reduce_fx", "mean")), *args, **kwargs)

    def _whole(self, values: list[tuple[Any, Any]], reduce: Any) -> Any:
        """The value of the whole batch: the weighted mean of the parts' unless it is summed or an extreme."""
        last = values[-1][0]
        if len(values) == 1 or not (type(last) is Tensor or isinstance(last, (int, float))):
            return last  # a torchmetrics object has seen all parts
        if reduce in _REDUCTIONS:
            return _REDUCTIONS[reduce](torch.stack([torch.as_tensor(value) for value, _ in values]))
        times = len(values) / self._parts  # that each part has logged it
        return sum(value * share for value, share in values) / times


def _joined(outputs: list[Any], shares: Sequence[Tensor | float]) -> Any:
    """One training step's output from those of its parts: rows after each other, numbers averaged, else the last."""
    first = outputs[0]
    if len(outputs) == 1:
        return dict(first) if isinstance(first, Mapping) else first
    if isinstance(first, Mapping):
        return {key: _joined([output[key] for output in outputs], shares) for key in first}
    if isinstance(first, Tensor) and first.dim() > 0:
        return torch.cat(outputs)
    if isinstance(first, Tensor) and first.is_floating_point():
        return sum(value * share for value, share in zip(outputs, shares, strict=True))
    return outputs[-1]


def _detached(output: Any) -> Any:
    if isinstance(output, Mapping):
        return {key: _detached(value) for key, value in output.items()}
    return output.detach() if isinstance(output, Tensor) else output


def _shares(amounts: Sequence[Tensor | float]) -> list[Tensor | float]:
    if len(amounts) == 1:
        return [1.0]
    whole = sum(amounts)
    # Where nothing counts, all shares are 0.
    whole = torch.where(whole > 0, whole, 1.0) if isinstance(whole, Tensor) else whole or 1.0
    return [part / whole for part in amounts]


def _add(sums: list[Tensor | None], gradients: tuple[Tensor | None, ...]) -> None:
    """Sum tensor by tensor; not in place, for two parameters' gradients may be one tensor."""
    rest = list(gradients)
    del gradients
    for place, gradient in enumerate(rest):
        rest[place] = None
        before = sums[place]
        if gradient is not None:
            sums[place] = gradient if before is None else before + gradient


@contextmanager
def _replaced(module: LightningModule, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method of this one object replaced for a while."""
    own = module.__dict__.get(name)
    module.__dict__[name] = function
    try:
        yield
    finally:
        if own is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own
