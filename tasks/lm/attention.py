"""Causal self-attention with rotary positions, grouped heads, documents and a cache.

Rotary positions: J. Su et al., 'RoFormer: Enhanced transformer with rotary position embedding', 2021, arXiv:2104.09864.
Grouped heads: J. Ainslie et al., 'GQA: Training generalized multi-query transformer models', 2023, arXiv:2305.13245.
Normalised queries and keys: M. Dehghani et al., 'Scaling vision transformers to 22 billion parameters', 2023,
arXiv:2302.05442.

Shapes: B batch, T tokens, D width, H query heads, K key and value heads, E = D/H width of a head, S tokens in the
cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.lm.cache import LayerCache

Rotary = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype = torch.float32) -> Rotary:
    """Cosines and signed sines by which `rotate` turns the queries and keys at these positions.

    Args:
        positions: whole numbers, (…, T).
        head_dim: E, even.
        base: the slowest of the E/2 angles per position is about 1/base, the fastest 1.
        dtype: of the angles; float32 is exact enough for positions up to 10⁶.

    Returns:
        Two tensors (…, T, 1, E); the 1 stands for the heads.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions[..., None].to(dtype) * base**-exponents
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([cosines, cosines], -1).unsqueeze(-2), torch.cat([-sines, sines], -1).unsqueeze(-2)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (x_i, x_{i+E/2}) of queries or keys (B, T, heads, E) by the angles of their positions."""
    cosines, signed_sines = rotary
    # One roll instead of two halves and a concatenation: fewer passes over memory, forward and backward.
    return (x * cosines + x.roll(x.shape[-1] // 2, -1) * signed_sines).type_as(x)


def document_positions(document: Tensor) -> Tensor:
    """The place of each token in its document, (B, T), for document numbers (B, T) that stand together in a row."""
    columns = torch.arange(document.shape[1], device=document.device).expand_as(document)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    return columns - torch.where(begins, columns, 0).cummax(1).values


def document_mask(document: Tensor) -> Tensor:
    """True where a token (row) may look at another (column): in its own document, not after itself; (B, 1, T, T)."""
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


class CausalAttention(nn.Module):
    """Multi-head self-attention in which no token sees a later one.

    Args:
        d_model: width D.
        n_heads: query heads H; must divide D.
        n_kv_heads: key and value heads K; must divide H. K = H is multi-head, K = 1 multi-query attention.
        bias: whether the projections have biases.
        dropout: probability with which attention weights are dropped in training.
        qk_norm: normalise each head's queries and keys by their root mean square, with a learned gain.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = d_model // n_heads
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)
        self.query_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()
        self.key_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """(B, T, D) to (B, T, D).

        Args:
            x: the tokens.
            rotary: table of their positions; None for no rotary positions.
            mask: True where a token may look, (B or 1, 1, T, S + T); None for all that are not later.
            cache: keys and values of the S tokens before, to which these are added.
        """
        batch, tokens, _ = x.shape
        heads = self.qkv(x).view(batch, tokens, -1, self.head_dim)
        query, key, value = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and tokens > 1,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        mixed: Tensor = self.out(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return mixed


class HeadNorm(nn.Module):
    """Root-mean-square normalisation over the width E of a head, computed in the type of its gain.

    Args:
        head_dim: E.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, E) to (…, E), in the type of `x`."""
        # Under autocast x is bfloat16 and the gain float32, for which torch has no fused kernel.
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, 1e-6).type_as(x)
