"""A sweep in one picture: the value over the jobs, and against each parameter."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainerkit.extras import require
from trainerkit.files import replacing

_MOST = 8  # parameters that have a panel
_WIDE = 30  # ratio of the largest to the smallest number from which an axis is logarithmic

Row = tuple[int, dict[str, str], float]  # number, parameters, value


def draw(path: Path, rows: Sequence[Row], metric: str, rises: bool) -> None:
    """Draw the jobs that have a value.

    Args:
        path: the .png to write.
        rows: number, parameters and value of each, in the order of the numbers.
        metric: name of the value.
        rises: whether larger is better.

    Raises:
        UserError: if matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "A picture of a sweep")
    keys = list(dict.fromkeys(key for _, params, _ in rows for key in params))[:_MOST]
    columns = min(3, len(keys) + 1)
    lines = math.ceil((len(keys) + 1) / columns)
    figure = figures.Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    best = (max if rises else min)(rows, key=lambda row: row[2])
    _over_jobs(panels[0], rows, metric, rises)
    for panel, key in zip(panels[1:], keys, strict=False):
        _against(panel, [row for row in rows if key in row[1]], key, metric, best)
    for panel in panels[len(keys) + 1 :]:
        panel.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _over_jobs(panel: Any, rows: Sequence[Row], metric: str, rises: bool) -> None:
    values = [value for _, _, value in rows]
    so_far = [(max if rises else min)(values[: i + 1]) for i in range(len(values))]
    numbers = [number for number, _, _ in rows]
    panel.plot(numbers, values, "o", color="tab:blue", alpha=0.7)
    panel.step(numbers, so_far, where="post", color="tab:orange", label="best so far")
    panel.legend(frameon=False)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set(xlabel="job", ylabel=metric)


def _against(panel: Any, rows: Sequence[Row], key: str, metric: str, best: Row) -> None:
    texts = [params[key] for _, params, _ in rows]
    numbers = _numbers(texts)
    if numbers is None:
        names = list(dict.fromkeys(texts))
        numbers = [float(names.index(text)) for text in texts]
        panel.set_xticks(range(len(names)), [name[-18:] for name in names])
        panel.margins(x=0.2)
    elif min(numbers) > 0 and max(numbers) >= _WIDE * min(numbers):
        panel.set_xscale("log")
    elif all(map(float.is_integer, numbers)):
        panel.xaxis.get_major_locator().set_params(integer=True)
    panel.plot(numbers, [value for _, _, value in rows], "o", color="tab:blue", alpha=0.7)
    marked = [x for x, (number, _, _) in zip(numbers, rows, strict=True) if number == best[0]]
    panel.plot(marked, [best[2]] * len(marked), "*", color="tab:orange", markersize=14)
    panel.set(xlabel=key, ylabel=metric)


def _numbers(texts: Sequence[str]) -> list[float] | None:
    """The values as numbers; None if one of them is none."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
