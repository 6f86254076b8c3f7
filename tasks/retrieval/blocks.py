"""What the small backbones share: transformer blocks, and checks of their sizes."""

from torch import nn


def make_blocks(dim: int, layers: int, heads: int, dropout: float) -> nn.ModuleList:
    """Pre-norm transformer blocks over (B, T, dim) with GELU layers four times as wide.

    Raises:
        ValueError: for a value that is not possible.
    """
    check_positive(dim=dim, layers=layers, heads=heads)
    check_dropout(dropout)
    if dim % heads:
        raise ValueError(f"dim={dim}: must be a multiple of heads={heads}")
    # One by one: nn.TransformerEncoder copies its layer, and all would begin with the same weights.
    return nn.ModuleList(
        nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, "gelu", batch_first=True, norm_first=True)
        for _ in range(layers)
    )


def check_positive(**sizes: int) -> None:
    """Refuse sizes below 1 with a ValueError."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be 1 or more")


def check_dropout(dropout: float) -> None:
    """Refuse what is no probability below 1 with a ValueError."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be from 0 to below 1")
