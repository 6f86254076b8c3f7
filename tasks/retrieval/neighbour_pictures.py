"""Pictures of queries and their neighbours. Needs matplotlib (extra `examples`)."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainerkit.extras import require
from trainerkit.files import replacing

if TYPE_CHECKING:
    from trainerkit.tasks.retrieval.neighbours import Answer

_DPI = 100
_CELL = 1.25  # inches
_RIGHT = "tab:green"


def draw(path: Path, answers: Sequence["Answer"], pictures: Mapping[tuple[str, int], Tensor]) -> None:
    """A row a query: the query, then its neighbours with their similarities, the relevant ones in a green frame.

    Args:
        path: the picture, .png.
        answers: what was found.
        pictures: (C, H, W) with C = 1 or 3, by side ('query', 'positive') and row; a query without one is written out.
    """
    columns = 1 + max(len(answer.neighbours) for answer in answers)
    size = (_CELL * (columns + 0.6), _CELL * 1.25 * len(answers) + 0.3)
    # Figure instead of pyplot: no global state, no window system.
    figure = require("matplotlib.figure", "drawing pictures").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(answers), columns, squeeze=False, width_ratios=[1.6, *[1] * (columns - 1)])
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for row, answer in zip(axes, answers, strict=True):
        _query(row[0], answer.text, pictures.get(("query", answer.row)))
        for axis, neighbour in zip(row[1:], answer.neighbours, strict=False):
            _picture(axis, pictures[("positive", neighbour.row)])
            axis.set_title(f"{_short(neighbour.text, 18)}\n{neighbour.score:.3f}", fontsize=6)
            if neighbour.right:
                axis.spines[:].set(visible=True, color=_RIGHT, linewidth=3)
    with replacing(path) as temporary, warnings.catch_warnings():
        # Its fonts have no letter for every text, and draw an empty box for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, dpi=_DPI, format="png")


def _query(axis: Any, text: str, picture: Tensor | None) -> None:
    if picture is None:
        lines = textwrap.fill(shortened(text, 90), 18)
        axis.text(0.5, 0.5, _plain(lines), ha="center", va="center", fontsize=7, transform=axis.transAxes)
        return
    _picture(axis, picture)
    axis.set_title(f"query\n{_short(text, 24)}", fontsize=6)
    axis.spines[:].set(visible=True, color="0.3", linewidth=1)


def _picture(axis: Any, picture: Tensor) -> None:
    """Draw (C, H, W); what is beyond 0 to 1, as after subtracting a mean, is spread over it."""
    picture = picture.float().cpu()
    if picture.min() < 0 or picture.max() > 1:
        picture = (picture - picture.min()) / (picture.max() - picture.min())
    shown = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
    axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)


def shortened(text: str, width: int) -> str:
    """A text on one line of at most `width` letters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _short(text: str, width: int) -> str:
    return _plain(shortened(text, width))


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib takes what stands between two of them for a formula
