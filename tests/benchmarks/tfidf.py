"""What TF-IDF finds of the standard library's code by its docstrings: `python -m tests.benchmarks.tfidf`.

Mean reciprocal rank (MRR): of all pairs, of a sample of 1,000 of them, and of the evaluation sets of `data=stdlib_pairs`,
the figures that `experiment=code_search` is held against. Words are taken apart as `HashedWords` does; the weights are
learnt from what is searched. Ties count against the right one.
"""

import random

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from trainerkit.data import HashedWords, StdlibPairs

_WAYS = {
    "log counts": {},
    "plain counts": {"sublinear_tf": False},
    "scikit-learn's words": {"analyzer": "word", "sublinear_tf": False},
    "with n-grams": {"analyzer": lambda text: words_and_ngrams(text)},
}


def mean_reciprocal_rank(queries: list[str], candidates: list[str], right: list[int], **options) -> float:
    """MRR of the cosine of TF-IDF vectors; `right` has each query's place among the candidates."""
    vectorizer = TfidfVectorizer(**({"analyzer": HashedWords().words, "sublinear_tf": True} | options))
    found = vectorizer.fit_transform(candidates)
    scores = np.asarray((vectorizer.transform(queries) @ found.T).todense())
    own = scores[np.arange(len(queries)), right][:, None]
    return float((1 / (scores >= own).sum(1)).mean())


def words_and_ngrams(text: str) -> list[str]:
    """Words, and their n-grams of four letters as `data.char_ngrams=[4,4]` gives them."""
    words = HashedWords(char_ngrams=(4, 4))
    return [part for word in words.words(text) for part in (word, *words._char_ngrams(word))]


def main() -> None:
    """Print the figures."""
    data = StdlibPairs()
    queries, codes = data.rows.query, data.rows.positive
    assert queries is not None
    assert codes is not None
    whole = list(range(len(codes)))
    sample = sorted(random.Random(0).sample(whole, min(1000, len(whole))))
    among_1000, among_all = (dataset.rows.tolist() for dataset in data.sets.test)
    print(f"{len(codes):,} pairs, {len(data.sets.train):,} of them train, {len(among_all):,} test")
    sets = {
        "1,000 of all": (sample, sample), "all": (whole, whole),
        "test, among_1000": (among_1000, among_1000), "test, among_all": (among_all, whole),
    }  # fmt: skip
    for name, (rows, candidates) in sets.items():
        place = {row: number for number, row in enumerate(candidates)}
        figures = [
            mean_reciprocal_rank(
                [queries[row] for row in rows], [codes[row] for row in candidates], [place[row] for row in rows], **how
            )
            for how in _WAYS.values()
        ]
        print(f"  {name:<20} MRR {', '.join(f'{how} {f:.3f}' for how, f in zip(_WAYS, figures, strict=True))}")


if __name__ == "__main__":
    main()
