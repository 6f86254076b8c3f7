from collections import Counter

import pytest
import torch

from trainerkit.data.rules import (
    ATTRIBUTES,
    TEMPLATES,
    UNSEEN,
    Rule,
    all_objects,
    all_rules,
    some_rules,
    split_rules,
    truth,
)


def test_there_are_340_rules_with_different_names():
    rules = all_rules()
    assert Counter(rule.kind for rule in rules) == {"is": 20, "and": 160, "or": 160}
    assert len({rule.name for rule in rules}) == len(set(rules)) == 340
    assert rules[0].name == "is_red"
    assert Rule("and", ((0, 0), (3, 1))).name == "and_red_glass"
    assert all(len({attribute for attribute, _ in rule.parts}) == len(rule.parts) for rule in rules)


def test_a_rule_says_yes_to_what_has_one_or_all_of_its_values():
    rules = some_rules(60)
    objects = all_objects().tolist()
    assert len({tuple(one) for one in objects}) == 1024
    expected = []
    for rule in rules:
        combine = any if rule.kind == "or" else all
        expected.append([combine(one[attribute] == value for attribute, value in rule.parts) for one in objects])
    assert truth(rules).tolist() == expected


def test_the_share_of_yes_depends_on_the_kind_alone():
    for rule, share in zip(all_rules(), truth(all_rules()).double().mean(1).tolist(), strict=True):
        assert share == {"is": 1 / 4, "and": 1 / 16, "or": 7 / 16}[rule.kind]


def test_no_two_sentences_are_the_same_and_each_names_the_parts_of_its_rule_alone():
    said = [(rule, template.say(rule)) for rule in all_rules() for template in TEMPLATES]
    assert len({sentence for _, sentence in said}) == 3400
    words = [word for values in ATTRIBUTES.values() for word in values]
    for rule, sentence in said:
        found = [word for word in words if f" {word}" in sentence]
        assert sorted(found) == sorted(rule.words), sentence


def test_templates_differ_in_words_and_in_the_order_of_the_parts():
    rule = Rule("or", ((0, 0), (1, 1)))  # red, square
    sentences = [template.say(rule) for template in TEMPLATES]
    first = [sentence.index("red") < sentence.index("square") for sentence in sentences]
    assert 4 <= sum(first) <= 6
    seen = {" ".join(sentence.split()[:2]) for number, sentence in enumerate(sentences) if number != UNSEEN}
    assert len(seen) == 9
    assert " ".join(sentences[UNSEEN].split()[:2]) not in seen


@pytest.mark.parametrize("kind", ["is", "and", "or"])
def test_what_the_unseen_template_says_of_a_kind_can_be_learnt_from_others(kind):
    """Of the words that tell its kinds apart some stand in a known template of the same kind."""

    def bare(number, kind):
        pattern = getattr(TEMPLATES[number], f"{kind}_")
        return set(pattern.lower().replace(",", " ").replace(".", " ").replace("?", " ").split()) - {"{a}", "{b}"}

    known = set().union(*(bare(number, kind) for number in range(UNSEEN)))
    own = bare(UNSEEN, kind) - set.intersection(*(bare(UNSEEN, other) for other in ("is", "and", "or")))
    assert bare(UNSEEN, kind) - known  # wording of its own
    assert kind == "is" or own & known


def test_fewer_rules_are_a_part_of_more():
    few, more = some_rules(50), some_rules(90)
    assert few == more[:50]
    assert [rule.kind for rule in few[:20]] == ["is"] * 20
    assert "is" not in {rule.kind for rule in few[20:]}
    assert set(some_rules(340)) == set(all_rules())


def test_held_out_are_compositions_of_both_kinds_and_a_rules_part_does_not_depend_on_their_order():
    rules = all_rules()
    roles = split_rules(rules, 25, 50)
    assert Counter(roles) == {"train": 265, "val": 25, "test": 50}
    kinds = Counter((rule.kind, role) for rule, role in zip(rules, roles, strict=True))
    assert kinds["is", "train"] == 20
    assert min(kinds["and", "test"], kinds["or", "test"]) >= 15
    assert min(kinds["and", "val"], kinds["or", "val"]) >= 7
    assert split_rules(rules[::-1], 25, 50) == roles[::-1]


@pytest.mark.parametrize("count", [20, 341])
def test_too_few_or_too_many_rules_are_refused(count):
    with pytest.raises(ValueError, match=f"rules={count}: must be from 21 to 340"):
        some_rules(count)


@pytest.mark.parametrize(("val", "test"), [(-1, 5), (5, -1), (10, 10)])
def test_impossible_splits_are_refused(val, test):
    with pytest.raises(
        ValueError, match=f"val_rules={val}, test_rules={test}: must be 0 or more, together below the 20"
    ):
        split_rules(some_rules(40), val, test)


def test_objects_are_all_there_are():
    objects = all_objects()
    assert objects.shape == (1024, 5)
    assert torch.equal(objects.unique(dim=0), objects)
    assert int(objects.max()) == 3
