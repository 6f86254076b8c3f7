"""All processes of a run compare what they are about to train, before the first step.

DistributedDataParallel copies rank 0's weights over everybody's and averages gradients of whatever the ranks compute.
A rank with another learning rate, another seed or older code trains on without a word, and the result is nobody's.
"""

import hashlib
import inspect
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import trainerkit
from trainerkit.callbacks._digest import digest_of, flat, shown
from trainerkit.callbacks._parameters import as_patterns, matches, named_parameters, plain_name
from trainerkit.callbacks._trainer import of_every_rank

_SETTINGS = (
    "world_size", "precision", "max_epochs", "min_epochs", "max_steps", "min_steps", "accumulate_grad_batches",
    "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "limit_val_batches", "overfit_batches",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps",
    "reload_dataloaders_every_n_epochs", "fast_dev_run",
)  # fmt: skip
_PACKAGES = ("trainerkit", "torch", "lightning", "pytorch-lightning", "numpy")
_NOT_OURS = ("builtins", "abc", "typing", "torch", "lightning", "pytorch_lightning", "lightning_fabric")
_SHOWN = 8  # keys in an error
_WIDTH = 60  # letters of a long value


class RanksDiffer(RuntimeError):
    """Two ranks were about to train different things; the message names rank and key, with each side's value."""


class RankConsensus(Callback):
    """Compare over all ranks what fit is about to train, and stop every one of them if they differ.

    A hash of 32 bytes is gathered when the model is built and once more when the loaders are; what the ranks have is
    exchanged only if the hashes differ. With one process it does nothing.

    Args:
        ignore: patterns of keys that may differ, like `callbacks.*`; None: nothing. Ignored weights are not read.
        facts: more to compare, by name, nested as it likes; trainerkit's own runs hand their resolved config in.

    Compared, in this order:

    - `version.NAME` of Python and packages; `code.NAME`: hashes of trainerkit's source and of the files that define the
      module's class and its bases; `seed`: that of Lightning's `seed_everything`.
    - `config.…`: `facts`; `module.…` and `data.…`: the hyperparameters that module and data module saved.
    - `trainer.…`: the settings that have to agree; `callbacks.N.…`: each callback's class and plain arguments.
    - `parameters.NAME`: dtype, shape, whether it is trained; `weights.NAME`: a hash of the first value of each
      parameter and buffer (not of sharded ones and those that are not made yet), restored ones included.
    - `batches.train`, `batches.val`: how many batches of an epoch this rank has.

    Raises:
        ValueError: for an empty pattern.
        RanksDiffer: in fit, on every rank, if anything differs.
    """

    def __init__(self, ignore: str | Sequence[str] | None = None, facts: Mapping[str, Any] | None = None) -> None:
        self.ignore = [] if ignore is None else as_patterns(ignore, "ignore")
        self.facts = facts
        self._patched: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare once all layers are there and before the strategy touches them.

        There is no hook at that moment: `on_fit_start` comes after DistributedDataParallel has copied rank 0's weights,
        or has waited for ever for a parameter that the others do not have.
        """
        if stage != "fit" or not _several(trainer):
            return
        strategy: Any = trainer.strategy
        original = strategy.setup

        def setup_after_comparing(trainer: Trainer) -> None:
            self._unpatch()
            self.compare(trainer, about_to_train(trainer, pl_module, self.facts))
            original(trainer)

        strategy.setup = setup_after_comparing
        self._patched = strategy

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy as it was, also where fit ended before its turn came."""
        self._unpatch()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the loaders: a rank with fewer batches would leave the others waiting at the epoch's end."""
        if _several(trainer):
            batches = {"batches.train": trainer.num_training_batches, "batches.val": list(trainer.num_val_batches)}
            self.compare(trainer, iter(batches.items()))

    def compare(self, trainer: Trainer, facts: Iterator[tuple[str, Any]]) -> None:
        """Compare named values over all ranks; every rank has to call it.

        Args:
            trainer: knows the other ranks.
            facts: pairs of name and value; a tensor or an array is compared by its hash.

        Raises:
            RanksDiffer: on every rank, if they differ.
        """
        own = {
            name: digest_of(value).hex()[:16] if isinstance(value, Tensor | np.ndarray) else shown(value)
            for name, value in facts
            if not matches(name, self.ignore)
        }
        found = hashlib.sha256(repr(sorted(own.items())).encode()).digest()
        tensor = torch.tensor(list(found), dtype=torch.uint8, device=trainer.strategy.root_device)
        hashes = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(hashes, tensor)
        if not all(torch.equal(tensor, other) for other in hashes):
            raise RanksDiffer(describe(of_every_rank(trainer, own)))

    def _unpatch(self) -> None:
        if self._patched is not None:
            vars(self._patched).pop("setup", None)
            self._patched = None


def _several(trainer: Trainer) -> bool:
    """Whether there are other processes that torch.distributed knows (XLA has a way of its own)."""
    return trainer.world_size > 1 and torch.distributed.is_initialized()


