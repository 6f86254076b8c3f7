"""What went bad first in a training step, and the file from which the step can be run again.

A dump is a dictionary of plain tensors and Python values (`torch.load(weights_only=True)` reads it): the batch, the
random state, all weights and buffers as they were before the step, and what is needed to build the module and run it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainerkit.callbacks._parameters import named_parameters, plain_name
from trainerkit.callbacks._twin import run_step, unseen
from trainerkit.files import replacing

FORMAT = 1  # of a dump


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all tensors are finite, as one bool tensor on the device of the first; nothing is copied to the host.

    By their 2-norms, which are one pass in foreach calls. It is wrong to one side only: elements beyond 1e19 whose
    squares overflow float32 are taken for infinite; `exactly_finite` tells.

    Args:
        tensors: of any shapes, float types and devices; sparse ones by their values.
    """
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        values = _values(tensor)
        buckets.setdefault((values.device, values.dtype), []).append(values)
    flags = []
    for (_, dtype), bucket in buckets.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        flags.append(torch.stack(torch._foreach_norm(bucket, 2, wide)).isfinite().all())
    if not flags:
        return torch.tensor(True)
    return torch.stack([flag.to(flags[0].device, non_blocking=True) for flag in flags]).all()


def exactly_finite(tensor: Tensor) -> bool:
    """Whether every element is finite; waits for the device."""
    return bool(torch.isfinite(_values(tensor.detach())).all())


def _values(tensor: Tensor) -> Tensor:
    # Not coalesced, for which the device would have to be waited for.
    return tensor._values() if tensor.is_sparse else tensor


@dataclass(frozen=True)
class Finding:
    """What went bad first in a step.

    Attributes:
        where: 'weights', 'batch', 'forward', 'loss' or 'backward'.
        module: name of the module it happened in; '' where there is none.
        parameter: name of the parameter; '' where there is none.
        text: the same as a sentence.
    """

    where: str
    module: str
    parameter: str
    text: str


