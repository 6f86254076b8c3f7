"""What all losses do first: check shapes, join candidates, tell which rows are relevant to each other."""

import torch
from torch import Tensor

from trainerkit.tasks.retrieval import rows


def check_rows(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    owners: Tensor | None,
    labels: Tensor | None,
    scores: Tensor | None,
) -> None:
    """Refuse what does not fit each other; shapes as in the package's docstring.

    Raises:
        ValueError: with the shapes that are there and what they must be.
    """
    number, shapes = len(queries), f"shapes {tuple(queries.shape)} and {tuple(positives.shape)}"
    ranks_fit = queries.ndim in (2, 3) and positives.ndim == queries.ndim
    if not ranks_fit or len(positives) != number or positives.shape[-1] != queries.shape[-1]:
        raise ValueError(f"queries, positives: {shapes}; must be (N, D) twice, or (N, T, D) and (N, S, D)")
    if negatives is not None and (negatives.ndim != queries.ndim or negatives.shape[-1] != queries.shape[-1]):
        raise ValueError(
            f"negatives: shape {tuple(negatives.shape)}; must be (M, {'S, ' * (queries.ndim == 3)}{queries.shape[-1]}) "
            f"beside queries of shape {tuple(queries.shape)}"
        )
    if owners is not None:
        _check_length("owners", owners, 0 if negatives is None else len(negatives), "one of each negative")
    for name, values in {"labels": labels, "scores": scores}.items():
        if values is not None:
            _check_length(name, values, number, "one of each query")


def no_scores(scores: Tensor | None, loss: object) -> None:
    """Refuse graded pairs, of which this loss would take the worst for as good as the best.

    Raises:
        ValueError: if there are scores.
    """
    if scores is not None:
        raise ValueError(
            f"scores: {type(loss).__name__} has no use for graded pairs; take CoSENT, or leave the column out"
        )


def relevant(queries: Tensor, labels: Tensor | None) -> Tensor:
    """(N, N) bool: whether a row's positive is one for a query: its own row's, or one of the same label."""
    own = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    return own if labels is None else own | (labels[:, None] == labels)


def given_for(queries: Tensor, negatives: Tensor, owners: Tensor | None) -> Tensor:
    """(N, M) bool: whether an explicit negative was given for a query."""
    if owners is None:
        return torch.ones(len(queries), len(negatives), dtype=torch.bool, device=queries.device)
    return owners == torch.arange(len(queries), device=queries.device)[:, None]


def joined(first: Tensor, *others: Tensor | None) -> Tensor:
    """One after another as `rows.joined`, in float32 or wider: autocast joins no mixture."""
    parts = [first, *(other for other in others if other is not None)]
    return rows.joined([part if part.dtype == torch.float64 else part.float() for part in parts])


def above_zero(**values: float) -> None:
    """Refuse numbers that are not above 0, by their names.

    Raises:
        ValueError: for the first of them.
    """
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value}: must be above 0")


def _check_length(name: str, values: Tensor, wanted: int, what: str) -> None:
    if values.shape != (wanted,):
        raise ValueError(f"{name}: shape {tuple(values.shape)}; must be ({wanted},), {what}")