def about_to_train(
    trainer: Trainer, pl_module: LightningModule, facts: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """What a rank is about to train, by name, causes before consequences; draws no random numbers."""
    yield "version.python", platform.python_version()
    for package in _PACKAGES:
        yield f"version.{package}", _version(package)
    yield from _code(pl_module)
    yield "seed", os.environ.get("PL_GLOBAL_SEED")
    data: Any = getattr(trainer, "datamodule", None)
    for name, values in (
        ("config", facts),
        ("module", getattr(pl_module, "hparams", None)),
        ("data", getattr(data, "hparams", None)),
    ):
        yield from flat(dict(values or {}), name)
    for name in _SETTINGS:
        yield f"trainer.{name}", getattr(trainer, name, None)
    yield "trainer.strategy", type(trainer.strategy).__name__
    yield "trainer.deterministic", torch.are_deterministic_algorithms_enabled()
    yield "trainer.matmul_precision", torch.get_float32_matmul_precision()
    yield from _callbacks(trainer)
    yield from _tensors(pl_module)


def describe(ranks: Sequence[Mapping[str, str]]) -> str:
    """A sentence about each key that differs: what it is, on which ranks.

    Args:
        ranks: for each rank its values by name.
    """
    names = list(dict.fromkeys(name for own in ranks for name in own))
    lines = []
    differing = [name for name in names if len({own.get(name) for own in ranks}) > 1]
    for name in differing[:_SHOWN]:
        values: dict[str | None, list[int]] = {}
        for rank, own in enumerate(ranks):
            values.setdefault(own.get(name), []).append(rank)
        letters = zip(*(value for value in values if value is not None), strict=False)
        start = next((place for place, side in enumerate(letters) if len(set(side)) > 1), 0)
        sides = [f"{_around(start, value)} on {_ranks(who)}" for value, who in values.items()]
        lines.append(f"  {name}: {', '.join(sides)}")
    if len(differing) > _SHOWN:
        lines.append(f"  and {len(differing) - _SHOWN} more")
    return "\n".join([
        "the ranks are not about to train the same thing:",
        *lines,
        "Start every rank with the same command, code, packages and environment. What may differ on purpose: "
        f"RankConsensus(ignore=['{differing[0]}']).",
    ])  # fmt: skip


def _around(start: int, value: str | None) -> str:
    """A value, or of a long one what is around the place from which it differs."""
    if value is None:
        return "not there"
    if len(value) <= 2 * _WIDTH:
        return value
    begin, end = max(0, start - _WIDTH // 2), start + _WIDTH
    return f"{'…' if begin else ''}{value[begin:end]}{'…' if end < len(value) else ''}"


def _ranks(who: Sequence[int]) -> str:
    listed = ", ".join(map(str, who[:4])) + (f" and {len(who) - 4} more" if len(who) > 4 else "")
    return f"rank {listed}" if len(who) == 1 else f"ranks {listed}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code(pl_module: LightningModule) -> Iterator[tuple[str, Any]]:
    """Hashes of source: all of trainerkit's, and each file that the module's class and its bases come from."""
    folders = [Path(trainerkit.__file__).parent, Path(__file__).parent]  # two places in a checkout
    yield "code.trainerkit", _hash_of_files(sorted({file for folder in folders for file in folder.rglob("*.py")}))
    for kind in type(pl_module).__mro__:
        home = kind.__module__
        if home.partition(".")[0] in _NOT_OURS:
            continue
        try:
            file = inspect.getsourcefile(kind)
        except (OSError, TypeError):  # made in an interpreter, where there is no file
            continue
        if file is not None and Path(file).is_file():
            yield f"code.{home if home != '__main__' else Path(file).name}", _hash_of_files([Path(file)])


def _hash_of_files(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def _callbacks(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for number, callback in enumerate(callbacks):
        name = f"callbacks.{number}"
        yield name, type(callback).__qualname__
        if isinstance(callback, RankConsensus):
            continue  # its facts are compared anyway
        for argument in inspect.signature(type(callback)).parameters:
            value = vars(callback).get(argument, vars(callback).get(f"{argument}s"))  # EMA keeps decay as decays
            if isinstance(value, bool | int | float | str | list | tuple | dict):
                yield from flat(value, f"{name}.{argument}")


def _tensors(pl_module: LightningModule) -> Iterator[tuple[str, Any]]:
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in pl_module.modules()):
        return  # pieces of one flat tensor, of other lengths on each rank
    parameters = named_parameters(pl_module)
    for name, parameter in parameters.items():
        trained = "trained" if parameter.requires_grad else "frozen"
        yield f"parameters.{name}", f"{parameter.dtype} {tuple(parameter.shape)} {trained}"
    buffers = {plain_name(name): buffer for name, buffer in pl_module.named_buffers()}
    for name, tensor in (parameters | buffers).items():
        if not tensor.is_meta and not hasattr(tensor, "_local_tensor"):
            yield f"weights.{name}", tensor
