"""Losses of embeddings that belong together in pairs.

All are called alike, `loss(queries, positives, negatives=None, *, owners=None, labels=None, scores=None)`, on the
embeddings of the whole batch (of all processes), of any length: what counts is `similarity`.

- queries, positives: (N, D), or (N, T, D) for late interaction; the i-th belong to each other.
- negatives: (M, D) or (M, S, D), explicit ones; always in addition to those that the batch gives.
- owners: (M,) int64, the query that each negative was given for; None: for every query.
- labels: (N,) int64; rows of the same label are relevant to each other.
- scores: (N,) how alike each pair is, for losses of graded pairs; the others refuse them.

A scalar comes back, in float32 or, of float64, in float64, under autocast too. `CosFace` is no loss of pairs: it stands
beside one and takes embeddings and labels.
"""

from trainerkit.tasks.retrieval.losses.cosent import CoSENT
from trainerkit.tasks.retrieval.losses.cosface import CosFace
from trainerkit.tasks.retrieval.losses.info_nce import InfoNCE, LateInteraction
from trainerkit.tasks.retrieval.losses.matryoshka import Matryoshka
from trainerkit.tasks.retrieval.losses.sigmoid import SigLIP
from trainerkit.tasks.retrieval.losses.sup_con import SupCon
from trainerkit.tasks.retrieval.losses.triplet import Triplet

__all__ = ["CoSENT", "CosFace", "InfoNCE", "LateInteraction", "Matryoshka", "SigLIP", "SupCon", "Triplet"]
