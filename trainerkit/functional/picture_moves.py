"""Shifting, turning and scaling pictures, a batch at a time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How far a picture is moved in training.

    Args:
        shift: of the picture's side, to each side at most.
        rotation: degrees to each side at most.
        scale: 0.1 is from 1/1.1 to 1.1 times the size.

    Raises:
        ValueError: for a number that is out of its range.
    """

    shift: float = 0.06
    rotation: float = 10.0
    scale: float = 0.15

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if not 0 <= number < (180 if name == "rotation" else 1):
                raise ValueError(f"{name}={number}: must be from 0 to below {180 if name == 'rotation' else 1}")


def moved(pictures: Tensor, draws: Tensor, by: Augmentation) -> Tensor:
    """Shift, turn and scale each picture, with bilinear interpolation; what comes in from outside repeats the edge.

    Args:
        pictures: (B, C, H, W), H = W.
        draws: (B, 4) in [0, 1); 0.5 everywhere leaves a picture as it is.
        by: how far.
    """
    right, down, turn, grow = (2 * draws - 1).unbind(1)
    angle = torch.deg2rad(by.rotation * turn)
    size = (1 + by.scale) ** -grow
    cos, sin = size * angle.cos(), size * angle.sin()
    # The grid goes from -1 to 1: a side is 2 long.
    rows = [torch.stack(row, 1) for row in ((cos, -sin, 2 * by.shift * right), (sin, cos, 2 * by.shift * down))]
    grid = F.affine_grid(torch.stack(rows, 1), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
