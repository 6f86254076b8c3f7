"""Words as numbers by a hash: no vocabulary to learn, to save or to keep in step with a checkpoint.

Source: K. Weinberger et al., Feature hashing for large scale multitask learning, ICML 2009; of the n-grams of letters,
P. Bojanowski et al., Enriching word vectors with subword information, TACL 2017.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from itertools import groupby


def _marks() -> str:
    """The ranges of what stands on, below or after a letter and is part of it, as in a vowel of Hindi or Thai."""
    codes = (code for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M")
    runs = [[code for _, code in run] for _, run in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)


# re knows no category of marks, and \w has none of them. Joiners without width stand between letters of some scripts.
_MARKS = _marks() + "\u200c\u200d"
# The names of languages that end in signs.
_SIGNED = r"(?<!\w)(?:[Cc]\+\+|[CcFf]#)(?![\w#+])"
# A sixth of the time, and the same for nearly all English and code.
_PLAIN_WORD = re.compile(r"[^\W_]+")
_PLAIN_IDENTIFIER = re.compile(r"\w+")
_WORD = re.compile(rf"{_SIGNED}|(?:[^\W_]|[{_MARKS}])+")
_IDENTIFIER = re.compile(rf"{_SIGNED}|[\w{_MARKS}]+")
# Between aB, and before the last capital of ABc: HTTPServer is HTTP and Server.
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class HashedWords:
    """A tokenizer whose tokens are hashes of words, from 1 on; 0 is padding.

    Args:
        n_buckets: how many different tokens there are at most.
        word_ngrams: 2 adds a token for each two words that follow each other, after the first of them; and so on.
        char_ngrams: shortest and longest n-grams of letters that are added after each word, the word's ends marked by
            < and >; None for none.
        split_identifiers: take `snake_case` and `CamelCase` apart.
        lowercase: take 'Word' and 'word' for the same.
        seed: of the hash.

    Letters and their marks are composed first (NFC), so that it does not matter how they are written. 'C++' and 'C#'
    are words. A script without blanks between words, such as Chinese or Thai, gives one word a phrase: there take
    `char_ngrams`, or the tokenizer of a model. A text that has no word, only signs, is one token as a whole; a blank
    one has none.

    Raises:
        ValueError: for an impossible argument.
    """

    def __init__(
        self,
        n_buckets: int = 65536,
        *,
        word_ngrams: int = 1,
        char_ngrams: tuple[int, int] | None = None,
        split_identifiers: bool = True,
        lowercase: bool = True,
        seed: int = 0,
    ) -> None:
        for name, (number, least) in {
            "n_buckets": (n_buckets, 1), "word_ngrams": (word_ngrams, 1), "seed": (seed, 0),
        }.items():  # fmt: skip
            if number < least:
                raise ValueError(f"{name}={number}: must be {least} or more")
        if char_ngrams is not None and not (len(char_ngrams) == 2 and 1 <= char_ngrams[0] <= char_ngrams[1]):
            raise ValueError(f"char_ngrams={list(char_ngrams)}: must be [shortest, longest], from 1 on, or null")
        self.n_buckets = n_buckets
        self.word_ngrams = word_ngrams
        self.char_ngrams = None if char_ngrams is None else (char_ngrams[0], char_ngrams[1])
        self.split_identifiers = split_identifiers
        self.lowercase = lowercase
        self.seed = seed
        self._known: dict[str, list[int]] = {}  # tokens of a word: most words come often

    @property
    def vocab_size(self) -> int:
        """The buckets, and padding."""
        return self.n_buckets + 1

    def words(self, text: str) -> list[str]:
        """The words that are hashed."""
        is_plain = text.isascii() and "#" not in text and "++" not in text
        text = unicodedata.normalize("NFC", text)
        if self.split_identifiers:
            words = [part for word in (_PLAIN_WORD if is_plain else _WORD).findall(text) for part in _CAMEL.split(word)]
        else:
            words = (_PLAIN_IDENTIFIER if is_plain else _IDENTIFIER).findall(text)
        words = words or ([text.strip()] if text.strip() else [])
        return [word.lower() for word in words] if self.lowercase else words

    def encode(self, text: str) -> list[int]:
        """The tokens of a text: each word's, then those of the n-grams that begin with it."""
        words = self.words(text)
        tokens: list[int] = []
        for place, word in enumerate(words):
            tokens += self._of_word(word)
            for length in range(2, min(self.word_ngrams, len(words) - place) + 1):
                tokens.append(self._hash(" ".join(words[place : place + length])))
        return tokens

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        """The tokens of several texts."""
        return [self.encode(text) for text in texts]

    def _of_word(self, word: str) -> list[int]:
        found = self._known.get(word)
        if found is None:
            found = self._known[word] = [self._hash(word), *map(self._hash, self._char_ngrams(word))]
        return found

    def _char_ngrams(self, word: str) -> list[str]:
        if self.char_ngrams is None:
            return []
        marked = f"<{word}>"
        shortest, longest = self.char_ngrams
        return [
            marked[start : start + length]
            for length in range(shortest, min(longest, len(marked) - 1) + 1)
            for start in range(len(marked) - length + 1)
        ]

    def _hash(self, word: str) -> int:
        # Not hash(), which differs from process to process.
        given = word.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(given, digest_size=8, salt=self.seed.to_bytes(8, "little")).digest()
        return 1 + int.from_bytes(digest, "little") % self.n_buckets
