"""What generated adapters are worth: the accuracy of the base model with them, on tasks that training never saw.

After each validation `val/accuracy`; after each test, as `test/accuracy/…`, for the held-out tasks

trained   the library's own adapter of the task: what there is to reach
known     the generated one, the task described in wordings that training knows
unseen    the same in a wording that it does not
wrong     the generated one of another held-out task's description
nearest   the library's adapter of the training task whose description is the most similar
mean      the mean of all training adapters
base      no adapter

each the mean over the tasks of the accuracy that the data judge by.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.adapter_layout import Factors
from trainerkit.fsdp import is_cut
from trainerkit.tasks.t2l.metrics import gauge_note
from trainerkit.tasks.t2l.task import TextToLoraTask

_TASKS = 64  # judged at a time
Judged = dict[str, Any]  # `index` (N,), `task` (N, E)


@runtime_checkable
class Judge(Protocol):
    """A data module that can say what an adapter is worth."""

    def described(self, split: Literal["train", "val", "test"], wording: Literal["known", "unseen"]) -> Judged:
        """A split's descriptions, a row each: `index` (N,), `task` (N, E), `text`."""

    def factors(self, rows: Tensor) -> Factors:
        """The library's adapters of these rows (N,)."""

    def task_accuracy(self, factors: Factors | None, rows: Tensor) -> Tensor:
        """The accuracy (N,) of the base model on each row's task, with its adapter, or with none (None)."""


class AdapterReport(Callback):
    """Measure by the data's own judge; does nothing where the data have none.

    Args:
        baselines: after a test also those of the trained, mean, nearest and wrong adapter and of the bare base model.
    """

    def __init__(self, baselines: bool = True) -> None:
        self.baselines = baselines

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the adapters of the validation tasks, in known wordings."""
        found = self._judged(trainer, pl_module, "val")
        if "known" in found:
            pl_module.log("val/accuracy", found["known"], rank_zero_only=True, prog_bar=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the adapters of the test tasks, beside what needs no training."""
        for name, accuracy in self._judged(trainer, pl_module, "test").items():
            pl_module.log(f"test/accuracy/{name}", accuracy, rank_zero_only=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it where factors and products tell two stories."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for name in metrics if trainer.is_global_zero else ():
            stage, _, what = name.rpartition("/")
            if what == "alignment" and f"{stage}/delta_w_cosine" in metrics:
                note = gauge_note(metrics[name], metrics[f"{stage}/delta_w_cosine"])
                if note is not None:
                    print(f"\n{stage}: {note}")

    @torch.no_grad()
    def _judged(self, trainer: Trainer, task: LightningModule, split: Literal["val", "test"]) -> dict[str, float]:
        """By the first process; those that hold pieces of the weights have to write adapters with it."""
        judge = getattr(trainer, "datamodule", None)
        if not isinstance(judge, Judge) or not isinstance(task, TextToLoraTask) or trainer.sanity_checking:
            return {}
        found: dict[str, float] = {}
        if trainer.is_global_zero or is_cut(task):
            sets = {wording: judge.described(split, wording) for wording in ("known", "unseen")}
            sets = {wording: rows for wording, rows in sets.items() if len(rows["index"])}
            if split == "val":
                sets.pop("unseen", None)
            found = {wording: _accuracy(judge, _writer(task, rows), rows["index"]) for wording, rows in sets.items()}
            if split == "test" and self.baselines and sets:
                found |= _baselines(judge, task, next(iter(sets.values())))
        broadcast: dict[str, float] = trainer.strategy.broadcast(found)
        return broadcast


def _baselines(judge: Judge, task: TextToLoraTask, rows: Judged) -> dict[str, float]:
    index: Tensor = rows["index"]
    train = judge.described("train", "known")
    alike = train["index"][nearest(rows["task"], train["task"])]
    mean = {key: factor.float().cpu() for key, factor in task.network.mean_adapter().items()}
    found = {
        "trained": _accuracy(judge, lambda part: judge.factors(index[part]), index),
        "nearest": _accuracy(judge, lambda part: judge.factors(alike[part]), index),
        "mean": _accuracy(judge, lambda part: _repeated(mean, len(index[part])), index),
        "base": _accuracy(judge, lambda part: None, index),
    }
    other = other_tasks(index)
    if other is not None:
        found["wrong"] = _accuracy(judge, _writer(task, {"task": rows["task"][other]}), index)
    return found


def nearest(queries: Tensor, candidates: Tensor) -> Tensor:
    """The most similar candidate of each query, by the cosine: (N, E) and (M, E) to (N,); the first of equal ones."""
    queries, candidates = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (queries, candidates))
    return (queries @ candidates.T).argmax(1)


def other_tasks(index: Tensor) -> Tensor | None:
    """For each row (N,) the first row of another task, (N,), each task's the same each time; None for one task alone.

    The tasks stand in a circle by a fixed draw, since neighbours in the library are alike, and each takes the next.
    """
    tasks, member = index.unique(return_inverse=True)
    if len(tasks) == 1:
        return None
    circle = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(0))
    following = torch.empty_like(circle).index_copy_(0, circle, circle.roll(-1))
    first = torch.full((len(tasks),), len(index)).scatter_reduce_(0, member, torch.arange(len(index)), "amin")
    return first[following[member]]


def _writer(task: TextToLoraTask, rows: Judged) -> Callable[[slice], Factors]:
    """Writes the adapters for some of the descriptions, on the host: those of all may not fit."""
    weight = next(task.network.parameters())

    def write(part: slice) -> Factors:
        was_training = task.training
        task.eval()
        factors = task.network(rows["task"][part].to(weight.device, weight.dtype))
        task.train(was_training)
        return {key: factor.float().cpu() for key, factor in factors.items()}

    return write


def _repeated(adapter: Factors, count: int) -> Factors:
    return {key: factor.expand(count, *factor.shape) for key, factor in adapter.items()}


def _accuracy(judge: Judge, write: Callable[[slice], Factors | None], rows: Tensor) -> float:
    """The mean over the rows, a few tasks at a time."""
    parts = [slice(start, start + _TASKS) for start in range(0, len(rows), _TASKS)]
    return float(torch.cat([judge.task_accuracy(write(part), rows[part]) for part in parts]).double().mean())
