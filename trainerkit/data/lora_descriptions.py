"""What is said about the adapters of a library: a file of descriptions, and which adapters train or are held out."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainerkit.data.text_files import SPLITS, draw_split
from trainerkit.errors import UserError, did_you_mean, nearest

_KEYS = ("adapter", "description", "wording", "split")
_WORDINGS = ("known", "unseen")


@dataclass(frozen=True)
class Descriptions:
    """Sentences about adapters, N of them about M adapters.

    Args:
        texts: the sentences, (N,).
        adapters: of each, its adapter's number, (N,).
        unseen: of each, whether it is kept from training, to ask for a known adapter in other words, (N,).
        roles: of each adapter, 0 to train, 1 to validate, 2 to test, (M,).
    """

    texts: list[str]
    adapters: list[int]
    unseen: list[bool]
    roles: list[int]

    def lines(self, split: str, wording: str) -> list[int]:
        """Which of the sentences are about adapters of a split ('train', 'val', 'test'), in known or unseen wordings.

        Raises:
            ValueError: for another split or wording.
        """
        for name, value, allowed in (("split", split, SPLITS), ("wording", wording, _WORDINGS)):
            if value not in allowed:
                raise ValueError(f"{name}={value}: must be one of {', '.join(allowed)}")
        wanted = (SPLITS.index(split), wording == "unseen")
        found = enumerate(zip(self.adapters, self.unseen, strict=True))
        return [line for line, (adapter, unseen) in found if (self.roles[adapter], unseen) == wanted]


def read_descriptions(path: Path, key: str, names: Sequence[str], fractions: tuple[float, float]) -> Descriptions:
    """Read a file with an object of JSON a line: `adapter`, `description`, and perhaps `wording` and `split`.

    Args:
        path: of the file.
        key: what named it, for messages.
        names: of the adapters, in the order of their numbers.
        fractions: shares of validation and test; an adapter whose lines name no split is drawn by a hash of its name,
            and a share that none of few adapters was drawn for gets one.

    Raises:
        UserError: for a file that cannot be read, and, with the line's number, for a line that is no such object, an
            adapter that is not there, a blank description, two splits of one adapter, or an unseen wording that is
            also a known one; for an adapter without description, or to train on without one in a known wording.
    """
    found = Descriptions([], [], [], [])
    numbers = {name: number for number, name in enumerate(names)}
    splits: dict[int, str] = {}
    places: dict[tuple[str, bool], int] = {}
    for place, line in enumerate(_lines(path, key), start=1):
        if not line.strip():
            continue

        def refuse(problem: str, place: int = place) -> UserError:
            return UserError(f"{key}={path}: line {place} {problem}.")

        try:
            row = _checked(line, numbers)
        except ValueError as error:
            raise refuse(str(error)) from error
        number, unseen = numbers[row["adapter"]], row.get("wording", "known") == "unseen"
        if row.get("split") is not None and splits.setdefault(number, row["split"]) != row["split"]:
            raise refuse(f"puts {row['adapter']} into {row['split']}, and a line before it into {splits[number]}")
        places.setdefault((row["description"], unseen), place)
        twin = places.get((row["description"], not unseen))
        if twin is not None:
            raise refuse(f"and line {twin} have one text, once as an unseen wording and once as a known one")
        found.texts.append(row["description"])
        found.adapters.append(number)
        found.unseen.append(unseen)
    found.roles.extend(_roles(names, splits, fractions))
    _check_all_described(found, f"{key}={path}", names)
    return found


def _lines(path: Path, key: str) -> list[str]:
    try:
        # Not splitlines(), which also cuts at characters that stand within a line of JSON.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        example = '{"adapter": "FOLDER", "description": "TEXT"}'
        raise UserError(f"{key}={path}: is not there; needed is a line a description: {example}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path}: cannot be read ({error}).") from error


def _checked(line: str, numbers: dict[str, int]) -> dict[str, Any]:
    """The object of a line, or a ValueError that says what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({type(error).__name__})") from error
    if not isinstance(row, dict):
        raise ValueError('must be an object: {"adapter": "FOLDER", "description": "TEXT"}')
    for key in row:
        if key not in _KEYS and nearest(key, _KEYS):  # other keys are the user's own
            raise ValueError(f"has the key {key!r}. {did_you_mean(key, _KEYS).removesuffix('?')}")
    for key in ("adapter", "description"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            given = "no" if key not in row else f"{json.dumps(row[key])[:60]} as"
            raise ValueError(f"has {given} {key}: must be a text that is not blank")
    for key, allowed in (("wording", _WORDINGS), ("split", SPLITS)):
        if row.get(key) is not None and row[key] not in allowed:
            raise ValueError(f"has {key}={json.dumps(row[key])[:60]}: must be one of {', '.join(allowed)}")
    if row["adapter"] not in numbers:
        hint = did_you_mean(row["adapter"], numbers)
        raise ValueError(
            f"names the adapter {row['adapter']!r}, and there is no folder of this name. {hint}".strip(" ?")
        )
    return row


def _roles(names: Sequence[str], splits: Mapping[int, str], fractions: tuple[float, float]) -> list[int]:
    """Of each adapter, given or drawn by its name; a share of few adapters that drew none gets one."""
    drawn = {number: name for number, name in enumerate(names) if number not in splits}
    roles = [
        draw_split(drawn[number].encode(), fractions) if number in drawn else SPLITS.index(splits[number])
        for number in range(len(names))
    ]
    for role, fraction in enumerate(fractions, start=1):
        free = [number for number in drawn if roles[number] == 0]
        if fraction > 0 and role not in roles and len(free) > 1:
            roles[min(free, key=lambda number: _digest(drawn[number]))] = role
    return roles


def _digest(name: str) -> str:
    return hashlib.md5(f"one at least {name}".encode(), usedforsecurity=False).hexdigest()


def _check_all_described(found: Descriptions, where: str, names: Sequence[str]) -> None:
    counts = Counter(zip(found.adapters, found.unseen, strict=True))
    known = [counts[number, False] for number in range(len(names))]
    none = [name for number, name in enumerate(names) if not known[number] + counts[number, True]]
    if none:
        raise UserError(
            f"{where}: has no description of {_some(none)}; each adapter needs one, or leave its folder out."
        )
    only_unseen = [name for number, name in enumerate(names) if found.roles[number] == 0 and not known[number]]
    if only_unseen:
        problem = f"has only unseen wordings of {_some(only_unseen)}, which would be trained on"
        raise UserError(f'{where}: {problem}; give a known one too, or put it into another split ("split": "test").')


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
