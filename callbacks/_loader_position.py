"""Where a training loader stands in its epoch, and how to get there again.

Lightning makes a `CombinedLoader` of the loaders and iterates that. `LoaderPosition` watches it: each epoch it notes
what the loaders begin with, and counts. A loader that was at batch n begins again with the same, and n batches are
passed over. What a batch draws at random depends on where it is read:

| loaders | begin with | pass over |
|---|---|---|
| one that has `state_dict` | its own state | nothing |
| one DataLoader with torch's samplers, no workers | the generators at `iter()` and the first `next()` | indices |
| the same with workers | the generators at `iter()` | batches that are read; indices if told so |
| any other: several, iterable data, own samplers | the seed of a stream of their own | batches that are read |

In the second and third row nothing is drawn between two batches that the next ones depend on, so watching is enough. In
the last one a shuffle buffer or a sampler draws between the steps, which draw too: there the loaders get a stream of
random numbers of their own, as workers have it.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trainerkit.functional.random import (
    RandomStream,
    State,
    generator_state,
    host_state,
    owned_generators,
    set_generator_state,
    set_host_state,
)

Replay = Literal["samples", "indices"]

# They draw from the global generators once, at their first index.
_KNOWN_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


@dataclass
class _Epoch:
    """What an epoch's batches follow from.

    Args:
        number: of the epoch; None before the first.
        fetched: batches that were asked for.
        start: the CPU's generators at `iter()`, where watching is enough.
        first: the same at the first `next()`.
        stream: the loaders' own, where it is not.
        generators: those that the loaders hold, at `iter()`.
        kept: whether its workers are those of the epoch before.
        states_before: of loaders that know their position, before the last batch, where one is held ready.
        before: the CPU's generators at that time.
    """

    number: int | None = None
    fetched: int = 0
    start: State | None = None
    first: State | None = None
    stream: RandomStream | None = None
    generators: State = field(default_factory=dict)
    kept: bool = False
    states_before: list[State] = field(default_factory=list)
    before: State | None = None

    def drawing(self) -> AbstractContextManager[Any]:
        """What to read in."""
        return nullcontext() if self.stream is None else self.stream


class LoaderPosition:
    """Watches the training loaders of a Trainer from `attach` to `detach`.

    Args:
        replay: 'samples' reads the batches that are passed over where workers read them; 'indices' never does.
    """

    def __init__(self, trainer: Any, replay: Replay) -> None:
        self._trainer = trainer
        self._replay = replay
        self._watched: list[tuple[Any, type[Any]]] = []
        self._waiting: Callable[[], None] | None = None
        self._goal: State | None = None
        self._epoch = _Epoch()

    def attach(self) -> None:
        """Watch whatever loader the Trainer is going to ask for."""
        source = self._trainer.fit_loop._data_source
        ask = source.dataloader
        source.dataloader = lambda: self._watch(ask())

    def detach(self) -> None:
        """Leave everything as it was."""
        vars(self._trainer.fit_loop._data_source).pop("dataloader", None)
        for loader, kind in self._watched:
            loader.__class__ = kind
        self._watched = []

    def _watch(self, given: Any) -> Any:
        self.arrive()
        combined = _combined_class(self._trainer)
        loader = given if isinstance(given, combined) else combined(given, "max_size_cycle")
        kind: Any = type(loader)
        loader.__class__ = _watched_class(kind)  # its iter() and next() are looked up there
        loader._position = self
        self._watched = [(loader, kind)]
        return loader

    # What Lightning does

    def before_next_use(self, action: Callable[[], None]) -> None:
        """Do something once, when Lightning next turns to the loaders.

        After `on_train_start` that is to tell the samplers their epoch: after everybody's `on_train_start`, and before
        everybody's `on_train_epoch_start`.
        """
        self._waiting = action

    def arrive(self) -> None:
        """Lightning turns to the loaders."""
        if self._waiting is not None:
            action, self._waiting = self._waiting, None
            action()

    def begin(self, combined: Any, iterate: Callable[[], Any], advance: Callable[[], Any]) -> None:
        """An epoch begins, or goes on where `go_to` said."""
        self.arrive()
        loaders = combined._flattened
        goal, self._goal = self._goal, None
        epoch = self._epoch = _Epoch(self._trainer.fit_loop.epoch_progress.current.processed)
        for loader in loaders:
            if is_seeded(loader) and hasattr(loader.dataset, "set_epoch"):
                loader.dataset.set_epoch(epoch.number)
        living = [one for one in loaders if getattr(one, "persistent_workers", False) and one._iterator is not None]
        keep = all(knows_position([one]) or self._by_index(one) for one in living)
        epoch.kept = goal["kept"] if goal is not None else bool(living) and keep
        if (goal is not None and not epoch.kept) or not keep:
            combined.reset()  # workers that live on would draw what depends on all epochs so far
        if knows_position(loaders):
            iterate()
            if goal is not None:
                epoch.fetched = goal["batches"]
                if goal["before"] is not None:
                    set_host_state(goal["before"])  # for the batch that the fetcher is going to hold ready
        elif goal is None:
            epoch.generators = self.generators(loaders)
            if needs_stream(loaders):
                epoch.stream = RandomStream(int(torch.empty((), dtype=torch.int64).random_().item()))
            else:
                epoch.start = host_state()
            with epoch.drawing():
                iterate()
        else:
            self._again(goal, combined, iterate, advance)

    def fetch(self, advance: Callable[[], Any]) -> Any:
        """A batch is asked for."""
        self.arrive()
        epoch = self._epoch
        if epoch.first is None and epoch.start is not None:
            epoch.first = host_state()
        if self._keeps_states():
            epoch.states_before = [loader.state_dict() for loader in self._loaders()]
            epoch.before = host_state()
        if epoch.stream is None:
            batch = advance()
        else:
            with epoch.stream:
                batch = advance()
        epoch.fetched += 1
        return batch

    def loader_states(self, states: Callable[[], list[State]]) -> list[State]:
        """The states that Lightning saves of loaders that know their position."""
        if not knows_position(self._loaders()):
            return []
        # The batch that is held ready was not trained on.
        return self._epoch.states_before if self._held() and self._epoch.states_before else states()

    # What a checkpoint holds

    def state(self) -> State:
        """Where the loaders stand.

        `batches` is None where that is not the middle of an epoch; `ends`: after its last batch; `ended`: in
        `on_train_epoch_end`.
        """
        loop, epoch = self._trainer.fit_loop, self._epoch
        in_epoch = epoch.number == loop.epoch_progress.current.processed
        ends = in_epoch and loop.epoch_loop._num_ready_batches_reached()
        state: State = {
            "reloaded": loop._last_train_dl_reload_epoch,
            "epoch": epoch.number,
            "batches": None,
            "ends": ends,
            "ended": loop.epoch_progress.current.completed < loop.epoch_progress.current.processed,
        }
        if in_epoch and not ends:
            state |= {
                "batches": epoch.fetched - self._held(),
                "start": epoch.start,
                "first": epoch.first,
                "stream": None if epoch.stream is None else epoch.stream.seed,
                "generators": epoch.generators,
                "kept": epoch.kept,
                "before": epoch.before if self._held() else None,
                "loaders": self.loader_states(lambda: [loader.state_dict() for loader in self._loaders()]),
            }
        return state

    def is_in(self, state: State) -> bool:
        """Whether the epoch that is to be trained is the one in whose middle the loaders stood."""
        now = self._trainer.fit_loop.epoch_progress.current.processed
        return state["batches"] is not None and bool(state["epoch"] == now)

    def go_to(self, state: State) -> None:
        """Go to where the loaders stood, in this epoch.

        Raises:
            ValueError: if the loaders are of another kind now.
        """
        loop = self._trainer.fit_loop
        combined = loop._combined_loader
        loaders = combined._flattened
        known = knows_position(loaders)
        had_state = state["start"] is None and state["stream"] is None
        if had_state != known or (not known and needs_stream(loaders) == (state["stream"] is None)):
            raise ValueError(
                "train_dataloader: is of another kind than that of the checkpoint, which stands in the middle of an "
                "epoch; resume with the same loader, or from the end of an epoch"
            )
        for loader in loaders:
            _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
        for loader, own in zip(loaders, state["loaders"], strict=False):
            loader.load_state_dict(own)
        self._goal = state
        iter(loop._data_fetcher)

    @staticmethod
    def generators(loaders: list[Any]) -> State:
        """The states of the generators that loaders, samplers and data sets hold."""
        return {name: generator_state(generator) for name, generator in owned_generators(loaders).items()}

    @staticmethod
    def set_generators(loaders: list[Any], states: State) -> None:
        """Undo whatever they drew since."""
        for name, generator in owned_generators(loaders).items():
            if name in states:
                set_generator_state(generator, states[name])

    # How

    def _again(self, goal: State, combined: Any, iterate: Callable[[], Any], advance: Callable[[], Any]) -> None:
        """Begin as the epoch began, and pass over the batches that were seen."""
        epoch, batches, loader = self._epoch, goal["batches"], combined._flattened[0]
        epoch.generators, epoch.start, epoch.first = goal["generators"], goal["start"], goal["first"]
        self.set_generators(combined._flattened, epoch.generators)
        if epoch.start is None:
            epoch.stream = RandomStream(goal["stream"])
        else:
            set_host_state(epoch.start)
        with epoch.drawing():
            if len(combined._flattened) > 1 or not self._by_index(loader):
                iterate()
                for _ in range(batches):
                    advance()
            elif loader.num_workers:
                with _beginning_at(loader, batches):
                    iterate()
            else:
                iterate()
                if epoch.first is not None:
                    set_host_state(epoch.first)
                indices = combined._iterator.iterators[0]._sampler_iter
                for _ in range(batches):
                    next(indices)
        epoch.fetched = batches

    def _by_index(self, loader: Any) -> bool:
        """Whether passing over indices is enough: samples do not depend on those before them."""
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return False
        known = loader.num_workers == 0 and draws_at_its_beginning(loader)
        return known or self._replay == "indices" or is_seeded(loader)

    def _held(self) -> int:
        """Batches that the fetcher holds ready: one where there is no length."""
        return len(getattr(self._trainer.fit_loop._data_fetcher, "batches", ()))

    def _keeps_states(self) -> bool:
        fetcher = self._trainer.fit_loop._data_fetcher
        return fetcher is not None and fetcher.length is None and knows_position(self._loaders())

    def _loaders(self) -> list[Any]:
        loaders: list[Any] = self._watched[0][0]._flattened
        return loaders


def is_seeded(loader: Any) -> bool:
    """Whether the samples say of themselves that they depend on seed, epoch and index alone."""
    return bool(getattr(getattr(loader, "dataset", None), "seeded_by_index", False))


def knows_position(loaders: list[Any]) -> bool:
    """Whether this is one loader with `state_dict` and `load_state_dict`; of several only some might be at an end."""
    return len(loaders) == 1 and hasattr(loaders[0], "state_dict") and hasattr(loaders[0], "load_state_dict")


def needs_stream(loaders: list[Any]) -> bool:
    """Whether something may be drawn between two batches, in this process, that later batches depend on."""
    return len(loaders) != 1 or not draws_at_its_beginning(loaders[0])


def draws_at_its_beginning(loader: Any) -> bool:
    """Whether what the order of batches draws is drawn at `iter()` and at the first index, and never later."""
    if iterates_its_own_way(loader):
        return False
    if isinstance(loader.dataset, IterableDataset):
        return bool(loader.num_workers)
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    return type(batches) in (BatchSampler, type(None)) and type(sampler) in _KNOWN_SAMPLERS


def iterates_its_own_way(loader: Any) -> bool:
    """Whether a loader has an `__iter__` that is not torch's."""
    return not (
        isinstance(loader, DataLoader) and type(loader).__iter__.__module__.startswith(("torch.", "torchdata."))
    )


