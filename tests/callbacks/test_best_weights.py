import importlib
import json
import math
import os
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from tests.support import ROOT, ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import EMA, BestWeights, CrashSafeCheckpoint, load_best_weights
from trainerkit.callbacks.best_weights import as_json, save_weights, size_in_bytes, split


class Scripted(ToyModule):
    """Validation losses by script; remembers the weights that were scored."""

    losses = (3.0, 1.0, 2.0, 0.5, 4.0)

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.layer.weight.detach().clone())
        self.log("val/loss", torch.tensor(self.losses[self.current_epoch]))


@pytest.mark.parametrize("swap", ["pointers", "copy"])
@pytest.mark.parametrize("order", ["before", "after", "without"])
def test_the_weights_that_were_scored_best_are_exported_in_any_order_with_ema(tmp_path, order, swap):
    callbacks: list[Callback] = [BestWeights()]
    if order != "without":
        callbacks.insert(0 if order == "before" else 1, EMA(decay=0.5, swap=swap))
    module = Scripted()
    toy_trainer(tmp_path, callbacks, max_epochs=5).fit(module, toy_loader(), toy_loader(rows=8))
    path = tmp_path / "best_model.safetensors"
    assert torch.equal(load_file(path)["layer.weight"], module.seen[3])
    with safe_open(path, "pt") as file:
        facts = {"monitor": "val/loss", "value": "0.5", "epoch": "4", "step": "16", "config": "{}", "format": "pt"}
        assert file.metadata() == facts


def resumed(tmp_path, folder, epochs):
    """A run of two epochs, whose best value is 1.0, resumed to `epochs`."""
    toy_trainer(tmp_path / "run", [BestWeights(), CrashSafeCheckpoint()], max_epochs=2).fit(
        Scripted(), toy_loader(), toy_loader()
    )
    best = BestWeights()
    trainer = toy_trainer(tmp_path / folder, [best, CrashSafeCheckpoint()], max_epochs=epochs)
    trainer.fit(Scripted(), toy_loader(), toy_loader(), ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt")
    with safe_open(tmp_path / folder / "best_model.safetensors", "pt") as file:
        return best, file.metadata()["epoch"]


@pytest.mark.parametrize(("epochs", "value", "of"), [(3, 1.0, "2"), (4, 0.5, "4")])
def test_the_best_value_goes_through_a_resume(tmp_path, epochs, value, of):
    best, epoch = resumed(tmp_path, "run", epochs)
    assert (best.state_dict(), epoch) == ({"best": value}, of)


def test_in_a_new_folder_an_old_best_value_does_not_count(tmp_path):
    best, epoch = resumed(tmp_path, "other", 3)
    assert (best.state_dict(), epoch) == ({"best": 2.0}, "3")


def test_a_second_run_with_the_same_callback_has_a_best_of_its_own(tmp_path):
    best = BestWeights()
    for epochs, value in ((5, 0.5), (1, 3.0)):
        toy_trainer(tmp_path, [best], max_epochs=epochs).fit(Scripted(), toy_loader(), toy_loader())
        assert best.state_dict() == {"best": value}


def test_without_validation_the_epochs_end_counts_and_nan_never_wins(tmp_path):
    class Trains(ToyModule):
        def training_step(self, batch, batch_idx):
            value = torch.tensor([2.0, 1.0, float("nan")][self.current_epoch])
            self.log("train/loss", value, on_epoch=True, on_step=False)
            return self.loss(batch)

    best = BestWeights("train/loss")
    trainer = toy_trainer(tmp_path, [best], max_epochs=3)
    trainer.fit(Trains(), toy_loader())
    with safe_open(tmp_path / "best_model.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "2"


class Tied(ToyModule):
    """One layer under two names, a parameter under two, and a buffer that is a part of another."""

    def __init__(self):
        super().__init__()
        self.again = self.layer
        self.head = nn.Linear(4, 1, bias=False)
        self.head.weight = self.layer.weight
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[:3])


def test_tied_weights_are_written_once_and_load_tied(tmp_path):
    module = Tied()
    toy_trainer(tmp_path, [BestWeights()], max_epochs=1).fit(module, toy_loader(), toy_loader())
    path = tmp_path / "best_model.safetensors"
    assert set(load_file(path)) == {"layer.weight", "layer.bias", "whole", "part"}
    state = load_best_weights(path)
    assert state.keys() == module.state_dict().keys()
    assert state["head.weight"] is state["again.weight"] is state["layer.weight"]
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in state.items())
    other = Tied()
    load_best_weights(path, other)
    assert torch.equal(other.head.weight, module.layer.weight)
    assert other.head.weight is other.layer.weight


