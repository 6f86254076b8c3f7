"""What is done to pictures by chance in training, on the batch, from torch's random state."""

import torch
from torch import Tensor, nn

from trainerkit.functional.picture_moves import Augmentation, moved


class PictureAugment(nn.Module):
    """Shift, turn, scale and mirror each picture of a batch; rows that are no pictures stay as they are.

    Args:
        shift: of the picture's side, to each side at most.
        rotation: degrees to each side at most.
        scale: 0.1 is from 1/1.1 to 1.1 times the size.
        mirror: probability that left and right change places.

    Raises:
        ValueError: for a number that is out of its range.
    """

    def __init__(self, shift: float = 0.12, rotation: float = 15.0, scale: float = 0.25, mirror: float = 0.0) -> None:
        super().__init__()
        self.by = Augmentation(shift, rotation, scale)
        if not 0 <= mirror <= 1:
            raise ValueError(f"mirror={mirror}: must be from 0 to 1")
        self.mirror = mirror

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same, of a table (B, features) to itself."""
        if x.ndim != 4:
            return x
        draws = torch.rand(len(x), 5, device=x.device)
        x = moved(x, draws[:, :4], self.by)
        return torch.where((draws[:, 4] < self.mirror)[:, None, None, None], x.flip(-1), x)