@contextmanager
def _beginning_at(loader: Any, batches: int) -> Iterator[None]:
    """Have workers begin with a later batch; they are handed the first indices as soon as the loader is iterated."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    sampler = vars(loader)[name]
    later = _From(sampler, batches)

    def replace(by: Any) -> None:
        vars(loader)[name] = by  # DataLoader.__setattr__ forbids it
        if loader._iterator is not None:  # workers that live on
            loader._iterator._index_sampler = by

    replace(later)
    try:
        yield
    finally:
        replace(sampler)


class _From:
    """The entries of a sampler from the nth on."""

    def __init__(self, sampler: Any, passed: int) -> None:
        self.sampler = sampler
        self.passed = passed

    def __iter__(self) -> Iterator[Any]:
        entries = iter(self.sampler)
        for _ in range(self.passed):
            next(entries)
        yield from entries

    def __len__(self) -> int:
        return len(self.sampler)


def _combined_class(trainer: Any) -> type[Any]:
    """The CombinedLoader of the trainer's own namespace."""
    home = type(trainer.fit_loop).__module__.partition(".loops")[0]
    kind: type[Any] = importlib.import_module(f"{home}.utilities.combined_loader").CombinedLoader
    return kind


@lru_cache
def _watched_class(kind: Any) -> Any:
    class Watched(kind):  # type: ignore[misc]
        """A CombinedLoader that tells a `LoaderPosition` what is asked of it."""

        _position: LoaderPosition

        @property
        def flattened(self) -> list[Any]:
            self._position.arrive()
            loaders: list[Any] = self._flattened
            return loaders

        @flattened.setter
        def flattened(self, loaders: list[Any]) -> None:
            kind.flattened.fset(self, loaders)

        def __iter__(self) -> Any:
            self._position.begin(self, super().__iter__, super().__next__)
            return self

        def __next__(self) -> Any:
            return self._position.fetch(super().__next__)

        def _state_dicts(self) -> list[State]:
            return self._position.loader_states(super()._state_dicts)

    return Watched
