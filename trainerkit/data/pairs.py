"""Pairs of texts and pictures of the user's: `data=pairs data.path=mine.jsonl`.

A row is a query and what answers it; columns say which texts and pictures. What is searched by what follows from the
columns: text by text, pictures by text, and so on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from trainerkit.data.pair_dataset import Negatives, PairDataset, Side
from trainerkit.data.pair_files import Columns, read_columns
from trainerkit.data.pair_groups import distinct, groups, own_negatives, row_labels, split_rows
from trainerkit.data.pair_module import PairModule, PairSets, check_fractions
from trainerkit.data.pair_pictures import FITS, Fit, PictureFiles, PictureSource, problems
from trainerkit.data.pair_rows import MODES, Mode, OnBad, PairRows, added, check_names, mode_of, pair_rows
from trainerkit.data.pair_texts import TokenRows, pair_tokenizer
from trainerkit.errors import UserError
from trainerkit.functional.picture_moves import Augmentation

_DEFAULT_NAMES = {
    name: [name]
    for name in ("query", "query_image", "positive", "positive_image", "negatives", "negatives_image", "label", "score")
}
SPLITS = ("train", "val", "test")


class PairData(PairModule):
    """Pairs from a file, in batches as `PairDataset` gives them; one evaluation set, `pairs`.

    Args:
        path: a .jsonl, .csv, .tsv or .parquet file, or a folder that `datasets.Dataset.save_to_disk` wrote.
        val_path: the same for validation; None takes a share of `path`.
        test_path: the same for the test.
        corpus_path: the same for more candidates, which every evaluation searches too; read are its positives.
        mode: 't2t', 't2i', 'i2i', 'i2t' (query to positive, t a text, i a picture), or 'composed' (text and picture to
            picture); None for what the columns say.
        query_column: texts; a column with one of the default names need not be there, None leaves it out if it is.
        query_image_column: paths of pictures, from the file's folder or `image_dir`; or pictures themselves (parquet).
        positive_column: texts.
        positive_image_column: pictures.
        negatives_column: texts, a list in each row; or several columns with one each.
        negatives_image_column: pictures, likewise.
        label_column: rows with the same label are positives of each other; without one, rows with the same positive.
        score_column: how well query and positive fit.
        image_dir: the folder of the pictures; None for the file's.
        image_size: side of a picture as the network sees it.
        channels: 1 (grey) or 3 (RGB).
        fit: of a picture that is no square: 'resize' stretches, 'crop' takes the middle, 'pad' adds black.
        mean: of each channel, subtracted; None for pictures in 0..1.
        std: of each channel, divided by.
        augment: shift, turn and scale pictures in training, see `Augmentation`.
        on_bad_image: for a picture that is missing or damaged, 'error', or 'skip', which leaves out and counts the row.
            Every picture is decoded once at setup to know.
        on_empty_text: the same for a blank text.
        tokenizer: see `pair_tokenizer`, as the next three.
        n_buckets: of hashed words.
        word_ngrams: longest sequence of words that has a token.
        char_ngrams: shortest and longest sequence of letters that has a token, or None.
        max_length: tokens of a text at most; the rest is cut.
        val_fraction: share for validation; rows that share a label, a query or a positive are on one side.
        test_fraction: share for the test.
        mined_negatives: how many mined negatives a row has room for.
        query: what prediction searches among the positives: a text, or a path where queries are pictures.
        query_image: the picture's path where queries are both.
        batch_size: pairs a batch and process.
        num_workers: processes that read ahead.
        seed: of order and augmentation; not of the split.

    Raises:
        ValueError: for an impossible argument.
        trainerkit.errors.UserError: for data that cannot be used; it names file and row.
    """

    def __init__(
        self,
        path: str,
        *,
        val_path: str | None = None,
        test_path: str | None = None,
        corpus_path: str | None = None,
        mode: Mode | None = None,
        query_column: str | None = "query",
        query_image_column: str | None = "query_image",
        positive_column: str | None = "positive",
        positive_image_column: str | None = "positive_image",
        negatives_column: str | Sequence[str] | None = "negatives",
        negatives_image_column: str | Sequence[str] | None = "negatives_image",
        label_column: str | None = "label",
        score_column: str | None = "score",
        image_dir: str | None = None,
        image_size: int = 64,
        channels: int = 3,
        fit: Fit = "resize",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: bool = False,
        on_bad_image: OnBad = "error",
        on_empty_text: OnBad = "error",
        tokenizer: str = "words",
        n_buckets: int = 65536,
        word_ngrams: int = 1,
        char_ngrams: tuple[int, int] | None = None,
        max_length: int = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        mined_negatives: int = 0,
        query: str | None = None,
        query_image: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            mined_negatives=mined_negatives,
            seed=seed,
            searches=query is not None or query_image is not None,
        )
        choices: dict[str, tuple[Any, Sequence[Any]]] = {"mode": (mode, [None, *MODES]), "fit": (fit, FITS)}
        choices |= {"channels": (channels, (1, 3))}
        choices |= {
            "on_bad_image": (on_bad_image, ("error", "skip")),
            "on_empty_text": (on_empty_text, ("error", "skip")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name}={value}: must be one of {', '.join(str(one or 'null') for one in allowed)}")
        for name, number in {"image_size": image_size, "max_length": max_length}.items():
            if number < 1:
                raise ValueError(f"{name}={number}: must be 1 or more")
        for name, numbers in {"mean": mean, "std": std}.items():
            if numbers is not None and len(numbers) != channels:
                raise ValueError(f"{name}={list(numbers)}: must have a number for each of channels={channels}")
        if std is not None and min(std) <= 0:
            raise ValueError(f"std={list(std)}: must be above 0")
        check_fractions({"val_fraction": val_fraction, "test_fraction": test_fraction})
        self.path = path
        self._other_paths = (val_path, test_path)
        self._corpus_path = corpus_path
        self._given_mode = mode
        self._names = {
            "query": _listed(query_column), "query_image": _listed(query_image_column),
            "positive": _listed(positive_column), "positive_image": _listed(positive_image_column),
            "negatives": _listed(negatives_column), "negatives_image": _listed(negatives_image_column),
            "label": _listed(label_column), "score": _listed(score_column),
        }  # fmt: skip
        self._image_dir = None if image_dir is None else Path(image_dir).expanduser()
        self._picture_options: dict[str, Any] = {"image_size": image_size, "channels": channels}
        self._picture_options |= {"fit": fit, "mean": mean, "std": std}
        self._augmentation = Augmentation() if augment else None
        self._on_bad: dict[str, OnBad] = {"on_bad_image": on_bad_image, "on_empty_text": on_empty_text}
        self._tokenizer = pair_tokenizer(
            tokenizer, max_length, n_buckets=n_buckets, word_ngrams=word_ngrams, char_ngrams=char_ngrams
        )
        self._max_length = max_length
        # A split that has a file of its own takes no share of `path`.
        self._fractions = (0.0 if val_path else val_fraction, 0.0 if test_path else test_fraction)
        self._query = (query, query_image)
        self.image_size = image_size
        self.evaluation_names = ["pairs"]
        self._columns_seen: Columns | None = None
        self._rows: PairRows | None = None
        self._roles: list[int] = []
        self._n_own = 0  # rows of `path` itself
        self._told = False  # how many rows were left out

    # What a subclass for other pairs writes anew.

    def load(self) -> tuple[PairRows, list[int]]:
        """The rows, those of `path` first, and the part of each: 0 to train, 1 to validate, 2 to test."""
        rows = self._read(self.path)
        self._n_own = len(rows)
        roles = split_rows(rows, self._fractions)
        for role, path in enumerate(self._other_paths, start=1):
            if path is not None:
                others = self._read(path)
                rows, roles = rows.joined(others), roles + [role] * len(others)
        return rows, roles

    # What tasks and callbacks read.

    @property
    def mode(self) -> Mode:
        """What is searched by what; reads the file if it was not given."""
        return self._given_mode or mode_of(self._columns, self._names, None)

    @property
    def modalities(self) -> list[str]:  # type: ignore[override]
        """'image' and 'text', what is there of them on either side."""
        parts = MODES[self.mode]
        return ["image"] * any(part.endswith("image") for part in parts) + ["text"] * bool(
            parts & {"query", "positive"}
        )

    @property
    def channels(self) -> int:  # type: ignore[override]
        """Of a picture; 1 where there is none."""
        return int(self._picture_options["channels"]) if "image" in self.modalities else 1

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Different tokens, padding counted; 1 where there is no text."""
        return self._tokenizer.vocab_size if "text" in self.modalities else 1

    @property
    def rows(self) -> PairRows:
        """What was read, with `skipped`, the number of rows left out by the reason; a row's number is `index`."""
        if self._rows is None:
            self._rows, self._roles = self.load()
        return self._rows

    def describe(self, index: int, side: Literal["query", "positive"]) -> str:
        """A row's text, the name of its picture's file, or both."""
        values = [getattr(self.rows, part) for part in (f"{side}_image", side)]
        return " ".join(_described(value[index]) for value in values if value is not None)

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Read and check what there is, and that the stage has rows."""
        super().setup(stage)
        sets = self.sets
        there = {"train": sets.train is not None, "val": bool(sets.val), "test": bool(sets.test)}
        shares = dict(zip(SPLITS, (1.0, *self._fractions), strict=True))
        # A run that trains ends with the test, and is to hear at its beginning that there is none.
        needed = {"fit": SPLITS, "validate": ("val",), "test": ("test",)}.get(stage, ())
        for name in needed:
            if shares[name] > 0 and not there[name]:
                raise UserError(self._none_for(name, shares[name]))
        if self.rows.skipped and not self._told:
            counts = ", ".join(f"{count} for {reason}" for reason, count in self.rows.skipped.items())
            rank_zero_warn(f"Rows of pairs left out: {counts}.")
            self._told = True

    def make_sets(self) -> PairSets:
        """Read, check, split, tokenise."""
        rows = self.rows
        roles = torch.tensor(self._roles)
        query = self._side(rows.query, rows.query_image, rows.places)
        positive = self._side(rows.positive, rows.positive_image, rows.places)
        named = row_labels(rows)
        labels = None if named is None else _class_numbers(named)
        scores = None if rows.score is None else torch.tensor(rows.score, dtype=torch.float32)
        corpus = self._read(self._corpus_path, positives=True) if self._corpus_path else None
        if corpus is not None:
            rows.skipped = added(rows.skipped, corpus.skipped)
        parts = [(roles == role).nonzero()[:, 0] for role in range(3)]

        def dataset(part: Tensor, **options: Any) -> PairDataset:
            return PairDataset(query, positive, part, labels=labels, scores=scores, seed=self.seed, **options)

        def evaluation(part: Tensor) -> list[PairDataset]:
            return [dataset(part, negatives=self._searched_too(rows, corpus, part))] if len(part) else []

        given = {"negatives": self._negatives(rows, parts[0]), "augmentation": self._augmentation}
        trains = len(parts[0]) > 0
        return PairSets(
            train=dataset(parts[0], mined=self.mined_negatives, **given) if trains else None,
            mining=dataset(parts[0], counted=True) if trains else None,
            val=evaluation(parts[1]),
            test=evaluation(parts[2]),
            rows=dataset(torch.arange(self._n_own)),
            query=self._searched(),
        )

    def _none_for(self, name: str, share: float) -> str:
        own = groups(self.rows)[: self._n_own]
        why = f"{self.path}: of {len(own)} rows in {len(set(own))} groups none is there for {name}; rows that share a "
        why += "label, a query or a positive are a group and stay together. "
        if name == "train":
            return f"{why}Give more rows, or files of their own for validation and test (val_path, test_path)."
        return (
            f"{why}Give more rows, a file of its own ({name}_path), or do without by {name}_fraction=0 (now {share})."
        )

    @property
    def _columns(self) -> Columns:
        if self._columns_seen is None:
            self._columns_seen = read_columns(self.path, {name for names in self._names.values() for name in names})
            check_names(self._columns_seen, self._names, _DEFAULT_NAMES)
        return self._columns_seen

    def _read(self, path: str, positives: bool = False) -> PairRows:
        own = path == self.path
        columns = self._columns if own else read_columns(path, {name for each in self._names.values() for name in each})
        parts = MODES[mode_of(self._columns, self._names, self._given_mode)]
        names = self._names
        if positives:
            parts = frozenset(part for part in parts if part.startswith("positive"))
            names = names | {"negatives": [], "negatives_image": [], "label": [], "score": []}
        else:
            self._check_negatives(columns, pictures="positive_image" in parts)
        for part in parts:
            if names[part][0] not in columns.values:
                raise UserError(f"{columns.path}: has no column {names[part][0]} ({part}_column).")
        return pair_rows(columns, names, parts, image_dir=self._image_dir, **self._on_bad)

    def _check_negatives(self, columns: Columns, pictures: bool) -> None:
        """Refuse negatives of the other modality alone, which nothing could be done with."""
        wanted, other = ("negatives_image", "negatives") if pictures else ("negatives", "negatives_image")
        there = {part: [name for name in self._names[part] if name in columns.values] for part in (wanted, other)}
        if there[other] and not there[wanted]:
            name, kind = there[other][0], "pictures" if pictures else "texts"
            raise UserError(
                f"{columns.path}: has negatives in {name} ({other}_column), but positives are {kind}; say "
                f"{wanted}_column={name} {other}_column=null, or leave them out by {other}_column=null."
            )

    def _side(self, texts: list[str] | None, pictures: list[PictureSource] | None, places: list[str]) -> Side:
        return Side(
            None if texts is None else TokenRows(self._tokenizer.encode_many(texts), self._max_length),
            None if pictures is None else PictureFiles(pictures, places.__getitem__, **self._picture_options),
        )

    def _negatives(self, rows: PairRows, part: Tensor) -> Negatives | None:
        """Those of each row of a part that are none of its query's positives."""
        lists: list[list[Any]] | None = rows.negatives_image if rows.positive_image is not None else rows.negatives
        if lists is None:
            return None
        kept = own_negatives(rows)
        dealt = [[(lists[row][place], rows.places[row]) for place in kept[row]] for row in part.tolist()]
        return self._dealt(dealt, rows.positive_image is not None)

    def _searched_too(self, rows: PairRows, corpus: PairRows | None, part: Tensor) -> Negatives | None:
        """What a part's queries are searched in besides its positives: its negatives and the corpus, each different one
        once, dealt out to the rows, since all rows search all of them.
        """
        pictures = rows.positive_image is not None
        lists: list[list[Any]] | None = rows.negatives_image if pictures else rows.negatives
        if lists is None and corpus is None:
            return None
        chosen = part.tolist()
        found: list[tuple[str, int, Any, str]] = []  # of each its key, who gets it, itself, and what it is called
        for number, row in enumerate(chosen if lists is not None else ()):
            for key, item in zip(rows.negatives_key[row], lists[row] if lists else [], strict=True):
                found.append((key, number, item, rows.places[row]))
        if corpus is not None:
            items: list[Any] = (corpus.positive_image if pictures else corpus.positive) or []
            for number, (key, item, place) in enumerate(zip(corpus.positive_key, items, corpus.places, strict=True)):
                found.append((key, number % len(chosen), item, place))
        # What equals a positive is there already, and would be a wrong answer to a query that it answers.
        kept = distinct([key for key, *_ in found], (rows.positive_key[row] for row in chosen))
        dealt: list[list[tuple[Any, str]]] = [[] for _ in chosen]
        for _, number, item, place in (found[one] for one in kept):
            dealt[number].append((item, place))
        return self._dealt(dealt, pictures)

    def _dealt(self, lists: list[list[tuple[Any, str]]], pictures: bool) -> Negatives:
        """Items with what a message calls them, by the row that they are given to."""
        items, places = [item for each in lists for item, _ in each], [place for each in lists for _, place in each]
        members = torch.full((len(lists), max([1, *map(len, lists)])), -1)
        first = 0
        for row, each in enumerate(lists):
            members[row, : len(each)] = torch.arange(first, first + len(each))
            first += len(each)
        return Negatives(self._side(None if pictures else items, items if pictures else None, places), members)

    def _searched(self) -> PairDataset | None:
        text, picture = self._query
        if text is None and picture is None:
            return None
        parts = MODES[self.mode] & {"query", "query_image"}
        if parts == {"query_image"} and picture is None:
            text, picture = None, text
        if {"query"} & parts != ({"query"} if text is not None else set()) or ("query_image" in parts) != (
            picture is not None
        ):
            raise UserError(f"query={text}: mode={self.mode} searches by {' and '.join(sorted(parts))}.")
        if text is not None and not text.strip():
            raise UserError("query: is a blank text; say what is searched.")
        if picture is not None and (found := problems([Path(picture)])):
            raise UserError(f"query: {found[0]}")
        side = self._side(None if text is None else [text], None if picture is None else [Path(picture)], ["query"])
        return PairDataset(side, Side(), torch.zeros(1, dtype=torch.int64))


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _class_numbers(labels: Sequence[str | int]) -> Tensor:
    whole = sorted({label for label in labels if isinstance(label, int)})
    names = sorted({label for label in labels if isinstance(label, str)})
    numbers: dict[str | int, int] = dict(zip([*whole, *names], range(len(whole) + len(names)), strict=True))
    return torch.tensor([numbers[label] for label in labels])


def _described(value: str | PictureSource) -> str:
    return value if isinstance(value, str) else value.name if isinstance(value, Path) else "(a picture)"
