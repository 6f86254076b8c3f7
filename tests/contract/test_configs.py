"""The same checks on every YAML there is; what the glob found is counted against the files."""

import json
import re
import shutil
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.support import ROOT, small_library, small_pictures, small_text, smooth_spectra
from trainerkit.build import build, check
from trainerkit.cli import GROUPS
from trainerkit.compose import choices, compose_config, config_loader
from trainerkit.data.text_stream import write_stream
from trainerkit.errors import UserError
from trainerkit.optim import make_optimizer, make_scheduler
from trainerkit.plugins import AllowList
from trainerkit.signatures import parameters
from trainerkit.testing import check_data, check_task
from trainerkit.testing._kill_runs import SMALL

CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.glob("*/*.yaml"))
ALLOW = AllowList()

# Choices that name no target of their own, or belong beside another choice.
COLLECTIONS = {"callbacks/default", "callbacks/none", "logger/none"}
# The task that an experiment is of, if it is not mae; and that of a whole group.
OF = dict.fromkeys(("tisslm_document", "gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl", "lm_gpu"), "lm")
OF["t2l_document"] = "t2l"
OF |= dict.fromkeys(("code_search", "hard_negatives", "retrieval_student", "vembed_document", "loss"), "retrieval")
OF |= dict.fromkeys(("fine_tune", "network"), "classification")
OF |= dict.fromkeys(("gan_hinge", "gan_wgan_gp"), "gan")
# What a choice needs before it can be composed or built.
NEEDS = {
    "experiment/retrieval_student": ["task.teacher.weights=teacher.safetensors"],
    "network/transformers": ["task.network.backbone.name_or_path=model"],
    "data/spectra": ["data.path=spectra.npy"],
    "data/text": ["data.path=text.txt", "data.context_length=32", "data.batch_size=8", "data.cache_dir=cache"],
    "data/text_stream": ["data.path=tokens", "data.context_length=32", "data.batch_size=8"],
    "data/pairs": ["data.path=pairs.jsonl", "data.batch_size=8"],
    "data/glyphs": ["data.cache_dir=cache"],
    "data/lora_library": ["data.path=adapters", "data.batch_size=8"],
    "data/rule_adapters": [
        "data.cache_dir=cache",
        "data.rules=60",
        "data.val_rules=5",
        "data.test_rules=5",
        "data.steps=2",
        "data.base_steps=2",
        "data.batch_size=8",
    ],
    "data/stdlib_pairs": ["data.batch_size=32"],
    "data/mnist_5k": ["data.cache_dir=cache"],
    "data/picture_folder": ["data.path=pictures", "data.batch_size=4"],
    "data/table": ["data.path=table.csv", "data.label=kind", "data.batch_size=4"],
    "data/stdlib_text": ["data.vocab_size=300", "data.cache_dir=cache"],
}


def name(path):
    return f"{path.parent.name}/{path.stem}"


def of(group):
    found = [path for path in FILES if path.parent.name == group and not path.stem.startswith("_")]
    assert found, group
    return [pytest.param(path, id=name(path)) for path in found]


def composed(path):
    group, choice = path.parent.name, path.stem
    chosen = f"{group}=[default,{choice}]" if group == "callbacks" and choice != "none" else f"{group}={choice}"
    if name(path) == "callbacks/default":
        chosen = "callbacks=[default]"
    task = [] if group == "task" else [f"task={OF.get(group) or OF.get(choice, 'mae')}"]
    return compose_config([*task, chosen, "out_dir=somewhere", *NEEDS.get(name(path), [])])


def test_the_glob_finds_every_file_and_hydra_every_choice():
    assert len(FILES) == sum(1 for _ in CONFIGS.rglob("*.yaml")) - 2  # all but train.yaml and Hydra's sweeper
    assert {path.parent.name for path in FILES} == set(GROUPS)
    with config_loader() as loader:
        listed = {f"{group}/{choice}" for group in GROUPS for choice in choices(loader, group)}
    assert listed == {name(path) for path in FILES if not path.stem.startswith("_")}
    assert len(listed) >= 50


