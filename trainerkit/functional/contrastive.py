"""The contrastive loss of pairs, with the other pairs of the batch as what they are not: InfoNCE.

Sources: A. van den Oord et al., 'Representation learning with contrastive predictive coding', 2018 (arXiv:1807.03748);
temperature and both directions: A. Radford et al., 'Learning transferable visual models from natural language
supervision', ICML 2021 (arXiv:2103.00020).

B: pairs, D: width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainerkit.functional.cross_entropy import linear_cross_entropy


def info_nce(
    queries: Tensor, documents: Tensor, temperature: float = 0.05, *, symmetric: bool = False, normalize: bool = True
) -> Tensor:
    """Cross-entropy of finding each query's document among all documents of the batch.

    −log [exp(q_i·d_i/τ) / Σ_j exp(q_i·d_j/τ)], mean over i. In float32 under autocast too, since τ enlarges rounding;
    the table of all pairs is never held at once.

    Args:
        queries: (B, D).
        documents: (B + extra, D); the i-th is the i-th query's, the extra ones are nobody's (hard negatives).
        temperature: τ, above 0.
        symmetric: the mean of this and of finding each document's query, for which the extra ones do not count.
        normalize: take all to length 1 first, so that products are cosines.

    Returns:
        A scalar; log(B + extra) where nothing is told apart, 0 without any query.

    Raises:
        ValueError: for a temperature that is not above 0, or shapes that do not fit.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    number = len(queries)
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1] or len(documents) < number:
        raise ValueError(
            f"queries, documents: shapes {tuple(queries.shape)} and {tuple(documents.shape)}; "
            "must be (B, D) and (B or more, D)"
        )
    if normalize:
        queries, documents = F.normalize(queries, dim=1), F.normalize(documents, dim=1)
    own = torch.arange(number, device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        if torch.float64 not in (queries.dtype, documents.dtype):
            queries, documents = queries.float(), documents.float()
        loss, _ = linear_cross_entropy(queries / temperature, documents, own)
        if symmetric:
            back, _ = linear_cross_entropy(documents[:number] / temperature, queries, own)
            loss = (loss + back) / 2
    return loss
