"""The judge of samples: a small classifier, trained on the spot on the training pictures.

Where pictures are not photographs, the usual judge, a network trained on ImageNet, has nothing to say; and it would
have to be fetched. What this one sees in a picture, `features`, is what Fréchet distance, precision and recall compare.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainerkit.functional.random import RandomStream
from trainerkit.tasks.gan.augment import shifted

_BATCH = 64
_RATE = 4e-3  # the highest of one cycle
_SHIFT = 1 / 14  # of the side, to each side at most
_AT_ONCE = 500  # pictures


class Judge(nn.Module):
    """Two convolutions and two linear layers.

    Args:
        channels: of a picture.
        image_size: its side, a multiple of 4.
        n_classes: number of classes.
    """

    num_features = 64

    def __init__(self, channels: int, image_size: int, n_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.5), nn.Linear(32 * (image_size // 4) ** 2, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.classify = nn.Linear(self.num_features, n_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, K) of pictures (B, C, H, W) in 0..1."""
        features: Tensor = self.features(x)
        return features, self.classify(features)

    @torch.no_grad()
    def look_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same of any number of pictures, on their device."""
        parts = [self(part) for part in x.split(_AT_ONCE)]
        return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])


def train_judge(x: Tensor, y: Tensor, n_classes: int, steps: int = 700, seed: int = 0) -> Judge:
    """Train a judge; moves no global random state of the CPU.

    Args:
        x: pictures, (N, C, H, W) in 0..1.
        y: their classes, (N,) int64.
        n_classes: number of classes.
        steps: of the optimizer, each with 64 pictures.
        seed: of initial weights, order, shifts and dropout.

    Returns:
        The judge, in evaluation mode, on the device of `x`.
    """
    with RandomStream(seed), torch.enable_grad(), torch.inference_mode(False):
        judge = Judge(x.shape[1], x.shape[-1], n_classes).to(x.device)
        optimizer = torch.optim.Adam(judge.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (_BATCH,)).to(x.device)
            moved = shifted(x[rows], torch.rand(_BATCH, 2).to(x.device), round(_SHIFT * x.shape[-1]), fill=0.0)
            optimizer.zero_grad()
            cross_entropy(judge(moved)[1], y[rows]).backward()
            optimizer.step()
            schedule.step()
    return judge.eval().requires_grad_(False)
