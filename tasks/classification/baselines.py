"""What needs no network: the nearest neighbour, and a support vector machine, on the numbers as they are."""

import torch.nn.functional as F
from torch import Tensor

from trainerkit.extras import require

_SIDE = 32  # of pictures: larger ones are made smaller


def baselines(train: dict[str, Tensor], test: dict[str, Tensor]) -> dict[str, float]:
    """Shares of the test rows that are classified rightly.

    Args:
        train: `x` (M, …) and `y` (M,). Pictures (M, C, H, W) with a side above 32 are made smaller by means.
        test: `x` (N, …) and `y` (N,).

    Returns:
        `nearest_neighbour`, and `svm` with C = 10 and an RBF kernel of γ = 2 / (features · variance).

    Raises:
        trainerkit.errors.UserError: if scikit-learn is not installed.
    """
    neighbours = require("sklearn.neighbors", "callbacks.classification_report.baselines=true")
    svm = require("sklearn.svm", "callbacks.classification_report.baselines=true")
    x, test_x = (_flat(rows["x"]) for rows in (train, test))
    gamma = 2 / max(x.shape[1] * float(x.var()), 1e-12)
    found = {"nearest_neighbour": neighbours.KNeighborsClassifier(1), "svm": svm.SVC(C=10, gamma=gamma)}
    y, test_y = train["y"].numpy(), test["y"].numpy()
    return {name: float(model.fit(x.numpy(), y).score(test_x.numpy(), test_y)) for name, model in found.items()}


def _flat(x: Tensor) -> Tensor:
    if x.ndim == 4 and max(x.shape[2:]) > _SIDE:
        x = F.adaptive_avg_pool2d(x, _SIDE)
    return x.flatten(1)
