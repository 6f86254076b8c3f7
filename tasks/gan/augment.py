"""Augmentation of everything that the discriminator sees, real or made, so that few pictures are not learnt by heart.

The generator's gradient goes through it. Source: S. Zhao et al., 'Differentiable augmentation for data-efficient GAN
training', NeurIPS 2020, arXiv:2006.10738.
"""

import torch
from torch import Tensor, nn


class DiffAugment(nn.Module):
    """Shift pictures and blank a square of each.

    Args:
        translation: how far at most, to each side, as a share of the side; what moves in is the darkest value, −1.
        cutout: side of the blanked square as a share of the picture's; 0 for none. It is grey, 0.

    Attributes:
        draws: uniform numbers that it needs for a picture.

    Raises:
        ValueError: for a share outside 0..1.
    """

    draws = 4

    def __init__(self, translation: float = 0.125, cutout: float = 0.0) -> None:
        super().__init__()
        for name, share in (("translation", translation), ("cutout", cutout)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: must be from 0 to 1")
        self.translation = translation
        self.cutout = cutout

    def forward(self, x: Tensor, draws: Tensor) -> Tensor:
        """Change pictures.

        Args:
            x: (B, C, H, W) in −1..1.
            draws: (B, 4), from [0, 1).

        Returns:
            The same shape.
        """
        if self.translation:
            x = shifted(x, draws[:, :2], round(self.translation * x.shape[-1]))
        if self.cutout:
            x = x.masked_fill(_square(x, draws[:, 2:], round(self.cutout * x.shape[-1])), 0.0)
        return x


def shifted(x: Tensor, draws: Tensor, most: int, fill: float = -1.0) -> Tensor:
    """Each picture (B, C, H, W) moved by whole pixels from −most to most along both axes, chosen by draws (B, 2).

    `fill` is what moves in.
    """
    height, width = x.shape[-2:]
    down, right = (draws * (2 * most + 1)).long().unbind(1)
    padded = nn.functional.pad(x, (most, most, most, most), value=fill)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    pictures = torch.arange(len(x), device=x.device)
    # (B, H, W, C): what is indexed on both sides of a slice comes first.
    return padded[pictures[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _square(x: Tensor, draws: Tensor, side: int) -> Tensor:
    """True in a square of each picture, (B, 1, H, W), part of which may be outside."""
    inside = []
    for axis, size in enumerate(x.shape[-2:]):
        first = (draws[:, axis, None] * (size + 1 - side % 2)).long() - side // 2
        place = torch.arange(size, device=x.device)
        inside.append((place >= first) & (place < first + side))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
