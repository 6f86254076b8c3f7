"""Triplet loss: a query's positive is to be more alike than its negatives by a margin.

    l_ij = max(0, m − s_ii + s_ij)        that is, with distances 1 − s: max(0, m + d_ii − d_ij)

Sources: F. Schroff et al., 'FaceNet', CVPR 2015 (arXiv:1503.03832); mining within the batch: A. Hermans et al.,
'In defense of the triplet loss for person re-identification', 2017 (arXiv:1703.07737).

N: queries, M: explicit negatives.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from trainerkit.tasks.retrieval.losses._rows import above_zero, check_rows, joined, no_scores, relevant
from trainerkit.tasks.retrieval.similarity import similarity

Mining = Literal["hard", "all"]


def triplet(similarities: Tensor, negative: Tensor, margin: float, mining: Mining = "hard") -> Tensor:
    """Triplet loss of each row of similarities (N, N + M); its own is the i-th.

    Args:
        similarities: of query i and candidate j.
        negative: (N, N + M) bool, true for the negatives of a query.
        margin: m.
        mining: 'hard', the mean over the queries of the most alike negative's l_ij, 0 where there is none; or 'all',
            the mean of all l_ij that are above 0 (Hermans' 'batch all ≠ 0'), 0 where none is.
    """
    if not len(similarities):
        return similarities.sum()  # there is no largest of nothing
    differences = similarities - similarities.diagonal()[:, None]
    if mining == "hard":
        most = differences.masked_fill(~negative, -torch.inf).amax(1)
        return (margin + most).relu().mean()
    losses = torch.where(negative, (margin + differences).relu(), 0.0)
    return losses.sum() / (losses > 0).sum().clamp(min=1)


class Triplet(nn.Module):
    """Triplet loss of cosines; formula at the top.

    Negatives of a query are all rows' positives but its own and those of the same label, and all explicit negatives,
    whichever query they were given for.

    Args:
        margin: m, above 0, in units of similarity: from −1 to 1.
        mining: 'hard' or 'all', see `triplet`. The hardest alone can draw all embeddings into one point where the
            learning rate is high; 'all' does not.
        symmetric: the mean of this and of the other direction, in which explicit negatives do not count.

    Raises:
        ValueError: for a number or word out of its range; in `forward` for shapes that do not fit, or for scores.
    """

    def __init__(self, margin: float = 0.5, mining: Mining = "hard", symmetric: bool = False) -> None:
        super().__init__()
        above_zero(margin=margin)
        if mining not in ("hard", "all"):
            raise ValueError(f"mining={mining}: must be hard or all")
        self.margin = margin
        self.mining: Mining = mining
        self.symmetric = symmetric

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
        no_scores(scores, self)
        table = similarity(queries, joined(positives, negatives))
        others = ~relevant(queries, labels)
        explicit = others.new_ones(len(queries), table.shape[1] - len(queries))
        loss = triplet(table, torch.cat([others, explicit], 1), self.margin, self.mining)
        if self.symmetric:
            loss = (loss + triplet(table[:, : len(queries)].T, others, self.margin, self.mining)) / 2
        return loss
