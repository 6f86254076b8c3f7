"""Contrastive retrieval as a task: `python -m trainerkit task=retrieval`.

Queries and what they are to find become vectors of one space; the loss compares each query with everything that the
batch of all processes holds. Method: R. Hadsell et al., 'Dimensionality reduction by learning an invariant mapping',
CVPR 2006; in batches: A. Radford et al., 'Learning transferable visual models from natural language supervision',
ICML 2021 (arXiv:2103.00020); in chunks: L. Gao et al., 'Scaling deep contrastive learning batch size under memory
limited setup', RepL4NLP 2021 (arXiv:2101.06983).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from trainerkit.task import OptimizerFactory, SchedulerFactory, Task
from trainerkit.tasks.retrieval.distillation import Distillation, Teacher
from trainerkit.tasks.retrieval.gather import gather, rank_offset
from trainerkit.tasks.retrieval.gradient_cache import GradientCache
from trainerkit.tasks.retrieval.losses import InfoNCE
from trainerkit.tasks.retrieval.metrics import EvaluationSet
from trainerkit.tasks.retrieval.similarity import normalized

Side = Literal["query", "positive", "negatives"]
_INPUTS = ("image", "text", "text_mask")


class RetrievalTask(Task):
    """Trains encoders so that each query is most alike what belongs to it.

    A batch is a mapping of tensors with one row a pair: `query_image` (B, C, H, W) or `query_text` (B, T) with
    `query_text_mask` (B, T), or both; the same with `positive_`; as the data have them `negatives_…` (B, K, …) with
    `negatives_mask` (B, K), `label` (B,), rows of one label belonging to each other, and `score` (B,), how well a pair
    fits; and `index` (B,), the rows' numbers. Data modules of `trainerkit.data` give these.

    Logged: `train/loss`, `val/loss`, `test/loss`; and of each whole evaluation set `val/SET/recall@1` and the like (see
    `EvaluationSet`), and their means over the sets `val/recall@1`, ….

    Predicted, for each row: `index`, and `query` and `positive`, what the row has of them, of length 1.

    Args:
        encoder: makes vectors (B, D), or (B, T, D) for late interaction, from a dict with `image`, `text` and
            `text_mask`.
        candidate_encoder: the same for what is searched; None for the same encoder.
        loss: of the embeddings of all processes; None for `InfoNCE()`.
        queries: what a row that has a picture and a text asks: 'together' one query of both (composed), 'separate' two
            queries for the same thing, their losses averaged.
        gradient_cache: encode in chunks, so that memory does not grow with the batch (`GradientCache`).
        gradient_cache_chunk_size: rows of a chunk.
        teacher: whose similarities are learnt as well; an encoder, or `Teacher` around one; None for no teacher.
        distillation: how; None for `Distillation()`.
        eval_steps: optimizer steps between validations; 0 validates after each epoch.
        ks: ranks at which metrics are taken.
        optimizer: see `Task`.
        scheduler: see `Task`.

    Raises:
        ValueError: for a choice or number that is not allowed, or a distillation without a teacher.
    """

    def __init__(
        self,
        encoder: nn.Module,
        candidate_encoder: nn.Module | None = None,
        loss: nn.Module | None = None,
        queries: Literal["together", "separate"] = "together",
        gradient_cache: bool = True,
        gradient_cache_chunk_size: int = 32,
        teacher: nn.Module | Teacher | None = None,
        distillation: Distillation | None = None,
        eval_steps: int = 0,
        ks: Sequence[int] = (1, 5, 10),
        optimizer: OptimizerFactory = AdamW,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters()
        if queries not in ("together", "separate"):
            raise ValueError(f"queries={queries}: must be together or separate")
        if eval_steps < 0:
            raise ValueError(f"eval_steps={eval_steps}: must be 0 (after each epoch) or more")
        if not ks or min(ks) < 1:
            raise ValueError(f"ks={list(ks)}: must be one or more ranks from 1 on")
        self.encoder = encoder
        self.candidate_encoder = candidate_encoder
        self.loss = InfoNCE() if loss is None else loss
        self.queries = queries
        self.eval_steps = eval_steps
        self.ks = tuple(ks)
        self._chunked = GradientCache(gradient_cache_chunk_size) if gradient_cache else None
        self._teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self._distillation = Distillation() if distillation is None else distillation
        self._evaluated: dict[str, EvaluationSet] = {}

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, D) of queries, of length 1."""
        return normalized(self.encoder(dict(inputs)))

    def networks(self) -> list[nn.Module]:
        """The encoders; what the loss learns is the same in every process anyhow."""
        return [part for part in (self.encoder, self.candidate_encoder) if part is not None]

    def setup(self, stage: str) -> None:
        """Put `eval_steps` where Lightning looks for it: batches between validations."""
        if stage == "fit" and self.eval_steps:
            self.trainer.val_check_interval = self.eval_steps * self.trainer.accumulate_grad_batches
            self.trainer.check_val_every_n_epoch = None

    def on_fit_start(self) -> None:
        """The teacher goes where the student is."""
        if self._teacher is not None:
            self._teacher.to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Encode in chunks, gather from all processes, compare everything with everything."""
        loss, *_ = self._loss_of(batch)
        self.track("train/loss", loss, weight=len(batch["index"]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the embeddings until the whole set is there."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same on the test data."""
        self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Embeddings of length 1 of what each row has."""
        sides: tuple[Side, ...] = ("query", "positive")
        found = {side: normalized(self.embed(batch, side)) for side in sides if parts_of(batch, side)}
        return {"index": batch["index"], **found}

    def embed(self, batch: Mapping[str, Tensor], side: Side) -> Tensor:
        """Embeddings (B, D) of one side of a batch, (B · K, D) of its negatives, as the encoder gives them.

        Of queries that are 'separate' the pictures, where a row has both.
        """
        inputs = parts_of(batch, side)
        return self._encode(side, self._views(inputs)[0] if side == "query" else inputs)

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._evaluated = {}

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        self._evaluated = {}

    def on_validation_epoch_end(self) -> None:
        """Search each query in its whole set."""
        self._log_sets("val")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Search each query in its whole set."""
        self._log_sets("test")
        super().on_test_epoch_end()

    def _loss_of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
        """The loss of the batch of all processes, and what this process embedded: queries, positives, negatives."""
        found = parts_of(batch, "positive")
        mine = self._encode("positive", found)
        positives = gather(mine)
        negatives, owners = self._negatives(batch)
        given = {name: gather(batch[key]) for name, key in (("labels", "label"), ("scores", "score")) if key in batch}
        if negatives is not None:
            given["owners"] = gather(owners + rank_offset(len(mine), mine.device))
        every = None if negatives is None else gather(negatives)
        taught = self._taught(batch, "positive", found)
        views = self._views(parts_of(batch, "query"))
        queries = [self._encode("query", view) for view in views]
        losses = []
        for view, embedded in zip(views, queries, strict=True):
            asked = gather(embedded)
            loss = self.loss(asked, positives, every, **given)
            if taught is not None:
                loss = self._distillation(loss, asked, positives, self._taught(batch, "query", view), taught)
            losses.append(loss)
        return torch.stack(losses).mean(), queries, mine, negatives

    def _negatives(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """Embeddings (M, D) of the explicit negatives of all rows, and the row (M,) that each was given for."""
        inputs = parts_of(batch, "negatives")
        rows = torch.arange(len(batch["index"]), device=batch["index"].device)
        if not inputs:
            return None, rows
        number = next(iter(inputs.values())).shape[1]
        there = batch.get("negatives_mask", torch.ones(len(rows), number, dtype=torch.bool, device=rows.device))
        owners = rows[:, None].expand_as(there)[there]
        return self._encode("negatives", {name: part[there] for name, part in inputs.items()}), owners

    def _views(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The queries of a batch: one of all its parts, or one of each."""
        if self.queries == "together" or not {"image", "text"} <= inputs.keys():
            return [inputs]
        return [{"image": inputs["image"]}, {name: part for name, part in inputs.items() if name != "image"}]

    def _encode(self, side: Side, inputs: dict[str, Tensor]) -> Tensor:
        if not inputs:
            raise ValueError(f"batch: has no {side}_image and no {side}_text")
        encoder = self.encoder if side == "query" or self.candidate_encoder is None else self.candidate_encoder
        if self._chunked is None:
            embeddings: Tensor = encoder(inputs)
        else:
            embeddings = self._chunked(encoder, inputs)
        return embeddings

    def _taught(self, batch: Mapping[str, Tensor], side: Side, inputs: dict[str, Tensor]) -> Tensor | None:
        if self._teacher is None or not self.training:
            return None
        return gather(self._teacher(inputs, batch["index"], side))

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor], dataloader_idx: int) -> None:
        loss, queries, positives, negatives = self._loss_of(batch)
        self.track(f"{stage}/loss", loss, weight=len(batch["index"]))
        names = getattr(getattr(self.trainer, "datamodule", None), "evaluation_names", None)
        name = names[dataloader_idx] if names else f"set{dataloader_idx}"
        for view, embedded in zip(("", "_text"), queries, strict=False):
            found = self._evaluated.setdefault(name + view, EvaluationSet(self.ks))
            found.add(batch["index"], embedded, positives, labels=batch.get("label"), negatives=negatives)

    def _log_sets(self, stage: str) -> None:
        found = {name: evaluated.compute(self.trainer.strategy) for name, evaluated in self._evaluated.items()}
        self._evaluated = {}  # all embeddings of all sets
        for metric in next(iter(found.values()), {}):
            values = [metrics[metric] for metrics in found.values()]
            self.log(f"{stage}/{metric}", sum(values) / len(values), prog_bar=metric == "mrr")
            if len(found) > 1:
                for name, metrics in found.items():
                    self.log(f"{stage}/{name}/{metric}", metrics[metric])


def parts_of(batch: Mapping[str, Tensor], side: Side) -> dict[str, Tensor]:
    """What a batch has of a side, by the names that encoders take: `image`, `text`, `text_mask`."""
    return {name: batch[f"{side}_{name}"] for name in _INPUTS if f"{side}_{name}" in batch}
