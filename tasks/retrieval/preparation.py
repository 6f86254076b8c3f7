"""Pictures in 0..1 as a trained model wants them: its size, its channels, its scale.

Shapes: B rows, C channels, H and W height and width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.errors import UserError
from trainerkit.extras import require
from trainerkit.loading import read_json

# Of transformers: the older file, and the one in which the values stand one level deeper.
_FILES = ("preprocessor_config.json", "processor_config.json")


class Prepare(nn.Module):
    """Resizes (bicubic, antialiased), repeats a single channel, subtracts the mean and divides by the deviation.

    Args:
        size: H and W, or one number for both; None leaves the size.
        channels: C; pictures of one channel are repeated.
        mean: of each channel, or one for all.
        std: of each channel, or one for all.

    Raises:
        ValueError: for a mean or std that does not fit the channels, or a std that is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size: int | Sequence[int] | None, channels: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name}={list(values)}: must be one number, or one for each of {channels} channels")
        if min(std) <= 0:
            raise ValueError(f"std={list(std)}: must be above 0")
        self.size = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
        self.channels = channels
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values))[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C or 1, H, W) in 0..1 to (B, C, H', W').

        Raises:
            ValueError: for another number of channels.
        """
        if images.shape[1] not in (1, self.channels):
            raise ValueError(
                f"images: have {images.shape[1]} channels; this model wants {self.channels}, or 1 to repeat"
            )
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return (images.expand(-1, self.channels, -1, -1) - self.mean) / self.std


def prepare_like(
    name_or_path: str,
    size: int | Sequence[int],
    channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Prepare:
    """As the folder of a `transformers` model says, where `mean` and `std` do not.

    Raises:
        ValueError: as `Prepare`.
        UserError: if the folder does not say and they are not given.
    """
    if mean is None or std is None:
        found = _saved(name_or_path)
        mean = found.get("image_mean") if mean is None else mean
        std = found.get("image_std") if std is None else std
    if mean is None or std is None:
        raise UserError(
            f"name_or_path={name_or_path}: has no {_FILES[0]} with image_mean and image_std; give mean= and std= that "
            "the model was trained with."
        )
    return Prepare(size, channels, mean, std)


def _saved(name_or_path: str) -> dict[str, Any]:
    """The settings of the image processor; none if there is no such file."""
    hub = require("transformers.utils.hub", f"name_or_path={name_or_path}")
    for file in _FILES:
        try:
            path = hub.cached_file(str(name_or_path), file)
        except OSError:
            continue
        content = read_json(Path(path), "name_or_path")
        return dict(content.get("image_processor", content))
    return {}
