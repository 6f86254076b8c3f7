"""Pictures of a masked autoencoder: reconstructions, latents, curves. Needs matplotlib (extra `examples`)."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trainerkit.extras import require
from trainerkit.files import replacing

_DPI = 120


def reconstruction(path: Path, x: Tensor, x_recon: Tensor, seen: Tensor) -> None:
    """A column a signal: what it is, what the network saw of it, what it made of that.

    Args:
        path: the picture, .png.
        x: signals, (N, L).
        x_recon: reconstructions, (N, L).
        seen: True where visible, (N, L).
    """
    figure, axes = _axes(3, len(x), (4.2 * len(x), 6.0))
    place = np.arange(x.shape[1])
    for column in range(len(x)):
        signal, hidden = x[column].numpy(), ~seen[column].numpy()
        filled = np.where(hidden, x_recon[column].numpy(), np.nan)
        titles = ("original", "masked", "reconstructed")
        for axis, title in zip(axes[:, column], titles, strict=True):
            axis.set_title(f"{title}, signal {column + 1}" if title == "original" else title, fontsize=9, loc="left")
            axis.set_xlim(0, len(place) - 1)
        axes[0, column].plot(place, signal, color="0.25", linewidth=1)
        axes[1, column].plot(place, np.where(hidden, np.nan, signal), color="tab:blue", linewidth=1.4)
        axes[2, column].plot(place, signal, color="0.7", linewidth=1, label="original")
        axes[2, column].plot(place, filled, color="tab:red", linewidth=1, label="filled in")
        axes[2, column].plot(place, np.where(hidden, np.nan, signal), color="tab:blue", linewidth=1.4, label="seen")
        for axis in axes[1:, column]:
            axis.set_ylim(axes[0, column].get_ylim())
        axes[2, column].set_xlabel("band")
    axes[2, 0].legend(fontsize=7)
    _save(figure, path)


def latents(path: Path, z: Tensor, y: Tensor, class_names: list[str]) -> None:
    """Latents (N, Z) on their two main axes, coloured by class (N,); 'unlabelled' is left out."""
    figure, axes = _axes(1, 1, (7.5, 5.0))
    axis = axes[0, 0]
    first = 1 if class_names[:1] == ["unlabelled"] else 0
    points, classes = z[y >= first].double(), y[y >= first].numpy()
    centred = (points - points.mean(0)).numpy()
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    flat = centred @ directions.T
    colours = require("matplotlib", "latents.png").colormaps["tab20"]
    for number in np.unique(classes):
        of_class = flat[classes == number]
        axis.scatter(*of_class.T, s=7, color=colours(number % 20), label=_name(class_names, number), linewidths=0)
    axis.set_xlabel("first principal axis of the latents")
    axis.set_ylabel("second")
    axis.legend(fontsize=7, markerscale=2.5, bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)
    _save(figure, path)


def history(path: Path, records: list[dict[str, Any]]) -> None:
    """Losses and learning rate over the epochs of `training_history.json`."""
    figure, axes = _axes(1, 2, (9.0, 3.4))
    epochs = [record["epoch"] for record in records]
    for name, colour in (("train_loss", "tab:blue"), ("val_loss", "tab:red")):
        values = [np.nan if record[name] is None else record[name] for record in records]
        axes[0, 0].plot(epochs, values, color=colour, marker=".", label=name)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_title("loss", fontsize=9, loc="left")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].plot(epochs, [record["lr"] for record in records], color="0.25", marker=".")
    axes[0, 1].set_title("learning rate after the epoch", fontsize=9, loc="left")
    ticker = require("matplotlib.ticker", "drawing pictures")
    for axis in axes[0]:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    _save(figure, path)


def elbow(path: Path, counts: list[int], curves: dict[str, list[float]], chosen: dict[str, int]) -> None:
    """A panel a measure over the number of clusters, the chosen number marked."""
    figure, axes = _axes(1, len(curves), (3.6 * len(curves), 3.2))
    for axis, (name, values) in zip(axes[0], curves.items(), strict=True):
        axis.plot(counts, values, color="tab:blue", marker=".")
        if name in chosen:
            axis.axvline(chosen[name], color="tab:red", linewidth=1)
            axis.annotate(f" {chosen[name]}", (chosen[name], max(values)), color="tab:red", fontsize=8)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("clusters")
    _save(figure, path)


def _name(class_names: list[str], number: int) -> str:
    return class_names[number] if number < len(class_names) else str(number)


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    # Figure instead of pyplot: no global state, no window system.
    figure = require("matplotlib.figure", "drawing pictures").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=7)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")
