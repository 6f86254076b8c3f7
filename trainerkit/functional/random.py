"""The state of random generators, in types that `torch.load(weights_only=True)` reads."""

import random
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Any]


def host_state() -> State:
    """The state of Python's, NumPy's and torch's global generators of the CPU, about 10 kB."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }


def set_host_state(state: State) -> None:
    """Undo whatever was drawn on the CPU since `host_state()` gave `state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())


def random_state() -> State:
    """The state of all global generators of this process: the CPU's, each CUDA device's, and Apple's."""
    # Where CUDA was not used so far nothing was drawn, and asking would start it up.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return host_state() | {"cuda": cuda, "mps": mps}


def set_random_state(state: State) -> None:
    """Undo whatever was drawn since `random_state()` gave `state`; devices that are not here any more are left out."""
    set_host_state(state)
    if torch.cuda.is_available():
        for index, device in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device.cpu(), index)
    if state.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


class RandomStream:
    """A stream of random numbers of its own: inside `with stream:` the CPU's global generators are the stream's.

    Args:
        seed: of the stream, 0 or more.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._state: State | None = None
        self._outside: State | None = None

    def __enter__(self) -> "RandomStream":
        self._outside = host_state()
        if self._state is None:
            seed_host(self.seed)
        else:
            set_host_state(self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = host_state()
        if self._outside is not None:
            set_host_state(self._outside)


def seed_host(seed: int) -> None:
    """Seed the global generators of the CPU, and of no device, with 63 bits."""
    random.seed(seed)
    # The third word: NumPy and Python have the same generator and would give the same numbers.
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32, 1])
    torch.default_generator.manual_seed(seed)


def owned_generators(roots: Iterable[Any]) -> dict[str, Any]:
    """The generators that objects hold: loaders, their samplers, data sets and transforms, by where they are.

    Looks at attributes and at the entries of short lists, tuples and dicts, six levels deep; a generator that is held
    in several places counts once.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    todo = [(str(number), root, 0) for number, root in enumerate(roots)]
    while todo:
        name, thing, depth = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            found[name] = thing
        elif depth < _DEPTH:
            todo += [(f"{name}.{key}", part, depth + 1) for key, part in _parts(thing)]
    return dict(sorted(found.items()))


_DEPTH = 6
_FEW = 64  # entries: longer containers hold samples


def _parts(thing: Any) -> list[tuple[str, Any]]:
    if isinstance(thing, (list, tuple, dict)):
        entries = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return [(str(key), part) for key, part in entries] if len(thing) <= _FEW else []
    if isinstance(thing, (Tensor, np.ndarray, type)) or type(thing).__module__ == "builtins":
        return []
    if isinstance(thing, nn.Module):
        return [*vars(thing).items(), *thing.named_children()]
    return list(vars(thing).items()) if hasattr(thing, "__dict__") else []


def generator_state(generator: Any) -> Any:
    """The state of one generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def set_generator_state(generator: Any, state: Any) -> None:
    """Undo whatever was drawn since `generator_state` gave `state`."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, internal, gauss_next = state
        generator.setstate((version, tuple(internal), gauss_next))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
