"""What the model finds: the nearest neighbours of some queries after each evaluation, and of yours in `stage=predict`.

python -m trainerkit task=retrieval stage=predict resume=RUN query='greek small letter' callbacks.neighbours.k=5
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.extras import require
from trainerkit.files import replacing, write_json
from trainerkit.tasks.retrieval import neighbour_pictures
from trainerkit.tasks.retrieval.metrics import EvaluationSet
from trainerkit.tasks.retrieval.neighbour_pictures import shortened
from trainerkit.tasks.retrieval.rows import PredictedRows, first_of_each, of_all_ranks
from trainerkit.tasks.retrieval.search import top_k

_QUERY, _CORPUS = 0, 1  # of the two loaders of a prediction with a query
_WIDTH = 100  # letters of a text on the screen and in a file


@runtime_checkable
class HasEvaluationSets(Protocol):
    """A module that keeps what it embedded until its own `on_validation_epoch_end` and `on_test_epoch_end`."""

    @property
    def evaluation_sets(self) -> Sequence[EvaluationSet]:
        """One for each loader."""


@runtime_checkable
class Describes(Protocol):
    """A data module that knows what a person would call its rows."""

    def describe(self, index: int, side: str) -> str:
        """A text for the side 'query' or 'positive' of a row."""


@dataclass
class Neighbour:
    """A row that was found.

    Args:
        row: its number in the data.
        score: similarity to the query.
        right: whether it is relevant.
        text: what a person would call it.
    """

    row: int
    score: float
    right: bool
    text: str


@dataclass
class Answer:
    """A query and what was found for it, the nearest first."""

    row: int
    text: str
    neighbours: list[Neighbour]


class Neighbours(Callback):
    """Show what lies next to a query.

    After each test, and each validation if asked, for each evaluation set, `neighbours/SET.png` in the run's folder:
    queries, spread over the rows, and their neighbours among all rows' positives, the right ones in a green frame;
    `neighbours/SET.txt` where these are texts. In `stage=predict` with a query (`predict_names` of the data module is
    `query`, `corpus`): the neighbours on the screen and in `predictions/neighbours.json`.

    Args:
        k: neighbours of a query.
        n_queries: queries of an evaluation set.
        pictures: False writes texts for pictures too.
        validation: after each validation as well, which the next one writes over.

    Raises:
        ValueError: for numbers below 1; in `setup`, for a module or data module without what is needed.
        UserError: before anything is trained, without matplotlib where pictures are to be drawn.
    """

    def __init__(self, k: int = 10, n_queries: int = 8, pictures: bool = True, validation: bool = False) -> None:
        if k < 1:
            raise ValueError(f"k={k}: must be 1 or more")
        if n_queries < 1:
            raise ValueError(f"n_queries={n_queries}: must be 1 or more")
        self.k = k
        self.n_queries = n_queries
        self.pictures = pictures
        self.validation = validation
        self._predicted = {_QUERY: PredictedRows(), _CORPUS: PredictedRows()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for what is needed before anything is trained."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, Describes):
            raise ValueError(f"data={type(data).__name__}: Neighbours needs a method describe(index, side)")
        if stage == "predict":
            return
        if not isinstance(pl_module, HasEvaluationSets):
            raise ValueError(f"task={type(pl_module).__name__}: Neighbours needs an attribute evaluation_sets")
        if not hasattr(data, "evaluation_names"):
            raise ValueError(f"data={type(data).__name__}: Neighbours needs an attribute evaluation_names")
        if self.pictures and "image" in getattr(data, "modalities", []):
            require("matplotlib", "callbacks.neighbours.pictures=true")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the neighbours of each validation set."""
        if self.validation and not trainer.sanity_checking:
            self._write_all(trainer, pl_module, trainer.val_dataloaders)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the neighbours of each test set."""
        self._write_all(trainer, pl_module, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._predicted = {_QUERY: PredictedRows(), _CORPUS: PredictedRows()}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the embeddings."""
        if _has_query(trainer):
            self._predicted[dataloader_idx].add(outputs)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search the corpus; show and write what was found."""
        if not _has_query(trainer):
            return
        queries, corpus = (self._predicted[loader].of_all_ranks() for loader in (_QUERY, _CORPUS))
        self._predicted = {}
        if not trainer.is_global_zero:
            return
        answers = find(queries, corpus, self.k, _data(trainer), device=pl_module.device)
        path = Path(trainer.default_root_dir) / "predictions" / "neighbours.json"
        write_json(path, [_plain(answer) for answer in answers])
        for answer in answers:
            print(as_text(answer, marks=False))
        print(f"{len(corpus[0])} rows searched; all in {path}")

    def _write_all(self, trainer: Trainer, pl_module: Any, loaders: Any) -> None:
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        names = _data(trainer).evaluation_names
        for name, evaluation_set, loader in zip(names, pl_module.evaluation_sets, loaders, strict=True):
            answers = self._answers(trainer, evaluation_set, pl_module.device)
            if answers:
                self._write(trainer, name, answers, loader)

    def _answers(self, trainer: Trainer, evaluation_set: EvaluationSet, device: torch.device) -> list[Answer]:
        """Those of the first process' queries, the same in every process; none if that has no rows."""
        mine = evaluation_set.local()
        corpus, positives, keys = (of_all_ranks(mine[name]) for name in ("index", "positives", "keys"))
        once = first_of_each(corpus)
        answers: list[Answer] = []
        if trainer.is_global_zero and len(evaluation_set):
            count = min(self.n_queries, len(mine["index"]))
            spread = torch.linspace(0, len(mine["index"]) - 1, count).long()
            chosen = mine["index"][spread], mine["queries"][spread]
            answers = find(
                chosen, (corpus[once], positives[once]), self.k, _data(trainer),
                keys=(mine["keys"][spread], keys[once]), device=device,
            )  # fmt: skip
        return trainer.strategy.broadcast(answers)

    def _write(self, trainer: Trainer, name: str, answers: list[Answer], loader: Any) -> None:
        folder = Path(trainer.default_root_dir) / "neighbours"
        found = pictures_of(loader, answers) if self.pictures else {}
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, found)
            found = {place: picture for part in parts for place, picture in part.items()}
        if not trainer.is_global_zero:
            return
        if any(side == "positive" for side, _ in found):
            neighbour_pictures.draw(folder / f"{name}.png", answers, found)
        else:
            with replacing(folder / f"{name}.txt") as temporary:
                temporary.write_text("\n".join(as_text(answer) for answer in answers), encoding="utf-8")


