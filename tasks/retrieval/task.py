"""Contrastive retrieval as a task: `python -m trainerkit task=retrieval`.

Queries and what they are to find become vectors of one space; the loss compares each query with everything that the
batch of all processes holds. Method: R. Hadsell et al., 'Dimensionality reduction by learning an invariant mapping',
CVPR 2006; in batches: A. Radford et al., 'Learning transferable visual models from natural language supervision',
ICML 2021 (arXiv:2103.00020); in chunks: L. Gao et al., 'Scaling deep contrastive learning batch size under memory
limited setup', RepL4NLP 2021 (arXiv:2101.06983).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from trainerkit.fsdp import is_cut
from trainerkit.task import OptimizerFactory, SchedulerFactory, Task
from trainerkit.tasks.retrieval.distillation import Distillation
from trainerkit.tasks.retrieval.gather import first_row, gather
from trainerkit.tasks.retrieval.gradient_cache import encode_in_chunks
from trainerkit.tasks.retrieval.losses import InfoNCE
from trainerkit.tasks.retrieval.metrics import EvaluationSet, ranks_of
from trainerkit.tasks.retrieval.similarity import normalized
from trainerkit.tasks.retrieval.teacher import Teacher

Side = Literal["query", "positive"]
_INPUTS = ("image", "text", "text_mask")


class RetrievalTask(Task):
    """Trains encoders so that each query is most alike what belongs to it.

    A batch is a mapping of tensors with one row a pair: `query_image` (B, C, H, W) or `query_text` (B, T) with
    `query_text_mask` (B, T), or both; the same with `positive_`; as the data have them `negatives_…` (B, K, …) with
    `negatives_mask` (B, K), `label` (B,), rows of one label belonging to each other, and `score` (B,), how well a pair
    fits; and `index` (B,), the rows' numbers. Data modules of `trainerkit.data` give these.

    Logged: `train/loss`, `val/loss`, `test/loss`; the means over the evaluation sets `val/recall@1`, `val/mrr` and so
    on; and where there are several, those of each, `val/SET/recall@1`.

    Predicted, for each row: `index`, `embedding` (B, D) of its positive, and `query` (B, D) of its query; of rows
    with a query alone `embedding` is the query's. All are of length 1.

    Args:
        encoder: makes vectors (B, D), or (B, T, D) for late interaction, from a dict with `image`, `text` and
            `text_mask`.
        candidate_encoder: the same for what is searched; None for the same encoder.
        loss: of the embeddings of all processes; None for `InfoNCE()`.
        class_loss: added to it in training, of embeddings (N, D) and the batch's labels, such as `CosFace`; the mean
            of queries and positives. None for none.
        queries: what a row that has a picture and a text asks: 'together' one query of both (composed), 'separate' two
            queries for the same thing, their losses averaged.
        gradient_cache: encode in chunks, so that memory does not grow with the batch (`GradientCache`).
        gradient_cache_chunk_size: rows of a chunk.
        teacher: whose similarities are learnt as well; an encoder, or `Teacher` around one; None for no teacher.
        distillation: how; None for `Distillation()`.
        eval_shift: pixels, s; in evaluation and prediction a picture's embedding is the mean over (2s + 1)² copies,
            moved by up to so many in both directions: of 25 for 2. 0 for one.
        eval_steps: optimizer steps between validations; 0 validates after each epoch.
        metrics: of evaluations, see `retrieval_metrics` for their names.
        optimizer: see `Task`.
        scheduler: see `Task`.

    Raises:
        ValueError: for a choice, number or name that is not allowed.
    """

    def __init__(
        self,
        encoder: nn.Module,
        candidate_encoder: nn.Module | None = None,
        loss: nn.Module | None = None,
        class_loss: nn.Module | None = None,
        queries: Literal["together", "separate"] = "together",
        gradient_cache: bool = True,
        gradient_cache_chunk_size: int = 32,
        teacher: nn.Module | None = None,
        distillation: Distillation | None = None,
        eval_shift: int = 0,
        eval_steps: int = 0,
        metrics: Sequence[str] = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"),
        optimizer: OptimizerFactory = AdamW,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters()
        if queries not in ("together", "separate"):
            raise ValueError(f"queries={queries}: must be together or separate")
        if gradient_cache_chunk_size < 1:
            raise ValueError(f"gradient_cache_chunk_size={gradient_cache_chunk_size}: must be 1 or more")
        if eval_shift < 0:
            raise ValueError(f"eval_shift={eval_shift}: must be 0 or more pixels")
        if eval_steps < 0:
            raise ValueError(f"eval_steps={eval_steps}: must be 0 (after each epoch) or more")
        self.encoder = encoder
        self.candidate_encoder = candidate_encoder
        self.loss = InfoNCE() if loss is None else loss
        self.class_loss = class_loss
        self.queries = queries
        self.eval_shift = eval_shift
        self.eval_steps = eval_steps
        self.metrics = list(metrics)
        self._ks = ranks_of(metrics)
        self._chunk_size = gradient_cache_chunk_size if gradient_cache else None
        self._teacher = teacher if isinstance(teacher, Teacher) or teacher is None else Teacher(teacher)
        if self._teacher is not None and self._teacher.chunk_size is None:
            self._teacher.chunk_size = self._chunk_size  # a whole batch of a teacher's activations may not fit either
        self._distillation = Distillation() if distillation is None else distillation
        self._evaluated: dict[str, EvaluationSet] = {}

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, D) of queries, of length 1."""
        return normalized(self.encoder(dict(inputs)))

    def networks(self) -> list[nn.Module]:
        """The encoders; what the loss learns is the same in every process anyhow."""
        return [part for part in (self.encoder, self.candidate_encoder) if part is not None]

    def setup(self, stage: str) -> None:
        """Have Lightning validate by a number of batches, of which `_plan_validation` makes optimizer steps."""
        if stage == "fit" and self.eval_steps:
            self.trainer.val_check_interval = self.eval_steps
            self.trainer.check_val_every_n_epoch = None

    def on_train_start(self) -> None:
        """A run that goes on is asked at once whether the validation of its last step is still to come."""
        self._plan_validation()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Validate now, or not."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._plan_validation()

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
        found = [normalized(self.embed(batch, side)).float() for side in sides if parts_of(batch, side)]
        embeddings = {"index": batch["index"], "embedding": found[-1]}
        return embeddings if len(found) == 1 else embeddings | {"query": found[0]}

    def embed(self, batch: Mapping[str, Tensor], side: Side) -> Tensor:
        """Embeddings (B, D) of one side of a batch as the encoder gives them.

        Of queries that are 'separate' the pictures, where a row has both.
        """
        inputs = parts_of(batch, side)
        if side == "query":
            return self._encode(self.encoder, self._views(inputs)[0])[0]
        return self._encode(self.encoder if self.candidate_encoder is None else self.candidate_encoder, inputs)[0]

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

    @property
    def evaluation_sets(self) -> list[EvaluationSet]:
        """What the running evaluation has embedded, an evaluation set for each loader; callbacks look at them."""
        return list(self._evaluated.values())

    def _plan_validation(self) -> None:
        """Steps are counted, since an epoch's last window of accumulated batches may be shorter than the others."""
        if not self.eval_steps:
            return
        loop: Any = self.trainer.fit_loop.epoch_loop
        is_due = not loop._should_accumulate() and self.trainer.global_step % self.eval_steps == 0
        # Lightning validates where this divides the number of batches so far.
        self.trainer.val_check_batch = 1 if is_due else loop.total_batch_idx + 2

    def _loss_of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, "_Embedded"]:
        """The loss of the batch of all processes, and what this process embedded."""
        mine = self._embedded(batch)
        positives = gather(mine.positives)
        options = {name: gather(batch[key]) for name, key in (("labels", "label"), ("scores", "score")) if key in batch}
        negatives = None
        if mine.negatives is not None and mine.owners is not None:
            negatives = gather(mine.negatives)
            options["owners"] = gather(mine.owners + first_row(mine.positives))
        taught = self._taught(batch, "positive", parts_of(batch, "positive"))
        losses = []
        for inputs, embeddings in mine.queries:
            queries = gather(embeddings)
            loss = self.loss(queries, positives, negatives, **options)
            if taught is not None:
                loss = self._distillation(loss, queries, positives, self._taught(batch, "query", inputs), taught)
            if self.class_loss is not None and self.training:
                labels = options.get("labels")
                loss = loss + (self.class_loss(queries, labels) + self.class_loss(positives, labels)) / 2
            losses.append(loss)
        return torch.stack(losses).mean(), mine

    def _embedded(self, batch: Mapping[str, Tensor]) -> "_Embedded":
        views, found = self._views(parts_of(batch, "query")), [parts_of(batch, "positive")]
        given, there, owners = parts_of(batch, "negatives"), None, None
        if given:
            number = next(iter(given.values())).shape[1]
            rows = torch.arange(len(batch["index"]), device=batch["index"].device)
            there = batch.get("negatives_mask", rows.new_ones(len(rows), number, dtype=torch.bool))
            owners = rows[:, None].expand_as(there)[there]
            # Parameters in pieces are gathered in each forward pass, so all processes have to make equally many.
            taken = torch.ones_like(there) if is_cut(self) else there
            if taken.any():  # before the first mining there are none, and many encoders take no batch of nothing
                found.append({name: part[taken] for name, part in given.items()})
                there = there[taken]
        if self.candidate_encoder is None:
            embeddings = self._encode(self.encoder, *views, *found)
        else:
            embeddings = (*self._encode(self.encoder, *views), *self._encode(self.candidate_encoder, *found))
        queries, (positives, *rest) = embeddings[: len(views)], embeddings[len(views) :]
        negatives = rest[0][there] if rest else None if there is None else positives[:0]
        return _Embedded(list(zip(views, queries, strict=True)), positives, negatives, owners)

    def _views(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The queries of a batch: one of all its parts, or one of each."""
        if self.queries == "together" or not {"image", "text"} <= inputs.keys():
            return [inputs]
        return [{"image": inputs["image"]}, {name: part for name, part in inputs.items() if name != "image"}]

    def _encode(self, encoder: nn.Module, *inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The embeddings of each; of pictures in evaluation the mean over `shifted`."""
        if self.training or not self.eval_shift:
            return self._encode_once(encoder, *inputs)
        return tuple(self._mean_over_shifts(encoder, part) for part in inputs)

    def _mean_over_shifts(self, encoder: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if "image" not in inputs:
            return self._encode_once(encoder, inputs)[0]
        pictures = shifted(inputs["image"], self.eval_shift)
        found = [normalized(self._encode_once(encoder, inputs | {"image": moved})[0]) for moved in pictures]
        return torch.stack(found).mean(0)

    def _encode_once(self, encoder: nn.Module, *inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        # Last batches of an evaluation may differ by a row, and so by a chunk: not where parameters are in pieces.
        if self._chunk_size is None or (is_cut(self) and not torch.is_grad_enabled()):
            return tuple(encoder(part) for part in inputs)
        embeddings: tuple[Tensor, ...] = encode_in_chunks(encoder, inputs, self._chunk_size)
        return embeddings

    def _taught(self, batch: Mapping[str, Tensor], side: Side, inputs: Any) -> Tensor | None:
        if self._teacher is None or not self.training:
            return None
        return gather(self._teacher.embed(inputs, side, batch["index"]))

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor], dataloader_idx: int) -> None:
        loss, mine = self._loss_of(batch)
        self.track(f"{stage}/loss", loss, weight=len(batch["index"]))
        names = getattr(getattr(self.trainer, "datamodule", None), "evaluation_names", None)
        name = names[dataloader_idx] if names else f"set{dataloader_idx}"
        found = self._evaluated.setdefault(name, EvaluationSet(*self._ks))
        # Of queries that are separate the first, the pictures; a set of texts has them as its only queries.
        queries = mine.queries[0][1]
        found.add(batch["index"], queries, mine.positives, batch.get("label"), mine.negatives, mine.owners)

    def _log_sets(self, stage: str) -> None:
        found = {name: evaluated.compute(device=self.device) for name, evaluated in self._evaluated.items()}
        self._evaluated = {}  # embeddings of whole sets
        for metric in self.metrics if found else ():
            values = [metrics[metric] for metrics in found.values()]
            self.log(f"{stage}/{metric}", sum(values) / len(values), prog_bar=metric == "mrr")
            if len(found) > 1:
                for name, metrics in found.items():
                    self.log(f"{stage}/{name}/{metric}", metrics[metric])


@dataclass
class _Embedded:
    """What one process embedded of a batch: queries, of each view its inputs and (B, D); positives (B, D); explicit
    negatives (M, D) and the row of the batch (M,) that each was given for."""

    queries: list[tuple[dict[str, Tensor], Tensor]]
    positives: Tensor
    negatives: Tensor | None = None
    owners: Tensor | None = None


def shifted(pictures: Tensor, by: int) -> list[Tensor]:
    """Pictures (B, C, H, W) moved by all numbers of pixels up to so many, in both directions; edges are repeated."""
    height, width = pictures.shape[-2:]
    wider = F.pad(pictures, (by, by, by, by), mode="replicate")
    places = product(range(2 * by + 1), repeat=2)
    return [wider[..., top : top + height, left : left + width] for top, left in places]


def parts_of(batch: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    """What a batch has of a side, by the names that encoders take: `image`, `text`, `text_mask`."""
    return {name: batch[f"{side}_{name}"] for name in _INPUTS if f"{side}_{name}" in batch}
