"""What is the same among rows of pairs: which rows a split keeps together, and which candidates are no negatives.

Texts are the same if they are equal, pictures if their files are, byte by byte, whatever their paths.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from trainerkit.data.pair_rows import PairRows
from trainerkit.data.text_files import draw_split


def groups(rows: PairRows) -> list[str]:
    """A name for each row, the same for rows that must be on one side of a split.

    Rows that share a label, a query or a positive belong together, and what these share; so do rows of which one's
    query is another's positive.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    found = [_shared(rows, row) for row in range(len(rows))]
    for first, *others in found:
        for other in others:
            # The first of the alphabet leads; labels come before texts and pictures.
            one, two = sorted((find(first), find(other)))
            leader[two] = one
    return [find(first) for first, *_ in found]


def split_rows(rows: PairRows, fractions: tuple[float, float]) -> list[int]:
    """Each row's part by a hash of its group: 0 to train, 1 to validate, 2 to test."""
    return [draw_split(group.encode("utf-8", "surrogatepass"), fractions) for group in groups(rows)]


def row_labels(rows: PairRows) -> list[str | int] | None:
    """The rows' labels; where the data have none, a label for each different positive if some rows share one.

    Without it a row's positive would be a wrong answer to the query of another row with the same positive.
    """
    if rows.label is not None:
        return rows.label
    return list(rows.positive_key) if len(set(rows.positive_key)) < len(rows) else None


def own_negatives(rows: PairRows) -> list[list[int]]:
    """Which of each row's negatives are none of its query's positives: their places among the row's negatives.

    A query's positives are those of the rows with the same query, and of those with the same label.
    """
    labels = row_labels(rows) or range(len(rows))
    right: dict[tuple[str, str | int], set[str]] = defaultdict(set)
    for query, label, positive in zip(rows.query_key, labels, rows.positive_key, strict=True):
        right["query", query].add(positive)
        right["label", label].add(positive)
    return [
        [
            place
            for place, key in enumerate(keys)
            if key not in right["query", query] and key not in right["label", label]
        ]
        for keys, query, label in zip(rows.negatives_key, rows.query_key, labels, strict=True)
    ]


def distinct(keys: Sequence[str], known: Iterable[str]) -> list[int]:
    """The places of the keys that are not known, of equal ones the first."""
    seen = set(known)
    places = []
    for place, key in enumerate(keys):
        if key not in seen:
            seen.add(key)
            places.append(place)
    return places


def _shared(rows: PairRows, row: int) -> list[str]:
    names = [] if rows.label is None else [f"label {rows.label[row]}"]
    return [*names, rows.query_key[row], rows.positive_key[row]]
