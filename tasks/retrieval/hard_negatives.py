"""Hard negatives: what the current model takes for the positive of a training row, and is none.

L. Xiong et al., 'Approximate nearest neighbor negative contrastive learning' (ANCE), ICLR 2021 (arXiv:2007.00808); here
the search is exact. The margin is that of G. Moreira et al., 'NV-Retriever', 2024 (arXiv:2407.15831): a candidate that
is almost as similar as the positive is probably a positive that nobody marked.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from trainerkit.functional.random import random_state, set_random_state
from trainerkit.tasks.retrieval.rows import first_of_each, joined, of_all_ranks, on_host
from trainerkit.tasks.retrieval.search import top_k
from trainerkit.tasks.retrieval.similarity import normalized, similarity

Sample = Literal["top", "random"]

_IDENTICAL = 1e-5  # between components of vectors of length 1: batches of other widths round in another way
_NUMBERS = 2**23  # compared at a time
_SQUARE = 64


@torch.no_grad()
def mine(
    queries: Tensor,
    candidates: Tensor,
    k: int,
    *,
    own_rows: Tensor,
    labels: Tensor | None = None,
    rank_start: int = 0,
    rank_stop: int = 100,
    margin: float | None = 0.0,
    sample: Sample = "top",
    seed: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """For each query k of the candidates that rank high and are not relevant.

    Not relevant: not its own row, not of its own label, not with the embedding of its own row. Of these, those of rank
    rank_start to rank_stop - 1, from 0, whose similarity is no more than that of the own row less the margin.

    Args:
        queries: embeddings (N, D) or (N, T, D).
        candidates: embeddings (M, D) or (M, S, D).
        k: 1 or more.
        own_rows: (N,) int64, the row of `candidates` that is the query's positive.
        labels: of the candidates, (M,) int64.
        rank_start: leave out so many that rank highest.
        rank_stop: more than `rank_start`.
        margin: None: whatever its similarity.
        sample: 'top' takes the highest, 'random' any; of a query the same ones whichever other queries there are.
        seed: of 'random'.
        device: where similarities are computed; None: where the queries are.

    Returns:
        Rows of candidates (N, k) int64 on the host; -1 where there are fewer than k.

    Raises:
        ValueError: for arguments that are not possible.
    """
    _check(k, rank_start, rank_stop, margin, sample)
    if own_rows.shape != queries.shape[:1]:
        raise ValueError(f"own_rows: shape {tuple(own_rows.shape)}; must be ({len(queries)},)")
    own_rows = own_rows.to(candidates.device)
    exclude = [(own_rows, torch.arange(len(candidates), device=candidates.device))]
    if labels is not None:
        labels = labels.to(candidates.device)
        exclude.append((labels[own_rows], labels))
    # One pass over the candidates; what is found is gone through in parts, for which all its vectors are taken.
    all_scores, all_rows = top_k(queries, candidates, rank_stop, exclude=exclude, device=device)
    found = []
    step = max(1, _NUMBERS // (rank_stop * candidates[0].numel()))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        scores, rows, own = all_scores[part], all_rows[part], own_rows[part]
        eligible = (rows >= 0) & ~_identical(candidates, own, rows)
        eligible[:, :rank_start] = False
        if margin is not None:
            eligible &= scores <= _own_scores(queries[part], candidates, own, device) - margin
        order = torch.arange(rank_stop).expand_as(rows) if sample == "top" else _shuffled(own.cpu(), rows, seed)
        # Ranks and shuffled numbers are below the largest one, which those that do not count get.
        order = order.masked_fill(~eligible, torch.iinfo(torch.int64).max)
        chosen = order.sort(dim=1, stable=True).indices[:, :k]
        rows = rows.masked_fill(~eligible, -1).gather(1, chosen)
        found.append(nn.functional.pad(rows, (0, k - rows.shape[1]), value=-1))
    return torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64)


def _own_scores(queries: Tensor, candidates: Tensor, own: Tensor, device: torch.device | None) -> Tensor:
    """Similarity of each query and its own row, (n, 1)."""
    device = device or queries.device
    # Small squares, of which the diagonal is wanted.
    parts = [
        similarity(some.to(device), candidates[rows].to(device)).diagonal().cpu()
        for some, rows in zip(queries.split(_SQUARE), own.split(_SQUARE), strict=True)
    ]
    return torch.cat(parts)[:, None]


def _identical(candidates: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """Whether candidates of `rows` (n, K) have the embedding of `own` (n,)."""
    vectors = normalized(candidates[rows.clamp(min=0).to(candidates.device)]).flatten(2)
    positive = normalized(candidates[own]).flatten(1)[:, None]
    return ((vectors - positive).abs().amax(-1) <= _IDENTICAL).cpu()


def _shuffled(own: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Numbers (n, K) that look random and follow from seed, query and candidate alone: splitmix64's mixing."""
    mixed = seed + own[:, None] * 0x632BE59BD9B4E019 + rows * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (mixed ^ (mixed >> 31)) & 0x7FFFFFFFFFFFFFF


