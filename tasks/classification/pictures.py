"""The confusion matrix as a picture. Needs matplotlib (extra `examples`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from trainerkit.extras import require
from trainerkit.files import replacing

_DPI = 120
_MOST_NUMBERS, _MOST_NAMES = 30, 60  # classes; of more, numbers and names would run into each other


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Counts on squares that are the darker, the larger their share of the true class.

    Args:
        path: the picture, .png.
        confusion: (K, K) counts, a row a true class, a column a predicted one.
        classes: names of the K classes.
    """
    counts = confusion.cpu().numpy()
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    side = 2.2 + 0.38 * min(len(counts), _MOST_NUMBERS)
    # Figure instead of pyplot: no global state, no window system.
    figure = require("matplotlib.figure", "drawing pictures").Figure(figsize=(side + 0.6, side), layout="constrained")
    axis = figure.subplots()
    # The root shows the few that are wrong beside the many that are right.
    image = axis.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, ax=axis, shrink=0.8, ticks=np.sqrt([0, 0.01, 0.1, 0.5, 1]))
    bar.ax.set_yticklabels(["0", ".01", ".1", ".5", "1"])
    bar.set_label("share of the true class")
    if len(counts) <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.4 else "black"
                axis.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    if len(counts) <= _MOST_NAMES:
        names = [_short(name) for name in classes]
        is_long = max(map(len, names)) > 3
        axis.set_xticks(range(len(names)), names, rotation=60 if is_long else 0, ha="right" if is_long else "center")
        axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(f"{np.trace(counts)} of {counts.sum()} right", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")


def _short(name: str) -> str:
    name = name if len(name) <= 20 else f"{name[:19]}…"
    return name.replace("$", r"\$")  # matplotlib takes what stands between two of them for a formula
