"""Small backbones for texts, trained from nothing.

Shapes: B rows, T tokens, V ids, F width of the backbone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.retrieval.blocks import check_dropout, check_positive, make_blocks


class TextBag(nn.Module):
    """The mean of the tokens' vectors, each token with a learned weight: words and n-grams without an order.

    Token i with id t_i has the weight exp(w[t_i]) over the sum of its row's; all w are 0 at first, a plain mean, and
    what they learn is much like inverse document frequencies. V·(F + 1) parameters.

    Source: A. Joulin et al., 'Bag of tricks for efficient text classification', 2016, arXiv:1607.01759; there without
    weights.

    Args:
        vocab_size: V, ids of words or hashed n-grams.
        dim: width F.
        dropout: probability with which a token is left out of its row in training.

    Attributes:
        out_features: F.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(self, vocab_size: int, dim: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, dim=dim)
        check_dropout(dropout)
        self.token_vectors = nn.Parameter(torch.randn(vocab_size, dim) * dim**-0.5)  # of length 1 or so
        self.weights = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = dropout
        self.out_features = dim

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, T) int64 and their mask (B, T), true where there is a token, to (B, F); zeros for none."""
        if self.training and self.dropout > 0:
            mask = mask & (torch.rand(mask.shape, device=mask.device) >= self.dropout)
        logits = self.weights[text]
        shares = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1) * mask
        # One sum without the vectors of every token in memory.
        return F.embedding_bag(text, self.token_vectors, mode="sum", per_sample_weights=shares)


class TextTransformer(nn.Module):
    """A bidirectional transformer over tokens with learned positions; padding, on either side, changes nothing.

    Vectors for V ids and the positions, and 12·F² parameters a block, nearly: 404,992 and 128·V with the defaults.

    Args:
        vocab_size: V.
        max_length: tokens a text may have.
        dim: width F, a multiple of `heads`.
        layers: blocks.
        heads: attention heads of each.
        dropout: probability, in the blocks.

    Attributes:
        out_features: F.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int = 64,
        dim: int = 128,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, max_length=max_length)
        self.blocks = make_blocks(dim, layers, heads, dropout)
        self.token_vectors = nn.Parameter(torch.randn(vocab_size, dim) * 0.02)
        self.position_embedding = nn.Parameter(torch.randn(max_length, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.max_length = max_length
        self.out_features = dim

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, T) int64 and their mask (B, T), true where there is a token, to (B, T, F); padding is anything.

        Raises:
            ValueError: if T is more than `max_length`.
        """
        if text.shape[1] > self.max_length:
            raise ValueError(f"max_length={self.max_length}: texts have up to {text.shape[1]} tokens")
        # Counted from a row's first token, wherever it stands.
        columns = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = F.embedding(text, self.token_vectors) + F.embedding(columns, self.position_embedding)
        # A row of nothing but padding looks at all of it: attention over nothing is not a number.
        hidden_from_view = ~mask & mask.any(1, keepdim=True)
        for block in self.blocks:
            hidden = block(hidden, src_key_padding_mask=hidden_from_view)
        out: Tensor = self.norm(hidden)
        return out
