"""Text as numbers: bytes, or the tokens of a tokenizer.json of the library `tokenizers` (extra `text`).

Whatever the tokenizer, each token is said to spell a number of bytes, and these sum to the bytes of the text: bits per
byte are then comparable between tokenizers.

Source of byte-level BPE: A. Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainerkit.errors import UserError, did_you_mean, either
from trainerkit.extras import require

END_OF_TEXT = "<|endoftext|>"
# What other makers call it, the likeliest first.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "[SEP]", "[EOS]", "<s>", "[CLS]")
_ALPHABET = 256

Encoded = tuple[NDArray[np.int64], NDArray[np.int64] | None]


class Tokenizer(Protocol):
    """What a text data module asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """How many different tokens there are."""

    @property
    def end_of_text(self) -> int:
        """The token that separates documents; it spells nothing."""

    @property
    def token_bytes(self) -> NDArray[np.int64] | None:
        """How many bytes each token spells, (vocab_size,); None if that depends on the place."""

    @property
    def content(self) -> str:
        """What it can be made from again, see `from_content`."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without an end of text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; the end of text spells nothing, bytes that are no UTF-8 become U+FFFD."""

    def encode_many(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """For each text its tokens and, where `token_bytes` is None, the bytes that each of them spells."""


class ByteTokenizer:
    """A token a byte of UTF-8, and number 256 for the end of a text."""

    vocab_size = 257
    end_of_text = 256
    content = "bytes"

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """One each; none of the end of text."""
        return np.append(np.ones(256, np.int64), 0)

    def encode(self, text: str) -> list[int]:
        """The bytes of its UTF-8."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; raises `ValueError` for a number above 256."""
        return bytes(number for number in ids if number != self.end_of_text).decode(errors="replace")

    def encode_many(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """As arrays."""
        for text in texts:
            yield np.frombuffer(text.encode(), np.uint8).astype(np.int64), None


class JsonTokenizer:
    """A tokenizer.json, as the library `tokenizers` and Hugging Face's models have it.

    Args:
        content: the file's text.
        name: of the file, for messages.
        end_of_text: name of the token that separates documents; None looks for a usual one, as `<|endoftext|>`.

    Special tokens that a text happens to spell are read as plain text.

    Raises:
        UserError: if the content is no tokenizer, or has no such token.
    """

    def __init__(self, content: str, name: str, end_of_text: str | None = None) -> None:
        library = require("tokenizers", f"tokenizer={name}")
        try:
            tokenizer = library.Tokenizer.from_str(content)
        except Exception as error:  # the library raises this class itself
            raise UserError(f"tokenizer={name}: is no tokenizer.json ({error}).") from error
        # What a model's maker set for its inputs has no place in a stream.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab()
        ends = [end_of_text] if end_of_text is not None else [end for end in _END_NAMES if end in vocabulary]
        if not ends or ends[0] not in vocabulary:
            special = [token["content"] for token in json.loads(content).get("added_tokens") or []]
            raise UserError(
                f"end_of_text={end_of_text if end_of_text is not None else 'null'}: {name} has no such token; name the "
                f"one that separates documents, one of {', '.join(special[:10]) or 'its vocabulary'}."
            )
        self._tokenizer = tokenizer
        self.content = content
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text: int = vocabulary[ends[0]]
        self.token_bytes = _bytes_of_tokens(json.loads(content), vocabulary, self.end_of_text)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        kept = [int(number) for number in ids if number != self.end_of_text]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def encode_many(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Of several texts at once, which the library does on all cores."""
        if self.token_bytes is not None:
            for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
                yield np.asarray(encoding.ids, np.int64), None
            return
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ends = np.asarray([end for _, end in encoding.offsets], np.int64)
            yield np.asarray(encoding.ids, np.int64), bytes_between(text, ends)


def bytes_between(text: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give every byte of a text to one token.

    What lies between two tokens goes to the second (the blanks that a tokenizer leaves out), what follows the last one
    to the last. Of tokens that share a character the first has its bytes.

    Args:
        text: of n characters.
        ends: where each token ends, in characters, (tokens,).

    Returns:
        (tokens,) bytes; they sum to the text's, unless there is no token.
    """
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    place = np.concatenate([[0], np.cumsum(lengths)])
    reached = place[np.maximum.accumulate(ends)] if len(ends) else ends
    reached[-1:] = place[-1]
    return np.diff(reached, prepend=0)


def load_tokenizer(name: str, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer that `name` stands for.

    Args:
        name: 'bytes', or the path of a tokenizer.json.
        end_of_text: see `JsonTokenizer`.

    Raises:
        UserError: if there is no such thing.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if not path.is_file():
        known = ("bytes", "bpe")
        raise UserError(
            f"tokenizer={name}: must be {either(known)}, or the path of a tokenizer.json. {did_you_mean(name, known)}"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer={name}: is no tokenizer.json ({error}).") from error
    return from_content(content, name, end_of_text)


def from_content(content: str, name: str, end_of_text: str | None = None) -> Tokenizer:
    """A tokenizer from its `content`; `name` is for messages."""
    return ByteTokenizer() if content == "bytes" else JsonTokenizer(content, name, end_of_text)


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Learn a byte-level BPE; the same texts give the same one.

    Args:
        texts: what to learn from.
        vocab_size: 256 bytes, the end of text, and the merges.

    Returns:
        The content of a tokenizer.json.

    Raises:
        ValueError: if the texts do not have so many merges.
    """
    require("tokenizers", "tokenizer=bpe")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the training text gives BPE no more than {reached} tokens; take {reached} or "
            "fewer, or more text"
        )
    content: str = tokenizer.to_str()
    return content


def digest(tokenizer: Tokenizer) -> str:
    """What tells one tokenizer from another."""
    return hashlib.sha256(f"{tokenizer.end_of_text} {tokenizer.content}".encode()).hexdigest()


def _bytes_of_tokens(content: Any, vocabulary: dict[str, int], end_of_text: int) -> NDArray[np.int64] | None:
    """How many bytes each token spells, if it is a byte-level tokenizer that leaves the text as it is."""
    if not _is_lossless(content):
        return None
    letters = _byte_letters()
    if not set(letters) <= vocabulary.keys():
        return None
    added = {token["content"] for token in content.get("added_tokens") or []}
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        sizes[number] = len(token.encode()) if token in added else len(token)
    sizes[end_of_text] = 0
    return sizes


def _is_lossless(content: Any) -> bool:
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before]) or [{}]
    *splits, last = steps
    return (
        content["model"].get("type") == "BPE"
        and content.get("normalizer") is None
        and (content.get("decoder") or {}).get("type") == "ByteLevel"
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space", True)
        and all(step.get("type") == "Split" and step.get("behavior") == "Isolated" for step in splits)
        and not any(token["lstrip"] or token["rstrip"] for token in content.get("added_tokens") or [])
    )


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: its own, or one from 256 on if it has none."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(_ALPHABET, 2 * _ALPHABET))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(_ALPHABET)]
