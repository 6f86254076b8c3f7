"""An index file that FAISS reads: J. Johnson, M. Douze, H. Jégou, 'Billion-scale similarity search with GPUs', 2017
(arXiv:1702.08734). Needs the extra `faiss`.

The index is exact (inner products of vectors of length 1, as `similarity` has them) and holds each row's number.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.extras import require
from trainerkit.files import replacing
from trainerkit.tasks.retrieval.rows import PredictedRows
from trainerkit.tasks.retrieval.similarity import normalized

_NEEDS = "a FAISS index"


def write_faiss_index(path: str | Path, embeddings: Tensor, index: Tensor | None = None) -> None:
    """Write embeddings (N, D) as an index of their cosines.

    Args:
        path: the file; what was there is replaced at the end.
        embeddings: (N, D), of any length.
        index: row numbers (N,) int64, which a search gives back; None: 0 to N - 1.

    Raises:
        ValueError: for late interaction, which an index of single vectors has no word for.
        UserError: without FAISS.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings: shape {tuple(embeddings.shape)}; must be (N, D)")
    faiss = require("faiss", _NEEDS)
    numbers = torch.arange(len(embeddings)) if index is None else index
    found = faiss.IndexIDMap2(faiss.IndexFlatIP(embeddings.shape[1]))
    found.add_with_ids(_vectors(embeddings), numbers.cpu().numpy())
    with replacing(path) as temporary:
        faiss.write_index(found, str(temporary))


def search_faiss_index(path: str | Path, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `top_k`: cosines and row numbers (N, k), -1 where there are fewer; of equal ones FAISS takes any.

    Args:
        path: what `write_faiss_index` wrote.
        queries: embeddings (N, D).
        k: 1 or more.
    """
    index = require("faiss", _NEEDS).read_index(str(path))
    scores, rows = index.search(_vectors(queries), k)
    found = torch.from_numpy(rows)
    return torch.from_numpy(scores).masked_fill(found < 0, -torch.inf), found


def _vectors(embeddings: Tensor) -> Any:
    return normalized(embeddings.detach().cpu()).float().contiguous().numpy()


class FaissIndex(Callback):
    """After `stage=predict`: the embeddings as `predictions/index.faiss`; with a query, those of the corpus.

    Args:
        dirname: folder, relative to `trainer.default_root_dir`.

    Raises:
        UserError: before anything is predicted, without FAISS.
    """

    def __init__(self, dirname: str = "predictions") -> None:
        self.dirname = dirname
        self._rows: dict[int, PredictedRows] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for FAISS."""
        if stage == "predict":
            require("faiss", _NEEDS)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._rows = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the embeddings of each loader."""
        self._rows.setdefault(dataloader_idx, PredictedRows()).add(outputs)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last loader's, which is the corpus."""
        # Not the last that this process was given rows of: a corpus of few may be another's alone.
        last = len(trainer.num_predict_batches) - 1
        index, embeddings = self._rows.get(last, PredictedRows()).of_all_ranks()
        self._rows = {}
        if trainer.is_global_zero:
            write_faiss_index(Path(trainer.default_root_dir) / self.dirname / "index.faiss", embeddings, index)
