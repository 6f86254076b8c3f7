"""Descriptions of tasks as vectors, what a hypernetwork is told of the adapter that it is to write.

One is chosen by `_target_` in `data.embedding`. What counts is that a sentence that says the same in other words lies
near: a sentence model does best. The hashed n-grams need nothing, and drop the words that no training description has.

Shapes: N descriptions, E the numbers of an embedding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize as unit
from torch.nn.functional import one_hot

from trainerkit.data.hashed_ngrams import HashedNgrams
from trainerkit.errors import UserError, first_lines
from trainerkit.extras import require
from trainerkit.loading import read_safetensors
from trainerkit.part import Part

__all__ = [
    "HashedNgrams", "OneHot", "PrecomputedEmbeddings", "SentenceEmbeddings", "TaskEmbedding", "checked",
    "embed_library",
]  # fmt: skip


@runtime_checkable
class TaskEmbedding(Protocol):
    """What `data.embedding` must be able to do.

    It may also have `embed_library(texts, adapters, n_adapters)`, which the descriptions of a library are embedded by
    instead; and `state_dict()` with `load_state_dict(state)`, which a checkpoint then keeps.
    """

    @property
    def dim(self) -> int:
        """Numbers of an embedding, E; known after `fit` at the latest."""

    def fit(self, train_texts: Sequence[str]) -> None:
        """Learn what is to be learnt, from the descriptions that are trained on alone; called once, before the rest."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, E) float32."""