class Replay:
    """Runs training steps on a twin of a module and looks for the first thing that is not finite.

    Args:
        twin: from `make_twin`; its buffers move on with each step.
        context: what the forward pass runs in (autocast).
        scale: what the gradient scaler does to the loss.
    """

    def __init__(
        self, twin: Any, context: Callable[[], AbstractContextManager[Any]], scale: Callable[[Tensor], Tensor]
    ) -> None:
        self.twin = twin
        self.context = context
        self.scale = scale
        self._forward: Finding | None = None
        self._backward: Finding | None = None

    def step(self, batch: Any, batch_idx: int) -> Finding | None:
        """Forward and backward of one batch; None if all of it is finite."""
        found = _in_weights(self.twin) or _in_batch(batch)
        self._forward = self._backward = None
        self.twin.zero_grad()
        self.twin.losses = []
        handles = list(self._hooks())
        # Also where something was found: layers that wait for other ranks need all ranks to run.
        try:
            with unseen():
                with self.context():
                    loss = run_step(self.twin, batch, batch_idx)
                if loss is not None and self.twin.automatic_optimization:
                    self.twin.losses.append(loss.detach())
                    if loss.requires_grad:
                        self.scale(loss).backward()
        finally:
            for handle in handles:
                handle.remove()
        return found or self._forward or _in_losses(self.twin.losses) or self._backward

    def _hooks(self) -> Iterator[Any]:
        for name, module in self.twin.named_modules():
            yield module.register_forward_hook(self._after_forward(plain_name(name)))
        for name, parameter in named_parameters(self.twin).items():
            if parameter.requires_grad:
                yield parameter.register_hook(self._after_backward(name))

    def _after_forward(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._forward is None and (bad := _count(output, with_masks=True)):
                given = "finite input" if not _count(inputs) else "input that was not finite"
                label = f"module {name!r} ({type(module).__name__})" if name else "the module as a whole"
                sizes = {key: float(p.detach().abs().max()) for key, p in module.named_parameters(recurse=False)}
                largest = max(sizes, key=sizes.__getitem__, default="")
                parameter = f"{name}.{largest}".lstrip(".") if largest else ""
                weight = f"; its largest weight is {sizes[largest]:.3g}, in {parameter!r}" if largest else ""
                self._forward = Finding("forward", name, parameter, f"{label} gave {bad} from {given}{weight}")

        return hook

    def _after_backward(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self._backward is None and (bad := _count(gradient)):
                text = f"in backward, the gradient of parameter {name!r} is the first that holds {bad}"
                self._backward = Finding("backward", name.rpartition(".")[0], name, text)

        return hook


def _in_weights(module: nn.Module) -> Finding | None:
    for name, parameter in named_parameters(module).items():
        if bad := _count(parameter):
            text = f"parameter {name!r} held {bad} before this step"
            return Finding("weights", name.rpartition(".")[0], name, text)
    for name, buffer in module.named_buffers():
        # An attention mask, say, holds infinities on purpose.
        if buffer.isnan().any():
            text = f"buffer {plain_name(name)!r} held {_count(buffer)} before this step"
            return Finding("weights", plain_name(name).rpartition(".")[0], plain_name(name), text)
    return None


def _in_batch(batch: Any) -> Finding | None:
    for path, tensor in _leaves(batch, "batch"):
        if bad := _count(tensor, with_masks=True):
            return Finding("batch", "", "", f"the batch itself holds {bad}, in {path}")
    return None


def _in_losses(losses: Sequence[Tensor]) -> Finding | None:
    for number, loss in enumerate(losses):
        if bad := _count(loss):
            which = "the loss" if len(losses) == 1 else f"loss {number + 1} of {len(losses)}"
            text = f"every module's output was finite, but {which} holds {bad}: it happens in training_step itself"
            return Finding("loss", "", "", text)
    return None


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}[{index}]")


def _count(value: Any, with_masks: bool = False) -> str:
    """'3 NaN and 1 infinite of 64 values' of all float tensors in a nest; '' if all are finite.

    `with_masks` takes negative infinity alone for what it mostly is among activations and inputs: a mask.
    """
    tensors = [_values(leaf.detach()) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    tensors = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    nan = sum(int(tensor.isnan().sum()) for tensor in tensors)
    infinite = sum(int(tensor.isinf().sum()) for tensor in tensors)
    if with_masks and not nan and all(tensor.is_floating_point() for tensor in tensors):
        infinite *= any(bool(tensor.isposinf().any()) for tensor in tensors)
    total = sum(tensor.numel() for tensor in tensors)
    return f"{nan} NaN and {infinite} infinite of {total} values" if nan or infinite else ""


def describe_step(twin: Any, batch: Any, batch_idx: int, random: Mapping[str, Any]) -> dict[str, Any]:
    """What a dump holds of a step, the twin being as it was before it.

    Args:
        twin: a copy of the module.
        batch: what the step gets; left out if it is made of anything but tensors and plain Python values.
        batch_idx: its index.
        random: the `random_state` that it begins with.
    """
    parameters = named_parameters(twin)
    content: dict[str, Any] = {"format": FORMAT, "batch_idx": batch_idx, "random": dict(random)}
    try:
        content["batch"] = as_plain(batch)
    except TypeError as error:
        content["batch_left_out"] = str(error)
    return content | {
        "weights": {name: as_plain(parameter) for name, parameter in parameters.items()},
        "buffers": {plain_name(name): as_plain(buffer) for name, buffer in twin.named_buffers()},
        "frozen": [name for name, parameter in parameters.items() if not parameter.requires_grad],
        "evaluating": [plain_name(name) for name, module in twin.named_modules() if not module.training],
        "hyperparameters": _plain_items(getattr(twin, "hparams", {})),
        "device": twin.device.type,
    }


def write_dump(path: Path, content: Mapping[str, Any]) -> None:
    """Write a dump, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(dict(content), temporary)


def as_plain(value: Any) -> Any:
    """A copy on the CPU of what `torch.load(weights_only=True)` can read.

    Raises:
        TypeError: for anything but tensors, numbers, strings, None and dictionaries, lists and tuples of these.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if type(value) is dict:
        return {as_plain(key): as_plain(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(as_plain(part) for part in value)
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is not made of tensors and plain values")


def _plain_items(values: Mapping[str, Any]) -> dict[str, Any]:
    plain = {}
    for key, value in dict(values).items():
        try:
            plain[key] = as_plain(value)
        except TypeError:
            continue
    return plain


def spell_class(kind: type) -> str | None:
    """How the command line finds a class: 'package.module:Class', or 'file.py:Class' of a script; None if it cannot."""
    if "<locals>" in kind.__qualname__:
        return None
    if kind.__module__ != "__main__":
        return f"{kind.__module__}:{kind.__qualname__}"
    script = getattr(sys.modules["__main__"], "__file__", None)
    return f"{Path(script).resolve()}:{kind.__qualname__}" if script else None
