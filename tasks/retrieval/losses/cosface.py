"""CosFace: a vector for each label of the training data, which its rows are drawn to and all others are kept from.

    L = −1/N Σ_i log [ exp((c_iy − m)/τ) / (exp((c_iy − m)/τ) + Σ_{k ≠ y} exp(c_ik/τ)) ]

c_ik is the cosine of embedding i and the vector of label k, y the label of i. A row meets all labels in each step and
not only those that the batch has, so that batches may be small and steps many.

Sources: H. Wang et al., 'CosFace: large margin cosine loss for deep face recognition', CVPR 2018 (arXiv:1801.09414),
with s = 1/τ; without the margin: F. Wang et al., 'NormFace', ACM MM 2017 (arXiv:1704.06369).
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.retrieval.losses._rows import above_zero, check_rows, joined
from trainerkit.tasks.retrieval.similarity import similarity


def cosface(cosines: Tensor, labels: Tensor, temperature: float, margin: float) -> Tensor:
    """Cross-entropy of cosines (N, K) with labels (N,) int64, whose own are m smaller; formula at the top.

    Returns:
        A scalar, the mean over the rows; 0 where there are none.
    """
    own = F.one_hot(labels, cosines.shape[1]).to(cosines.dtype)
    return F.cross_entropy((cosines - margin * own) / temperature, labels, reduction="sum") / max(1, len(labels))


class CosFace(nn.Module):
    """Another loss, and `weight` times CosFace of queries and positives together; formula at the top. Needs labels.

    Labels count from 0 here, and the vectors are of the training data alone: in evaluation the loss is the other's.
    Explicit negatives are the other's too, since what labels they have is not known.

    Args:
        loss: the other one, of the same embeddings and labels.
        classes: K, how many labels the training data have.
        dim: D, width of the embeddings.
        temperature: τ, above 0.
        margin: m, a cosine from 0 to below 1.
        weight: of CosFace, above 0.

    Raises:
        ValueError: for a number out of its range; in `forward` for embeddings that are not (N, D), without labels, for
            a label of K or more, and what the other loss raises.
    """

    def __init__(
        self,
        loss: nn.Module,
        classes: int,
        dim: int,
        temperature: float = 0.05,
        margin: float = 0.2,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        for name, number in {"classes": classes, "dim": dim}.items():
            if number < 1:
                raise ValueError(f"{name}={number}: must be 1 or more")
        above_zero(temperature=temperature, weight=weight)
        if not 0 <= margin < 1:
            raise ValueError(f"margin={margin}: must be from 0 to below 1")
        self.loss = loss
        self.classes = classes
        self.temperature = temperature
        self.margin = margin
        self.weight = weight
        # An embedding, so that optimizers neither decay it nor take it for a hidden matrix.
        self.vectors = nn.Embedding(classes, dim)
        nn.init.normal_(self.vectors.weight, std=1 / math.sqrt(dim))

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
        loss: Tensor = self.loss(queries, positives, negatives, owners=owners, labels=labels, scores=scores)
        if not self.training:
            return loss
        if queries.ndim != 2 or queries.shape[1] != self.vectors.embedding_dim:
            raise ValueError(
                f"queries: shape {tuple(queries.shape)}; must be (N, {self.vectors.embedding_dim}), as dim says"
            )
        if labels is None:
            raise ValueError("labels: CosFace needs a label of each query; without labels take InfoNCE")
        # Elsewhere it would be a wait for the device, whose own kernels refuse it.
        if labels.device.type == "cpu" and ((labels < 0) | (labels >= self.classes)).any():
            raise ValueError(
                f"labels: from {int(labels.min())} to {int(labels.max())}; must be from 0 to {self.classes - 1}, as "
                f"classes={self.classes} says"
            )
        cosines = similarity(joined(queries, positives), self.vectors.weight)
        return loss + self.weight * cosface(cosines, labels.repeat(2), self.temperature, self.margin)
