"""Grids of samples beside real pictures, as PNG. Needs Pillow (extra `examples`)."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.extras import require
from trainerkit.files import replacing
from trainerkit.tasks.gan.report import HasPictures
from trainerkit.tasks.gan.task import GanTask

_GAP = 2  # pixels between pictures
_WIDE = 8  # gaps between two grids
_LEAST_SIDE = 28  # smaller pictures are drawn larger
_COLUMNS = 8  # without classes
_MOST_CLASSES = 20


class SampleGrid(Callback):
    """After each validation `samples/epoch-NNNN.png` in the run's folder: samples, and beside them real pictures.

    A column is a class where there are classes, of the first 20; noise and classes are the same in all epochs. The
    real ones are of the validation part, or else of the training part. The test leaves `samples.png`, prediction the
    first samples in `predictions/samples.png`.

    Args:
        rows: of the grid.
        dirname: folder of the epochs' grids.

    Raises:
        ValueError: for no row.
    """

    def __init__(self, rows: int = 8, dirname: str = "samples") -> None:
        if rows < 1:
            raise ValueError(f"rows={rows}: must be 1 or more")
        self.rows = rows
        self.dirname = dirname
        self._predicted: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the optional package before anything is trained."""
        require("PIL", "callbacks.sample_grid")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's grid."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            name = f"epoch-{trainer.current_epoch + 1:04}.png"
            self._draw(trainer, pl_module, Path(trainer.default_root_dir) / self.dirname / name)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The grid of the weights that are tested."""
        self._draw(trainer, pl_module, Path(trainer.default_root_dir) / "samples.png")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._predicted = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep the first samples."""
        if isinstance(pl_module, GanTask) and sum(map(len, self._predicted)) < self.rows * _COLUMNS:
            self._predicted.append(outputs["picture"].float().cpu())

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        if self._predicted and trainer.is_global_zero:
            shown = torch.cat(self._predicted)[: self.rows * _COLUMNS]
            write_png(Path(trainer.default_root_dir) / "predictions" / "samples.png", grid(shown, _COLUMNS))

    @torch.no_grad()
    def _draw(self, trainer: Trainer, task: LightningModule, path: Path) -> None:
        if not isinstance(task, GanTask) or not trainer.is_global_zero:
            return
        columns = min(len(task.class_names), _MOST_CLASSES) or _COLUMNS
        places = torch.arange(self.rows * columns, device=task.device)
        made = task(places, places % columns) if task.class_names else task(places)
        grids = [grid(made.float().cpu(), columns)]
        data: Any = getattr(trainer, "datamodule", None)
        if isinstance(data, HasPictures):
            grids.append(grid(self._real(data, columns, by_class=bool(task.class_names)), columns))
        write_png(path, beside(grids))

    def _real(self, data: HasPictures, columns: int, by_class: bool) -> Tensor:
        """Real pictures in the places of the samples; black where a class has too few."""
        part = next((rows for rows in map(data.rows, ("val", "train")) if len(rows["x"])), {})
        if not by_class:
            return part["x"][: self.rows * columns]
        shown = part["x"].new_zeros(self.rows, columns, *part["x"].shape[1:])
        for column in range(columns):
            found = part["x"][part["y"] == column][: self.rows]
            shown[: len(found), column] = found
        return shown.flatten(0, 1)


def grid(pictures: Tensor, columns: int) -> Tensor:
    """Pictures (N, C, H, W) in 0..1 row by row beside each other, with gaps: (C, H', W') uint8."""
    scale = -(-_LEAST_SIDE // pictures.shape[-1])
    pictures = pictures.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    side, rows = pictures.shape[-1] + _GAP, -(-len(pictures) // columns)
    canvas = torch.full((pictures.shape[1], rows * side - _GAP, columns * side - _GAP), 128, dtype=torch.uint8)
    for place, picture in enumerate((pictures.clamp(0, 1) * 255).round().to(torch.uint8)):
        top, left = place // columns * side, place % columns * side
        canvas[:, top : top + side - _GAP, left : left + side - _GAP] = picture
    return canvas


def beside(grids: list[Tensor]) -> Tensor:
    """Grids (C, H, W) uint8 in one picture, from left to right."""
    channels, height = grids[0].shape[0], max(one.shape[1] for one in grids)
    width = sum(one.shape[2] for one in grids) + _WIDE * _GAP * (len(grids) - 1)
    canvas = torch.full((channels, height, width), 255, dtype=torch.uint8)
    left = 0
    for one in grids:
        canvas[:, : one.shape[1], left : left + one.shape[2]] = one
        left += one.shape[2] + _WIDE * _GAP
    return canvas


def write_png(path: Path, picture: Tensor) -> None:
    """Write a picture (C, H, W) uint8: grey if C = 1, RGB if C = 3, else its first channel in grey."""
    image = require("PIL.Image", "drawing samples")
    array = picture.permute(1, 2, 0).numpy() if len(picture) == 3 else picture[0].numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.fromarray(array).save(temporary, format="png")
