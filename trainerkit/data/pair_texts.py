"""Texts of pairs as tokens: made once, kept in one array, padded batch by batch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainerkit.data.hashed_words import HashedWords
from trainerkit.errors import UserError, did_you_mean, either
from trainerkit.extras import require


class PairTokenizer(Protocol):
    """What data of pairs ask of a tokenizer. Padding is 0, and the mask says what is padding."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text; none only of a blank one."""


class ByteTokens:
    """A token a byte of UTF-8, from 1 on."""

    vocab_size = 257

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes, plus one."""
        return [[byte + 1 for byte in text.encode("utf-8", "surrogatepass")] for text in texts]


class ModelTokens:
    """The tokens that a pretrained model knows, with those that its maker puts around a text ([CLS], [SEP], …).

    Args:
        path: of a tokenizer.json.
        max_length: tokens of a text at most; what is too long is cut inside what is put around it.

    Raises:
        UserError: if the file is no tokenizer.json.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        library = require("tokenizers", f"tokenizer={path}")
        try:
            self._tokenizer = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises this class itself
            raise UserError(f"tokenizer={path}: is no tokenizer.json ({error}).") from error
        around = self._tokenizer.num_special_tokens_to_add(False)
        if max_length <= around:
            raise ValueError(f"max_length={max_length}: must be above {around}, which {path.name} puts around a text")
        self._path = path
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.no_padding()
        # A text that spells "[SEP]" does not end there.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Of several texts at once, which the library does on all cores.

        Raises:
            UserError: if none of the texts has a token, though some are not blank: the tokenizer is of something else.
        """
        # Half of a character, as a broken JSON file has it, is what the library cannot take.
        whole = [text.encode("utf-8", "replace").decode() for text in texts]
        found: list[list[int]] = [encoding.ids for encoding in self._tokenizer.encode_batch(whole)]
        spoken = next((text for text in whole if text.strip()), None)
        if spoken is not None and not any(found):
            raise UserError(
                f"tokenizer={self._path}: gives no token for any text, such as {spoken[:40]!r}; is it of these texts?"
            )
        return found


def pair_tokenizer(
    name: str,
    max_length: int,
    *,
    n_buckets: int = 65536,
    word_ngrams: int = 1,
    char_ngrams: tuple[int, int] | None = None,
) -> PairTokenizer:
    """The tokenizer that `name` stands for.

    Args:
        name: 'words' (`HashedWords`), 'bytes', the path of a tokenizer.json, or of a folder that has one, as that of a
            saved model of the library `transformers`.
        max_length: tokens of a text at most; `TokenRows` cuts the others'.
        n_buckets: of the words, as the next two.
        word_ngrams: longest sequence of words that has a token.
        char_ngrams: shortest and longest sequence of letters that has one.

    Raises:
        UserError: if there is no such thing.
    """
    if name == "words":
        return HashedWords(n_buckets, word_ngrams=word_ngrams, char_ngrams=char_ngrams)
    if name == "bytes":
        return ByteTokens()
    path = Path(name).expanduser()
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        known = ("words", "bytes")
        raise UserError(
            f"tokenizer={name}: must be {either(known)}, the path of a tokenizer.json, or of a folder with one. "
            f"{did_you_mean(name, known)}"
        )
    return ModelTokens(path, max_length)


class TokenRows:
    """The tokens of many texts, one after the other in one array.

    Args:
        rows: tokens of each text.
        max_length: of a row at most; the others are cut at their end.
    """

    def __init__(self, rows: Iterable[Sequence[int]], max_length: int) -> None:
        cut = [np.asarray(row[:max_length], dtype=np.int32) for row in rows]
        self._ids = torch.from_numpy(np.concatenate([*cut, np.zeros(1, np.int32)]))  # one more, so that none is empty
        self._starts = torch.tensor([0, *map(len, cut)]).cumsum(0)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows, padded to the longest of them.

        Args:
            rows: (B,) int64.

        Returns:
            The tokens, (B, T) int64, 0 where there is none, and where there is one, (B, T) bool.
        """
        starts = self._starts[rows]
        lengths = self._starts[rows + 1] - starts
        place = torch.arange(max(1, int(lengths.max()) if len(rows) else 0))
        mask = place < lengths[:, None]
        ids = self._ids[(starts[:, None] + place).clamp(max=len(self._ids) - 1)]
        return ids.long() * mask, mask
