"""A pre-norm transformer block and what it is made of.

SwiGLU: N. Shazeer, 'GLU variants improve transformer', 2020, arXiv:2002.05202. ReLU²: D. So et al., 'Primer: Searching
for efficient transformers for language modeling', 2021, arXiv:2109.08668. RMSNorm: B. Zhang and R. Sennrich, 'Root mean
square layer normalization', 2019, arXiv:1910.07467.

Shapes: B batch, T tokens, D width, F width inside the feed-forward layers.
"""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.lm.attention import CausalAttention, Rotary
from trainerkit.tasks.lm.cache import LayerCache

Activation = Literal["gelu", "gelu_tanh", "swiglu", "relu2"]
Norm = Literal["layernorm", "rmsnorm"]


class Block(nn.Module):
    """Attention and a feed-forward layer, each on the normalised input and added to it.

    Args:
        attention: the first half.
        feed_forward: the second half.
        norms: before either half.
        dropout: probability, of what is added.
    """

    def __init__(
        self,
        attention: CausalAttention,
        feed_forward: "FeedForward",
        norms: tuple[nn.Module, nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attention = attention
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """(B, T, D) to (B, T, D); see `CausalAttention.forward`."""
        x = x + self.dropout(self.attention(self.norm1(x), rotary, mask, cache))
        out: Tensor = x + self.dropout(self.feed_forward(self.norm2(x)))
        return out


class FeedForward(nn.Module):
    """Two linear layers with an activation in between; swiglu has a gate of the same width as well.

    Args:
        d_model: width D.
        d_ff: width F inside.
        activation: see `GPT`.
        bias: whether both layers have biases.
    """

    def __init__(self, d_model: int, d_ff: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(d_model, 2 * d_ff if activation == "swiglu" else d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        hidden = self.up(x)
        if self.activation == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        elif self.activation == "relu2":
            hidden = F.relu(hidden).square()
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        out: Tensor = self.down(hidden)
        return out


def make_norm(kind: Norm, width: int, bias: bool) -> nn.Module:
    """A LayerNorm (ε 1e-5, GPT-2's) or an RMSNorm (ε 1e-6), over the last dimension."""
    return nn.LayerNorm(width, bias=bias) if kind == "layernorm" else nn.RMSNorm(width, eps=1e-6)


def default_d_ff(d_model: int, activation: Activation) -> int:
    """4·D; with swiglu's third matrix 8/3·D, which is as many weights, rounded up to a multiple of 64."""
    return math.ceil(8 * d_model / 3 / 64) * 64 if activation == "swiglu" else 4 * d_model
