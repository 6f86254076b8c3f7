"""Clusters of the latents, which lie on a sphere: cosine k-means and a mixture of von Mises-Fisher distributions.

K-means on vectors of unit length is scikit-learn's, since ‖a − b‖² = 2 − 2·cos(a, b) there. No kept library has the
mixture; it is below, by expectation-maximisation: A. Banerjee et al., 'Clustering on the unit hypersphere using von
Mises-Fisher distributions', JMLR 6, 2005.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.extras import require
from trainerkit.files import write_json
from trainerkit.tasks.mae import pictures

_NEEDS = "callbacks=latent_clusters"


def vmf_log_normalizer(kappa: Tensor, dim: int) -> Tensor:
    """ln C_d(κ) of the density C_d(κ)·exp(κ·μᵀx) on the unit sphere in `dim` dimensions, for κ > 0.

    C_d(κ) = κ^ν / ((2π)^(d/2)·I_ν(κ)) with ν = d/2 − 1.
    """
    special = require("scipy.special", _NEEDS)
    order = dim / 2 - 1
    # ive is I·exp(−κ): I itself overflows at 700.
    log_bessel = torch.from_numpy(np.log(special.ive(order, kappa.double().numpy()))) + kappa.double()
    return order * kappa.double().log() - dim / 2 * math.log(2 * math.pi) - log_bessel


@dataclass
class VonMisesFisherMixture:
    """A fitted mixture of K components in d dimensions.

    Attributes:
        weights: share of each component, (K,).
        means: unit vectors, (K, d).
        kappas: concentrations, (K,).
        log_likelihood: of the data, mean per row.
        bic: Bayesian information criterion on the data; smaller is better.
    """

    weights: Tensor
    means: Tensor
    kappas: Tensor
    log_likelihood: float
    bic: float

    def log_joint(self, x: Tensor) -> Tensor:
        """ln(weight·density) of unit vectors (N, d) under each component, (N, K)."""
        log_c = vmf_log_normalizer(self.kappas, x.shape[1])
        return self.weights.log() + log_c + self.kappas * (x.double() @ self.means.T)

    def predict(self, x: Tensor) -> Tensor:
        """The likeliest component of unit vectors (N, d), (N,) int64."""
        return self.log_joint(x).argmax(1)


def fit_vmf_mixture(
    x: Tensor, n_components: int, *, seed: int = 0, max_iterations: int = 200, tolerance: float = 1e-6
) -> VonMisesFisherMixture:
    """Fit by expectation-maximisation in float64, begun from cosine k-means.

    Args:
        x: unit vectors, (N, d) with N ≥ K.
        n_components: K.
        seed: of the k-means.
        max_iterations: at the most.
        tolerance: stop when the mean log likelihood grows by less.

    The concentration is Banerjee's approximation κ = (r·d − r³)/(1 − r²), r the length of a component's mean vector.
    """
    x = torch.nn.functional.normalize(x.double(), dim=1)
    rows, dim = x.shape
    assigned = torch.from_numpy(cosine_kmeans(x, n_components, seed)[0]).long()
    shares = torch.nn.functional.one_hot(assigned, n_components).double()
    before = -math.inf
    for _ in range(max_iterations):
        mixture = _maximize(x, shares)
        joint = mixture.log_joint(x)
        log_likelihood = float(joint.logsumexp(1).mean())
        shares = joint.softmax(1)
        if log_likelihood - before < tolerance:
            break
        before = log_likelihood
    parameters = n_components * (dim - 1) + n_components + (n_components - 1)
    mixture.log_likelihood = log_likelihood
    mixture.bic = parameters * math.log(rows) - 2 * rows * log_likelihood
    return mixture


def _maximize(x: Tensor, shares: Tensor) -> VonMisesFisherMixture:
    mass = shares.sum(0).clamp_min(1e-10)
    resultant = shares.T @ x
    length = resultant.norm(dim=1).clamp_min(1e-10)
    mean_length = (length / mass).clamp(1e-6, 1 - 1e-6)
    kappas = (mean_length * x.shape[1] - mean_length**3) / (1 - mean_length**2)
    return VonMisesFisherMixture(mass / mass.sum(), resultant / length[:, None], kappas, math.nan, math.nan)


def cosine_kmeans(x: Tensor, n_clusters: int, seed: int = 0) -> tuple[Any, float]:
    """Cluster numbers (N,) of vectors (N, d) by direction, and the inertia Σ(1 − cos) to the own centre."""
    cluster = require("sklearn.cluster", _NEEDS)
    unit = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    model = cluster.KMeans(n_clusters, n_init=4, random_state=seed).fit(unit)
    centres = model.cluster_centers_ / np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True).clip(1e-12)
    return model.labels_, float((1 - (unit * centres[model.labels_]).sum(1)).sum())


def elbow(counts: list[int], values: list[float]) -> int:
    """The count where a falling curve bends most: the farthest below the line between its ends, both axes scaled to 1.

    Source: V. Satopää et al., 'Finding a Kneedle in a haystack', ICDCS workshops 2011.
    """
    x, y = np.asarray(counts, dtype=float), np.asarray(values, dtype=float)
    if len(x) < 3 or np.ptp(y) == 0:
        return counts[0]
    x, y = (x - x[0]) / (x[-1] - x[0]), (y - y[-1]) / (y[0] - y[-1])
    return counts[int(np.argmax((1 - x) - y))]


class LatentClusters(Callback):
    """After `stage=predict`: cluster the latents for several numbers of clusters, choose one, and write the labels.

    Writes `predictions/clusters.npy` (the k-means labels of all rows at the elbow of the inertia),
    `predictions/vmf_clusters.npy` (the mixture's at the smallest BIC), `clusters.json` (inertia, silhouette by cosine,
    and BIC for each number) and `clusters.png`.

    Args:
        min_clusters: the smallest number tried, 2 or more.
        max_clusters: the largest.
        max_rows: measure, and fit the mixture, on a random part of this size if there are more rows.
        seed: of that part and of the starts.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(self, min_clusters: int = 2, max_clusters: int = 12, max_rows: int = 5000, seed: int = 0) -> None:
        if min_clusters < 2:
            raise ValueError(f"min_clusters={min_clusters}: must be 2 or more")
        if max_clusters < min_clusters:
            raise ValueError(f"max_clusters={max_clusters}: must be min_clusters={min_clusters} or more")
        if max_rows <= max_clusters:
            raise ValueError(f"max_rows={max_rows}: must be more than max_clusters={max_clusters}")
        self.min_clusters = min_clusters
        self.max_clusters = max_clusters
        self.max_rows = max_rows
        self.seed = seed
        self._latents: list[Tensor] = []
        self._index: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the optional packages before anything is predicted."""
        if stage == "predict":
            require("sklearn", _NEEDS)
            require("matplotlib", _NEEDS)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the latents."""
        self._latents.append(outputs["latent"].cpu())
        self._index.append(outputs["index"].cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster and write."""
        if trainer.world_size > 1:
            raise RuntimeError("latent_clusters works on one process; predict with trainer.devices=1")
        latents = torch.cat(self._latents)[torch.cat(self._index).argsort()]
        self._latents, self._index = [], []
        # Lightning predicts in inference mode; the tensors leave it as ordinary ones.
        with torch.inference_mode(False):
            self._write(Path(trainer.default_root_dir), latents.clone())

    def _write(self, folder: Path, latents: Tensor) -> None:
        metrics = require("sklearn.metrics", _NEEDS)
        unit = torch.nn.functional.normalize(latents.double(), dim=1)
        generator = torch.Generator().manual_seed(self.seed)
        part = unit[torch.randperm(len(unit), generator=generator)[: self.max_rows]]
        counts = list(range(self.min_clusters, min(self.max_clusters, len(part) - 1) + 1))
        curves: dict[str, list[float]] = {"inertia": [], "silhouette": [], "vmf_bic": []}
        for count in counts:
            labels, inertia = cosine_kmeans(part, count, self.seed)
            curves["inertia"].append(inertia)
            sample = min(2000, len(part))
            curves["silhouette"].append(
                float(
                    metrics.silhouette_score(part, labels, metric="cosine", sample_size=sample, random_state=self.seed)
                )
            )
            curves["vmf_bic"].append(fit_vmf_mixture(part, count, seed=self.seed).bic)
        chosen = {
            "inertia": elbow(counts, curves["inertia"]),
            "silhouette": counts[int(np.argmax(curves["silhouette"]))],
            "vmf_bic": counts[int(np.argmin(curves["vmf_bic"]))],
        }
        out = folder / "predictions"
        out.mkdir(parents=True, exist_ok=True)
        np.save(out / "clusters.npy", cosine_kmeans(unit, chosen["inertia"], self.seed)[0])
        mixture = fit_vmf_mixture(part, chosen["vmf_bic"], seed=self.seed)
        np.save(out / "vmf_clusters.npy", mixture.predict(unit).numpy())
        write_json(folder / "clusters.json", {"clusters": counts, **curves, "chosen": chosen})
        pictures.elbow(folder / "clusters.png", counts, curves, chosen)
