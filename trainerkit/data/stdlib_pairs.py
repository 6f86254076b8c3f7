"""Docstrings of Python's standard library and the code they belong to: `data=stdlib_pairs`, nothing is fetched.

4,920 functions with a docstring of three words or more and code of three lines or more, in 3.11.7; the code has neither
its docstring nor its name. TF-IDF finds the right one of 1,000 with a mean reciprocal rank of 0.440 by counts of words,
0.525 by their logarithms; of all with 0.293 and 0.370 (`python -m tests.benchmarks.tfidf`). Licence: PSF.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from trainerkit.data.pair_dataset import PairDataset
from trainerkit.data.pair_module import PairSets
from trainerkit.data.pair_rows import PairRows, with_keys
from trainerkit.data.pairs import PairData
from trainerkit.data.text_files import draw_split

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_CANDIDATES = 1000


class StdlibPairs(PairData):
    """Docstring to code, whole files held out by a hash of their names.

    The evaluation sets are `among_1000`, a sample of the held-out pairs, or all if there are fewer, and `among_all`,
    where held-out docstrings are searched among the code of all pairs.

    Args:
        tokenizer: see `PairData`, as all that follow.
        n_buckets: of hashed words.
        word_ngrams: longest sequence of words that has a token.
        char_ngrams: shortest and longest sequence of letters that has a token, or None.
        max_length: tokens of a text at most.
        val_fraction: share of the files for validation.
        test_fraction: share of the files for the test.
        mined_negatives: how many mined negatives a row has room for.
        query: what prediction searches.
        batch_size: pairs a batch and process.
        num_workers: processes that read ahead.
        seed: of the order; not of the split or the sample.
    """

    def __init__(
        self,
        *,
        tokenizer: str = "words",
        n_buckets: int = 65536,
        word_ngrams: int = 1,
        char_ngrams: tuple[int, int] | None = None,
        max_length: int = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.25,
        mined_negatives: int = 0,
        query: str | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            sysconfig.get_path("stdlib"),
            mode="t2t",
            tokenizer=tokenizer,
            n_buckets=n_buckets,
            word_ngrams=word_ngrams,
            char_ngrams=char_ngrams,
            max_length=max_length,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            mined_negatives=mined_negatives,
            query=query,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.evaluation_names = ["among_1000", "among_all"]

    def load(self) -> tuple[PairRows, list[int]]:
        """Its functions, file by file in the order of their names."""
        root = Path(self.path)
        files = {
            path.relative_to(root).as_posix(): path
            for path in root.rglob("*.py")
            if not _LEFT_OUT & set(path.relative_to(root).parts[:-1])
        }
        rows, roles = PairRows(query=[], positive=[]), []
        assert rows.query is not None
        assert rows.positive is not None
        for name in sorted(files):
            for docstring, code, line in documented_functions(files[name].read_bytes()):
                rows.query.append(docstring)
                rows.positive.append(code)
                rows.places.append(f"{files[name]}: line {line}")
                roles.append(draw_split(name.encode(), self._fractions))
        self._n_own = len(rows)
        return with_keys(rows), roles

    def make_sets(self) -> PairSets:
        """Each split as a sample, and with the code of all other pairs as more candidates."""
        made = super().make_sets()
        return PairSets(
            made.train, made.mining, self._evaluation(made.val), self._evaluation(made.test), made.rows, made.query
        )

    def _evaluation(self, sets: list[PairDataset]) -> list[PairDataset]:
        return [each for whole in sets for each in (self._sample(whole), self._among_all(whole))]

    def _sample(self, whole: PairDataset) -> PairDataset:
        count = min(_CANDIDATES, len(whole))
        chosen = torch.tensor(sorted(random.Random(0).sample(whole.rows.tolist(), count)))
        return PairDataset(whole.query, whole.positive, chosen, labels=whole.labels)

    def _among_all(self, whole: PairDataset) -> PairDataset:
        rest = self.rows.without(dict.fromkeys(whole.rows.tolist(), ""), "")
        negatives = self._searched_too(self.rows, rest, whole.rows)
        return PairDataset(whole.query, whole.positive, whole.rows, labels=whole.labels, negatives=negatives)


def documented_functions(source: bytes) -> Iterator[tuple[str, str, int]]:
    """The functions of a Python file with a docstring of three words or more and code of three lines or more.

    Args:
        source: the file's content; one that is no Python of this version has none.

    Yields:
        The docstring; the code without it, comments and the function's name, as `ast.unparse` writes it; and its line.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or len(docstring.split()) < 3:
            continue
        node.body = node.body[1:] or [ast.Pass()]
        node.name = "_"
        code = ast.unparse(node)
        if len(code.splitlines()) >= 3:
            yield docstring, code, node.lineno
