"""Text that is larger than a disk: `data=text_stream data.path=s3://bucket/tokens` (extra `streaming`).

The library litdata keeps chunks of tokens in a folder or an object store, and fetches and forgets them as training goes
through them. `write_stream` makes such a folder:

    from trainerkit.data import TextData
    from trainerkit.data.text_stream import write_stream
    write_stream(TextData("books", tokenizer="bpe", vocab_size=8192), "tokens")

Source: litdata, https://github.com/Lightning-AI/litdata
"""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from trainerkit.data.loader import Batch, BatchLoader, ranks_of
from trainerkit.data.prompts import check_prompts, prompt_loader
from trainerkit.data.text import TextData
from trainerkit.data.text_files import SPLITS
from trainerkit.data.tokenizers import Tokenizer, from_content
from trainerkit.errors import UserError
from trainerkit.extras import require
from trainerkit.files import write_json

_SETTINGS = "trainerkit.json"
_TOKENS_AT_ONCE = 1 << 16


def write_stream(data: TextData, folder: str, chunk_bytes: int = 1 << 26) -> None:
    """Write the tokens of a text as litdata's chunks: `train`, `val` and `test` below a folder, and the tokenizer.

    Args:
        data: the text; tokenised first, where it is not yet.
        folder: a new or empty folder of this machine, to be copied to an object store afterwards.
        chunk_bytes: size of a chunk, 4 bytes a token; what is fetched at once.

    Raises:
        UserError: if the folder is not empty, or the tokenizer cannot say how many bytes a token spells.
    """
    litdata = _litdata()
    cache = require("litdata.streaming.cache", "data=text_stream")
    target = Path(folder).expanduser()
    if target.exists() and any(target.iterdir()):
        raise UserError(f"folder={folder}: is not empty; give a new one.")
    if data.tokenizer.token_bytes is None:
        raise UserError("tokenizer: leaves characters out, and a stream has no room for what its tokens spell.")
    for number, split in enumerate(SPLITS):
        stream = data.corpus.stream(number)
        if len(stream) == 0:
            continue
        (target / split).mkdir(parents=True)
        block = data.context_length + 1
        # Items of whole blocks, several to a chunk: what is left of a block at a chunk's end would not be read.
        at_once = max(1, min(_TOKENS_AT_ONCE, chunk_bytes // 16) // block) * block
        loader = litdata.TokensLoader(block_size=block)
        writer = cache.Cache(str(target / split), chunk_bytes=chunk_bytes, item_loader=loader)
        for item, start in enumerate(range(0, len(stream), at_once)):
            tokens = stream.read(start, min(at_once, len(stream) - start))
            writer[item] = torch.from_numpy(tokens).int()
        writer.done()
        writer.merge()
    settings = {"tokenizer": data.tokenizer.content, "end_of_text": data.tokenizer.end_of_text}
    write_json(target / _SETTINGS, settings | {"end_of_text_name": data.end_of_text})


class TextStream(LightningDataModule):
    """Rows of a folder that `write_stream` made: `{"tokens": (B, T), "targets": (B, T), "n_bytes": (B,)}`, int64.

    A block of `context_length + 1` tokens is a row: the first token of a block is never a target, and what is left at a
    chunk's end is not read. Bits per byte are therefore of nearly all of the held-out text, where `TextData` has all of
    it. A run resumes in mid-epoch at its place: litdata's loader knows it.

    Args:
        path: the folder, or its address (`s3://…`, `gs://…`).
        tokenizer: path of the file trainerkit.json that stands there; None looks for it in `path`, if that is a folder.
        context_length: tokens of a row, T.
        batch_size: rows a batch and process.
        num_workers: processes that fetch and read ahead.
        cache_dir: where chunks are kept for a while; None for litdata's own choice.
        max_cache_size: how much is kept there.
        prompt: what to go on from in prediction, see `TextData`; prediction reads the tokenizer alone.
        prompt_file: the same from a file, a prompt a line, or .jsonl with the field `text`.
        seed: of the order.

    Raises:
        ValueError: for an impossible argument.
        trainerkit.errors.UserError: if there is no such folder, or no tokenizer; for prompts that cannot be used.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer: str | None = None,
        context_length: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
        cache_dir: str | None = None,
        max_cache_size: str = "50GB",
        prompt: str | None = None,
        prompt_file: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least = {"context_length": (context_length, 1), "batch_size": (batch_size, 1)}
        at_least |= {"num_workers": (num_workers, 0), "seed": (seed, 0)}
        for name, (number, least) in at_least.items():
            if number < least:
                raise ValueError(f"{name}={number}: must be {least} or more")
        check_prompts(prompt, prompt_file)
        self.path = path.rstrip("/")
        self.context_length = context_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer = _tokenizer(path, tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self._prompt = prompt
        self._prompt_file = prompt_file
        self._cache = {"cache_dir": cache_dir, "max_cache_size": max_cache_size}

    def train_dataloader(self) -> Any:
        """In another order each epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        """In order; empty without validation text."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> Any:
        """In order; empty without test text."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> BatchLoader:
        """The prompts."""
        return prompt_loader(
            self._prompt,
            self._prompt_file,
            "text",
            tokenizer=self.tokenizer,
            context_length=self.context_length,
            batch_size=self.batch_size,
            world=ranks_of(self.trainer),
        )

    def _loader(self, split: str, shuffle: bool) -> Any:
        litdata = _litdata()
        place = f"{self.path}/{split}"
        if split != "train" and "://" not in place and not Path(place).expanduser().exists():
            return []
        rows = litdata.StreamingDataset(
            place,
            item_loader=litdata.TokensLoader(block_size=self.context_length + 1),
            shuffle=shuffle,
            seed=self.seed,
            **self._cache,
        )
        rows.seeded_by_index = True  # a block is as it was written; ExactResume asks
        return _loader_class(litdata)(
            rows,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_Batches(self.tokenizer),
            generator=torch.Generator().manual_seed(self.seed),  # or it draws from the global state
        )


def _loader_class(litdata: Any) -> Any:
    class Loader(litdata.StreamingDataLoader):  # type: ignore[misc]
        """Goes on from a state once, in the iteration that follows.

        litdata's own forgets the state when its generator ends. Lightning counts batches and never asks for one more
        than there are, so that the next epoch would go on from the state again.
        """

        _just_loaded = False

        def load_state_dict(self, obj: dict[str, Any]) -> None:
            super().load_state_dict(obj)
            self._just_loaded = True

        def __iter__(self) -> Any:
            if not self._just_loaded:
                self.restore = False
            self._just_loaded = False
            return super().__iter__()

    return Loader


class _Batches:
    """Blocks of tokens as a batch; a class, so that worker processes can have it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.token_bytes is not None
        self._token_bytes = torch.from_numpy(tokenizer.token_bytes)

    def __call__(self, blocks: list[Tensor]) -> Batch:
        block = torch.stack(blocks).long()
        targets = block[:, 1:].contiguous()
        return {"tokens": block[:, :-1].contiguous(), "targets": targets, "n_bytes": self._token_bytes[targets].sum(1)}


def _tokenizer(path: str, given: str | None) -> Tokenizer:
    if given is None and "://" in path:
        raise ValueError(f"tokenizer=null: is needed for {path}: copy {_SETTINGS} from there, and give its path")
    file = Path(given or f"{path}/{_SETTINGS}").expanduser()
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        content, end, name = settings["tokenizer"], settings["end_of_text"], settings.get("end_of_text_name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"path={path}: {file} cannot be read ({error}). write_stream makes such a folder: docs/your_text.md"
        ) from error
    tokenizer = from_content(content, str(file), name)
    if tokenizer.end_of_text != end:
        raise UserError(f"{file}: its tokenizer has another end of text than the tokens were written with.")
    return tokenizer


def _litdata() -> Any:
    return require("litdata", "data=text_stream")
