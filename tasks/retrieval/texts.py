"""Small backbones for texts, trained from nothing.

Shapes: B rows, T tokens, V ids, F width of the backbone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        for name, size in (("vocab_size", vocab_size), ("dim", dim)):
            if size < 1:
                raise ValueError(f"{name}={size}: must be 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be from 0 to below 1")
        self.vectors = nn.Parameter(torch.randn(vocab_size, dim) * dim**-0.5)  # of length 1 or so
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
        return F.embedding_bag(text, self.vectors, mode="sum", per_sample_weights=shares)