def _check(k: int, rank_start: int, rank_stop: int, margin: float | None, sample: str) -> None:
    if k < 1:
        raise ValueError(f"k={k}: must be 1 or more")
    if rank_start < 0:
        raise ValueError(f"rank_start={rank_start}: must be 0 or more")
    if rank_stop < rank_start + k:
        raise ValueError(f"rank_stop={rank_stop}: must be rank_start={rank_start} plus k={k}, or more")
    if margin is not None and not -2 <= margin <= 2:
        raise ValueError(f"margin={margin}: must be a difference of cosines, -2 to 2, or null for none")
    if sample not in ("top", "random"):
        raise ValueError(f"sample={sample}: must be top or random")


class Embeds(Protocol):
    """A module that embeds a side of a batch, as `RetrievalTask` does."""

    def embed(self, batch: dict[str, Tensor], side: str) -> Tensor:
        """Embeddings (B, D) or (B, T, D) of the side 'query' or 'positive'."""


@runtime_checkable
class TakesMined(Protocol):
    """A training data set that appends the positives of other rows as negatives."""

    def __len__(self) -> int:
        """Training rows."""

    def set_mined(self, rows: Tensor) -> None:
        """Rows (n, K) int64 whose positives are negatives of row i from now on; -1: none."""


class HasMining(Protocol):
    """A data module whose training rows can be mined."""

    @property
    def train_dataset(self) -> TakesMined:
        """There after `setup('fit')`."""

    def mining_dataloader(self) -> Iterable[dict[str, Tensor]]:
        """All training rows, or this process's share of them, without augmentation; `index` ascends with the rows."""


