import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from trainerkit.adapters import read_adapter
from trainerkit.data import RuleAdapters, rule_library
from trainerkit.data.rules import UNSEEN, some_rules, split_rules
from trainerkit.testing import check_data

# Fewer rules and steps: two seconds, and yet adapters that have learnt their rules.
SMALL = {"rules": 60, "val_rules": 5, "test_rules": 10, "steps": 80, "objects": 32, "base_steps": 200, "examples": 16}
# Nothing is learnt.
TINY = {"rules": 28, "val_rules": 1, "test_rules": 1, "steps": 1, "objects": 2, "base_steps": 1, "examples": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("rules"))


@pytest.fixture(scope="module")
def data(cache):
    data = RuleAdapters(cache_dir=cache, examples_per_task=8, **SMALL)
    data.prepare_data()
    data.setup("fit")
    return data


def every_row(data):
    return torch.arange(data.library.rules)


def figures(data):
    """Mean balanced accuracy: of the bare base, with each rule's adapter, the mean adapter, and another rule's."""
    rows = every_row(data)
    factors = data.factors(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    given = {
        "base": None,
        "own": factors,
        "mean": {key: value.mean(0, keepdim=True).expand_as(value) for key, value in factors.items()},
        "other": {key: value[order] for key, value in factors.items()},
    }
    return {name: float(data.task_accuracy(adapters, rows).mean()) for name, adapters in given.items()}


def test_the_adapters_answer_their_rules_and_nothing_else_does(data):
    found = figures(data)
    assert found["own"] >= 0.95
    assert 0.42 <= found["base"] <= 0.58
    assert 0.42 <= found["other"] <= 0.58
    assert found["mean"] <= 0.6


@pytest.mark.slow
def test_the_whole_library_has_the_figures_that_its_page_says(tmp_path):
    data = RuleAdapters(cache_dir=str(tmp_path))
    found = figures(data)
    assert found["own"] >= 0.985
    assert found == pytest.approx({"base": 0.49, "own": 0.99, "mean": 0.49, "other": 0.50}, abs=0.04)
    rows = every_row(data)
    kinds = [rule.kind for rule in data.rules_of(rows)]
    right = data.task_accuracy(data.factors(rows), rows)
    for kind in ("is", "and", "or"):
        assert float(right[[one == kind for one in kinds]].mean()) >= 0.98
    start = time.perf_counter()
    again = RuleAdapters(cache_dir=str(tmp_path))
    again.setup("fit")
    print(f"read from the cache in {time.perf_counter() - start:.2f} s")
    assert torch.equal(again.factors(rows)["A/up"], data.factors(rows)["A/up"])


def test_held_out_are_compositions_alone_and_each_rule_has_ten_sentences_one_unseen(data):
    roles = dict(zip(data.folders.names, data.descriptions.roles, strict=True))
    rules = some_rules(60)
    expected = split_rules(rules, 5, 10)
    assert roles == {
        rule.name: ("train", "val", "test").index(role) for rule, role in zip(rules, expected, strict=True)
    }
    assert all(role == 0 for name, role in roles.items() if name.startswith("is_"))
    known, unseen = (data.described("test", wording) for wording in ("known", "unseen"))
    assert Counter(known["index"].tolist()) == dict.fromkeys(unseen["index"].tolist(), UNSEEN)
    assert len(unseen["index"]) == 10
    assert all(text.startswith("Please keep") for text in unseen["text"])
    assert data.evaluation_names == ["known", "unseen"]


def test_what_the_config_asks_for_is_known_before_anything_is_trained_and_as_the_folders_have_it(data, tmp_path):
    fresh = RuleAdapters(cache_dir=str(tmp_path), **SMALL)
    asked = (fresh.layers, fresh.rank, fresh.scaling, fresh.embedding_dim)
    assert not list(tmp_path.iterdir())
    layout = data.folders.layout
    assert asked == (layout.layers, layout.rank, layout.scaling, data.tasks.shape[1])


def test_a_rules_accuracy_does_not_depend_on_what_else_is_asked(data):
    rows = every_row(data)
    together = data.task_accuracy(data.factors(rows), rows)
    some = torch.tensor([17, 3])
    assert torch.equal(data.task_accuracy(data.factors(some), some), together[some])


def test_the_accuracy_is_that_of_the_base_network_with_the_folders_adapter(data):
    base = data.base_network()
    row = 40
    rule = data.rules_of(torch.tensor([row]))[0]
    folder = data.make_folder() / rule.name
    adapter = read_adapter(folder, "path")
    weights = {
        f"{name}.weight": base.get_parameter(f"{name}.weight") + adapter.scaling * b @ a
        for name, (a, b) in adapter.factors.items()
    }
    from trainerkit.data.lora_examples import ExampleFiles

    examples = ExampleFiles([folder], "path", 16).take(torch.zeros(1, dtype=torch.int64), torch.arange(16)[None])
    inputs, targets = examples["inputs"][0], examples["targets"][0]
    assert targets.tolist() == [0, 1] * 8
    said = functional_call(base, weights, (inputs,)).argmax(-1)
    assert float((said == targets).float().mean()) >= 0.8
    assert float(data.task_accuracy(data.factors(torch.tensor([row])), torch.tensor([row]))) >= 0.85


def test_the_base_network_is_frozen_and_making_it_moves_no_random_state(data):
    state = torch.get_rng_state()
    base = data.base_network()
    assert torch.equal(torch.get_rng_state(), state)
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_all_adapters_began_with_one_a(data):
    assert data.shares_initial_a() is True


def test_batches_have_a_description_the_adapter_and_balanced_examples(data):
    batch = next(iter(data.train_dataloader()))
    shapes = {name: tuple(value.shape[1:]) for name, value in batch.items()}
    assert shapes == {
        "index": (), "task": (data.embedding_dim,), "A/up": (3, 4, 48), "B/up": (3, 96, 4), "A/down": (3, 4, 96),
        "B/down": (3, 48, 4), "inputs": (8, 48), "targets": (8,),
    }  # fmt: skip
    (validation,) = data.val_dataloader()
    first = next(iter(validation))
    assert first["targets"].double().mean(1).tolist() == [0.5] * len(first["targets"])


def test_the_contract_is_kept(cache):
    check_data(lambda: RuleAdapters(cache_dir=cache, batch_size=8, **SMALL))
    check_data(lambda: RuleAdapters(cache_dir=cache, batch_size=8, examples_per_task=4, num_workers=1, **SMALL))


def test_making_the_library_moves_no_random_state(tmp_path):
    state = torch.get_rng_state()
    RuleAdapters(cache_dir=str(tmp_path), **TINY).prepare_data()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_library_depends_on_names_its_folder(cache):
    folders = {RuleAdapters(cache_dir=cache, **TINY).library.key}
    for name, value in {**{key: TINY[key] + 2 for key in TINY}, "rank": 3, "noise": 0.1, "library_seed": 1}.items():
        folders.add(RuleAdapters(cache_dir=cache, **(TINY | {name: value})).library.key)
    assert len(folders) == 11
    same = RuleAdapters(cache_dir=cache, batch_size=2, seed=3, num_workers=1, **TINY)
    assert same.library.key in folders


def test_it_is_made_once_and_told(tmp_path, capsys):
    for _ in range(2):
        RuleAdapters(cache_dir=str(tmp_path), **TINY).prepare_data()
    told = capsys.readouterr().err
    assert told.count("training 28 adapters, an example library, into ") == 1


def test_a_run_that_was_stopped_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    data = RuleAdapters(cache_dir=str(tmp_path), **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(rule_library, "write_adapter", stop)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    left = [path for path in (tmp_path / "rule_adapters").iterdir() if not path.name.endswith(".lock")]
    assert left == []
    data.prepare_data()
    assert len(data.folders) == 28


def test_what_a_killed_run_leaves_is_taken_away_by_the_next(tmp_path):
    code = f"""
import os
from trainerkit.data import RuleAdapters, rule_library
def kill(*_, **__): os._exit(9)
rule_library.write_adapter = kill
RuleAdapters(cache_dir={str(tmp_path)!r}, **{TINY}).prepare_data()
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    torn = list((tmp_path / "rule_adapters").glob(".*.tmp"))
    assert len(torn) == 1
    data = RuleAdapters(cache_dir=str(tmp_path), **TINY)
    data.setup("fit")
    assert not torn[0].exists()
    assert len(data.folders) == 28


def test_of_two_at_a_time_one_makes_it_and_the_other_waits(tmp_path, capsys, monkeypatch):
    made = []
    write = rule_library._write

    def counted(*args):
        made.append(Path(args[2]))
        time.sleep(0.2)
        write(*args)

    monkeypatch.setattr(rule_library, "_write", counted)
    both = [RuleAdapters(cache_dir=str(tmp_path), **TINY) for _ in range(2)]
    threads = [threading.Thread(target=data.prepare_data) for data in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert "another process is making" in capsys.readouterr().err
    assert [len(data.folders) for data in both] == [28, 28]


def test_a_cache_that_cannot_be_written_is_an_error_that_says_so(tmp_path):
    from trainerkit.errors import UserError

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file.*choose where by cache_dir"):
        RuleAdapters(cache_dir=str(tmp_path / "file"), **TINY).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: must be 1 or more"),
        ({"rules": 20}, "rules=20: must be from 21 to 340"),
        ({"rules": 40, "val_rules": 10, "test_rules": 10}, "val_rules=10, test_rules=10: must be 0 or more"),
        ({"steps": 0}, "steps=0: must be 1 or more"),
        ({"objects": 3}, "objects=3: must be even"),
        ({"noise": -1.0}, "noise=-1.0: must be 0 or more"),
        ({"examples": 5}, "examples=5: must be even, 2 or more"),
        ({"examples_per_task": 129}, "examples_per_task=129: there are examples=128 of each rule"),
        ({"library_seed": -1}, "library_seed=-1: must be 0 or more"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
        ({"description": " "}, "description=: must not be blank"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RuleAdapters(**options)
