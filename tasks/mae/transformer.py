"""A pre-norm transformer block, with the parameter names of `torch.nn.TransformerEncoderLayer`.

torch's layer takes a general path (mask merging, transposes for its batch-second internals) and its encoder checks
masks on every call; where no token is padding, the block below does the same arithmetic with fewer copies. The names
are kept so that weights trained with torch's layer load as they are.

Shapes: B batch, N tokens, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention over (B, N, D), without a mask.

    Args:
        d_model: width D.
        nhead: heads H; must divide D.
        dropout: probability with which attention weights are dropped in training.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float) -> None:
        super().__init__()
        self.nhead = nhead
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or to (B, `first`, D): the first tokens' outputs, for which all are looked at."""
        batch, tokens, width = x.shape
        if first is None:
            projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
            query, key, value = projected.view(batch, tokens, 3, self.nhead, -1).permute(2, 0, 3, 1, 4)
        else:
            asked = F.linear(x[:, :first], self.in_proj_weight[:width], self.in_proj_bias[:width])
            query = asked.view(batch, first, self.nhead, -1).transpose(1, 2)
            rest = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
            key, value = rest.view(batch, tokens, 2, self.nhead, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        mixed: Tensor = self.out_proj(attended.transpose(1, 2).reshape(batch, -1, width))
        return mixed


class Block(nn.Module):
    """Pre-norm attention and a GELU feed-forward layer, each added to its input.

    Args:
        d_model: width D.
        nhead: heads H.
        dim_feedforward: width inside the feed-forward layer.
        dropout: probability, after attention, inside and after the feed-forward layer.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or to (B, `first`, D): the first tokens only."""
        x = x[:, :first] + self.dropout(self.self_attn(self.norm1(x), first))
        hidden = self.dropout(F.gelu(self.linear1(self.norm2(x))))
        out: Tensor = x + self.dropout(self.linear2(hidden))
        return out


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        num_layers: how many.
        d_model: width D.
        nhead: heads H.
        dim_feedforward: width inside the feed-forward layers.
        dropout: probability, as in `Block`.
    """

    def __init__(self, num_layers: int, d_model: int, nhead: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(d_model, nhead, dim_feedforward, dropout) for _ in range(num_layers))

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """(B, N, D) to (B, N, D), or to (B, `first`, D), for which the last block leaves out what is not needed."""
        *before, last = self.layers
        for layer in before:
            x = layer(x)
        out: Tensor = last(x, first)
        return out