@pytest.mark.parametrize("path", [pytest.param(path, id=name(path)) for path in FILES])
def test_the_first_comment_says_what_it_is(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert re.fullmatch(r"# [A-Z0-9a-z].{15,125}", lines[0]), lines[0]


# What a data module says of itself to the task's config.
SIZES = {
    "seq_len": 200, "vocab_size": 2048, "context_length": 256, "channels": 1, "image_size": 32,
    "modalities": ["image", "text"], "query_mode": "together", "eval_shift": 0,
    "layers": [["blocks.0.up", 48, 96]], "rank": 4, "scaling": 1.0, "embedding_dim": 64,
    "classes": ["0", "1"], "class_counts": [9, 9], "n_classes": 2, "features": 4,
}  # fmt: skip
COMPOSED = [path for path in FILES if not path.stem.startswith("_")]


@pytest.mark.parametrize("path", [pytest.param(path, id=name(path)) for path in COMPOSED])
def test_it_composes_and_every_key_binds_to_its_target(path):
    cfg = composed(path)
    sizes = SIZES | ({"seq_len": 256} if path.stem == "chemomae_document" else {})
    OmegaConf.register_new_resolver("data_module", sizes.__getitem__, replace=True)
    for part in ("task", "data", "optimizer", "scheduler", "trainer"):
        given = frozenset({"optimizer", "scheduler"}) if part == "task" else frozenset()
        check(cfg[part], part, ALLOW, given)
    for group in ("callbacks", "logger"):
        for key, node in cfg[group].items():
            check(node, f"{group}.{key}", ALLOW)


@pytest.mark.parametrize("path", of("callbacks"))
def test_callbacks_list_every_plain_parameter_with_the_signatures_default(path):
    if name(path) in COLLECTIONS:
        pytest.skip("a collection")
    ours = OmegaConf.load(path)
    assert list(ours) == [path.stem]
    node = OmegaConf.to_container(ours[path.stem])
    target = ALLOW.resolve(node.pop("_target_"), path.stem)
    known = parameters(target)
    if target.__module__.startswith("trainerkit"):
        assert set(node) == set(known)
        for key, value in node.items():
            assert value == known[key].default, key
    else:
        assert set(node) <= set(known)


@pytest.mark.parametrize("path", of("optimizer"))
def test_optimizers_list_every_parameter_and_take_a_step(path):
    factory = build(composed(path).optimizer, "optimizer", ALLOW)
    assert isinstance(factory, partial)
    assert set(factory.keywords) == set(parameters(factory.func)) - {"params"}
    layer = torch.nn.Linear(3, 3)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = make_optimizer(factory, layer)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize("path", of("scheduler"))
def test_schedulers_list_every_parameter_and_stay_between_nothing_and_the_rate(path):
    factory = build(composed(path).scheduler, "scheduler", ALLOW)
    assert set(factory.keywords) == set(parameters(factory.func)) - {"optimizer"}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = make_scheduler(factory, optimizer, total_steps=20, steps_per_epoch=5)
    for _ in range(20):
        assert 0 <= optimizer.param_groups[0]["lr"] <= 0.5
        optimizer.step()
        scheduler.step()


def test_the_trainers_list_every_parameter_that_is_not_given_by_the_run():
    from trainerkit.trainer import Trainer

    node = OmegaConf.load(CONFIGS / "trainer" / "_base.yaml")
    given = {"logger", "callbacks", "default_root_dir"}
    assert set(node) - {"_target_"} == set(parameters(Trainer)) - given


@pytest.mark.parametrize("path", of("trainer"))
def test_trainers_build_where_their_device_is(path):
    node = composed(path).trainer
    if path.stem in ("gpu", "fsdp", "fsdp_tp") and not torch.cuda.is_available():
        with pytest.raises(UserError, match="trainer: .*(No supported gpu backend found|cuda)"):
            build(node, "trainer", ALLOW, logger=False)
        return
    if path.stem == "ddp":
        node.accelerator, node.devices = "cpu", 2
    trainer = build(node, "trainer", ALLOW, logger=False)
    assert trainer.num_devices == (2 if path.stem == "ddp" else 1)


@pytest.mark.parametrize("path", of("data"))
def test_data_keep_the_contract(path, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    np.save("spectra.npy", smooth_spectra())
    small_text(tmp_path / "text.txt")
    pairs = [json.dumps({"query": f"question {i}", "positive": f"answer {i}"}) for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    small_pictures(tmp_path / "pictures")
    rows = [f"{i},{i % 7},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "table.csv").write_text("\n".join(["length,width,kind", *rows]))
    if path.stem == "lora_library":
        small_library(tmp_path / "adapters", 30)
    # Of the standard library a part: all of it takes seconds to tokenise.
    library = Path(sysconfig.get_path("stdlib"))
    for package in ("asyncio", "email", "json", "http"):
        shutil.copytree(library / package, tmp_path / "lib" / package)
    where = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "lib" if name == "stdlib" else where(name))
    if path.stem == "text_stream":
        pytest.importorskip("litdata")
        write_stream(
            build(compose_config(["task=mae", "data=text", *NEEDS["data/text"]]).data, "data", ALLOW), "tokens"
        )
    check_data(lambda: build(composed(path).data, "data", ALLOW))


@pytest.mark.parametrize("path", of("task"))
def test_tasks_keep_the_contract(path, tmp_path):
    cfg = compose_config([f"task={path.stem}", *SMALL[path.stem](tmp_path)])
    data = build(cfg.data, "data", ALLOW)
    OmegaConf.register_new_resolver("data_module", lambda key: getattr(data, key), replace=True)

    def make_task():
        parts = {name: build(cfg[name], name, ALLOW) for name in ("optimizer", "scheduler")}
        return build(cfg.task, "task", ALLOW, **parts)

    check_task(make_task, lambda: build(cfg.data, "data", ALLOW), tmp_path)


@pytest.mark.parametrize("group", ["task", "callbacks"])
def test_every_task_and_callback_of_ours_has_its_page_and_its_test(group):
    folder = "tasks" if group == "task" else "callbacks"
    checked = 0
    for parameter in of(group):
        path = parameter.values[0]
        if name(path) in COLLECTIONS or "_target_: trainerkit" not in path.read_text():
            continue  # collections, and Lightning's own
        assert (ROOT / "docs" / folder / f"{path.stem}.md").is_file(), path
        found = [test.stem for test in (ROOT / "tests").rglob(f"test_{path.stem}.py")]
        assert len(found) == 1, path
        checked += 1
    assert checked == {"task": 6, "callbacks": 20}[group]
