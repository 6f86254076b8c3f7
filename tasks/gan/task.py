"""A generative adversarial network as a task: `python -m trainerkit task=gan`.

In each batch the discriminator learns to tell real pictures from made ones, and then the generator to be taken for
real. Source: I. Goodfellow et al., 'Generative adversarial nets', NeurIPS 2014, algorithm 1.

Noise and augmentation are drawn by epoch and row (`trainerkit.functional.row_draws`). So a resumed run, several
processes with smaller batches, and batches that are accumulated see the same numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from trainerkit.alternating import AlternatingTask, Turn
from trainerkit.functional.row_draws import row_draws, row_normals
from trainerkit.task import OptimizerFactory, SchedulerFactory
from trainerkit.tasks.gan.losses import KINDS, Kind, discriminator_loss, generator_loss
from trainerkit.tasks.gan.penalties import gradient_penalty, r1_penalty

# What numbers of a row are for.
STREAMS = {"discriminator": 0, "generator": 1, "augment real": 2, "augment made": 3, "penalty": 4, "evaluation": 5}


class GanTask(AlternatingTask):
    """Trains a generator and a discriminator.

    A batch is a mapping with `x`, pictures (B, C, H, W) in 0..1; where there are classes `y` (B,) int64; and `index`
    (B,), the rows' numbers in the data. Without `index`, rows are numbered in the order in which they come.

    Logged: `train/discriminator_loss` and `train/generator_loss`, without penalties; `train/gradient_penalty` and
    `train/r1`, without their weights; and both losses of validation and test, where a discriminator that has learnt
    the training pictures by heart shows.

    Predicted, for each row: `index`, `class` where there are classes, and `picture` (C, H, W) in 0..1, a made one of
    that class.

    Args:
        generator: makes pictures (B, C, H, W) in −1..1 from noise (B, Z), called with it and, where there are classes,
            `y`.
        discriminator: scores pictures (B, C, H, W) in −1..1, larger for real ones, (B,) or (B, 1); called likewise.
        noise_dim: Z.
        classes: how many, or their names; None or none of them to train without.
        loss: see `discriminator_loss`.
        gradient_penalty: weight of `gradient_penalty`; 10 in the paper, with 'wasserstein'.
        r1: weight of `r1_penalty` (γ); 0.1 to 10 for most pictures.
        r1_every: batches of an epoch between those that have it, then with so many times its weight, as T. Karras et
            al. found to do as well (arXiv:1912.04958, 'lazy regularization').
        augment: of all that the discriminator sees; called with pictures and as many uniform numbers a picture as its
            attribute `draws` says. None for nothing.
        wanted: in prediction, the name or number of every sample's class; None for the class of each row.
        seed: of noise and augmentation.
        optimizers: turns named 'discriminator' and 'generator'; None for one of each in each batch.
        optimizer: see `AlternatingTask`.
        scheduler: see `AlternatingTask`.

    Raises:
        ValueError: for another loss, a number or name that is not possible, or without one of the two turns.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        noise_dim: int = 64,
        classes: int | Sequence[str] | None = None,
        loss: Kind = "non_saturating",
        gradient_penalty: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
        augment: nn.Module | None = None,
        wanted: str | int | None = None,
        seed: int = 0,
        optimizers: Mapping[str, Turn] | None = None,
        optimizer: OptimizerFactory = Adam,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        names = ("discriminator", "generator")
        super().__init__(
            {name: Turn(name) for name in names} if optimizers is None else optimizers, optimizer, scheduler
        )
        self.save_hyperparameters()
        if not set(names) <= set(self.turns):
            raise ValueError(f"optimizers={list(self.turns)}: must have a discriminator and a generator")
        if loss not in KINDS:
            raise ValueError(f"loss={loss}: must be one of {', '.join(KINDS)}")
        for name, weight in (("gradient_penalty", gradient_penalty), ("r1", r1), ("seed", seed)):
            if weight < 0:
                raise ValueError(f"{name}={weight}: must be 0 or more")
        for name, count in (("noise_dim", noise_dim), ("r1_every", r1_every)):
            if count < 1:
                raise ValueError(f"{name}={count}: must be 1 or more")
        self.generator = generator
        self.discriminator = discriminator
        self.augment = augment
        self.noise_dim = noise_dim
        self.class_names = [str(name) for name in (range(classes) if isinstance(classes, int) else classes or ())]
        self.loss: Kind = loss
        self.gradient_penalty = gradient_penalty
        self.r1 = r1
        self.r1_every = r1_every
        self.seed = seed
        if wanted is not None and str(wanted) not in self.class_names:
            known = f"one of {', '.join(self.class_names)}" if self.class_names else "null, for there are no classes"
            raise ValueError(f"wanted={wanted}: must be {known}")
        self._wanted = None if wanted is None else self.class_names.index(str(wanted))

    def forward(self, rows: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples in 0..1, (B, C, H, W): those that evaluation makes for these row numbers (B,) and classes (B,)."""
        noise = row_normals(self.seed, 0, rows, self.noise_dim, STREAMS["evaluation"]).to(self.dtype)
        return (self._made(noise, y).to(self.dtype) + 1) / 2

    def turn_loss(self, name: str, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of the discriminator or the generator."""
        if name == "generator":
            return self._generator_loss(batch, batch_idx)
        if name == "discriminator":
            return self._discriminator_loss(batch, batch_idx)
        return super().turn_loss(name, batch, batch_idx)

    def on_validation_start(self) -> None:
        """Have all processes evaluate what a checkpoint holds: batch norm's statistics are the first one's."""
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Both losses."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Both losses."""
        self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """A sample for each row."""
        rows, y = self._rows(batch, batch_idx), self._classes(batch)
        if y is None:
            return {"index": rows, "picture": self(rows)}
        y = y if self._wanted is None else torch.full_like(y, self._wanted)
        return {"index": rows, "class": y, "picture": self(rows, y)}

    def noise(self, name: str, rows: Tensor) -> Tensor:
        """What pictures are made from in a turn, (B, Z).

        Args:
            name: of the turn.
            rows: numbers of the rows, (B,).
        """
        return row_normals(self.seed, self.current_epoch, rows, self.noise_dim, STREAMS[name]).to(self.dtype)

    def _discriminator_loss(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        rows, y = self._rows(batch, batch_idx), self._classes(batch)
        real = self._real(batch)
        with torch.no_grad():
            made = self._made(self.noise("discriminator", rows), y).to(real.dtype)
        real, made = self._augmented(real, rows, "augment real"), self._augmented(made, rows, "augment made")
        # Each by itself: batch norms would see another mix here than in the generator's turn.
        loss = discriminator_loss(self.loss, self._scores(real, y), self._scores(made, y))
        self.track("train/discriminator_loss", loss, weight=len(rows))
        return loss + self._penalties(real, made, rows, y, batch_idx)

    def _penalties(self, real: Tensor, made: Tensor, rows: Tensor, y: Tensor | None, batch_idx: int) -> Tensor:
        def score(x: Tensor) -> Tensor:
            return self._scores(x, y, differentiable_twice=True)

        total = real.new_zeros(())
        if self.gradient_penalty:
            share = row_draws(self.seed, self.current_epoch, rows, 1, STREAMS["penalty"])[:, 0].to(real.dtype)
            penalty = gradient_penalty(score, real, made, share)
            self.track("train/gradient_penalty", penalty, weight=len(rows))
            total = total + self.gradient_penalty * penalty
        if self.r1 and batch_idx % self.r1_every == 0:
            penalty = r1_penalty(score, real)
            self.track("train/r1", penalty, weight=len(rows))
            total = total + self.r1 * self.r1_every * penalty
        return total

    def _generator_loss(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        rows, y = self._rows(batch, batch_idx), self._classes(batch)
        made = self._made(self.noise("generator", rows), y)
        loss = generator_loss(self.loss, self._scores(self._augmented(made, rows, "augment made"), y))
        self.track("train/generator_loss", loss, weight=len(rows))
        return loss

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        rows, y = self._rows(batch, batch_idx), self._classes(batch)
        made = self._scores(self(rows, y) * 2 - 1, y)
        real = self._scores(self._real(batch), y)
        self.track(f"{stage}/discriminator_loss", discriminator_loss(self.loss, real, made), weight=len(rows))
        self.track(f"{stage}/generator_loss", generator_loss(self.loss, made), weight=len(rows))

    def _real(self, batch: Mapping[str, Tensor]) -> Tensor:
        return _pictures(batch).to(self.dtype) * 2 - 1

    def _made(self, noise: Tensor, y: Tensor | None) -> Tensor:
        pictures: Tensor = self.generator(noise) if y is None else self.generator(noise, y)
        return pictures

    def _scores(self, x: Tensor, y: Tensor | None, differentiable_twice: bool = False) -> Tensor:
        # Compiled code has no second derivative; `forward` is the code that was not compiled.
        call = self.discriminator.forward if differentiable_twice else self.discriminator
        scores: Tensor = call(x) if y is None else call(x, y)
        return scores.flatten()

    def _augmented(self, x: Tensor, rows: Tensor, stream: str) -> Tensor:
        if self.augment is None:
            return x
        needed: Any = self.augment.draws
        changed: Tensor = self.augment(x, row_draws(self.seed, self.current_epoch, rows, needed, STREAMS[stream]))
        return changed

    def _classes(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        if not self.class_names:
            return None
        if "y" not in batch:
            raise ValueError(f"classes={len(self.class_names)}: the batches have no y; take classes=null")
        return batch["y"]

    def _rows(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        if "index" in batch:
            return batch["index"]
        x = _pictures(batch)
        if batch_idx == 0:  # all batches but the last have the size of the first
            self._first_size = len(x)
        place = batch_idx * getattr(self, "_first_size", len(x)) + torch.arange(len(x), device=x.device)
        return place * self.trainer.world_size + self.trainer.global_rank


def _pictures(batch: Any) -> Tensor:
    x = batch.get("x") if isinstance(batch, Mapping) else None
    if not isinstance(x, Tensor) or x.ndim != 4:
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"batch: must be a mapping with pictures 'x' (B, C, H, W), got {found}")
    return x
