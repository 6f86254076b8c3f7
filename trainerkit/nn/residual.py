"""A small network of pre-norm residual blocks, x + down(gelu(up(norm(x)))), with two readouts.

One tells the attributes of an object, the other answers yes or no to a question. Trained on the attributes and frozen,
it is a base model for adapters: each low-rank addition to its linear layers has it answer another question.

Source of the block: R. Xiong et al., 'On layer normalization in the transformer architecture', 2020, arXiv:2002.04745,
without the attention.
"""

from torch import Tensor, nn
from torch.nn.functional import gelu


class ResidualBlock(nn.Module):
    """x + down(gelu(up(norm(x)))).

    Args:
        width: numbers that come in and go out.
        hidden: numbers between the two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to (…, width)."""
        residual: Tensor = self.down(gelu(self.up(self.norm(x))))
        return x + residual


class ResidualNetwork(nn.Module):
    """Residual blocks, a norm, and two readouts of what it gives: `attributes` and `answer`.

    The layers that adapters change are named `blocks.0.up`, `blocks.0.down`, `blocks.1.up`, and so on.

    Args:
        width: numbers of an object.
        hidden: numbers within a block.
        blocks: how many.
        attributes: how many an object has.
        values: how many an attribute may have.

    Raises:
        ValueError: for a size below 1.
    """

    def __init__(
        self, width: int = 48, hidden: int = 96, blocks: int = 3, *, attributes: int = 5, values: int = 4
    ) -> None:
        super().__init__()
        sizes = {"width": width, "hidden": hidden, "blocks": blocks, "attributes": attributes, "values": values}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size}: must be 1 or more")
        self.sizes = sizes
        self.blocks = nn.ModuleList([ResidualBlock(width, hidden) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.attributes = nn.Linear(width, attributes * values)
        self.answer = nn.Linear(width, 2)

    def features(self, x: Tensor) -> Tensor:
        """What the readouts read: (…, width) to (…, width)."""
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)
        return features

    def tell(self, x: Tensor) -> Tensor:
        """Logits of each attribute's values: (…, width) to (…, attributes, values)."""
        logits: Tensor = self.attributes(self.features(x))
        return logits.reshape(*x.shape[:-1], self.sizes["attributes"], self.sizes["values"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits of no and yes: (…, width) to (…, 2)."""
        logits: Tensor = self.answer(self.features(x))
        return logits
