"""What keeps a resumed run from being the uninterrupted one, as far as it can be seen at the start of fit."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from trainerkit.callbacks._loader_position import Replay, is_seeded, iterates_its_own_way, knows_position
from trainerkit.callbacks._trainer import is_sharded


def inexact_reasons(trainer: Any, loaders: list[Any], replay: Replay) -> list[str]:
    """Why a resumed run may differ, a sentence each; none where it is exact.

    Args:
        trainer: of the run.
        loaders: its training loaders.
        replay: of `ExactResume`.
    """
    reasons = _of_the_device(trainer) if trainer.strategy.root_device.type == "cuda" else []
    if type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":
        reasons.append("training_step(dataloader_iter) may fetch batches ahead of those it trains on")
    if trainer.accumulate_grad_batches != 1 and is_sharded(trainer):
        reasons.append("checkpoints inside an accumulation window leave out the gradients of sharded parameters")
    for loader in loaders:
        own = knows_position([loader]) and (len(loaders) == 1 or iterates_its_own_way(loader))
        reasons += _of_workers(loader, replay) if own else _of_a_loader(loader)
    return reasons


def _of_the_device(trainer: Any) -> list[str]:
    reasons = []
    if torch.backends.cudnn.benchmark:
        reasons.append("cudnn.benchmark chooses algorithms by their time; use Trainer(benchmark=False)")
    if not torch.are_deterministic_algorithms_enabled():
        reasons.append("some CUDA operations add in an order that varies; use Trainer(deterministic=True)")
    elif torch.is_deterministic_algorithms_warn_only_enabled():
        reasons.append("some CUDA operations have no deterministic form, and deterministic='warn' lets them pass")
    return reasons


def _of_workers(loader: Any, replay: Replay) -> list[str]:
    if getattr(loader, "num_workers", 0) and not is_seeded(loader) and replay == "samples":
        return [
            f"what samples draw inside the workers of {_name(loader)} is not part of its state_dict; if they draw "
            "nothing, or by index (trainerkit.data.SeededSamples), say so with ExactResume(replay='indices')"
        ]
    return []


def _of_a_loader(loader: Any) -> list[str]:
    if isinstance(loader, (list, tuple, range, torch.Tensor)):
        return []
    if iterates_its_own_way(loader):
        return [
            f"{_name(loader)} has an __iter__ of its own and no state_dict, and is exact only if iterating it anew "
            "begins at its beginning"
        ]
    reasons = []
    if loader.num_workers and not loader.in_order:
        reasons.append(f"{_name(loader)}(in_order=False) gives batches in the order in which workers finish")
    if isinstance(loader.dataset, IterableDataset):
        reasons += [
            f"{_name(loader.dataset)} {what}, which goes on where it was when it is iterated anew"
            for what in _open_ends(loader.dataset)
        ]
    return reasons


def _open_ends(dataset: Any) -> list[str]:
    if isinstance(dataset, Iterator):
        return ["is its own iterator"]
    return [
        f"holds {'an open file' if hasattr(value, 'fileno') else 'an iterator'} ({name})"
        for name, value in vars(dataset).items()
        if isinstance(value, Iterator)
    ]


def _name(thing: Any) -> str:
    return type(thing).__name__