def find(
    queries: tuple[Tensor, Tensor],
    corpus: tuple[Tensor, Tensor],
    k: int,
    data: Any,
    *,
    keys: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> list[Answer]:
    """The k nearest of each query.

    Args:
        queries: row numbers (N,) and embeddings (N, D) or (N, T, D).
        corpus: row numbers (M,) and embeddings.
        k: at most so many; fewer if the corpus is smaller.
        data: has `describe`.
        keys: of queries and corpus, relevant where equal; None: the query is not of the data.
        device: where similarities are computed.
    """
    scores, rows = top_k(queries[1], corpus[1], k, device=device)
    answers = []
    for i, number in enumerate(queries[0].tolist()):
        neighbours = []
        for score, row in zip(scores[i].tolist(), rows[i].tolist(), strict=True):
            if row >= 0:
                right = keys is not None and bool(keys[0][i] == keys[1][row])
                there = int(corpus[0][row])
                neighbours.append(Neighbour(there, score, right, data.describe(there, "positive")))
        answers.append(Answer(number, "" if keys is None else data.describe(number, "query"), neighbours))
    return answers


def pictures_of(loader: Iterable[dict[str, Tensor]], answers: Sequence[Answer]) -> dict[tuple[str, int], Tensor]:
    """Pictures (C, H, W) of what answers show, by side and row, as far as this process' loader has them.

    The loader is read once more, up to the last of them: keeping every picture of an evaluation takes its memory.
    """
    wanted = {("query", answer.row) for answer in answers}
    wanted |= {("positive", neighbour.row) for answer in answers for neighbour in answer.neighbours}
    found: dict[tuple[str, int], Tensor] = {}
    for batch in loader:
        sides = [side for side in ("query", "positive") if f"{side}_image" in batch]
        for place, row in enumerate(batch["index"].tolist()):
            found |= {(side, row): batch[f"{side}_image"][place] for side in sides if (side, row) in wanted}
        if all(place in found for place in wanted if place[0] in sides):
            break
    return found


def as_text(answer: Answer, marks: bool = True) -> str:
    """A line for the query, if it has a text, and one for each neighbour; `marks` puts a * before the right ones."""
    lines = [shortened(answer.text, _WIDTH)] if answer.text else []
    for place, neighbour in enumerate(answer.neighbours, 1):
        mark = ("* " if neighbour.right else "  ") if marks else ""
        text = shortened(neighbour.text, _WIDTH)
        lines.append(f"  {mark}{place:>3}  {neighbour.score:6.3f}  row {neighbour.row}: {text}")
    return "\n".join(lines) + "\n"


def _plain(answer: Answer) -> dict[str, Any]:
    found = [
        {"rank": place, "row": neighbour.row, "score": neighbour.score, "text": neighbour.text}
        for place, neighbour in enumerate(answer.neighbours, 1)
    ]
    return {"query": answer.row, "neighbours": found}


def _data(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _has_query(trainer: Trainer) -> bool:
    return list(getattr(_data(trainer), "predict_names", [])) == ["query", "corpus"]
