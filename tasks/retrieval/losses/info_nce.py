"""InfoNCE: cross-entropy of finding each query's positive among all candidates of the batch.

    L = −1/N Σ_i log [ exp(s_ii/τ) / Σ_{j ∈ C(i)} exp(s_ij/τ) ]

s_ij is the similarity of query i and candidate j; the candidates C(i) are the positives of all rows and the explicit
negatives.

Sources: A. van den Oord et al., 'Representation learning with contrastive predictive coding', 2018 (arXiv:1807.03748);
learnable temperature and both directions: A. Radford et al., 'Learning transferable visual models from natural language
supervision', ICML 2021 (arXiv:2103.00020); false negatives: A. Solatorio, 'GISTEmbed', 2024 (arXiv:2402.16829), here
with the model as its own guide; late interaction: O. Khattab, M. Zaharia, 'ColBERT', SIGIR 2020 (arXiv:2004.12832).

N: queries, M: explicit negatives.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.functional.contrastive import info_nce
from trainerkit.tasks.retrieval.losses._rows import above_zero, check_rows, given_for, joined, no_scores, relevant
from trainerkit.tasks.retrieval.similarity import normalized, similarity

_LEAST_LEARNT = 0.01  # τ; CLIP's bound, against instability


def info_nce_among(similarities: Tensor, counted: Tensor, temperature: float | Tensor) -> Tensor:
    """InfoNCE of each row of similarities (N, N + M) among the candidates that count; its own is the i-th.

    Args:
        similarities: of query i and candidate j.
        counted: (N, N + M) bool, true for the candidates of a query; its own counts in any case.
        temperature: τ.

    Returns:
        A scalar, the mean over the rows; 0 where there are none.
    """
    number = len(similarities)
    own = torch.arange(number, device=similarities.device)
    left_out = ~counted & (own[:, None] != torch.arange(similarities.shape[1], device=similarities.device))
    logits = (similarities / temperature).masked_fill(left_out, -torch.inf)
    return F.cross_entropy(logits, own, reduction="sum") / max(1, number)


def hardest(similarities: Tensor, pool: Tensor, number: int) -> Tensor:
    """(N, C) bool: of each row's pool (N, C) the `number` candidates of the largest similarities, or all if fewer."""
    ranked = similarities.masked_fill(~pool, -torch.inf).topk(min(number, similarities.shape[1]), dim=1).indices
    return torch.zeros_like(pool).scatter(1, ranked, True) & pool


class InfoNCE(nn.Module):
    """InfoNCE with explicit negatives, labels, hard negatives and a guard against false ones; formula at the top.

    Candidates of a query are its own positive, the explicit negatives given for it, and everything else in the batch:
    the other rows' positives and the negatives given for other queries. Of a query and a row with the same label
    neither is a negative of the other; what labels explicit negatives have is not known. The options below choose
    among that which was not given for the query; what was given for it always counts. In this order:

    1. `own_negatives_only` leaves out negatives given for other queries.
    2. `false_negative_margin` m leaves out j with s_ij > s_ii − m: they are so alike that they may well be right.
    3. `hard_negatives` k leaves all but the k most alike.

    Args:
        temperature: τ, above 0.
        learnable_temperature: train log(1/τ) from there, with 1/τ at most 100 as in CLIP.
        symmetric: the mean of this and of finding each positive's query among all queries, with the same options;
            explicit negatives are nobody's query and do not count there.
        hard_negatives: k, at least 1; None: all.
        false_negative_margin: m, in units of similarity; with 0 those more alike than the positive are left out, a
            larger one leaves out more. It needs a model that knows something already. None: no guard.
        own_negatives_only: see above.

    Raises:
        ValueError: for a number out of its range; in `forward` for shapes that do not fit, or for scores.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        symmetric: bool = False,
        hard_negatives: int | None = None,
        false_negative_margin: float | None = None,
        own_negatives_only: bool = False,
    ) -> None:
        super().__init__()
        above_zero(temperature=temperature)
        if learnable_temperature and temperature < _LEAST_LEARNT:
            raise ValueError(f"temperature={temperature}: must be {_LEAST_LEARNT} or more where it is learnt")
        if hard_negatives is not None and hard_negatives < 1:
            raise ValueError(f"hard_negatives={hard_negatives}: must be 1 or more, or null for all")
        if false_negative_margin is not None and not math.isfinite(false_negative_margin):
            raise ValueError(f"false_negative_margin={false_negative_margin}: must be a number, or null for no guard")
        self._temperature = temperature
        # Of one dimension, since FSDP2 refuses scalars.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)])) if learnable_temperature else None
        self.symmetric = symmetric
        self.hard_negatives = hard_negatives
        self.false_negative_margin = false_negative_margin
        self.own_negatives_only = own_negatives_only

    @property
    def temperature(self) -> float | Tensor:
        """τ: a number, or a tensor (1,) where it is learnt."""
        return self._temperature if self.log_scale is None else (-self.log_scale).exp()

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
        if self.log_scale is not None:
            with torch.no_grad():  # in place: clamped within the graph it would have no gradient to come back by
                self.log_scale.clamp_(max=-math.log(_LEAST_LEARNT))
        temperature = self.temperature
        candidates = joined(positives, negatives)
        if queries.ndim == 2 and labels is None and not self._chooses(negatives, owners):
            # Without choices the table of all pairs need not be held.
            scaled = normalized(queries) / temperature
            return info_nce(scaled, normalized(candidates), 1.0, symmetric=self.symmetric, normalize=False)
        table = similarity(queries, candidates)
        others = ~relevant(queries, labels)
        given = None if negatives is None else given_for(queries, negatives, owners)
        loss = info_nce_among(table, self._counted(table.detach(), others, given), temperature)
        if self.symmetric:
            back = table[:, : len(queries)].T
            loss = (loss + info_nce_among(back, self._counted(back.detach(), others, None), temperature)) / 2
        return loss

    def _chooses(self, negatives: Tensor | None, owners: Tensor | None) -> bool:
        among_negatives = self.own_negatives_only and negatives is not None and owners is not None
        return among_negatives or self.hard_negatives is not None or self.false_negative_margin is not None

    def _counted(self, table: Tensor, others: Tensor, given: Tensor | None) -> Tensor:
        """(N, N + M): the candidates of each query except its own, as the class's docstring says."""
        number = len(table)
        if given is None:
            given = others.new_zeros(number, 0)
        always = torch.cat([torch.zeros_like(others), given], 1)
        rest = torch.cat([others, torch.zeros_like(given) if self.own_negatives_only else ~given], 1)
        if self.false_negative_margin is not None:
            rest = rest & (table <= table.diagonal()[:, None] - self.false_negative_margin)
        if self.hard_negatives is not None:
            rest = hardest(table, rest, self.hard_negatives)
        return always | rest


class LateInteraction(InfoNCE):
    """`InfoNCE` of sequences of vectors, ColBERT's MaxSim; see `similarity`.

    Arguments are those of `InfoNCE`, which takes sequences as well; this one refuses anything else, so that an encoder
    that pools is noticed.

    Raises:
        ValueError: as `InfoNCE`; in `forward` also for embeddings that are not (N, T, D).
    """

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
        if queries.ndim != 3:
            raise ValueError(
                f"queries: shape {tuple(queries.shape)}; late interaction needs (N, T, D), from an encoder that does "
                "not pool"
            )
        return super().forward(queries, positives, negatives, owners=owners, labels=labels, scores=scores)
