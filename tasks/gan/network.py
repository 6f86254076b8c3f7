"""Generator and discriminator of DCGAN's kind, for square pictures whose side is a multiple of 4.

A side is halved as long as 4 pixels are left, and twice at least: 28 → 14 → 7, 64 → 32 → 16 → 8 → 4, 8 → 4 → 2. The
last stage has `width` channels, and each nearer to the noise twice as many.

Sources: A. Radford et al., 'Unsupervised representation learning with deep convolutional generative adversarial
networks', ICLR 2016, arXiv:1511.06434; the conditional discriminator: T. Miyato, M. Koyama, 'cGANs with projection
discriminator', ICLR 2018, arXiv:1802.05637; T. Miyato et al., 'Spectral normalization for generative adversarial
networks', ICLR 2018, arXiv:1802.05957.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils import parametrizations

Norm = Literal["batch", "group", "none"]
_NORMS = ("batch", "group", "none")
_GROUPS = 8
_DEVIATION = 0.02  # DCGAN's


class Generator(nn.Module):
    """Pictures in −1..1 from noise, and from a class where there are classes.

    Args:
        channels: of a picture.
        image_size: its side, a multiple of 4.
        classes: how many, or their names; None or none of them for pictures of no class.
        noise_dim: numbers that a picture is made from.
        width: channels of the last stage.
        norm: after each stage but the last: 'batch' as in DCGAN; 'group' (8 groups) or 'none' where each picture is to
            depend on its own noise alone, as for two processes to equal one.

    Raises:
        ValueError: for an impossible number, or another norm.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        classes: int | Sequence[str] | None = None,
        noise_dim: int = 64,
        width: int = 32,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        _check({"channels": channels, "noise_dim": noise_dim, "width": width}, norm)
        halvings = _halvings(image_size)
        self.noise_dim = noise_dim
        self.n_classes = _count(classes)
        widths = [width << stage for stage in reversed(range(halvings))]
        first, start = widths[0], image_size >> halvings
        # A bias would be taken out again by batch norm.
        self.project = nn.Sequential(
            nn.Linear(noise_dim, first * start * start, bias=norm == "none"),
            nn.Unflatten(1, (first, start, start)),
            _normed(norm, first),
        )
        # Added to what is normalised: a class that is joined to the noise before soon counts for everything, and all
        # samples of a class are one.
        self.of_class = nn.Embedding(self.n_classes, first * start * start) if self.n_classes else None
        layers: list[nn.Module] = [nn.ReLU()]
        for into, out in pairwise(widths):
            up = nn.ConvTranspose2d(into, out, 4, 2, 1, bias=norm == "none")
            layers += [up, _normed(norm, out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh())
        self.apply(_initialize)

    def forward(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Make pictures.

        Args:
            noise: (B, Z).
            y: their classes, (B,) int64, if there are classes.

        Returns:
            (B, C, H, W).
        """
        x = self.project(noise)
        if self.of_class is not None:
            x = x + self.of_class(y).view_as(x)
        pictures: Tensor = self.layers(x)
        return pictures


class Discriminator(nn.Module):
    """Scores of pictures: ψ(h) + ⟨e_y, h⟩, the second term where there are classes, with h what the convolutions give.

    The projection discriminator has h summed over its places; with all of them a few thousand pictures are enough.

    Args:
        channels: of a picture.
        image_size: its side, a multiple of 4.
        classes: how many, or their names; None or none of them for pictures of no class.
        width: channels of the first stage.
        norm: after each stage but the first: 'batch' as in DCGAN; 'group' (8 groups) or 'none', one of which penalties
            on the slope at each picture need.
        spectral_norm: divide each weight by its largest singular value.

    Raises:
        ValueError: for an impossible number, or another norm.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        classes: int | Sequence[str] | None = None,
        width: int = 32,
        norm: Norm = "batch",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        _check({"channels": channels, "width": width}, norm)
        halvings = _halvings(image_size)
        self.n_classes = _count(classes)
        widths = [channels, *(width << stage for stage in range(halvings))]
        layers: list[nn.Module] = []
        for stage, (into, out) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(into, out, 4, 2, 1), _normed(norm if stage else "none", out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * (image_size >> halvings) ** 2
        self.score = nn.Linear(features, 1)
        self.of_class = nn.Embedding(self.n_classes, features) if self.n_classes else None
        if self.of_class is not None:
            nn.init.normal_(self.of_class.weight, 0.0, 0.05)  # torch's deviation of 1 would drown ψ
        if spectral_norm:
            weighted = [part for part in self.modules() if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding)]
            for part in weighted:
                parametrizations.spectral_norm(part)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Score pictures.

        Args:
            x: (B, C, H, W) in −1..1.
            y: their classes, (B,) int64, if there are classes.

        Returns:
            (B,), larger for what seems real.
        """
        features = self.layers(x)
        scores: Tensor = self.score(features)[:, 0]
        if self.of_class is not None:
            scores = scores + (self.of_class(y) * features).sum(1)
        return scores


def _normed(norm: Norm, channels: int) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if channels % _GROUPS:
        raise ValueError(f"norm=group: needs a width that is a multiple of {_GROUPS}")
    return nn.GroupNorm(_GROUPS, channels)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, _DEVIATION)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _count(classes: int | Sequence[str] | None) -> int:
    return classes if isinstance(classes, int) else len(classes or ())


def _halvings(image_size: int) -> int:
    if image_size < 4 or image_size % 4:
        raise ValueError(f"image_size={image_size}: must be a multiple of 4")
    halvings = 2
    while image_size % (2 << halvings) == 0 and image_size >> (halvings + 1) >= 4:
        halvings += 1
    return halvings


def _check(numbers: dict[str, int], norm: str) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number}: must be 1 or more")
    if norm not in _NORMS:
        raise ValueError(f"norm={norm}: must be one of {', '.join(_NORMS)}")
