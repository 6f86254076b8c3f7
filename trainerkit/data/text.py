"""Text of the user's for language modelling: `data=text data.path=mine.txt`.

Files, folders, patterns, .jsonl, compressed or not, are tokenised once into a cache folder, and read from there through
memory maps. A row is a window of `context_length` tokens over documents that follow each other, `<end of text> document
<end of text> document …`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from trainerkit.data.loader import BatchLoader, ranks_of
from trainerkit.data.prompts import check_prompts, prompt_loader
from trainerkit.data.text_cache import Corpus, default_cache_dir, tokenized
from trainerkit.data.text_files import SPLITS, Source, SplitBy, find_sources
from trainerkit.data.tokenizers import ByteTokenizer, Tokenizer, from_content, load_tokenizer
from trainerkit.data.windows import WindowBatches, Windows, training_windows
from trainerkit.errors import UserError

_BPE_TOKENS = 4096


class TextData(LightningDataModule):
    """Text as tokens: `{"tokens": (B, T), "targets": (B, T), "n_bytes": (B,), "index": (B,)}`, see `Windows`.

    Prediction gives prompts: `{"prompt": (B, P), "length": (B,), "index": (B,)}`, each an end of text and the prompt's
    tokens, filled up with ends of text on the left; `length` does not count these.

    Args:
        path: a file, a folder or a pattern (`books/**/*.txt`), or a list of them; .gz and .zst are decompressed.
        tokenizer: 'bytes'; 'bpe', which is learnt from the training part; or the path of a tokenizer.json.
        vocab_size: of the BPE, None for 4096; of another tokenizer, None or what it has.
        end_of_text: name of the token of a tokenizer.json that separates documents; None for a usual one. Bytes and BPE
            have their own.
        field: of a line of .jsonl that holds the text.
        context_length: tokens of a row, T.
        documents: 'packed' lets a row's tokens see the document before theirs; 'separate' adds `document` (B, T), by
            which attention stays within one.
        split: 'files' gives each file to one split, 'within' gives each split a part of every file, 'auto' takes
            'files' from 60 files on; see `find_sources`. Neither depends on `seed`.
        val_fraction: share for validation.
        test_fraction: share for the test.
        eval_stride: tokens from a window to the next in evaluation; None for context_length. Less gives each token more
            before it, and costs in proportion.
        shift_windows: whether training windows begin at other places in each epoch.
        batch_size: rows a batch and process.
        num_workers: processes that read ahead; a row is one slice of a memory map, so 0 is seldom slow.
        cache_dir: where tokens are kept; None for `$XDG_CACHE_HOME/trainerkit`, or `~/.cache/trainerkit`.
        shard_bytes: text of a shard, which is what a killed run repeats.
        tokenize_workers: processes that tokenise; None for as many as cores, one for small texts.
        prompt: what to go on from in prediction; None for nothing but the end of text.
        prompt_file: the same from a file, a prompt a line, or .jsonl with `field`.
        seed: of the order of the windows.

    Raises:
        ValueError: for an impossible argument.
        trainerkit.errors.UserError: for text that cannot be used; it names the file, and the byte or the line.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        end_of_text: str | None = None,
        field: str = "text",
        context_length: int = 256,
        documents: Literal["packed", "separate"] = "packed",
        split: SplitBy = "auto",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        eval_stride: int | None = None,
        shift_windows: bool = True,
        batch_size: int = 32,
        num_workers: int = 0,
        cache_dir: str | None = None,
        shard_bytes: int = 16_777_216,
        tokenize_workers: int | None = None,
        prompt: str | None = None,
        prompt_file: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.paths = [path] if isinstance(path, str) else list(path)
        if not self.paths or "" in self.paths:
            raise ValueError(f"path={path!r}: needed is a file, a folder (. for this one) or a pattern")
        _check_choice("documents", documents, ("packed", "separate"))
        _check_choice("split", split, ("auto", "files", "within"))
        _check_fractions(val_fraction, test_fraction)
        at_least = {
            "context_length": (context_length, 1),
            "batch_size": (batch_size, 1),
            "num_workers": (num_workers, 0),
        }
        at_least |= {"shard_bytes": (shard_bytes, 1), "seed": (seed, 0), "tokenize_workers": (tokenize_workers or 1, 1)}
        for name, (number, least) in at_least.items():
            if number < least:
                raise ValueError(f"{name}={number}: must be {least} or more")
        if eval_stride is not None and not 1 <= eval_stride <= context_length:
            raise ValueError(f"eval_stride={eval_stride}: must be from 1 to context_length={context_length}, or null")
        if end_of_text is not None and tokenizer in ("bytes", "bpe"):
            raise ValueError(f"end_of_text={end_of_text}: tokenizer={tokenizer} has its own; say null")
        check_prompts(prompt, prompt_file)
        self.context_length = context_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._tokenizer_name = tokenizer
        self.end_of_text = end_of_text
        self._field = field
        self._separate = documents == "separate"
        self._split: SplitBy = split
        self._fractions = (val_fraction, test_fraction)
        self._eval_stride = context_length if eval_stride is None else eval_stride
        self._shift = shift_windows
        self._cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._shard_bytes = shard_bytes
        self._workers = tokenize_workers
        self._prompt = prompt
        self._prompt_file = prompt_file
        self._corpus: Corpus | None = None
        self._given_tokenizer = None if tokenizer == "bpe" else load_tokenizer(tokenizer, end_of_text)
        self._tokenizer: Tokenizer | None = self._given_tokenizer  # a checkpoint may bring another, for prediction
        self.vocab_size = self._checked_size(vocab_size)

    # What a subclass for another text writes anew.

    def sources(self) -> list[Source]:
        """The files, in the order of their tokens."""
        return find_sources(self.paths, self._split)

    # What tasks and callbacks read.

    @property
    def tokenizer(self) -> Tokenizer:
        """With `vocab_size`, `encode`, `decode` and `end_of_text`; a BPE is learnt if it is not there yet."""
        return self._tokenizer if self._tokenizer is not None else self.corpus.tokenizer

    @property
    def corpus(self) -> Corpus:
        """The tokenised text; made if it is not there yet."""
        if self._corpus is None:
            self._corpus = tokenized(
                self.sources(),
                self.vocab_size if self._given_tokenizer is None else self._given_tokenizer,
                cache_dir=self._cache_dir,
                fractions=self._fractions,
                field=self._field,
                end_of_text=self.end_of_text,
                part_bytes=self._shard_bytes,
                workers=self._workers,
            )
        return self._corpus

    def texts(self, split: Literal["train", "val", "test"]) -> Iterator[str]:
        """The text of a split from its files, in pieces, for baselines."""
        job, wanted = self.corpus.job, SPLITS.index(split)
        for part in range(len(job.parts)):
            yield from (piece.text for piece in job.pieces(part) if piece.split == wanted)

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Tokenise what is not there yet; Lightning has one process of a machine do it while the others wait."""
        if self.trainer is None or self.trainer.state.fn != "predict":
            _ = self.corpus

    def setup(self, stage: str) -> None:
        """Check that there is text enough for each process; prompts need none."""
        if stage == "predict":
            return
        for name, tokens, share in zip(SPLITS, self.corpus.tokens, (1.0, *self._fractions), strict=True):
            processes = self._world().get("num_replicas", 1)
            if name == "train":
                windows, _ = training_windows(tokens, self.context_length, self._shift)
            else:  # the last one may be filled up
                windows = 1 - (self.context_length - tokens) // self._eval_stride
            if share > 0 and (tokens < self.context_length or windows < processes):
                key = f"{name}_fraction={share}" if name != "train" else f"context_length={self.context_length}"
                less = "one window" if processes == 1 else f"a window for each of {processes} processes"
                raise UserError(
                    f"{key}: {tokens} tokens of the text are there to {_PURPOSE[name]}, less than {less} of "
                    f"context_length={self.context_length}. Give more text or a smaller context_length"
                    + ("." if name == "train" else f", a larger {name}_fraction, split=within{_WITHOUT[name]}.")
                )

    def train_dataloader(self) -> BatchLoader:
        """Shuffled anew each epoch."""
        stream = self.corpus.stream(0)
        windows, slack = training_windows(len(stream), self.context_length, self._shift)
        batches = WindowBatches(
            windows,
            self.batch_size,
            stride=self.context_length,
            slack=slack,
            shuffle=True,
            seed=self.seed,
            even=True,
            **self._world(),
        )
        return self._loader(Windows(stream, self.context_length, self.context_length, self._separate), batches)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """Every token once, in order; empty without validation text."""
        return self._evaluation(1)

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """Every token once, in order; empty without test text."""
        return self._evaluation(2)

    def predict_dataloader(self) -> BatchLoader:
        """The prompts."""
        return prompt_loader(
            self._prompt,
            self._prompt_file,
            self._field,
            tokenizer=self.tokenizer,
            context_length=self.context_length,
            batch_size=self.batch_size,
            world=self._world(),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the text, and the tokenizer itself, so that prediction needs no text."""
        return {"text": None if self._corpus is None else self._corpus.key, "tokenizer": self.tokenizer.content}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold a resumed run to the text it was trained on; take the tokenizer of the checkpoint for prediction.

        Raises:
            UserError: if a run that trains on would get other tokens.
        """
        doing = None if self.trainer is None else self.trainer.state.fn
        if doing == "predict":
            self._tokenizer = from_content(state_dict["tokenizer"], "the checkpoint's", self.end_of_text)
            return
        if self.tokenizer.content != state_dict["tokenizer"]:
            raise UserError(
                f"tokenizer={self._tokenizer_name}: is not that of the checkpoint, so that its tokens mean something "
                "else. Give the same text and tokenizer, or the tokenizer.json that it was trained with."
            )
        if doing == "fit" and state_dict["text"] not in (None, self.corpus.key):
            raise UserError(
                f"path={', '.join(self.paths)}: the text, how it is split, or shard_bytes has changed since the "
                "checkpoint was written. Bring it back to resume; or train on the new text in another out_dir."
            )

    def _checked_size(self, given: int | None) -> int:
        if self._tokenizer is None:
            size = _BPE_TOKENS if given is None else given
            if size <= ByteTokenizer.vocab_size:
                raise ValueError(f"vocab_size={size}: must be above 257, which are the bytes and the end of text")
            return size
        if given not in (None, self._tokenizer.vocab_size):
            raise ValueError(
                f"vocab_size={given}: tokenizer={self._tokenizer_name} has {self._tokenizer.vocab_size}; say null, or "
                "tokenizer=bpe to have one learnt"
            )
        return self._tokenizer.vocab_size

    def _world(self) -> dict[str, int]:
        return ranks_of(self.trainer)

    def _evaluation(self, split: int) -> BatchLoader | list[Any]:
        stream = self.corpus.stream(split)
        if self._fractions[split - 1] == 0 or len(stream) == 0:
            return []
        windows = Windows(stream, self.context_length, self._eval_stride, self._separate)
        batches = WindowBatches(
            len(windows), self.batch_size, stride=self._eval_stride, shuffle=False, even=False, **self._world()
        )
        return self._loader(windows, batches)

    def _loader(self, windows: Windows, batches: WindowBatches) -> BatchLoader:
        return BatchLoader(windows, batches, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())


_PURPOSE = {"train": "train on", "val": "validate on", "test": "test on"}
# What can be said without the split: without validation nothing may wait for val/loss.
_WITHOUT = {"val": ", or val_fraction=0 with callbacks.early_stopping=null", "test": ", or test_fraction=0"}


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value}: must be one of {', '.join(allowed)}")


def _check_fractions(val: float, test: float) -> None:
    for name, fraction in {"val_fraction": val, "test_fraction": test}.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}={fraction}: must be from 0 to below 1")
    if val + test >= 1:
        raise ValueError(f"test_fraction={test}: with val_fraction={val} nothing is left to train on")
