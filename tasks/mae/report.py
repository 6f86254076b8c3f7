"""What a trained masked autoencoder is worth, beside what needs no network: figures and pictures after each test.

Figures, logged as `test/…`: the masked error of mean fill, linear interpolation and the Gaussian conditional on the
same signals and masks; where there are labels, the share of test signals that are classified rightly from the latents
and from the raw signals. Pictures: reconstructions, the latents in two dimensions, the curves of the history.
"""

import json
import warnings
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.extras import require
from trainerkit.fsdp import is_cut
from trainerkit.tasks.mae import pictures
from trainerkit.tasks.mae.baselines import reconstruction_errors
from trainerkit.tasks.mae.task import MaskedAutoencoderTask

_BATCH = 1024
# Rows that baselines and probes look at, of larger data sets an even selection.
_MOST_TRAIN, _MOST_TEST = 20_000, 5_000


@runtime_checkable
class HasRows(Protocol):
    """A data module that can give a whole split at once."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; empty without labels."""

    def rows(self, split: Literal["train", "val", "test"], limit: int | None = None) -> dict[str, Tensor]:
        """At most `limit` rows of a split as one batch: `x` (N, L), `index` (N,), `y` (N,) where there are labels."""


class ReconstructionReport(Callback):
    """Compare with baselines after each test, and draw.

    Args:
        probes: classify the test signals where the data have labels: by logistic regression and the nearest neighbour
            on the latents, the nearest neighbour and a support vector machine on the raw signals. Class 0 means no
            label if it is named 'unlabelled'.
        pictures: write reconstruction.png, latents.png and history.png into the run's folder.
    """

    def __init__(self, probes: bool = True, pictures: bool = True) -> None:
        self.probes = probes
        self.pictures = pictures

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the optional packages before anything is trained."""
        data = getattr(trainer, "datamodule", None)
        if self.probes and isinstance(data, HasRows) and data.class_names:
            require("sklearn", "callbacks.reconstruction_report.probes=true")
        if self.pictures:
            require("matplotlib", "callbacks.reconstruction_report.pictures=true")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute on the first process, or with sharded parameters on all, which that takes; log on all."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, HasRows) or not isinstance(pl_module, MaskedAutoencoderTask):
            return
        figures: dict[str, float] = {}
        if trainer.is_global_zero or is_cut(pl_module):
            figures = self._report(Path(trainer.default_root_dir), pl_module, data, trainer.is_global_zero)
        figures = trainer.strategy.broadcast(figures)
        for name, value in figures.items():
            pl_module.log(f"test/{name}", value, rank_zero_only=True)

    @torch.no_grad()
    def _report(self, folder: Path, task: MaskedAutoencoderTask, data: HasRows, writes: bool) -> dict[str, float]:
        train, test = data.rows("train", _MOST_TRAIN), data.rows("test", _MOST_TEST)
        network = task.network
        visible = task.fixed_visible(test["index"])
        figures = reconstruction_errors(train["x"], test["x"], visible, network.n_patches)
        latents: dict[str, Tensor] = {}
        if "y" in test and (self.probes or self.pictures):
            latents = {"train": encode(task, train["x"]), "test": encode(task, test["x"])}
        if latents and self.probes and writes:
            figures |= probe(latents, train, test, data.class_names)
        if self.pictures:
            # Spread over the rows: neighbours look alike.
            spread = torch.linspace(0, len(test["x"]) - 1, 3).long()
            shown = test["x"][spread], visible[spread]
            x_recon, _, seen = network(shown[0].to(task.device), shown[1].to(task.device))
            if not writes:
                return figures
            pictures.reconstruction(folder / "reconstruction.png", shown[0], x_recon.float().cpu(), seen.cpu())
            if latents:
                pictures.latents(folder / "latents.png", latents["test"], test["y"], data.class_names)
            history = folder / "training_history.json"
            if history.exists():
                pictures.history(folder / "history.png", json.loads(history.read_text(encoding="utf-8")))
        return figures


def encode(task: MaskedAutoencoderTask, x: Tensor) -> Tensor:
    """Latents (N, Z) of signals (N, L), on the host."""
    parts = [task.network.encode(part.to(task.device)).float().cpu() for part in x.split(_BATCH)]
    return torch.cat(parts)


def probe(
    latents: dict[str, Tensor], train: dict[str, Tensor], test: dict[str, Tensor], class_names: list[str]
) -> dict[str, float]:
    """Share of labelled test signals classified rightly by simple classifiers trained on the labelled training ones.

    Args:
        latents: `train` (M, Z) and `test` (N, Z).
        train: a batch with `x` (M, L) and `y` (M,).
        test: a batch with `x` (N, L) and `y` (N,).
        class_names: if the first is 'unlabelled', class 0 is left out.

    Returns:
        `latent_linear`, `latent_1nn`, `raw_1nn` and `raw_svm` (C=100, γ=0.005), each an accuracy.
    """
    first = 1 if class_names[:1] == ["unlabelled"] else 0
    fit, judge = train["y"] >= first, test["y"] >= first
    labels, truth = train["y"][fit].numpy(), test["y"][judge].numpy()
    if len(truth) == 0 or len(np.unique(labels)) < 2:
        return {}
    linear_model = require("sklearn.linear_model", "callbacks.reconstruction_report.probes")
    neighbors = require("sklearn.neighbors", "callbacks.reconstruction_report.probes")
    svm = require("sklearn.svm", "callbacks.reconstruction_report.probes")
    z = {"train": latents["train"][fit].numpy(), "test": latents["test"][judge].numpy()}
    raw = {"train": train["x"][fit].numpy(), "test": test["x"][judge].numpy()}
    scale = z["train"].std(0).clip(1e-6)

    def accuracy(classifier: Any, inputs: dict[str, Any], over: Any = 1.0) -> float:
        with warnings.catch_warnings():
            # A probe that stops at its last iteration is as good a probe; its advice does not belong on the screen.
            warnings.simplefilter("ignore")
            return float(classifier.fit(inputs["train"] / over, labels).score(inputs["test"] / over, truth))

    return {
        "latent_linear": accuracy(linear_model.LogisticRegression(C=10, solver="newton-cholesky"), z, scale),
        "latent_1nn": accuracy(neighbors.KNeighborsClassifier(1), z),
        "raw_1nn": accuracy(neighbors.KNeighborsClassifier(1), raw),
        "raw_svm": accuracy(svm.SVC(C=100, gamma=0.005), raw),
    }
