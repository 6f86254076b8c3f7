"""Small backbones for texts, trained from nothing.

Shapes: B rows, T tokens, V ids, F width of the backbone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.retrieval.blocks import check_dropout, check_positive, make_blocks


class TextBag(nn.Module):
    """The mean of the tokens' vectors, each token with a learned weight: words and n-grams without an order.

    Token i with id t_i has the weight exp(w[t_i]) over the sum of its row's; all w are 0 at first, a plain mean, and
    what they learn is much like inverse document frequencies. V·(F + 1) parameters. The first vectors are random, so
    that cosines of a new bag are those of the counts of tokens, nearly, the nearer the wider it is.

    Sources: A. Joulin et al., 'Bag of tricks for efficient text classification', 2016, arXiv:1607.01759; there without
    weights. Random vectors: D. Achlioptas, 'Database-friendly random projections', PODS 2001.

    Args:
        vocab_size: V, ids of words or hashed n-grams.
        dim: width F.
        dropout: probability with which a token is left out of its row in training.
        log_counts: a token that comes n times counts 1 + log n times, not n times, and is left out as a whole.
        scale: length of the first vectors, nearly. Steps of Adam or Muon do not depend on it: the larger it is, the
            slower vectors turn at a given learning rate, and the faster weights change beside them.

    Attributes:
        out_features: F.

    Raises:
        ValueError: for a value that is not possible.
    """

    def __init__(
        self, vocab_size: int, dim: int = 128, dropout: float = 0.0, log_counts: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, dim=dim)
        check_dropout(dropout)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}: must be above 0")
        self.token_vectors = nn.Parameter(torch.randn(vocab_size, dim) * (scale * dim**-0.5))
        self.weights = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = dropout
        self.log_counts = log_counts
        self.out_features = dim

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, T) int64 and their mask (B, T), true where there is a token, to (B, F); zeros for none."""
        if self.log_counts:
            return self._of_counts(text, mask)
        if self.training and self.dropout > 0:
            mask = mask & (torch.rand(mask.shape, device=mask.device) >= self.dropout)
        logits = self.weights[text]
        shares = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1) * mask
        # One sum without the vectors of every token in memory.
        return F.embedding_bag(text, self.token_vectors, mode="sum", per_sample_weights=shares)

    def _of_counts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Without padding: rows of code are long, some ten times as long as others."""
        rows, tokens, counts = counted_tokens(text, mask)
        if self.training and self.dropout > 0:
            kept = torch.rand(rows.shape, device=rows.device) >= self.dropout
            rows, tokens, counts = rows[kept], tokens[kept], counts[kept]
        logits = self.weights[tokens] + (1 + counts.to(self.weights.dtype).log()).log()
        largest = logits.new_zeros(len(text)).scatter_reduce(0, rows, logits.detach(), "amax", include_self=False)
        amounts = (logits - largest[rows]).exp()
        shares = amounts / amounts.new_zeros(len(text)).index_add(0, rows, amounts)[rows]
        starts = torch.searchsorted(rows, torch.arange(len(text), device=rows.device))
        return F.embedding_bag(tokens, self.token_vectors, starts, mode="sum", per_sample_weights=shares)


def counted_tokens(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token of each row once, and how often it stands there.

    Args:
        text: ids (B, T) int64, 0 or more.
        mask: (B, T) bool, true where there is a token.

    Returns:
        Row, id and count of each, all int64; by row, then by id.
    """
    base = int(text.max()) + 1 if text.numel() else 1
    keys = text + base * torch.arange(len(text), device=text.device)[:, None]
    found, counts = keys[mask].unique(return_counts=True)
    return found // base, found % base, counts


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
