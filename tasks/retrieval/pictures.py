"""Small backbones for pictures, trained from nothing.

Group normalisation: Y. Wu and K. He, ECCV 2018, arXiv:1803.08494. It looks at one picture at a time, so a batch in
chunks gives what the whole batch gives; batch normalisation would not.

Shapes: B rows, C channels, H and W height and width of pictures, F width of the backbone, G×G its grid.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.retrieval.blocks import check_dropout, check_positive, make_blocks


class ImageCNN(nn.Module):
    """Stages of a convolution of stride 2, group normalisation and ReLU; then a grid of means, one after another.

    The first convolution has a kernel of 6×6, computed as one of 3×3 on blocks of 2×2 pixels: a CPU, which has little
    to do with a single channel, takes a fifth less for forward and backward than with 5×5. The others have 3×3.

    The grid keeps where in the picture something is, which tells glyphs apart and which one mean would lose. With the
    defaults 372,288 parameters for one channel, and 10.3 million multiplications a picture of 32×32. A CPU takes 128
    pictures at a time, whose activations stay near it: with 500 at once it takes a sixth longer.

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
        check_positive(channels=channels, image_size=image_size, grid=grid)
        check_dropout(dropout)
        if not widths or any(width < 1 or width % _GROUP for width in widths):
            raise ValueError(f"widths={list(widths)}: must be multiples of {_GROUP}, one for each stage")
        if image_size < 2 ** len(widths) * grid:
            raise ValueError(
                f"image_size={image_size}: must be {2 ** len(widths) * grid} or more, for {len(widths)} stages that "
                f"halve it and a grid of {grid}"
            )
        later = [_stage(into, width, stride=2) for into, width in pairwise(widths)]
        self.stages = nn.Sequential(_stage(4 * channels, widths[0], stride=1), *later)
        self.grid = grid
        self.flatten = flatten
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.out_features = widths[-1] * (grid**2 if flatten else 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 to (B, F), or (B, G², F) with flatten=False."""
        parts = images.split(_AT_A_TIME) if images.device.type == "cpu" else [images]
        cells = torch.cat([self._cells(part) for part in parts])
        out: Tensor = self.dropout(cells.flatten(1) if self.flatten else cells.flatten(2).transpose(1, 2))
        return out

    def _cells(self, images: Tensor) -> Tensor:
        """(B, F, G, G)."""
        height, width = images.shape[-2:]
        even = F.pad(images - 0.5, (0, width % 2, 0, height % 2))
        found: Tensor = self.stages(F.pixel_unshuffle(even, 2))
        # What is of that size already need not be copied there and back.
        return found if found.shape[-2:] == (self.grid, self.grid) else F.adaptive_avg_pool2d(found, self.grid)


class ImageViT(nn.Module):
    """A vision transformer: patches as tokens with learned positions, pre-norm blocks, a last norm.

    With the defaults 803,712 parameters for one channel of 32×32: 12·F² a block, nearly.

    Source: A. Dosovitskiy et al., 'An image is worth 16×16 words', ICLR 2021, arXiv:2010.11929.

    Args:
        channels: C of the pictures.
        image_size: H and W, a multiple of `patch_size`.
        patch_size: height and width of a patch.
        dim: width F, a multiple of `heads`.
        layers: blocks.
        heads: attention heads of each.
        class_token: put a learned token first, which pooling='cls' takes.
        dropout: probability, in the blocks.

    Attributes:
        out_features: F.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        class_token: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, image_size=image_size, patch_size=patch_size)
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size}: must be a multiple of patch_size={patch_size}")
        self.blocks = make_blocks(dim, layers, heads, dropout)
        self.patches = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        tokens = (image_size // patch_size) ** 2
        self.class_token = nn.Parameter(torch.randn(dim) * 0.02) if class_token else None
        self.position_embedding = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.image_size = image_size
        self.out_features = dim

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 to (B, T, F), T patches, the class token before them.

        Raises:
            ValueError: for pictures of another size.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"image_size={self.image_size}: pictures have the shape {tuple(images.shape[1:])}")
        hidden = self.patches(images - 0.5).flatten(2).transpose(1, 2) + self.position_embedding
        if self.class_token is not None:
            hidden = torch.cat([self.class_token.expand(len(hidden), 1, -1), hidden], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.norm(hidden)
        return out


_GROUP = 8  # channels that are normalised together
_AT_A_TIME = 128  # pictures, on a CPU


def _stage(channels: int, width: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(channels, width, 3, stride, padding=1)
    # Channels last in memory: forward and backward take 0.82 of the time on a CPU core.
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    # Not GELU, whose backward pass alone takes a quarter of a training step there; in place, for a twentieth less.
    return nn.Sequential(convolution, nn.GroupNorm(width // _GROUP, width), nn.ReLU(inplace=True))
