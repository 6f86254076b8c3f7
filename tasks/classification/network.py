"""Networks that classify: a backbone that makes features, and a linear head.

Shapes: B rows, C channels, H and W height and width of pictures, F features, K classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.errors import UserError
from trainerkit.nn.weights import fill, read_weights

Pooling = Literal["first", "mean"]
_GROUP = 8  # channels that are normalised together


class Classifier(nn.Module):
    """A backbone, dropout and a linear layer.

    Args:
        backbone: makes features (B, F), or (B, T, F) of T tokens, and has `out_features`, F.
        n_classes: K.
        pooling: of tokens: 'first' takes the first one, 'mean' all.
        dropout: probability, of the features.
        weights: a file with the backbone's weights, .safetensors or .pt (`trainerkit.nn.weights`): those of the
            backbone alone, or of a run of this task, whose head is left out. None leaves the backbone as it is.

    Raises:
        ValueError: for a value that is not possible.
        trainerkit.errors.UserError: for weights that do not fit the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_classes: int,
        pooling: Pooling = "first",
        dropout: float = 0.0,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes={n_classes}: must be 2 or more")
        if pooling not in ("first", "mean"):
            raise ValueError(f"pooling={pooling}: must be first or mean")
        _check_dropout(dropout)
        width = getattr(backbone, "out_features", None)
        if not isinstance(width, int):
            raise ValueError(f"backbone={type(backbone).__name__}: must have an attribute out_features, a whole number")
        self.backbone = backbone
        self.pooling: Pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, n_classes)
        if weights is not None:
            state = read_weights(weights)
            own = {name.removeprefix("backbone."): tensor for name, tensor in state.items() if _is_of_backbone(name)}
            fill(backbone, own or state, weights)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) to logits (B, K)."""
        features: Tensor = self.backbone(x)
        if features.ndim == 3:
            features = features[:, 0] if self.pooling == "first" else features.mean(1)
        logits: Tensor = self.head(self.dropout(features))
        return logits


class PictureCNN(nn.Module):
    """Stages of two convolutions, the second of stride 2, each with group normalisation and ReLU; then a grid of means.

    It takes pictures of any size from `2^len(widths)` on, 8×8 and 28×28 among them. Group normalisation looks at one
    picture at a time, so that batches on several processes give what one large batch gives. With the defaults 65,184
    parameters for one channel, and 7.5 million multiplications a picture of 28×28.

    Source: Y. Wu, K. He, 'Group normalization', ECCV 2018, arXiv:1803.08494.

    Args:
        channels: C of the pictures.
        widths: channels of each stage, multiples of 8.
        grid: cells along each side of what comes out; 1 for the mean over the picture.
        image_size: side to which pictures are brought first; None leaves them.

    Attributes:
        out_features: F, the last width times grid².

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(
        self, channels: int, widths: Sequence[int] = (32, 64), grid: int = 2, image_size: int | None = None
    ) -> None:
        super().__init__()
        for name, number in (("channels", channels), ("grid", grid), ("image_size", image_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: must be 1 or more")
        if not widths or any(width < 1 or width % _GROUP for width in widths):
            raise ValueError(f"widths={list(widths)}: must be multiples of {_GROUP}, one for each stage")
        self.stages = nn.ModuleList(
            nn.Sequential(*_convolution(into, width, 1), *_convolution(width, width, 2))
            for into, width in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.grid = grid
        self.image_size = image_size
        self.out_features = widths[-1] * grid**2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in 0..1 to (B, F).

        Raises:
            trainerkit.errors.UserError: for what is no picture, or too small.
        """
        if x.ndim != 4 or min(x.shape[2:]) < 2 ** len(self.stages):
            raise UserError(
                f"widths: {len(self.stages)} stages take pictures of {2 ** len(self.stages)} pixels or more, not "
                f"{tuple(x.shape[1:])}; for a table choose network=mlp"
            )
        if self.image_size is not None and x.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        x = x - 0.5
        for stage in self.stages:
            x = stage(x)
        return F.adaptive_avg_pool2d(x, self.grid).flatten(1)


class TableMLP(nn.Module):
    """Layers of a linear map, layer normalisation, GELU and dropout, for rows of numbers.

    Args:
        features: numbers a row.
        widths: of the layers.
        dropout: probability, after each layer.

    Attributes:
        out_features: F, the last width.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(self, features: int, widths: Sequence[int] = (128, 128), dropout: float = 0.0) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features={features}: must be 1 or more")
        if not widths or any(width < 1 for width in widths):
            raise ValueError(f"widths={list(widths)}: must be 1 or more, one for each layer")
        _check_dropout(dropout)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(into, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout))
            for into, width in zip([features, *widths[:-1]], widths, strict=True)
        )
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, …), flattened to (B, features), to (B, F)."""
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return x


def _convolution(channels: int, width: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.GroupNorm(width // _GROUP, width), nn.ReLU()]


def _is_of_backbone(name: str) -> bool:
    return name.startswith("backbone.")


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be from 0 to below 1")
