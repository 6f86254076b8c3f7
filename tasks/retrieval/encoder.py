"""Pictures, texts, or both together, as embeddings: a backbone for each, pooling, and a projection to a common width.

Shapes: B rows, T tokens or patches, F width of a backbone, D width of the embeddings.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from trainerkit.tasks.retrieval.pooling import POOLINGS, Pooling, masked

Projection = Literal["linear", "mlp"]
Combine = Literal["sum", "concat", "gated"]
MODALITIES = ("image", "text")


class Encoder(nn.Module):
    """Embeds rows of pictures, of texts, or of both (a composed query: 'this picture, but in red').

    Args:
        image: backbone of pictures, called with (B, C, H, W) in 0..1; gives (B, F) or (B, T, F). None for no pictures.
        text: backbone of texts, called with token ids (B, T) and their mask (B, T); gives (B, F), or (B, T, F), which
            the same mask fits. None for no texts. Both have an attribute `out_features`, F.
        dim: width D of the embeddings; with projection=None it is that of the backbones.
        pooling: from (B, T, F) to (B, F): 'mean', 'cls' (first token), 'last', 'max'; 'none' keeps every vector, for
            late interaction, padding as zeros. Backbones that give (B, F) have pooled themselves.
        image_pooling: the same for pictures; None for `pooling`.
        projection: after pooling, one for each modality: 'linear', 'mlp' (F to F to D with a GELU), or None.
        combine: of a row's picture and text: 'sum' of both, 'concat' (a linear layer over both), 'gated' (a learned
            weighted mean of each feature). The parameters of the latter two get gradients from composed rows only. With
            pooling='none' the vectors of both stand one after another, and `combine` is 'sum'.
        modalities: those that the data have, 'image' and 'text'; the tower of any other is left out, so that no
            parameter stays without a gradient. None for both.

    Attributes:
        embedding_dim: D.

    Raises:
        ValueError: for a value that is not possible, or if no tower is left.
    """

    def __init__(
        self,
        image: nn.Module | None = None,
        text: nn.Module | None = None,
        dim: int = 128,
        pooling: Pooling = "mean",
        image_pooling: Pooling | None = None,
        projection: Projection | None = "linear",
        combine: Combine = "sum",
        modalities: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        image_pooling = pooling if image_pooling is None else image_pooling
        _check(dim, pooling, image_pooling, projection, combine)
        towers = _chosen({"image": image, "text": text}, modalities)
        widths = {name: _width(name, tower) for name, tower in towers.items()}
        if projection is None and len(set(widths.values())) > 1:
            raise ValueError(f"projection=None: backbones of widths {widths} have no common one; take linear or mlp")
        self.embedding_dim = next(iter(widths.values())) if projection is None else dim
        self.pooling = {"image": image_pooling, "text": pooling}
        self.towers = nn.ModuleDict(towers)
        self.projections = nn.ModuleDict({name: make_projection(projection, widths[name], dim) for name in towers})
        both = len(towers) == 2
        self.combine = (
            Combination(combine, self.embedding_dim) if both and "none" not in self.pooling.values() else None
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, D), or (B, T, D) with pooling='none'; not normalised.

        Args:
            inputs: `image` (B, C, H, W) and/or `text` (B, T) with `text_mask` (B, T), true where there is a token.

        Raises:
            ValueError: if there is neither, or one for which there is no tower; it says what there is.
        """
        given = [name for name in MODALITIES if name in inputs]
        if not given or any(name not in self.towers for name in given):
            raise ValueError(
                f"inputs: have {', '.join(inputs) or 'nothing'}; this encoder has a tower for "
                f"{' and one for '.join(self.towers)}"
            )
        parts = [self._embedded(name, inputs) for name in given]
        if len(parts) == 1:
            return parts[0]
        if self.combine is None:
            return torch.cat(parts, dim=1)
        combined: Tensor = self.combine(*parts)
        return combined

    def _embedded(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """One modality's embeddings."""
        mask = inputs.get("text_mask") if name == "text" else None
        if name == "text" and mask is None:
            raise ValueError(f"inputs: have {', '.join(inputs)}; text needs its text_mask as well")
        hidden = self.towers[name](inputs[name]) if mask is None else self.towers[name](inputs[name], mask)
        pooling = self.pooling[name]
        if hidden.ndim == 3:
            hidden = POOLINGS[pooling](hidden, mask)
        elif pooling == "none":
            hidden, mask = hidden[:, None], None  # pooled by the backbone: a sequence of one
        projected: Tensor = self.projections[name](hidden)
        # The projection's bias would make vectors of the padding.
        return masked(projected, mask) if pooling == "none" else projected


class Combination(nn.Module):
    """The embedding of a row of two parts, from both parts'.

    Args:
        kind: 'sum', 'concat' or 'gated'; see `Encoder`.
        dim: width D.
    """

    def __init__(self, kind: Combine, dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.layer = None if kind == "sum" else nn.Linear(2 * dim, dim)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, D) and (B, D) to (B, D)."""
        if self.layer is None:
            return image + text
        mixed: Tensor = self.layer(torch.cat([image, text], dim=-1))
        return torch.lerp(text, image, mixed.sigmoid()) if self.kind == "gated" else mixed


def make_projection(kind: Projection | None, width: int, dim: int) -> nn.Module:
    """From F to D; nothing for None."""
    if kind is None:
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, dim)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim))


def _chosen(towers: Mapping[str, nn.Module | None], modalities: Sequence[str] | None) -> dict[str, nn.Module]:
    wanted = list(MODALITIES) if modalities is None else list(modalities)
    if not set(wanted) <= set(MODALITIES):
        raise ValueError(f"modalities={wanted}: must be a list of {' and '.join(MODALITIES)}, or None")
    there = {name: tower for name, tower in towers.items() if tower is not None}
    chosen = {name: tower for name, tower in there.items() if name in wanted}
    if not there:
        raise ValueError("image=None, text=None: give a backbone for one of them or both")
    if not chosen:
        raise ValueError(f"modalities={wanted}: there are backbones for {', '.join(there)} only")
    return chosen


def _width(name: str, tower: nn.Module) -> int:
    width = getattr(tower, "out_features", None)
    if not isinstance(width, int):
        raise ValueError(f"{name}={type(tower).__name__}: a backbone must say its width in an attribute out_features")
    return width


def _check(dim: int, pooling: str, image_pooling: str, projection: str | None, combine: str) -> None:
    if dim < 1:
        raise ValueError(f"dim={dim}: must be 1 or more")
    choices: list[tuple[str, str | None, Sequence[str | None]]] = [
        ("pooling", pooling, get_args(Pooling)),
        ("image_pooling", image_pooling, get_args(Pooling)),
        ("projection", projection, (*get_args(Projection), None)),
        ("combine", combine, get_args(Combine)),
    ]
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name}={value}: must be one of {', '.join(map(str, allowed))}")
    if (pooling == "none") != (image_pooling == "none"):
        raise ValueError(f"image_pooling={image_pooling}: is none, for late interaction, if and only if pooling is")
    if pooling == "none" and combine != "sum":
        raise ValueError(f"combine={combine}: must be sum with pooling=none, which sets vectors one after another")
