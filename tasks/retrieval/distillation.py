"""Distillation: a student learns what a teacher finds alike, beside its own task.

    L = (1 − w) · task + w · KD
    KD of tables:      T² · 1/N Σ_i KL( softmax(c t_i / T) ‖ softmax(c s_i / T) )
    KD of embeddings:  the mean of ‖ê_student − ê_teacher‖²

s_i and t_i are the i-th rows of the student's and the teacher's similarities of queries and positives.

Source: G. Hinton et al., 'Distilling the knowledge in a neural network', 2015 (arXiv:1503.02531). There T divides
logits; here these are c times cosines. With c = 20, the 1/τ of InfoNCE's 0.05, and T = 4 cosines are divided by 0.2:
the teacher's rows are softer than the task's, but not flat. They would be flat if T divided the cosines themselves.

N: queries, D: width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainerkit.tasks.retrieval.similarity import normalized, similarity

Kind = Literal["kl", "mse"]


def similarity_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over rows.

    Args:
        student: logits (N, M).
        teacher: logits (N, M); gets no gradient.
        temperature: T, above 0. T² keeps the gradient's size where T changes.

    Returns:
        A scalar, 0 or more, in float32 or wider.

    Raises:
        ValueError: for other shapes, or a temperature that is not above 0.
    """
    _check_temperature(temperature)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"student, teacher: shapes {tuple(student.shape)} and {tuple(teacher.shape)}; must be (N, M)")
    ours, theirs = (
        torch.log_softmax((logits if logits.dtype == torch.float64 else logits.float()) / temperature, dim=1)
        for logits in (student, teacher.detach())
    )
    return temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True) / max(1, len(student))


def embedding_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of normalised embeddings, the mean over the teacher's vectors: 2 − 2 · cosine.

    Summed over the width, not averaged: a mean over D as well would make it nothing beside the task's loss.

    Args:
        student: (N, D), or (N, T, D).
        teacher: of the same shape; gets no gradient. Where its vector is zeros there is padding, which does not count.

    Raises:
        ValueError: for other shapes, above all another width.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student, teacher: shapes {tuple(student.shape)} and {tuple(teacher.shape)}; embeddings of different "
            "widths cannot be compared: give the student a projection to the teacher's width, or take kind='kl'"
        )
    there = teacher.detach().any(-1)
    squares = (normalized(student) - normalized(teacher.detach())).square().sum(-1)
    return (squares * there).sum() / there.sum().clamp(min=1)


class Distillation(nn.Module):
    """The task's loss and the distillation's in one; formulas at the top. Holds no parameters.

    Args:
        weight: w, from 0 (the task alone) to 1 (the teacher alone).
        temperature: T, above 0; of 'kl' only.
        kind: 'kl' compares tables of similarities, whatever the widths; 'mse' compares embeddings.
        scale: c, above 0, what makes logits of cosines; of 'kl' only. Set it to the task's 1/τ.

    Raises:
        ValueError: for a number or word out of its range.
    """

    def __init__(self, weight: float = 0.5, temperature: float = 4.0, kind: Kind = "kl", scale: float = 20.0) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"weight={weight}: must be from 0 to 1")
        _check_temperature(temperature)
        if kind not in ("kl", "mse"):
            raise ValueError(f"kind={kind}: must be kl or mse")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale}: must be above 0")
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.kind: Kind = kind
        self.scale = scale

    def forward(
        self,
        task_loss: Tensor,
        student_queries: Tensor,
        student_positives: Tensor,
        teacher_queries: Tensor,
        teacher_positives: Tensor,
    ) -> Tensor:
        """(1 − w) · task + w · KD.

        Args:
            task_loss: a scalar.
            student_queries: (N, D) or (N, T, D), of the whole batch.
            student_positives: the same; the i-th belongs to the i-th query.
            teacher_queries: (N, D') or (N, T', D'), of the same rows; for 'mse' of the student's shape.
            teacher_positives: the same.

        Raises:
            ValueError: for shapes that do not fit.
        """
        return (1 - self.weight) * task_loss + self.weight * self.of_embeddings(
            student_queries, student_positives, teacher_queries, teacher_positives
        )

    def of_embeddings(
        self,
        student_queries: Tensor,
        student_positives: Tensor,
        teacher_queries: Tensor,
        teacher_positives: Tensor,
    ) -> Tensor:
        """KD alone; arguments as above."""
        if self.kind == "mse":
            of_queries = embedding_mse(student_queries, teacher_queries)
            return (of_queries + embedding_mse(student_positives, teacher_positives)) / 2
        ours = self.scale * similarity(student_queries, student_positives)
        with torch.no_grad():
            theirs = self.scale * similarity(teacher_queries, teacher_positives)
        return similarity_kl(ours, theirs, self.temperature)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be above 0")
