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

from trainerkit.tasks.retrieval.losses._rows import above_zero
from trainerkit.tasks.retrieval.similarity import similarity


def cosface(cosines: Tensor, labels: Tensor, temperature: float, margin: float) -> Tensor:
    """Cross-entropy of cosines (N, K) with labels (N,) int64, whose own are m smaller; formula at the top.

    Returns:
        A scalar, the mean over the rows; 0 where there are none.
    """
    own = F.one_hot(labels, cosines.shape[1]).to(cosines.dtype)
    return F.cross_entropy((cosines - margin * own) / temperature, labels, reduction="sum") / max(1, len(labels))


class CosFace(nn.Module):
    """Trained vectors of labels, and `weight` times the loss of embeddings against them; formula at the top.

    It is no loss of pairs but stands beside one (`task.class_loss`), in training alone: other data have other labels.

    Args:
        dim: D, width of the embeddings.
        classes: K; labels count from 0. None where the data have no labels: the loss is 0.
        temperature: τ, above 0.
        margin: m, a cosine from 0 to below 1.
        weight: above 0.

    Raises:
        ValueError: for a number out of its range; in `forward` for embeddings or labels that do not fit.
    """

    def __init__(
        self,
        dim: int,
        classes: int | None = None,
        temperature: float = 0.05,
        margin: float = 0.2,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim}: must be 1 or more")
        if classes is not None and classes < 1:
            raise ValueError(f"classes={classes}: must be 1 or more, or null for data without labels")
        above_zero(temperature=temperature, weight=weight)
        if not 0 <= margin < 1:
            raise ValueError(f"margin={margin}: must be from 0 to below 1")
        self.classes = classes
        self.temperature = temperature
        self.margin = margin
        self.weight = weight
        self.vectors = None
        if classes is not None:
            # An embedding, so that optimizers neither decay it nor take it for a hidden matrix.
            self.vectors = nn.Embedding(classes, dim)
            nn.init.normal_(self.vectors.weight, std=1 / math.sqrt(dim))

    def forward(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        """A scalar.

        Args:
            embeddings: (N, D), of any length.
            labels: (N,) int64; None only if there are no classes.
        """
        if self.vectors is None:
            return embeddings.new_zeros((), dtype=similarity(embeddings[:0], embeddings[:0]).dtype)
        if labels is None:
            raise ValueError(f"classes={self.classes}: the batch has no labels; set null for data without")
        dim = self.vectors.embedding_dim
        if embeddings.shape != (len(labels), dim):
            raise ValueError(
                f"embeddings: shape {tuple(embeddings.shape)}; must be ({len(labels)}, {dim}), by the labels and dim"
            )
        # Elsewhere it would be a wait for the device, whose own kernels refuse it.
        if labels.device.type == "cpu" and ((labels < 0) | (labels >= self.vectors.num_embeddings)).any():
            raise ValueError(
                f"labels: from {int(labels.min())} to {int(labels.max())}; must be from 0 to "
                f"{self.vectors.num_embeddings - 1}, as classes={self.classes} says"
            )
        cosines = similarity(embeddings, self.vectors.weight)
        return self.weight * cosface(cosines, labels, self.temperature, self.margin)
