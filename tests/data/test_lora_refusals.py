"""Libraries that cannot be used: what is wrong is said, and where."""

import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import descriptions_of, small_library, write_descriptions
from trainerkit.adapters import AdapterLayout, write_adapter
from trainerkit.data import LoraLibrary
from trainerkit.errors import UserError

ADAPTERS = 24


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    small_library(folder, ADAPTERS, examples=7)
    return folder


@pytest.fixture
def own(library, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(library, tmp_path / "own")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
        ({"num_workers": -1}, "num_workers=-1: must be 0 or more"),
        ({"examples_per_task": 0}, "examples_per_task=0: must be 1 or more"),
        ({"in_memory": "yes"}, "in_memory=yes: must be true, false or auto"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: must be from 0 to below 1"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "nothing is left to train on"),
        ({"description": " "}, "description=: must not be blank"),
        ({"description": "a", "description_file": "b"}, "description_file=b: give a description or a file of them, not both"),
        ({"embedding": "words"}, "embedding=str: must have fit; see TaskEmbedding"),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraLibrary("x", **options)


def refused(folder, **options):
    with pytest.raises(UserError) as caught:
        LoraLibrary(str(folder), **options).setup("fit")
    return str(caught.value)


def rewrite(folder, layers, rank=2):
    layout = AdapterLayout(layers, rank)
    write_adapter(folder, layout, {key: torch.zeros(shape) for key, shape in layout.shapes.items()})


def test_folders_without_adapters_are_refused(tmp_path, own):
    assert refused(tmp_path / "nowhere").endswith(
        "nowhere: is no folder; needed is one with a folder for each adapter."
    )
    (tmp_path / "empty").mkdir()
    assert "has no folder of an adapter" in refused(tmp_path / "empty")
    (own / "notes").mkdir()
    assert refused(own) == (
        f"path={own / 'notes'}: has no adapter_config.json; a folder of an adapter has it and adapter_model.safetensors."
    )
    (own / "notes").rename(own / ".notes")
    LoraLibrary(str(own)).setup("fit")


def test_adapters_that_differ_are_refused_with_both_files(own):
    layers = LoraLibrary(str(own)).layers
    here, there = (str(own / name / "adapter_model.safetensors") for name in ("rule7", "rule0"))
    rewrite(own / "rule7", layers, rank=3)
    assert refused(own).startswith(f"path={here}: has rank 3, and {there} has 2; all adapters of a library need")
    rewrite(own / "rule7", layers[1:])
    assert refused(own).startswith(f"path={here}: lacks the layers blocks.0.down, which {there} has;")
    rewrite(own / "rule7", [*layers, ["blocks.2.down", 6, 6]])
    assert refused(own).startswith(f"path={here}: has the layers blocks.2.down, which {there} has not;")
    rewrite(own / "rule7", [[name, 6, 5] for name, _, _ in layers])
    assert refused(own).startswith(f"path={here}: the layer blocks.0.down has in_features, out_features [6, 5], in")


def test_damaged_files_and_numbers_that_are_none_are_refused_whenever_they_are_read(own):
    file = own / "rule7" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert refused(own).startswith(f"path={file}: is not a whole safetensors file")
    file.write_bytes(whole)
    data = LoraLibrary(str(own), in_memory=False)
    data.setup("fit")
    tensors = load_file(file)
    tensors["base_model.model.blocks.1.up.lora_A.weight"] = torch.full((2, 6), math.nan)
    save_file(tensors, file)
    assert refused(own) == f"path={file}: the layer 'blocks.1.up' has numbers that are not finite (NaN or inf)."
    with pytest.raises(UserError, match=r"rule7.*the layer 'blocks.1.up' has numbers that are not finite"):
        data.factors(torch.tensor([7]))
    rewrite(own / "rule7", data.layers[1:])
    with pytest.raises(UserError, match=r"rule7.*was exchanged while it was in use"):
        data.factors(torch.tensor([7]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON (JSONDecodeError)."),
        ("[" * 100_000, "line 3 is not JSON (RecursionError)."),
        ("[1]", 'line 3 must be an object: {"adapter": "FOLDER", "description": "TEXT"}.'),
        ('{"adapter": "rule99", "description": "a"}', "line 3 names the adapter 'rule99', and there is no folder of this name. Did you mean"),
        ('{"adapter": "../rule1", "description": "a"}', "line 3 names the adapter '../rule1', and there is no folder"),
        ('{"adapter": "rule1"}', "line 3 has no description: must be a text that is not blank."),
        ('{"adapter": "rule1", "description": " "}', 'line 3 has " " as description: must be a text'),
        ('{"adapter": 1, "description": "a"}', "line 3 has 1 as adapter: must be a text"),
        ('{"adapter": "rule1", "description": "a", "wording": "new"}', 'line 3 has wording="new": must be one of known, unseen.'),
        ('{"adapter": "rule1", "description": "a", "split": "dev"}', 'line 3 has split="dev": must be one of train, val, test.'),
        ('{"adapter": "rule1", "description": "a", "wordings": "unseen"}', "line 3 has the key 'wordings'. Did you mean wording."),
        ('{"adapter": "rule1", "description": "a"}\n{"adapter": "rule2", "description": "a", "wording": "unseen"}', "line 4 and line 3 have one text, once as an unseen wording and once as a known one."),
        ('{"adapter": "rule1", "description": "a", "split": "val"}\n{"adapter": "rule1", "description": "b", "split": "test"}', "line 4 puts rule1 into test, and a line before it into val."),
    ],
)  # fmt: skip
def test_lines_that_are_no_descriptions_are_refused_with_their_number(own, line, message):
    file = own / "descriptions.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = ""  # is counted
    file.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    assert refused(own).startswith(f"path={file}: {message}")


def test_keys_of_the_users_own_and_a_mark_of_the_byte_order_do_no_harm(own):
    write_descriptions(own, [line | {"author": "me"} for line in descriptions_of(own)])
    file = own / "descriptions.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    LoraLibrary(str(own)).setup("fit")


def test_missing_descriptions_are_refused_and_a_file_elsewhere_is_read(own, tmp_path):
    lines = descriptions_of(own)
    write_descriptions(own, [line for line in lines if line["adapter"] not in ("rule3", "rule5")])
    assert "has no description of rule3, rule5; each adapter needs one, or leave its folder out." in refused(own)
    write_descriptions(own, [line for line in lines if line["adapter"] != "rule3" or "wording" in line])
    assert "has only unseen wordings of rule3, which would be trained on" in refused(own)
    os.rename(own / "descriptions.jsonl", tmp_path / "mine.jsonl")
    assert refused(own).startswith(f"path={own / 'descriptions.jsonl'}: is not there; needed is a line a description")
    assert refused(own, descriptions=str(tmp_path / "mine.jsonl")).startswith(
        f"descriptions={tmp_path / 'mine.jsonl'}: "
    )
    write_descriptions(tmp_path, lines)
    LoraLibrary(str(own), descriptions=str(tmp_path / "descriptions.jsonl")).setup("fit")


def test_a_split_that_is_asked_for_and_has_no_adapter_is_refused(own):
    lines = descriptions_of(own)
    write_descriptions(own, [line | {"split": "train"} for line in lines])
    assert refused(own) == (
        f"path={own}: of 24 adapters none is there for val (val_fraction=0.1, test_fraction=0.1); give more adapters, or "
        'say by "split" in descriptions.jsonl which are, or do without by val_fraction=0 and '
        "monitor=train/loss in callbacks.crash_safe_checkpoint, best_weights and early_stopping."
    )
    LoraLibrary(str(own), val_fraction=0.0, test_fraction=0.0).setup("fit")
    write_descriptions(own, [line | {"split": "val"} for line in lines])
    assert "of 24 adapters none is there for train" in refused(own)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"rule4: has no examples.safetensors, and examples_per_task=4 asks for them"),
        ({"inputs": torch.zeros(3, 3), "targets": torch.zeros(3).long()}, "has 3 examples, and examples_per_task=4 asks for more"),
        ({"inputs": torch.zeros(7, 3)}, r"has \{'inputs': \(7, 3\)\}: must be inputs \(M, …\) and targets"),
        ({"inputs": torch.zeros(7, 3), "targets": torch.zeros(6).long()}, "must be inputs"),
        ({"inputs": torch.zeros(7, 2), "targets": torch.zeros(7).long()}, r"has inputs of shape \(2,\) torch.float32 for each"),
        ({"inputs": torch.zeros(7, 3), "targets": torch.zeros(7)}, r"has targets of shape \(\) torch.float32 for each"),
        ({"inputs": torch.full((7, 3), math.inf), "targets": torch.zeros(7).long()}, "inputs has numbers that are not finite"),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_used_are_refused(own, content, message):
    file = own / "rule4" / "examples.safetensors"
    file.unlink()
    if content is not None:
        save_file(content, file)
    with pytest.raises(UserError, match=message) as caught:
        LoraLibrary(str(own), examples_per_task=4).setup("fit")
    assert str(own / "rule4") in str(caught.value)
