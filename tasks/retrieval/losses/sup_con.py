"""Supervised contrastive loss: everything of the same label is pulled together.

    L = −1/N Σ_i 1/|P(i)| Σ_{p ∈ P(i)} log [ exp(s_ip/τ) / Σ_{a ∈ A(i)} exp(s_ia/τ) ]

Source: P. Khosla et al., 'Supervised contrastive learning', NeurIPS 2020 (arXiv:2004.11362), L_out (equation 2).

N: queries, M: explicit negatives.
"""

import torch
from torch import Tensor, nn

from trainerkit.tasks.retrieval.losses._rows import above_zero, check_rows, joined, no_scores, relevant
from trainerkit.tasks.retrieval.similarity import similarity


def sup_con(similarities: Tensor, positive: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """L_out of similarities of anchors and candidates.

    Args:
        similarities: (N, C).
        positive: (N, C) bool, P(i), at least one in each row.
        counted: (N, C) bool, A(i), of which P(i) is a part.
        temperature: τ.

    Returns:
        A scalar, the mean over the anchors; 0 where there are none.
    """
    logs = torch.log_softmax((similarities / temperature).masked_fill(~counted, -torch.inf), dim=1)
    # where() instead of a product: what is left out is minus infinity.
    of_positives = torch.where(positive, logs, 0.0).sum(1) / positive.sum(1)
    return -of_positives.sum() / max(1, len(similarities))


class SupCon(nn.Module):
    """Supervised contrastive loss; formula at the top. Needs labels.

    As retrieval needs it the anchors are the queries, A(i) all positives and explicit negatives, and P(i) the positives
    of rows of the same label, its own among them. The paper's form has queries and positives as two views of one
    kind (`all_views`): every one of them is an anchor, and A(i) all others, queries too, and the explicit negatives.

    Args:
        temperature: τ, above 0; the paper's.
        symmetric: the mean of this and of the other direction, in which explicit negatives do not count; not with
            `all_views`, which goes in all directions anyway.
        all_views: the paper's form.

    Raises:
        ValueError: for a temperature that is not above 0, or symmetric with all_views; in `forward` for shapes that do
            not fit, without labels, or for scores.
    """

    def __init__(self, temperature: float = 0.1, symmetric: bool = False, all_views: bool = False) -> None:
        super().__init__()
        above_zero(temperature=temperature)
        if symmetric and all_views:
            raise ValueError("symmetric=True: must be False with all_views, which goes in all directions")
        self.temperature = temperature
        self.symmetric = symmetric
        self.all_views = all_views

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
        if labels is None:
            raise ValueError("labels: SupCon needs a label of each query; without labels take InfoNCE")
        same, anchors, candidates = relevant(queries, labels), queries, joined(positives, negatives)
        itself = torch.zeros_like(same)
        if self.all_views:
            anchors, candidates = joined(queries, positives), joined(queries, positives, negatives)
            itself, same = torch.eye(len(anchors), dtype=torch.bool, device=same.device), same.repeat(2, 2)
        table = similarity(anchors, candidates)
        explicit = same.new_zeros(len(anchors), table.shape[1] - same.shape[1])
        positive, counted = torch.cat([same & ~itself, explicit], 1), torch.cat([~itself, ~explicit], 1)
        loss = sup_con(table, positive, counted, self.temperature)
        if self.symmetric:
            back = table[:, : len(queries)].T
            loss = (loss + sup_con(back, same, torch.ones_like(same), self.temperature)) / 2
        return loss
