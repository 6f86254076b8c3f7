"""The training runs in which callbacks are examined: a small module in many variants, of either Lightning namespace."""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from trainerkit.data.loader import ArrayDataset, BatchLoader, EpochBatches

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
BATCHES, ROWS = 4, 8  # of an epoch, of a batch over all processes
_WIDTH = 6

MakeCallback = Callable[[], Any]


def namespace(name: str = "lightning.pytorch") -> ModuleType:
    """One of Lightning's two packages, whose classes are different objects."""
    return importlib.import_module(name)


@lru_cache
def module_class(name: str = "lightning.pytorch") -> type[Any]:
    """The module of the bench, as a LightningModule of the given namespace."""

    class Bench(namespace(name).LightningModule):  # type: ignore[misc]
        """Regression by a backbone and a head; by a pair of optimizers where optimization is manual.

        A bias and a shift begin equal, a weight is tied, a layer is frozen. Options add a batch norm, a compiled
        backbone, layers that are built in `configure_model`, a parameter that no gradient reaches, one that is added at
        the start of fit.
        """

        def __init__(
            self,
            manual: bool = False,
            batch_norm: bool = False,
            compiled: bool = False,
            late: bool = False,
            unused: bool = False,
            grows: bool = False,
            scores: Sequence[float] | None = None,
            fails: str = "",
        ) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.late, self.compiled, self.batch_norm, self.grows = late, compiled, batch_norm, grows
            self.scores = scores  # what is logged as val/loss, epoch by epoch
            self.fails = fails
            if unused:
                self.unused = nn.Parameter(torch.ones(2))
            if not late:
                self.build()

        def configure_model(self) -> None:
            if self.late and not hasattr(self, "head"):
                self.build()

        def on_fit_start(self) -> None:
            if self.grows:
                self.register_parameter("added", nn.Parameter(torch.ones(3), requires_grad=False))

        def build(self) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                norm = nn.BatchNorm1d(_WIDTH) if self.batch_norm else nn.LayerNorm(_WIDTH)
                backbone = nn.Sequential(nn.Linear(4, _WIDTH), norm, nn.Tanh(), nn.Linear(_WIDTH, _WIDTH))
                for name in ("0.bias", "3.bias"):
                    nn.init.zeros_(backbone.get_parameter(name))
                self.frozen = nn.Linear(_WIDTH, _WIDTH).requires_grad_(False)
                self.head = Tied()
            self.backbone = torch.compile(backbone, backend="eager") if self.compiled else backbone

        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            hidden = self.backbone(batch["x"])
            hidden = hidden + self.frozen(hidden)
            loss: Tensor = (self.head(hidden)[:, 0] - batch["y"]).square().mean()
            return loss

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            if self.fails == "training" and self.trainer.current_epoch == 1 and batch_idx == 2:
                raise Failure
            loss = self.loss(batch)
            if self.fails == "overflow" and batch_idx == 1:
                loss = loss * float("inf")
            if self.automatic_optimization:
                return loss
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
            return None

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            if self.fails == "validation" and self.trainer.current_epoch == 1:
                raise Failure
            if self.fails == "interrupt" and self.trainer.current_epoch == 1:
                raise KeyboardInterrupt
            loss = self.loss(batch)
            if self.scores is not None:
                loss = torch.tensor(self.scores[self.trainer.current_epoch])
            self.log("val/loss", loss, sync_dist=self.trainer.world_size > 1, batch_size=len(batch["x"]))

        def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.log("test/loss", self.loss(batch), batch_size=len(batch["x"]))

        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            return {"index": batch["index"], "hidden": self.backbone(batch["x"])}

        def configure_optimizers(self) -> Any:
            def adam(*modules: Any) -> torch.optim.Optimizer:
                # As people write it who fine-tune: what is frozen now is not the optimizer's.
                chosen = [p for module in modules for p in module.parameters() if p.requires_grad]
                return torch.optim.Adam(chosen, lr=0.02)

            if self.automatic_optimization:
                return adam(self)
            return [adam(self.backbone), adam(self.head)]

        def train_dataloader(self) -> BatchLoader:
            return self._loader(BATCHES, seed=1)

        def val_dataloader(self) -> BatchLoader:
            return self._loader(2, seed=2)

        test_dataloader = predict_dataloader = val_dataloader

        def _loader(self, batches: int, seed: int) -> BatchLoader:
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(batches * ROWS, 4, generator=generator)
            data = ArrayDataset({"x": x, "y": x.sum(1).sin()})
            ranks, rank = self.trainer.world_size, self.trainer.global_rank
            order = EpochBatches(len(data), ROWS // ranks, shuffle=False, num_replicas=ranks, rank=rank)
            return BatchLoader(data, order)

    return Bench


class Tied(nn.Module):
    """A shift, then two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(_WIDTH))
        self.first, self.second = nn.Linear(_WIDTH, 1), nn.Linear(_WIDTH, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Both outputs, (B, 1)."""
        x = x + self.shift
        both: Tensor = self.first(x) + 0.1 * self.second(x)
        return both


class Failure(RuntimeError):
    """What a module raises in the middle of a run when it is asked to."""


@dataclass
class Run:
    """A run that is over, and what was seen on the way."""

    trainer: Any
    module: Any
    callbacks: list[Any]
    witness: Any

    @property
    def weights(self) -> dict[str, Tensor]:
        """The module's weights now."""
        return weights_of(self.module)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@lru_cache
def witness_class(name: str = "lightning.pytorch") -> type[Any]:
    """A callback that sees what each batch left behind, after all others; and saves a checkpoint after some batches."""

    class Witness(importlib.import_module(f"{name}.callbacks").Checkpoint):  # type: ignore[misc]
        def __init__(self, folder: Path, saves: Sequence[int] = ()) -> None:
            self.folder = folder
            self.saves = saves
            self.batches = 0
            self.live: dict[str, Tensor] = {}
            self.validated: list[float] = []
            self.after_batch: Callable[[], None] | None = None

        def state_dict(self) -> dict[str, Any]:
            return {"batches": self.batches, "validated": list(self.validated)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.batches, self.validated = state_dict["batches"], state_dict["validated"]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if self.after_batch is not None:
                self.after_batch()
            self.batches += 1
            self.live = weights_of(pl_module)
            if (
                not trainer.is_last_batch
            ):  # else the validation has to be in it, which Lightning would never make up for
                self._save(trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self._save(trainer)

        def _save(self, trainer: Any) -> None:
            if self.batches in self.saves:
                trainer.save_checkpoint(self.folder / f"{self.batches}.ckpt")
                trainer.save_checkpoint(self.folder / f"{self.batches}-weights.ckpt", weights_only=True)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                self.validated.append(float(trainer.callback_metrics["val/loss"]))

    return Witness


class Bench:
    """Makes runs with the callbacks that `makers` make anew each time.

    Args:
        makers: make the callbacks.
        folder: an empty folder.
        logger: whether the runs have a logger unless they say otherwise.
    """

    def __init__(self, makers: Sequence[MakeCallback], folder: Path, logger: bool = False) -> None:
        self.makers = list(makers)
        self.folder = folder
        self.logger = logger
        self._runs = 0

    def trainer(self, callbacks: Sequence[Any], name: str = "lightning.pytorch", **options: Any) -> Any:
        """A quiet trainer of the namespace."""
        self._runs += 1
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "logger": CSVLogger(self.folder) if self.logger else False,
            "enable_progress_bar": False,
            "max_epochs": 2,
        }
        defaults |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1000}
        defaults |= {"default_root_dir": self.folder / str(self._runs)} | options
        checkpoints = any(_is_checkpoint(callback) for callback in callbacks)
        return namespace(name).Trainer(callbacks=list(callbacks), enable_checkpointing=checkpoints, **defaults)

    def fit(
        self,
        name: str = "lightning.pytorch",
        *,
        callbacks: Sequence[Any] | None = None,
        first: Sequence[Callback] = (),
        saves: Sequence[int] = (),
        resume: Path | None = None,
        module: dict[str, Any] | None = None,
        expect: type[BaseException] | None = None,
        **options: Any,
    ) -> Run:
        """One fit.

        Args:
            name: the namespace of trainer and module.
            callbacks: those of an earlier run; None makes new ones.
            first: callbacks that stand before.
            saves: after which batches to save `folder/<number>.ckpt`.
            resume: a checkpoint to go on from.
            module: options of the bench's module.
            expect: an exception that ends the run.
            options: of the trainer.
        """
        made = [make() for make in self.makers] if callbacks is None else list(callbacks)
        witness = witness_class(name)(self.folder, saves)
        trainer = self.trainer([*first, *made, witness], name, **options)
        subject = module_class(name)(**(module or {}))
        with suppress(expect) if expect is not None else nullcontext():
            trainer.fit(subject, ckpt_path=resume)
        return Run(trainer, subject, made, witness)


@contextmanager
def quiet() -> Iterator[None]:
    """No advice, no warnings and no device lines: what is found is said in the end."""
    for name in NAMESPACES:
        namespace(name)  # importing it sets its logger up
    loggers = [logging.getLogger(name) for name in (*NAMESPACES, "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _is_checkpoint(callback: Any) -> bool:
    return any(kind.__name__ == "Checkpoint" for kind in type(callback).__mro__)
