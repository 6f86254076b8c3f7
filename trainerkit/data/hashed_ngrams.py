"""Descriptions as hashed n-grams: an embedding that needs no model and no vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainerkit.data.hashed_words import HashedWords
from trainerkit.part import Part


class HashedNgrams(Part):
    """Words and sequences of words, each hashed to a place and a sign; the vector has length 1.

    A text that has nothing of the training descriptions is all zeros. Also: an n-gram that came in no training
    description is left out, as nothing was learnt about it, and it would only take length away from the rest.

    Args:
        dim: places, E; n-grams that fall on one place add up there, by their signs.
        word_ngrams: longest sequence of words.
        char_ngrams: shortest and longest sequence of letters of a word, or None for none.
        sublinear: count an n-gram that comes n times as 1 + ln n.
        idf: weight an n-gram by ln((1 + N) / (1 + n)) + 1, n of N training descriptions having it.
        min_count: training descriptions that must have an n-gram, or it is left out; 0 keeps even the unseen.
        seed: of the hash.

    Raises:
        ValueError: for an impossible argument.

    Source: K. Weinberger et al., Feature hashing for large scale multitask learning, ICML 2009; of the weights,
    scikit-learn's TfidfVectorizer.
    """

    def __init__(
        self,
        dim: int = 1024,
        *,
        word_ngrams: int = 2,
        char_ngrams: tuple[int, int] | None = None,
        sublinear: bool = True,
        idf: bool = True,
        min_count: int = 1,
        seed: int = 0,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}: must be 1 or more")
        if min_count < 0:
            raise ValueError(f"min_count={min_count}: must be 0 or more")
        # A token is a place and a sign.
        self._words = HashedWords(2 * dim, word_ngrams=word_ngrams, char_ngrams=char_ngrams, seed=seed)
        self.dim = dim
        self.sublinear = sublinear
        self.idf = idf
        self.min_count = min_count
        self._weights = torch.ones(2 * dim)

    def fit(self, train_texts: Sequence[str]) -> None:
        """Count in how many descriptions each n-gram is."""
        counts = torch.zeros(2 * self.dim)
        for text in train_texts:
            counts[sorted({token - 1 for token in self._words.encode(text)})] += 1
        weights = torch.log((1 + len(train_texts)) / (1 + counts)) + 1 if self.idf else torch.ones(2 * self.dim)
        self._weights = weights * (counts >= self.min_count)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, E)."""
        return normalize(torch.stack([self._of(text) for text in texts]), dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """What `fit` learnt."""
        return {"weights": self._weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what was learnt before.

        Raises:
            ValueError: if it is of another `dim`.
        """
        if state["weights"].shape != self._weights.shape:
            raise ValueError(f"dim={self.dim}: must be what was trained with, {len(state['weights']) // 2}")
        self._weights = state["weights"].clone()

    def _of(self, text: str) -> Tensor:
        tokens, counts = torch.tensor(self._words.encode(text), dtype=torch.int64).unique(return_counts=True)
        often = 1 + counts.log() if self.sublinear else counts.float()
        places, signs = (tokens - 1) // 2, 1 - 2 * ((tokens - 1) % 2)
        return torch.zeros(self.dim).index_add_(0, places, often * self._weights[tokens - 1] * signs)