class HardNegatives(Callback):
    """Mine hard negatives with the current model before an epoch, and give them to the training data.

    All training rows are embedded with the model in eval mode, without gradients, each process its share; the module's
    modes and all random states stay what they were. `train/mined_negatives` is how many a row has in the mean. What
    was mined is in the checkpoint: a run that goes on in mid-epoch reads the batches that the uninterrupted one reads.

    Args:
        k: negatives a row.
        every_n_epochs: mine anew so often.
        start_epoch: the first epoch that has mined negatives, from 0; before epoch 0 they are those of the initial
            weights.
        rank_start: see `mine`.
        rank_stop: the same.
        margin: the same; with 0.0 a candidate that is more similar than the positive is left out.
        sample: the same.
        seed: of `sample='random'`; each epoch draws others.

    Raises:
        ValueError: for arguments that are not possible; in `setup`, for a module or data module without what is
            needed, named in the message; in fit, if a training row is not embedded.
    """

    def __init__(
        self,
        k: int = 4,
        every_n_epochs: int = 1,
        start_epoch: int = 1,
        rank_start: int = 0,
        rank_stop: int = 100,
        margin: float | None = 0.0,
        sample: Sample = "top",
        seed: int = 0,
    ) -> None:
        _check(k, rank_start, rank_stop, margin, sample)
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs}: must be 1 or more")
        if start_epoch < 0:
            raise ValueError(f"start_epoch={start_epoch}: must be 0 or more")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be 0 or more")
        self.k = k
        self.every_n_epochs = every_n_epochs
        self.start_epoch = start_epoch
        self.rank_start = rank_start
        self.rank_stop = rank_stop
        self.margin = margin
        self.sample: Sample = sample
        self.seed = seed
        self.rows: Tensor | None = None
        self._data: HasMining | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for what is needed before anything is trained; forget an earlier fit."""
        self._data = self.rows = None
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not callable(getattr(pl_module, "embed", None)):
            raise ValueError(f"task={type(pl_module).__name__}: HardNegatives needs a method embed(batch, side)")
        if not callable(getattr(data, "mining_dataloader", None)):
            raise ValueError(f"data={type(data).__name__}: HardNegatives needs a method mining_dataloader()")
        if not isinstance(getattr(data, "train_dataset", None), TakesMined):
            raise ValueError(f"data={type(data).__name__}: HardNegatives needs a train_dataset with set_mined(rows)")
        self._data = data

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the data go."""
        self._data = None

    def state_dict(self) -> dict[str, Any]:
        """What was mined last."""
        return {} if self.rows is None else {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give it to the data at once: a loader may read ahead as soon as fit begins."""
        if self._data is not None:
            self._give(state_dict["rows"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine if it is time; no batch of the epoch is read yet, and in mid-epoch Lightning does not call this."""
        epochs = trainer.current_epoch - self.start_epoch
        if epochs < 0 or epochs % self.every_n_epochs:
            return
        self._give(self._mine(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how many negatives a row had; here, for a run that goes on in mid-epoch does not come by the start."""
        if self.rows is not None:
            mined = float((self.rows >= 0).sum()) / len(self.rows)
            pl_module.log("train/mined_negatives", mined, sync_dist=True, batch_size=1)

    def _give(self, rows: Tensor) -> None:
        assert self._data is not None
        dataset = self._data.train_dataset
        if len(rows) != len(dataset):
            raise ValueError(f"rows={len(rows)} were mined, and the training data have {len(dataset)}")
        self.rows = rows
        dataset.set_mined(rows)

    def _mine(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        assert self._data is not None
        with as_it_was(pl_module):
            rows = embedded(trainer, cast(Embeds, pl_module), self._data.mining_dataloader())
        everybodys = {name: of_all_ranks(part) for name, part in rows.items() if name != "query"}
        once = first_of_each(everybodys["index"])
        everybodys = {name: part[once] for name, part in everybodys.items()}
        expected = len(self._data.train_dataset)
        if len(once) != expected:
            raise ValueError(f"mining_dataloader: gave {len(once)} different rows of {expected}")
        entropy = np.random.SeedSequence([self.seed, trainer.current_epoch]).generate_state(1, np.uint64)
        mined = mine(
            rows["query"],
            everybodys["positive"],
            self.k,
            own_rows=torch.searchsorted(everybodys["index"], rows["index"]),
            labels=everybodys.get("label"),
            rank_start=self.rank_start,
            rank_stop=self.rank_stop,
            margin=self.margin,
            sample=self.sample,
            seed=int(entropy[0] >> 1),
            device=pl_module.device,
        )
        return of_all_ranks(mined)[once]


def embedded(trainer: Trainer, pl_module: Embeds, loader: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`index`, `query` and `positive` of a loader's rows, and `label` where there is one, on the host."""
    parts: dict[str, list[Tensor]] = {}
    for given in loader:
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(given))
        with trainer.precision_plugin.forward_context():
            sides = {side: on_host(pl_module.embed(batch, side)) for side in ("query", "positive")}
        sides |= {name: given[name].cpu() for name in ("index", "label") if name in given}
        for name, part in sides.items():
            parts.setdefault(name, []).append(part)
    return {name: joined(part) for name, part in parts.items()}


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each part has its mode and every generator its state again."""
    modes = {part: part.training for part in module.modules()}
    state = random_state()
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        set_random_state(state)
