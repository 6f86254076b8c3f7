"""SigLIP's loss: each query and candidate alone, matched or not, without a sum over the batch in a logarithm.

    L = −1/N Σ_i Σ_j log σ(z_ij (t s_ij + b)),        z_ij = 1 where they match, −1 elsewhere

Source: X. Zhai et al., 'Sigmoid loss for language image pre-training', ICCV 2023 (arXiv:2303.15343).

N: queries, M: explicit negatives.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.retrieval.losses._rows import above_zero, check_rows, joined, no_scores, relevant
from trainerkit.tasks.retrieval.similarity import similarity


def sigmoid_loss(similarities: Tensor, matched: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """SigLIP's loss of similarities (N, C), of which `matched` (N, C) bool match; a scalar, 0 without any query.

    Args:
        similarities: s_ij.
        matched: where z_ij is 1.
        scale: t.
        bias: b.
    """
    logits = scale * similarities + bias
    return -F.logsigmoid(torch.where(matched, logits, -logits)).sum() / max(1, len(similarities))


class SigLIP(nn.Module):
    """SigLIP's loss with scale and bias that are trained; formula at the top.

    A query matches its own row's positive and those of the same label, and no explicit negative, whichever query it was
    given for. Both directions are the same.

    Args:
        scale: t at the beginning, above 0; its logarithm is trained.
        bias: b at the beginning. Low, so that the many mismatches do not take over the first steps.

    Raises:
        ValueError: for a number out of its range; in `forward` for shapes that do not fit, or for scores.
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        above_zero(scale=scale)
        if not math.isfinite(bias):
            raise ValueError(f"bias={bias}: must be a number")
        # Of one dimension, since FSDP2 refuses scalars.
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.bias = nn.Parameter(torch.tensor([float(bias)]))

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
        matched = F.pad(relevant(queries, labels), (0, table.shape[1] - len(queries)))
        return sigmoid_loss(table, matched, self.log_scale.exp(), self.bias)
