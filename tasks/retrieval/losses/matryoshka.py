"""Matryoshka: embeddings whose first numbers alone are good embeddings too.

    L = Σ_k w_k · loss of the first d_k numbers

Source: A. Kusupati et al., 'Matryoshka representation learning', NeurIPS 2022 (arXiv:2205.13147), in which all w are 1.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn


class Matryoshka(nn.Module):
    """Any of the other losses on several shortened versions of the embeddings; formula at the top.

    Each is shortened first and taken to length 1 by the loss, as it will be when it is used.

    Args:
        loss: what is computed of each.
        dims: how many of the first numbers, in any order; name the full width too if it is to count.
        weights: one for each of `dims`, in its order; None: 1 each.

    Raises:
        ValueError: for dims that are not there, not above 0 or there twice, or weights that do not fit or are all 0; in
            `forward` for embeddings that are narrower than one of dims, and what the loss raises.
    """

    def __init__(self, loss: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
            raise ValueError(f"dims={list(dims)}: must be one or more different numbers above 0")
        weights = [1.0] * len(dims) if weights is None else list(weights)
        if len(weights) != len(dims):
            raise ValueError(f"weights={weights}: must be {len(dims)} numbers, one for each of dims={list(dims)}")
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"weights={weights}: must be 0 or more, and not all 0")
        self.loss = loss
        self.dims = tuple(dims)
        self.weights = tuple(weights)

    def forward(
        self,
        queries: Tensor,
        positives: Tensor,
        negatives: Tensor | None = None,
        *,
        owners: Tensor | None = None,
        labels: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """A scalar; arguments as in the package's docstring."""
        if max(self.dims) > queries.shape[-1]:
            raise ValueError(f"dims={list(self.dims)}: must be at most {queries.shape[-1]}, the embeddings' width")
        losses: list[Tensor] = [
            weight
            * self.loss(
                queries[..., :dim],
                positives[..., :dim],
                None if negatives is None else negatives[..., :dim],
                owners=owners,
                labels=labels,
                scores=scores,
            )
            for dim, weight in zip(self.dims, self.weights, strict=True)
        ]
        return sum(losses[1:], losses[0])