def test_safetensors_own_way_loads_tied_weights_too(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    module, other = Twice(), Twice()
    save_weights(module.state_dict(), tmp_path / "w.safetensors", {}, 1000)
    assert load_model(other, tmp_path / "w.safetensors") == (set(), [])
    assert torch.equal(other.two.weight, module.one.weight)


class Sized(Scripted):
    """600 bytes in six tensors."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 4})
        self.more = nn.ParameterList([nn.Parameter(torch.full((25,), float(i))) for i in range(5)])
        self.more.append(nn.Parameter(torch.zeros(20)))  # 80 bytes, and 20 of the layer


def test_shards_have_hugging_faces_layout_and_no_file_of_before_stays(tmp_path):
    module = Sized()
    trainer = toy_trainer(tmp_path, [BestWeights(max_shard_size=250)], max_epochs=5)
    trainer.fit(module, toy_loader(), toy_loader(rows=8))
    index = json.loads((tmp_path / "best_model.safetensors.index.json").read_text())
    assert (
        index["metadata"].items() >= {"total_size": 600, "epoch": "4", "value": "0.5", "config": '{"width": 4}'}.items()
    )
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"best_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == files
    assert sum(os.path.getsize(tmp_path / file) for file in files) > 600
    for name, file in index["weight_map"].items():
        shard = load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 250
        expected = module.seen[3] if name == "layer.weight" else None
        assert expected is None or torch.equal(shard[name], expected)
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata()["epoch"] == "4"
    assert load_best_weights(tmp_path / "best_model.safetensors").keys() == module.state_dict().keys()


def test_one_file_and_shards_take_each_others_place(tmp_path):
    path = tmp_path / "w.safetensors"
    states = [{name: torch.full((10,), float(turn)) for name in "abc"} for turn in range(6)]
    for state, limit in zip(states, (1000, 50, 50, 1000, 50, 90), strict=True):
        save_weights(state, path, {}, limit)
        read = load_best_weights(path)
        assert all(torch.equal(read[name], state[name]) for name in state)
        assert path.exists() == (limit == 1000) != (tmp_path / "w.safetensors.index.json").exists()
        assert len(list(tmp_path.glob("*.safetensors"))) == {1000: 1, 50: 3, 90: 2}[limit]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("before", "after"), [(50, 50), (1000, 50), (50, 1000), (50, 90)])
def test_a_crash_at_any_moment_leaves_the_old_weights_or_the_new(tmp_path, monkeypatch, before, after):
    """Every call that changes a file fails in turn."""
    old, new = ({name: torch.full((10,), value) for name in "abc"} for value in (1.0, 2.0))
    real = {"replace": os.replace, "unlink": os.unlink}
    outcomes = set()
    for crash in range(1, 20):
        folder = tmp_path / str(crash)
        path = folder / "w.safetensors"
        save_weights({name: torch.zeros(10) for name in "abc"}, path, {}, 50)  # so that either set of names is in use
        save_weights(old, path, {}, before)
        calls = iter(range(1, 100))

        def failing(kind, calls=calls, crash=crash):
            def call(*arguments, **options):
                if next(calls) >= crash:
                    raise SystemExit("the power went off")
                return real[kind](*arguments, **options)

            return call

        with monkeypatch.context() as context:
            for kind in real:
                context.setattr(os, kind, failing(kind))
            try:
                save_weights(new, path, {}, after)
                finished = True
            except SystemExit:
                finished = False
        read = load_best_weights(path)
        values = {float(tensor[0]) for tensor in read.values()}
        assert read.keys() == old.keys()
        assert values in ({1.0}, {2.0})
        outcomes |= values
        save_weights(new, path, {}, after)  # what was left behind is no obstacle
        assert {float(tensor[0]) for tensor in load_best_weights(path).values()} == {2.0}
        if finished:
            assert values == {2.0}
            break
    assert finished
    assert outcomes == {1.0, 2.0}


def test_splitting_keeps_all_in_order_within_the_limit_and_in_as_few_parts():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (50,), generator=generator).tolist()
    state = {str(i): torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    for limit in (1, 20, 64, 10_000):
        parts = split(state, limit)
        assert [name for part in parts for name in part] == list(state)
        totals = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
        assert all(total <= limit or len(part) == 1 for total, part in zip(totals, parts, strict=True))
        # No part could have had the next one's first tensor as well.
        firsts = [next(iter(part.values())).nbytes for part in parts[1:]]
        assert all(total + first > limit for total, first in zip(totals, firsts, strict=False))
    assert split({}, 10) == [{}]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MiB", 500 * 2**20), ("1.5kb", 1500), (7, 7), ("2TB", 2 * 10**12)]
)
def test_sizes_are_read_as_hugging_face_does(text, size):
    assert size_in_bytes(text, "max_shard_size") == size


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "5 elephants", 1.5, "0GB"])
def test_a_wrong_size_is_refused(size):
    with pytest.raises(ValueError, match=f"max_shard_size={size}: must be a number of bytes above 0"):
        BestWeights(max_shard_size=size)


def test_hyperparameters_become_plain_json(tmp_path):
    config = as_json(
        {
            "lr": 0.1,
            "sizes": (1, 2),
            "nested": {3: None},
            "activation": nn.GELU(),
            "f": print,
            "bad": math.inf,
            "no": {1},
        }
    )
    assert config == {
        "lr": 0.1, "sizes": [1, 2], "nested": {"3": None}, "activation": "GELU(approximate='none')",
        "f": "<built-in function print>", "bad": "inf", "no": "{1}",
    }  # fmt: skip
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    assert as_json(object()) == "<object object>"


def test_names_are_those_without_compile_and_load_into_either(tmp_path):
    class Compiled(ToyModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.compile(self.layer, backend="eager")

    module = Compiled()
    with pytest.warns(UserWarning, match="monitor=val/loss was never logged, so there is no best_model.safetensors"):
        toy_trainer(tmp_path, [BestWeights()], max_epochs=1).fit(module, toy_loader())  # no validation, and no metric
    assert not list(tmp_path.iterdir())
    save = BestWeights("train/loss")
    toy_trainer(tmp_path, [save], max_epochs=1).fit(module, toy_loader())
    path = tmp_path / "best_model.safetensors"
    assert set(load_file(path)) == {"layer.weight", "layer.bias"}
    for other in (ToyModule(), Compiled()):
        load_best_weights(path, other)
        pairs = zip(other.parameters(), module.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_does_not_fit_or_is_not_there_is_said(tmp_path):
    save_weights({"layer.weight": torch.zeros(1, 4)}, tmp_path / "w.safetensors", {}, 1000)
    with pytest.raises(RuntimeError, match="layer.bias"):
        load_best_weights(tmp_path / "w.safetensors", ToyModule())
    with pytest.raises(FileNotFoundError, match="there is no such file, and no v.safetensors.index.json"):
        load_best_weights(tmp_path / "v.safetensors")


def test_extra_state_that_is_no_tensor_is_left_out(tmp_path):
    class Extra(ToyModule):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, state):
            assert state == {"anything": 1}

    module = Extra()
    toy_trainer(tmp_path, [BestWeights()], max_epochs=1).fit(module, toy_loader(), toy_loader())
    assert set(load_best_weights(tmp_path / "best_model.safetensors", Extra())) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_runs_in_both_namespaces_with_manual_optimization(tmp_path, name):
    lightning = importlib.import_module(name)

    class Manual(lightning.LightningModule):
        def __init__(self, width=4):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(width, 1)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(ToyModule.loss(self, batch))
                optimizer.step()

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)]

    module = Manual()
    lightning.Trainer(
        default_root_dir=tmp_path, callbacks=[BestWeights()], max_epochs=1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    ).fit(module, toy_loader(), toy_loader())  # fmt: skip
    path = tmp_path / "best_model.safetensors"
    assert torch.equal(load_file(path)["layer.weight"], module.layer.weight)
    with safe_open(path, "pt") as file:
        assert file.metadata()["config"] == '{"width": 4}'
        assert file.metadata()["step"] == "8"


def test_two_ranks_write_one_file_of_what_both_have(tmp_path):
    class Ranks(ToyModule):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.loss(batch), sync_dist=True)

    class Writes(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(pl_module.state_dict(), tmp_path / f"{trainer.global_rank}.pt")

    trainer = toy_trainer(tmp_path, [BestWeights(), Writes()], max_epochs=1, devices=2, strategy="ddp_fork")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*sync_dist")
        trainer.fit(Ranks(), toy_loader(), toy_loader())
    weights = load_file(tmp_path / "best_model.safetensors")
    for rank in range(2):
        other = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(weights[name], other[name]) for name in other)


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_sharded_parameters_other_than_fsdp2s_are_refused(strategy):
    trainer = SimpleNamespace(strategy=type(strategy, (), {})())
    with pytest.raises(ValueError, match=f"strategy={strategy}: BestWeights does not work on sharded parameters"):
        BestWeights().setup(trainer, ToyModule(), "fit")


def test_the_pages_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "callbacks" / "best_weights.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "best_weights.md", "exec"), {})


def test_a_wrong_mode_is_refused():
    with pytest.raises(ValueError, match="mode=low: must be min or max"):
        BestWeights(mode="low")


def test_a_metric_that_the_module_logs_at_its_own_epochs_end_belongs_to_that_epoch(tmp_path):
    """The module's hook runs after the callbacks': the weights wait for their metric."""

    class Late(ToyModule):
        def __init__(self):
            super().__init__()
            self.ends = []

        def on_train_epoch_end(self):
            self.ends.append(self.layer.weight.detach().clone())
            self.log("late", [10.0, 5.0, 1.0, 7.0][self.current_epoch])

    for epochs, best in ((4, 3), (3, 3), (2, 2)):
        module = Late()
        toy_trainer(tmp_path / str(epochs), [BestWeights("late")], max_epochs=epochs).fit(module, toy_loader())
        path = tmp_path / str(epochs) / "best_model.safetensors"
        assert torch.equal(load_file(path)["layer.weight"], module.ends[best - 1])
        with safe_open(path, "pt") as opened:
            assert opened.metadata()["epoch"] == str(best)
            assert opened.metadata()["value"] == str([10.0, 5.0, 1.0, 7.0][best - 1])
