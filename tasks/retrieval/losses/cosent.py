"""CoSENT: pairs are to be ranked by similarity as they are by score.

    L = log(1 + Σ exp(λ (s_low − s_high)))        over all two pairs of which one has the higher score

Source: J. Su, 'CoSENT', 2022 (https://kexue.fm/archives/8847), λ = 20.

N: queries, M: explicit negatives, P: pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.retrieval.losses._rows import above_zero, check_rows, given_for, joined, relevant
from trainerkit.tasks.retrieval.similarity import similarity


def cosent(similarities: Tensor, scores: Tensor, scale: float = 20.0) -> Tensor:
    """CoSENT of pairs with similarities (P,) and scores (P,); a scalar, 0 where no two scores differ."""
    exponents = scale * (similarities[:, None] - similarities)  # (low, high)
    ordered = scores[:, None] < scores
    # softplus(logsumexp(x)) is log(1 + Σ exp(x)).
    return F.softplus(exponents.masked_fill(~ordered, -torch.inf).flatten().logsumexp(0))


def cosent_of_two(similarities: Tensor, high: Tensor, low: Tensor, scale: float = 20.0) -> Tensor:
    """The same for two scores only, without the table of all two pairs: Σ exp(a − b) = Σ exp(a) · Σ exp(−b).

    Args:
        similarities: of any shape.
        high: bool, of the same shape: where the score is the high one.
        low: bool, of the same shape: where it is the low one.
        scale: λ.
    """
    scaled = scale * similarities
    lows = scaled.masked_fill(~low, -torch.inf).flatten().logsumexp(0)
    highs = (-scaled).masked_fill(~high, -torch.inf).flatten().logsumexp(0)
    return F.softplus(lows + highs)


class CoSENT(nn.Module):
    """CoSENT; formula at the top.

    With scores the N pairs are compared, and each explicit negative with the query it was given for (all queries
    without owners), scored 0 or, if that is lower, as the lowest pair of the batch. Mismatches in the batch have no
    score and stay out, and labels change nothing.

    Without scores each query and its positive, or one of the same label, are scored 1, all mismatches in the batch and
    all explicit negatives 0.

    Args:
        scale: λ, above 0.

    Raises:
        ValueError: for a scale that is not above 0; in `forward` for shapes that do not fit.
    """

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        above_zero(scale=scale)
        self.scale = scale

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
        check_rows(queries, positives, negatives, owners, labels, scores)
        table = similarity(queries, joined(positives, negatives))
        number = len(queries)
        if scores is None:
            high = F.pad(relevant(queries, labels), (0, table.shape[1] - number))
            return cosent_of_two(table, high, ~high, self.scale)
        similarities = table.diagonal()
        if negatives is not None and number:
            explicit = table[:, number:][given_for(queries, negatives, owners)]
            similarities = torch.cat([similarities, explicit])
            scores = torch.cat([scores, scores.min().clamp(max=0).expand(len(explicit))])
        return cosent(similarities, scores, self.scale)
