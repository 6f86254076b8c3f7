"""Small backbones for pictures, trained from nothing.

Group normalisation: Y. Wu and K. He, ECCV 2018, arXiv:1803.08494. It looks at one picture at a time, so a batch in
chunks gives what the whole batch gives; batch normalisation would not.

Shapes: B rows, C channels, H and W height and width of pictures, F width of the backbone, G×G its grid.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ImageCNN(nn.Module):
    """Stages of a 3×3 convolution of stride 2, group normalisation and GELU; then a grid of means, one after another.

    The grid keeps where in the picture something is, which tells glyphs apart and which one mean would lose. With the
    default widths 370,560 parameters for one channel, and 9.9 million multiplications a picture of 32×32.

    Args:
        channels: C of the pictures.
        image_size: the smaller of H and W; `2^len(widths)·grid` or more.
        widths: channels of each stage, multiples of 8.
        grid: G; 1 for the mean over the picture.
        flatten: give (B, W·G²), with W the last width; false for (B, G², W), which `Encoder` pools, or keeps for late
            interaction.
        dropout: probability, of what comes out.

    Attributes:
        out_features: F.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 32,
        widths: Sequence[int] = (64, 128, 256),
        grid: int = 4,
        flatten: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_positive(channels=channels, image_size=image_size, grid=grid)
        _check_dropout(dropout)
        if not widths or any(width < 1 or width % _GROUP for width in widths):
            raise ValueError(f"widths={list(widths)}: must be multiples of {_GROUP}, one for each stage")
        if image_size < 2 ** len(widths) * grid:
            raise ValueError(
                f"image_size={image_size}: must be {2 ** len(widths) * grid} or more, for {len(widths)} stages that "
                f"halve it and a grid of {grid}"
            )
        before = [channels, *widths]
        self.stages = nn.Sequential(*(_stage(*pair) for pair in zip(before, widths, strict=False)))
        self.grid = grid
        self.flatten = flatten
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.out_features = widths[-1] * (grid**2 if flatten else 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 to (B, F), or (B, G², F) with flatten=False."""
        cells = F.adaptive_avg_pool2d(self.stages(images - 0.5), self.grid)
        out: Tensor = self.dropout(cells.flatten(1) if self.flatten else cells.flatten(2).transpose(1, 2))
        return out


_GROUP = 8  # channels that are normalised together


def _stage(channels: int, width: int) -> nn.Module:
    convolution = nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(width // _GROUP, width), nn.GELU())


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be 1 or more")


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be from 0 to below 1")
