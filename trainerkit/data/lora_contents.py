"""What a library of adapters holds and what tasks ask of it; the loaders are `LoraLibrary`'s.

Shapes: B adapters, N descriptions, E numbers of an embedding; n layers of a type, r the rank.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from trainerkit.adapter_layout import AdapterLayout, Factors
from trainerkit.data.lora_descriptions import Descriptions, read_descriptions
from trainerkit.data.lora_folders import AdapterFolders, InMemory
from trainerkit.data.pair_module import check_fractions
from trainerkit.data.prompts import read_prompts
from trainerkit.data.task_embeddings import HashedNgrams, TaskEmbedding, embed_library
from trainerkit.data.text_files import SPLITS
from trainerkit.errors import UserError


class LibraryContents(LightningDataModule):
    """The adapters of a folder, their descriptions and their embeddings, each read when it is first needed.

    Args: see `LoraLibrary`.

    Raises:
        ValueError: for an impossible argument.
    """

    def __init__(
        self,
        path: str,
        *,
        descriptions: str | None,
        embedding: TaskEmbedding | None,
        val_fraction: float,
        test_fraction: float,
        description: str | None,
        description_file: str | None,
        in_memory: InMemory,
    ) -> None:
        super().__init__()
        if in_memory not in (True, False, "auto"):
            raise ValueError(f"in_memory={in_memory}: must be true, false or auto")
        check_fractions({"val_fraction": val_fraction, "test_fraction": test_fraction})
        if description is not None and description_file is not None:
            raise ValueError(f"description_file={description_file}: give a description or a file of them, not both")
        if description is not None and not description.strip():
            raise ValueError("description=: must not be blank")
        for name in ("fit", "__call__"):
            if embedding is not None and not callable(getattr(embedding, name, None)):
                raise ValueError(f"embedding={type(embedding).__name__}: must have {name}; see TaskEmbedding")
        self.path = path
        self.embedding: TaskEmbedding = HashedNgrams() if embedding is None else embedding
        self.in_memory: InMemory = in_memory
        self._descriptions_path = descriptions
        self._fractions = (val_fraction, test_fraction)
        self._asked = (description, description_file)
        self._folders: AdapterFolders | None = None
        self._descriptions: Descriptions | None = None
        self._tasks: Tensor | None = None
        self._predict_texts: list[str] | None = None

    # What a subclass for another library writes anew.

    def make_folder(self) -> Path:
        """The folder of the library; a subclass makes it if it is not there. Asked for whenever it is first needed."""
        return Path(self.path).expanduser()

    # What tasks and callbacks read.

    @property
    def folders(self) -> AdapterFolders:
        """The adapters; a row's number, `index`, is the place of its folder in `folders.names`."""
        if self._folders is None:
            self._folders = AdapterFolders(self.make_folder(), "path", self.in_memory)
        return self._folders

    @property
    def descriptions(self) -> Descriptions:
        """What is said about them, and which of them train."""
        if self._descriptions is None:
            given = self._descriptions_path
            key = "path" if given is None else "descriptions"
            file = self.make_folder() / "descriptions.jsonl" if given is None else Path(given).expanduser()
            self._descriptions = read_descriptions(file, key, self.folders.names, self._fractions)
        return self._descriptions

    @property
    def tasks(self) -> Tensor:
        """Embeddings of all descriptions, (N, E), fitted on those of the training adapters in known wordings."""
        if self._tasks is None:
            known = self.descriptions
            self.embedding.fit([known.texts[line] for line in known.lines("train", "known")])
            self._embed()
        assert self._tasks is not None
        return self._tasks

    @property
    def layout(self) -> AdapterLayout:
        """Which layers the adapters change."""
        return self.folders.layout

    @property
    def layers(self) -> list[list[Any]]:
        """[name, in_features, out_features] of each of them."""
        return self.layout.layers

    @property
    def rank(self) -> int:
        """Of the adapters."""
        return self.layout.rank

    @property
    def scaling(self) -> float:
        """What B·A is multiplied with."""
        return self.layout.scaling

    @property
    def embedding_dim(self) -> int:
        """E."""
        if hasattr(self.embedding, "embed_library"):  # may depend on the library
            return self.tasks.shape[1]
        return self.embedding.dim

    @property
    def evaluation_names(self) -> list[str]:
        """Of the test's loaders."""
        return [wording for wording in ("known", "unseen") if self.descriptions.lines("test", wording)]

    def factor_statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation over the training adapters, (n, r, in) and (n, out, r) for each type."""
        return self.folders.statistics(self._rows("train"))

    def shares_initial_a(self) -> bool | None:
        """Whether the adapters were trained from one initial A, as `AdapterFolders.shares_initial_a` tells."""
        return self.folders.shares_initial_a(self._rows("train"))

    def factors(self, rows: Tensor) -> Factors:
        """Of the adapters with these numbers, (B, n, r, in) and (B, n, out, r) for each type."""
        return self.folders.factors(rows)

    def described(self, split: str, wording: str) -> dict[str, Any]:
        """All descriptions of the adapters of a split.

        Args:
            split: 'train', 'val' or 'test'.
            wording: 'known' or 'unseen'.

        Returns:
            `index` (N,), `task` (N, E), and `text`, a list of N.

        Raises:
            ValueError: for another split or wording.
        """
        known, lines = self.descriptions, self.descriptions.lines(split, wording)
        index = torch.tensor([known.adapters[line] for line in lines], dtype=torch.int64)
        return {"index": index, "task": self.tasks[lines], "text": [known.texts[line] for line in lines]}

    @property
    def predict_texts(self) -> list[str]:
        """The descriptions that prediction writes adapters for; a batch's `index` is a place in it."""
        if self._predict_texts is None:
            self._predict_texts = self._asked_for()
        return self._predict_texts

    def _asked_for(self) -> list[str]:
        text, file = self._asked
        if text is not None:
            return [text]
        if file is None:
            known = self.descriptions
            return [each for each, unseen in zip(known.texts, known.unseen, strict=True) if not unseen]
        texts = read_prompts(file, "description", "description_file")
        for place, each in enumerate(texts, start=1):
            if not each.strip():
                raise UserError(f"description_file={file}: description {place} is blank.")
        return texts

    def _embed(self) -> None:
        known = self.descriptions
        self._tasks = embed_library(self.embedding, known.texts, known.adapters, len(self.folders))

    def _rows(self, split: str) -> Tensor:
        roles = self.descriptions.roles
        return torch.tensor([row for row, role in enumerate(roles) if role == SPLITS.index(split)], dtype=torch.int64)
