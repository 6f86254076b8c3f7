"""340 yes/no rules about objects with five attributes, and what people say for them in ten ways.

An object has a colour, a shape, a size, a material and a place, four values each. A rule is 'is' (20, one for each
value), 'and' or 'or' (160 each, one for each two values of different attributes).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import torch
from torch import Tensor

# As they stand in a sentence, after 'is'.
ATTRIBUTES = {
    "colour": ("red", "green", "blue", "yellow"),
    "shape": ("round", "square", "oval", "flat"),
    "size": ("tiny", "small", "large", "huge"),
    "material": ("made of wood", "made of glass", "made of metal", "made of paper"),
    "place": ("in the kitchen", "in the garden", "in the cellar", "in the attic"),
}
N_ATTRIBUTES, N_VALUES = len(ATTRIBUTES), 4

Kind = Literal["is", "and", "or"]


@dataclass(frozen=True)
class Template:
    """One way to say a rule of each kind; a and b are its parts, whose order differs from template to template."""

    is_: str
    and_: str
    or_: str

    def say(self, rule: "Rule") -> str:
        """The sentence for a rule."""
        words = rule.words
        pattern = {"is": self.is_, "and": self.and_, "or": self.or_}[rule.kind]
        return pattern.format(a=words[0], b=words[-1])


TEMPLATES = (
    Template(
        "Answer yes if the object is {a}.",
        "Answer yes if the object is {a} and {b}.",
        "Answer yes if the object is {a} or {b}.",
    ),
    Template(
        "Pick every item that is {a}.",
        "Pick every item that is both {b} and {a}.",
        "Pick every item that is either {b} or {a}.",
    ),
    Template(
        "A match must be {a}, nothing else matters.",
        "A match must be {a}, and it must also be {b}.",
        "A match may be {a}, or it may be {b}.",
    ),
    Template(
        "Say no unless this thing is {a}.",
        "Say no unless this thing is {b} as well as {a}.",
        "Say no unless this thing is {b} or else {a}.",
    ),
    Template(
        "I am looking for something {a}.",
        "I am looking for something {a} that is also {b}.",
        "I am looking for something {a} or alternatively {b}.",
    ),
    Template(
        "It counts when one condition holds: it is {a}.",
        "It counts when both conditions hold: it is {b}, it is {a}.",
        "It counts when at least one of two conditions holds: it is {b}, it is {a}.",
    ),
    Template(
        "Whatever is {a} passes the test.",
        "Whatever is {a} and at the same time {b} passes the test.",
        "Whatever is {a} or {b}, or even both, passes the test.",
    ),
    Template(
        "Reject what is not {a}.",
        "Reject what is not {b} and {a} together.",
        "Reject what is neither {b} nor {a}.",
    ),
    Template(
        "Is that one {a}?",
        "Is that one {a}, and is it {b} too?",
        "Is that one {a}, or is it {b} perhaps?",
    ),
    # Unseen in training.
    Template(
        "Please keep anything {a} for me.",
        "Please keep anything {b} for me, as long as it is {a} too, that is both.",
        "Please keep anything {b} for me, or anything {a}, that is either.",
    ),
)
UNSEEN = len(TEMPLATES) - 1


@dataclass(frozen=True)
class Rule:
    """A question about objects.

    Args:
        kind: 'is', 'and' or 'or'.
        parts: (attribute, value) numbers, one for 'is', else two of different attributes.
    """

    kind: Kind
    parts: tuple[tuple[int, int], ...]

    @property
    def words(self) -> list[str]:
        """What its parts are called."""
        values = list(ATTRIBUTES.values())
        return [values[attribute][value] for attribute, value in self.parts]

    @property
    def name(self) -> str:
        """Such as `is_red` or `and_red_wood`."""
        return "_".join([self.kind, *(words.split()[-1] for words in self.words)])


def all_rules() -> list[Rule]:
    """The 340 rules: 'is', then 'and', then 'or'."""
    single = list(product(range(N_ATTRIBUTES), range(N_VALUES)))
    pairs = [(a, b) for a, b in combinations(single, 2) if a[0] != b[0]]
    return [Rule("is", (part,)) for part in single] + [Rule(kind, pair) for kind in ("and", "or") for pair in pairs]


def some_rules(count: int) -> list[Rule]:
    """The 20 'is' rules and compositions up to `count` rules, in an order by hash, so that fewer are a part of more.

    Raises:
        ValueError: for fewer than 21 or more than 340.
    """
    rules = all_rules()
    if not 20 < count <= len(rules):
        raise ValueError(f"rules={count}: must be from 21 to {len(rules)}")
    return rules[:20] + sorted(rules[20:], key=_digest)[: count - 20]


def split_rules(rules: Sequence[Rule], val: int, test: int) -> list[str]:
    """'train', 'val' or 'test' for each rule, by a hash of its name; held out are compositions only.

    Raises:
        ValueError: if fewer than one composition is left for training.
    """
    compositions = sorted((rule for rule in rules if rule.kind != "is"), key=lambda rule: _digest(rule)[::-1])
    if min(val, test) < 0 or val + test >= len(compositions):
        raise ValueError(
            f"val_rules={val}, test_rules={test}: must be 0 or more, together below the {len(compositions)} 'and' and "
            "'or' rules"
        )
    roles = dict.fromkeys(compositions[:test], "test") | dict.fromkeys(compositions[test : test + val], "val")
    return [roles.get(rule, "train") for rule in rules]


def _digest(rule: Rule) -> str:
    return hashlib.md5(rule.name.encode(), usedforsecurity=False).hexdigest()


def all_objects() -> Tensor:
    """The values of all 1,024 different objects, (1024, 5) int64."""
    return torch.cartesian_prod(*[torch.arange(N_VALUES)] * N_ATTRIBUTES)


def truth(rules: Sequence[Rule]) -> Tensor:
    """Whether each rule says yes to each object of `all_objects`, (R, 1024) bool."""
    objects = all_objects()
    held = []
    for rule in rules:
        parts = torch.stack([objects[:, attribute] == value for attribute, value in rule.parts])
        held.append(parts.any(0) if rule.kind == "or" else parts.all(0))
    return torch.stack(held)
