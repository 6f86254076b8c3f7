"""How alike made and real pictures are, from what a judge sees in them.

- frechet_distance: M. Heusel et al., 'GANs trained by a two time-scale update rule converge to a local Nash
  equilibrium', NeurIPS 2017, arXiv:1706.08500; computed by torchmetrics, whose class takes any network's features.
- precision_and_recall: T. Kynkäänniemi et al., 'Improved precision and recall metric for assessing generative models',
  NeurIPS 2019, arXiv:1904.06991.
"""

import math

import torch
from torch import Tensor, nn


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """|μ − μ'|² + tr(C + C' − 2(CC')^½) of the features' means and covariances.

    Args:
        real: features, (N, D), N ≥ 2.
        made: features, (M, D), M ≥ 2.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # late: it takes half a second

    # One process computes it for all: the others would not be there to be asked for theirs.
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), normalize=True, sync_on_compute=False)
    metric = metric.to(real.device)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return max(0.0, float(metric.compute()))  # rounding may give less


class _Given(nn.Module):
    """The network that torchmetrics asks for features: they are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def precision_and_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of made pictures that are as near to a real one as its k-th real neighbour is, and the other way round.

    Args:
        real: features, (N, D), N > k.
        made: features, (M, D), M > k.
        k: which neighbour's distance is a picture's radius.

    Raises:
        ValueError: for too few pictures.
    """
    if not 1 <= k < min(len(real), len(made)):
        raise ValueError(f"k={k}: must be from 1 to {min(len(real), len(made)) - 1}")
    between = _distances(real, made)
    # A picture's own distance, 0, is the first.
    radii = [_distances(x, x).kthvalue(k + 1, dim=1).values for x in (real, made)]
    precision = (between <= radii[0][:, None]).any(0).double().mean()
    recall = (between <= radii[1][None]).any(1).double().mean()
    return float(precision), float(recall)


def nearest_distance(x: Tensor, others: Tensor) -> float:
    """Mean distance of each row of x (N, D) to the nearest row of others (M, D)."""
    nearest = [torch.cdist(part, others).min(1).values for part in x.float().split(1000)]
    return float(torch.cat(nearest).double().mean())


def class_shares(predicted: Tensor, n_classes: int) -> Tensor:
    """Share of each class, (K,), among predicted classes (N,)."""
    return predicted.bincount(minlength=n_classes).double() / len(predicted)


def coverage(shares: Tensor, real: Tensor) -> float:
    """Share of the real pictures' classes that are found half as often, or more often, than among real pictures.

    Args:
        shares: of the classes among made pictures, (K,).
        real: the same among real ones, (K,).
    """
    there = real > 0
    return float((shares[there] >= real[there] / 2).double().mean())


def relative_entropy(shares: Tensor) -> float:
    """Entropy of shares (K,) divided by ln K: 1 if all classes are as frequent, 0 if there is one alone."""
    if len(shares) < 2:
        return 1.0
    return float(-torch.special.xlogy(shares, shares).sum() / math.log(len(shares)))


def _distances(x: Tensor, others: Tensor) -> Tensor:
    """Euclidean, (N, M); in float64, where a picture's distance to itself is 0 by far less than to another."""
    return torch.cdist(x.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