class SentenceEmbeddings(Part):
    """What a model of `sentence-transformers` gives (extra `pretrained`); none of its folder's code is run.

    Args:
        name_or_path: folder that its `save` wrote, or a name on the Hugging Face hub.
        prefix: put before each text, as some models ask for.
        normalize: make each vector's length 1.
        batch_size: texts at once.

    Raises:
        ValueError: for an impossible argument.
        trainerkit.errors.UserError: on use, for a missing package or a model that cannot be loaded.
    """

    def __init__(self, name_or_path: str, *, prefix: str = "", normalize: bool = True, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be 1 or more")
        self.name_or_path = name_or_path
        self.prefix = prefix
        self.normalize = normalize
        self.batch_size = batch_size
        self._model: Any = None

    @property
    def dim(self) -> int:
        """Of the model."""
        return int(self._loaded().get_embedding_dimension())

    def fit(self, train_texts: Sequence[str]) -> None:
        """Nothing is learnt."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, E)."""
        embeddings: Tensor = self._loaded().encode(
            [self.prefix + text for text in texts],
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return embeddings.float().cpu().clone()  # out of inference mode, for autograd

    def _loaded(self) -> Any:
        if self._model is None:
            package = require("sentence_transformers", f"SentenceEmbeddings(name_or_path={self.name_or_path})")
            safe = {"use_safetensors": True, "dtype": torch.float32}
            try:
                self._model = package.SentenceTransformer(
                    str(self.name_or_path), device="cpu", trust_remote_code=False, model_kwargs=safe
                ).eval()
            except (OSError, ValueError) as error:
                raise UserError(f"name_or_path={self.name_or_path}: {first_lines(error)}") from error
        return self._model


class PrecomputedEmbeddings(Part):
    """Vectors from a file, one for each line of descriptions.jsonl, in its order (blank lines are not counted).

    Args:
        path: a .npy file (N, E), or a .safetensors file with one tensor (N, E).
        normalize: make each vector's length 1.

    Raises:
        trainerkit.errors.UserError: for a file that cannot be used.
    """

    def __init__(self, path: str, *, normalize: bool = False) -> None:
        self.path = path
        self._rows = _read_vectors(Path(path).expanduser(), f"path={path}")
        if normalize:
            self._rows = unit(self._rows, dim=1)
        self._known: dict[str, int] = {}

    @property
    def dim(self) -> int:
        """Columns of the file."""
        return self._rows.shape[1]

    def fit(self, train_texts: Sequence[str]) -> None:
        """Nothing is learnt."""

    def embed_library(self, texts: Sequence[str], adapters: Sequence[int], n_adapters: int) -> Tensor:
        """All rows.

        Raises:
            UserError: if there are more or fewer than descriptions.
        """
        if len(texts) != len(self._rows):
            raise UserError(
                f"path={self.path}: has {len(self._rows)} rows, and the library {len(texts)} descriptions; "
                "needed is a row for each, in their order."
            )
        self._known = {text: row for row, text in enumerate(texts)}
        return self._rows

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Rows of descriptions that the library has.

        Raises:
            UserError: for another text.
        """
        for text in texts:
            if text not in self._known:
                raise UserError(
                    f"description={text}: the library has none like it, and precomputed embeddings are of its own "
                    "alone; predict without a description, or train with an embedding that reads texts."
                )
        return self._rows[[self._known[text] for text in texts]]


class OneHot(Part):
    """A number for each adapter, whatever its descriptions say: what can be memorised, and nothing of another task."""

    def __init__(self) -> None:
        self._n_adapters: int | None = None

    @property
    def dim(self) -> int:
        """Adapters of the library, once it was read."""
        if self._n_adapters is None:
            raise ValueError("dim: is known once the library was read")
        return self._n_adapters

    def fit(self, train_texts: Sequence[str]) -> None:
        """Nothing is learnt."""

    def embed_library(self, texts: Sequence[str], adapters: Sequence[int], n_adapters: int) -> Tensor:
        """(N, adapters)."""
        self._n_adapters = n_adapters
        return one_hot(torch.tensor(list(adapters)), n_adapters).float()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Refuse: a text has no number.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"description={texts[0]}: OneHot reads no texts; predict without a description, or train with another "
            "data.embedding."
        )


def embed_library(embedding: TaskEmbedding, texts: Sequence[str], adapters: Sequence[int], n_adapters: int) -> Tensor:
    """The embeddings of a library's descriptions.

    Args:
        embedding: fitted.
        texts: the descriptions.
        adapters: of each, its adapter's number.
        n_adapters: how many there are.

    Returns:
        (N, E) float32.

    Raises:
        ValueError: if the embedding gives something else.
    """
    own = getattr(embedding, "embed_library", None)
    embedded = embedding(texts) if own is None else own(texts, adapters, n_adapters)
    return checked(embedding, embedded, len(texts))


def checked(embedding: TaskEmbedding, embedded: Tensor, count: int) -> Tensor:
    """(N, E) float32 as `embedding` gave it, or a ValueError that says what it gave instead."""
    if embedded.shape != (count, embedding.dim) or not embedded.is_floating_point():
        given = f"{tuple(embedded.shape)} {embedded.dtype}"
        raise ValueError(
            f"embedding={type(embedding).__name__}: gave {given}: must be {(count, embedding.dim)} of floats"
        )
    if not bool(embedded.isfinite().all()):
        raise ValueError(f"embedding={type(embedding).__name__}: gave numbers that are not finite")
    return embedded.float()


def _read_vectors(path: Path, where: str) -> Tensor:
    """(N, E) float32."""
    if path.suffix == ".safetensors" and path.is_file():
        tensors, _ = read_safetensors(path, where.partition("=")[0])
        if len(tensors) != 1:
            raise UserError(f"{where}: has {len(tensors)} tensors: must be one, (descriptions, numbers).")
        rows = next(iter(tensors.values()))
    elif path.suffix == ".npy":
        try:
            rows = torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise UserError(f"{where}: cannot be read ({first_lines(error, 1)}).") from error
    else:
        raise UserError(f"{where}: must be a .npy or .safetensors file.")
    if rows.ndim != 2 or rows.numel() == 0 or not rows.is_floating_point():
        raise UserError(f"{where}: has {tuple(rows.shape)} {rows.dtype}: must be floats (descriptions, numbers).")
    rows = rows.float()
    if not bool(rows.isfinite().all()):
        raise UserError(
            f"{where}: has numbers that are not finite, first in row {int((~rows.isfinite()).any(1).nonzero()[0])}."
        )
    return rows
