"""A library of LoRA adapters and what each is for: `task=t2l data=lora_library data.path=FOLDER`.

Shapes: B adapters of a batch, N descriptions, E numbers of an embedding.
"""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from trainerkit.data.loader import ArrayDataset, BatchLoader, EpochBatches, ranks_of
from trainerkit.data.lora_contents import LibraryContents
from trainerkit.data.lora_dataset import LoraBatches, LoraDataset
from trainerkit.data.lora_examples import ExampleFiles
from trainerkit.data.lora_folders import InMemory
from trainerkit.data.task_embeddings import TaskEmbedding, checked
from trainerkit.data.text_files import SPLITS
from trainerkit.errors import UserError


class LoraLibrary(LibraryContents):
    """Adapters with an embedding of one of their descriptions, in batches as `LoraDataset` gives them.

    The folder has a folder of PEFT for each adapter (`adapter_model.safetensors`, `adapter_config.json`), all of one
    rank and for the same layers, and `descriptions.jsonl`: an object `{"adapter": FOLDER, "description": TEXT}` a line,
    with `"wording": "unseen"` where a text is kept for the test of other words, and `"split": "train"`, `"val"` or
    `"test"` where the adapter is not to be drawn. An adapter may have several lines; in training one is drawn anew in
    each epoch. Validation and test have every description.

    Args:
        path: the folder.
        descriptions: of the file with them; None for `descriptions.jsonl` in the folder.
        embedding: of the descriptions; None for `HashedNgrams()`.
        val_fraction: share of the adapters for validation, drawn by a hash of their names.
        test_fraction: share for the test.
        batch_size: adapters a batch and process.
        examples_per_task: examples that a batch has of each adapter's task, from `examples.safetensors` in its folder,
            drawn anew in each epoch; None for none.
        description: what prediction writes an adapter for; without it, for every known description of the library.
        description_file: the same from a file, one a line, or a .jsonl with the field `description`.
        in_memory: whether adapters are kept in memory, in float32; 'auto' if they take less than 1 GiB. Else those of a
            batch are read from their files.
        num_workers: processes that read ahead.
        seed: of order, descriptions and examples; not of the split.

    Attributes:
        evaluation_names: of the test's loaders: 'known', and 'unseen' where the test has unseen wordings.

    Raises:
        ValueError: for an impossible argument.
        trainerkit.errors.UserError: for a library that cannot be used; it names the file.
    """

    def __init__(
        self,
        path: str,
        *,
        descriptions: str | None = None,
        embedding: TaskEmbedding | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        batch_size: int = 32,
        examples_per_task: int | None = None,
        description: str | None = None,
        description_file: str | None = None,
        in_memory: InMemory = "auto",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            descriptions=descriptions,
            embedding=embedding,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            description=description,
            description_file=description_file,
            in_memory=in_memory,
        )
        some = 1 if examples_per_task is None else examples_per_task
        at_least = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0), "seed": (seed, 0)}
        for name, (number, least) in (at_least | {"examples_per_task": (some, 1)}).items():
            if number < least:
                raise ValueError(f"{name}={number}: must be {least} or more")
        self.batch_size = batch_size
        self.examples_per_task = examples_per_task
        self.num_workers = num_workers
        self.seed = seed
        self._examples: ExampleFiles | None = None

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Make the folder, where a subclass does; Lightning has one process of a machine do it."""
        self.make_folder()

    def setup(self, stage: str) -> None:
        """Read and check what there is, and that the stage has adapters."""
        if stage == "predict":
            _ = self.predict_texts
        shares = dict(zip(SPLITS, (1.0, *self._fractions), strict=True))
        counts = {name: len(self._rows(name)) for name in SPLITS}
        counts["val"] = min(counts["val"], len(self.descriptions.lines("val", "known")))  # in these words it validates
        # A run that trains ends with the test, and is to hear at its beginning that there is none.
        for name in {"fit": SPLITS, "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if shares[name] > 0 and not counts[name]:
                raise UserError(self._none_for(name))
        if self.examples_per_task is not None and self._examples is None:
            self._examples = ExampleFiles(self.folders.folders, "path", self.examples_per_task, self.in_memory)
            self._examples.load()
        if stage != "predict":
            self.folders.load()

    def train_dataloader(self) -> BatchLoader:
        """Shuffled, and descriptions and examples drawn, anew each epoch."""
        lines: dict[int, list[int]] = {}
        for line in self.descriptions.lines("train", "known"):
            lines.setdefault(self.descriptions.adapters[line], []).append(line)
        dataset = self._dataset(sorted(lines.items()), drawn=True)
        batches = LoraBatches(dataset, self.batch_size, seed=self.seed, world=self._world())
        return self._loader(dataset, batches)

    def val_dataloader(self) -> list[BatchLoader]:
        """One, of the known wordings, or none."""
        return [self._in_order("val", "known")] if self.descriptions.lines("val", "known") else []

    def test_dataloader(self) -> list[BatchLoader]:
        """One for each of `evaluation_names`."""
        return [self._in_order("test", wording) for wording in self.evaluation_names]

    def predict_dataloader(self) -> BatchLoader:
        """`index`, places in `predict_texts`, and `task`, in order."""
        texts, world = self.predict_texts, self._world()
        if self._asked == (None, None):
            task = self.tasks[[line for line, unseen in enumerate(self.descriptions.unseen) if not unseen]]
        else:
            _ = self.tasks  # fits the embedding
            task = checked(self.embedding, self.embedding(texts), len(texts))
            for text, row in zip(texts, task, strict=True):
                if not bool(row.any()):
                    rank_zero_warn(f"description={text}: has nothing of the training descriptions; its vector is zero.")
        processes = world.get("num_replicas", 1)
        if len(texts) < processes:
            raise UserError(f"description: each of {processes} processes needs one, and there are {len(texts)}.")
        dataset = ArrayDataset({"task": task})
        return BatchLoader(dataset, EpochBatches(len(dataset), self.batch_size, shuffle=False, even=False, **world))

    def state_dict(self) -> dict[str, Any]:
        """What the embedding learnt, where it learns anything."""
        own = getattr(self.embedding, "state_dict", None)
        if own is None:
            return {}
        _ = self.tasks  # fits it
        return {"embedding": own()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what the embedding had learnt, though descriptions may have changed since."""
        own = getattr(self.embedding, "load_state_dict", None)
        if own is not None and "embedding" in state_dict:
            own(state_dict["embedding"])
            self._embed()

    def _in_order(self, split: str, wording: str) -> BatchLoader:
        items = [(self.descriptions.adapters[line], [line]) for line in self.descriptions.lines(split, wording)]
        dataset = self._dataset(items, drawn=False)
        batches = EpochBatches(len(dataset), self.batch_size, shuffle=False, even=False, **self._world())
        return self._loader(dataset, batches)

    def _dataset(self, items: list[tuple[int, list[int]]], drawn: bool) -> LoraDataset:
        options: dict[str, Any] = {"examples": self._examples, "seed": self.seed, "drawn": drawn}
        return LoraDataset(self.folders, self.tasks, items, **options)

    def _loader(self, dataset: LoraDataset, batches: EpochBatches) -> BatchLoader:
        return BatchLoader(dataset, batches, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def _world(self) -> dict[str, int]:
        return ranks_of(self.trainer)

    def _none_for(self, name: str) -> str:
        fractions = f"val_fraction={self._fractions[0]}, test_fraction={self._fractions[1]}"
        why = f"path={self.folders.folders[0].parent}: of {len(self.folders)} adapters none is there for {name} "
        advice = 'give more adapters, or say by "split" in descriptions.jsonl which are'
        if name == "train":
            return f"{why}({fractions}); {advice}."
        without = f"or do without by {name}_fraction=0"
        if name == "val":
            without += " and monitor=train/loss in callbacks.crash_safe_checkpoint, best_weights and early_stopping"
        return f"{why}({fractions}); {advice}, {without}."
