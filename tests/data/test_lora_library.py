import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file

from tests.support import descriptions_of, small_library, write_descriptions
from trainerkit.adapters import AdapterLayout, read_adapter, write_adapter
from trainerkit.data import HashedNgrams, LoraLibrary, OneHot, PrecomputedEmbeddings
from trainerkit.data.lora_examples import draw_examples
from trainerkit.data.lora_folders import AdapterFolders
from trainerkit.errors import UserError
from trainerkit.testing import check_data

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


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def epochs(data, count=3):
    data.setup("fit")
    loader, found = data.train_dataloader(), []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        found.append(list(loader))
    return found


def test_a_batch_has_the_factors_of_its_adapters_as_their_folders_have_them(library):
    data = LoraLibrary(str(library), batch_size=5)
    for batch in epochs(data, 1)[0]:
        for place, row in enumerate(batch["index"].tolist()):
            adapter = read_adapter(library / f"rule{row}", "path")
            for key, packed in data.layout.pack(adapter.factors).items():
                assert torch.equal(batch[key][place], packed)
    assert data.folders.names == [f"rule{row}" for row in range(ADAPTERS)]  # 9 before 10
    assert (data.rank, data.scaling) == (2, 0.5)
    assert AdapterLayout(data.layers, data.rank).names == data.layout.names


def test_each_description_is_of_the_batchs_adapter_known_and_drawn_anew_in_each_epoch(library):
    data = LoraLibrary(str(library), batch_size=5)
    by_text = {line["description"]: line for line in descriptions_of(library)}
    embedding, texts = data.tasks, data.descriptions.texts
    seen = {}
    for epoch in epochs(data, 30):
        for batch in epoch:
            for row, task in zip(batch["index"].tolist(), batch["task"], strict=True):
                found = [texts[i] for i in (embedding == task).all(1).nonzero()[:, 0].tolist()]
                assert len(found) == 1
                line = by_text[found[0]]
                assert line["adapter"] == f"rule{row}"
                assert line.get("wording") is None
                seen.setdefault(row, []).append(found[0])
    assert all(len(set(drawn)) == 2 for drawn in seen.values())
    first = sum(drawn.count(drawn[0]) for drawn in seen.values()) / sum(map(len, seen.values()))
    assert 0.4 < first < 0.65


def test_what_is_drawn_does_not_depend_on_workers_or_on_where_the_adapters_are(library):
    options = {"batch_size": 5, "examples_per_task": 3}
    here = epochs(LoraLibrary(str(library), **options))
    there = epochs(LoraLibrary(str(library), in_memory=False, num_workers=2, **options))
    assert all(equal(a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("options", [{}, {"in_memory": False}, {"examples_per_task": 4}, {"num_workers": 1}])
def test_the_contract_of_data_holds(library, options):
    check_data(lambda: LoraLibrary(str(library), batch_size=5, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_in_mid_epoch_with_the_batches_that_were_left(library, workers):
    def data():
        data = LoraLibrary(str(library), batch_size=4, examples_per_task=2, num_workers=workers)
        data.setup("fit")
        return data.train_dataloader()

    whole = data()
    whole.sampler.set_epoch(3)
    expected = list(whole)
    before = data()
    before.sampler.set_epoch(3)
    batches = iter(before)
    for _ in range(2):
        next(batches)
    state = before.state_dict()
    after = data()
    after.load_state_dict(state)
    after.sampler.set_epoch(3)
    left = list(after)
    assert len(left) == len(expected) - 2 > 0
    assert all(equal(a, b) for a, b in zip(left, expected[2:], strict=True))


def test_no_adapter_is_in_two_splits_and_evaluation_has_every_wording_once(library):
    data = LoraLibrary(str(library), batch_size=4, val_fraction=0.2, test_fraction=0.2)
    train = {row for batch in epochs(data, 1)[0] for row in batch["index"].tolist()}
    (val,) = data.val_dataloader()
    known, unseen = data.test_dataloader()
    rows = {name: [row for batch in loader for row in batch["index"].tolist()]
            for name, loader in (("val", val), ("known", known), ("unseen", unseen))}  # fmt: skip
    assert train | set(rows["val"]) | set(rows["known"]) == set(range(ADAPTERS))
    assert len(train) + len(set(rows["val"])) + len(set(rows["known"])) == ADAPTERS
    assert sorted(rows["known"]) == sorted(2 * rows["unseen"])
    assert data.evaluation_names == ["known", "unseen"]
    described = data.described("test", "unseen")
    assert described["index"].tolist() == rows["unseen"]
    assert torch.equal(described["task"], torch.cat([batch["task"] for batch in unseen]))
    unseen_lines = {line["description"]: line["adapter"] for line in descriptions_of(library) if "wording" in line}
    assert [unseen_lines[text] for text in described["text"]] == [f"rule{row}" for row in rows["unseen"]]


def test_the_split_depends_on_names_alone(library, own):
    whole = LoraLibrary(str(library)).descriptions.roles
    shutil.rmtree(own / "rule0")
    write_descriptions(own, [line for line in descriptions_of(own) if line["adapter"] != "rule0"][::-1])
    assert LoraLibrary(str(own), seed=7).descriptions.roles == whole[1:]


@pytest.mark.parametrize("adapters", [1, 2, 3, 8])
def test_few_adapters_train_and_each_share_gets_one_if_there_are_enough(tmp_path, adapters):
    small_library(tmp_path, adapters)
    roles = LoraLibrary(str(tmp_path), val_fraction=1e-4, test_fraction=1e-4).descriptions.roles
    assert [roles.count(role) for role in (1, 2)] == [int(adapters > 1), int(adapters > 2)]
    assert LoraLibrary(str(tmp_path), val_fraction=0.0, test_fraction=0.0).descriptions.roles == [0] * adapters


def test_splits_that_are_given_are_kept_and_a_test_without_unseen_wordings_has_one_loader(own):
    lines = [
        line | {"split": "test" if line["adapter"] in ("rule3", "rule5") else "train"} for line in descriptions_of(own)
    ]
    write_descriptions(own, [line for line in lines if line["split"] == "train" or "wording" not in line])
    data = LoraLibrary(str(own), val_fraction=0.0)
    assert len(epochs(data, 1)[0][0]["index"]) == ADAPTERS - 2
    assert data.val_dataloader() == []
    assert data.evaluation_names == ["known"]
    (known,) = data.test_dataloader()
    assert next(iter(known))["index"].tolist() == [3, 3, 5, 5]


def test_statistics_are_those_of_all_training_adapters_at_once_whatever_is_in_memory(library, monkeypatch):
    data = LoraLibrary(str(library))
    rows = (torch.tensor(data.descriptions.roles) == 0).nonzero()[:, 0]
    factors = {key: factor.double() for key, factor in data.factors(rows).items()}
    whole = data.factor_statistics()
    monkeypatch.setattr("trainerkit.data.lora_folders._CHUNK", 3 * 4 * data.layout.numel)  # three at a time
    streamed = LoraLibrary(str(library), in_memory=False).factor_statistics()
    for key, factor in factors.items():
        for mean, std in (whole[key], streamed[key]):
            torch.testing.assert_close(mean.double(), factor.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(std.double(), factor.std(0, unbiased=False), rtol=1e-5, atol=1e-6)


def test_statistics_move_and_stretch_with_the_adapters(tmp_path):
    layout = AdapterLayout([["a", 3, 4], ["b.0", 2, 2]], rank=1)
    for name, scale, shift in (("one", 1, 0), ("two", 3, 5)):
        for number in range(5):
            generator = torch.Generator().manual_seed(number)
            drawn = {key: torch.randn(shape, generator=generator) for key, shape in layout.shapes.items()}
            moved = {key: scale * each + shift for key, each in drawn.items()}
            write_adapter(tmp_path / name / str(number), layout, moved)
    one, two = (AdapterFolders(tmp_path / name, "path").statistics(torch.arange(5)) for name in ("one", "two"))
    for key in layout.keys:
        torch.testing.assert_close(two[key][0], 3 * one[key][0] + 5)
        torch.testing.assert_close(two[key][1], 3 * one[key][1])


@pytest.mark.parametrize("in_memory", [False, True])
def test_factors_come_in_any_order_and_twice(library, in_memory):
    data = LoraLibrary(str(library), in_memory=in_memory)
    rows = torch.tensor([5, 2, 5])
    factors = data.factors(rows)
    assert equal({key: each[0] for key, each in factors.items()}, {key: each[2] for key, each in factors.items()})
    assert equal({key: each[1] for key, each in factors.items()}, {k: v[0] for k, v in data.factors(rows[1:2]).items()})


def test_in_memory_is_chosen_by_size(library, monkeypatch):
    assert AdapterFolders(library, "path").in_memory is True
    monkeypatch.setattr("trainerkit.data.lora_folders._SMALL", 100)
    assert AdapterFolders(library, "path").in_memory is False
    assert AdapterFolders(library, "path", True).in_memory is True


@pytest.mark.parametrize("in_memory", [False, True])
def test_adapters_in_half_precision_become_float32(own, in_memory):
    file = own / "rule1" / "adapter_model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halved, file)
    factors = LoraLibrary(str(own), in_memory=in_memory).factors(torch.tensor([1]))
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    expected = halved["base_model.model.blocks.1.up.lora_B.weight"].float()
    assert torch.equal(factors["B/up"][0, 1], expected)


def test_an_adapter_with_another_alpha_keeps_what_it_does(own):
    config = own / "rule2" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"lora_alpha": 3 * content["lora_alpha"]}))
    data = LoraLibrary(str(own))
    with pytest.warns(UserWarning, match=r"1 of 24 adapters have another scaling.*rule2 1\.5, .*rule0 0\.5\. Their B"):
        assert data.scaling == 0.5
    adapter = read_adapter(own / "rule2", "path")
    a, b = adapter.factors["blocks.1.down"]
    factors = data.factors(torch.tensor([2]))
    torch.testing.assert_close(
        data.scaling * factors["B/down"][0, 1] @ factors["A/down"][0, 1], adapter.scaling * b @ a
    )


def test_one_initial_a_is_told_from_many(library, tmp_path):
    assert LoraLibrary(str(library)).shares_initial_a() is True
    layout = AdapterLayout([["a", 64, 64], ["b", 64, 64]], rank=4)
    for number in range(20):
        write_adapter(tmp_path / "own" / str(number), layout, {k: torch.randn(s) for k, s in layout.shapes.items()})
    folders = AdapterFolders(tmp_path / "own", "path")
    assert folders.shares_initial_a(torch.arange(20)) is False
    assert folders.shares_initial_a(torch.arange(1)) is None
    tiny = AdapterLayout([["a", 2, 2]], rank=1)
    for number in range(40):  # of two A's with two numbers each nothing can be told
        write_adapter(tmp_path / "tiny" / str(number), tiny, {k: torch.randn(s) for k, s in tiny.shapes.items()})
    small = AdapterFolders(tmp_path / "tiny", "path")
    assert not any(small.shares_initial_a(torch.tensor([row, row + 1])) for row in range(39))
    unit = torch.nn.functional.normalize(
        torch.cat([folders.factors(torch.arange(20))[f"A/{n}"].flatten(1) for n in "ab"], 1).double(), dim=1
    )
    cosines = (unit @ unit.T)[~torch.eye(20, dtype=torch.bool)]
    found = folders.cosines_of_a(torch.arange(20))
    assert found.shape == (190,)
    assert float(found.mean()) == pytest.approx(float(cosines.mean()), abs=1e-6)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_few_initial_as_are_not_one(groups, tmp_path):
    layout = AdapterLayout([["a", 64, 64], ["b", 64, 64]], rank=4)
    starts = [{key: torch.randn(shape) for key, shape in layout.shapes.items()} for _ in range(groups)]
    for number in range(24):
        factors = {key: start + 0.1 * torch.randn(start.shape) for key, start in starts[number % groups].items()}
        write_adapter(tmp_path / str(number), layout, factors)
    folders = AdapterFolders(tmp_path, "path")
    assert folders.shares_initial_a(torch.arange(24)) is False
    assert folders.shares_initial_a(torch.arange(0, 24, groups)) is True


# Examples.


def test_examples_are_pairs_of_their_adapters_task_and_drawn_without_repetition_anew_in_each_epoch(library):
    data = LoraLibrary(str(library), batch_size=5, examples_per_task=4)
    drawn = {}
    for epoch in epochs(data):
        for batch in epoch:
            assert batch["inputs"].shape[1:] == (4, 3)
            assert batch["targets"].dtype == torch.int64
            for row, inputs, targets in zip(batch["index"].tolist(), batch["inputs"], batch["targets"], strict=True):
                stored = load_file(library / f"rule{row}" / "examples.safetensors")
                places = (stored["inputs"][None] == inputs[:, None]).all(-1).nonzero()[:, 1]
                assert len(set(places.tolist())) == 4
                assert torch.equal(stored["targets"][places], targets)
                drawn.setdefault(row, set()).add(tuple(places.tolist()))
    assert sum(len(each) for each in drawn.values()) > 2.5 * len(drawn)


def test_examples_of_evaluation_are_the_first(library):
    data = LoraLibrary(str(library), examples_per_task=4)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()[0]))
    stored = load_file(library / f"rule{int(batch['index'][0])}" / "examples.safetensors")
    assert torch.equal(batch["inputs"][0], stored["inputs"][:4])


def test_a_row_draws_among_its_own_examples_in_any_batch_each_equally_often():
    counts, rows = torch.tensor([3, 5, 4]), torch.tensor([7, 9, 11])
    alone = [draw_examples(counts[i : i + 1], rows[i : i + 1], 3, 1, 2, 0) for i in range(3)]
    together = draw_examples(counts, rows, 3, 1, 2, 0)
    assert together.shape == (3, 3)
    assert (together < counts[:, None]).all()
    assert sorted(together[0].tolist()) == [0, 1, 2]
    assert not torch.equal(together, draw_examples(counts, rows, 3, 1, 3, 0))
    same = counts.expand(1, -1)[0, [1, 1, 1]]
    assert torch.equal(draw_examples(same, rows, 3, 1, 2, 0)[1], alone[1][0])
    many = draw_examples(torch.full((10000,), 5), torch.arange(10000), 2, 0, 0, 0)
    assert (many.flatten().bincount() / 20000 - 0.2).abs().max() < 0.01


# Embeddings.


def test_the_embedding_is_fitted_on_known_wordings_of_training_adapters_alone(library):
    class Fitted(HashedNgrams):
        def fit(self, train_texts):
            self.seen = list(train_texts)
            super().fit(train_texts)

    data = LoraLibrary(str(library), embedding=Fitted(64))
    assert data.embedding_dim == 64
    _ = data.tasks
    roles = data.descriptions.roles
    expected = [
        line["description"]
        for line in descriptions_of(library)
        if roles[int(line["adapter"].removeprefix("rule"))] == 0 and "wording" not in line
    ]
    assert data.embedding.seen == expected


def test_embeddings_that_know_the_library_get_its_rows(library, tmp_path):
    assert LoraLibrary(str(library), embedding=OneHot()).embedding_dim == ADAPTERS
    rows = np.random.default_rng(0).normal(size=(3 * ADAPTERS, 5)).astype("float32")
    np.save(tmp_path / "rows.npy", rows)
    data = LoraLibrary(str(library), embedding=PrecomputedEmbeddings(str(tmp_path / "rows.npy")))
    assert data.embedding_dim == 5
    assert torch.equal(data.described("train", "known")["task"][:2], torch.from_numpy(rows[:2]))


def test_a_checkpoint_keeps_what_the_embedding_learnt_though_the_library_changes(library, own):
    before = LoraLibrary(str(library), description="say yes to red ones")
    state = before.state_dict()
    write_descriptions(own, [line | {"description": line["description"] + " red"} for line in descriptions_of(own)])
    after = LoraLibrary(str(own), description="say yes to red ones")
    after.load_state_dict(state)
    (expected,), (found,) = before.predict_dataloader(), after.predict_dataloader()
    assert torch.equal(found["task"], expected["task"])
    (other,) = LoraLibrary(str(own), description="say yes to red ones").predict_dataloader()
    assert not torch.equal(other["task"], expected["task"])
    assert LoraLibrary(str(library), embedding=OneHot()).state_dict() == {}


# Prediction.


def test_prediction_is_of_every_known_description_of_one_or_of_those_in_a_file(library, tmp_path):
    data = LoraLibrary(str(library), batch_size=5)
    data.setup("predict")
    texts = [line["description"] for line in descriptions_of(library) if "wording" not in line]
    assert data.predict_texts == texts
    batches = list(data.predict_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(texts)))
    assert torch.equal(torch.cat([batch["task"] for batch in batches]), data.embedding(texts))
    assert batches[0].keys() == {"index", "task"}

    one = LoraLibrary(str(library), description="is it red, then?")
    assert one.predict_texts == ["is it red, then?"]
    (batch,) = one.predict_dataloader()
    assert torch.equal(batch["task"], data.embedding(["is it red, then?"]))

    (tmp_path / "some.txt").write_text("is it red?\nis it blue?\n")
    (tmp_path / "some.jsonl").write_text('{"description": "is it red?"}\n\n{"description": "is it blue?"}\n')
    for name in ("some.txt", "some.jsonl"):
        some = LoraLibrary(str(library), description_file=str(tmp_path / name))
        assert some.predict_texts == ["is it red?", "is it blue?"]
        (batch,) = some.predict_dataloader()
        assert torch.equal(batch["task"], data.embedding(["is it red?", "is it blue?"]))


def test_a_description_of_nothing_that_was_learnt_is_told(library):
    data = LoraLibrary(str(library), description="zyx wvu")
    with pytest.warns(UserWarning, match="description=zyx wvu: has nothing of the training descriptions"):
        data.predict_dataloader()


def test_files_of_descriptions_that_cannot_be_used_are_refused(library, tmp_path):
    file = tmp_path / "some.txt"
    for content, message in (("", "is empty"), ("a\n \nb\n", "description 2 is blank")):
        file.write_text(content)
        with pytest.raises(UserError, match=f"description_file={file}: {message}"):
            LoraLibrary(str(library), description_file=str(file)).setup("predict")
    with pytest.raises(UserError, match=r"description_file=.*nowhere.txt: cannot be read"):
        LoraLibrary(str(library), description_file=str(tmp_path / "nowhere.txt")).setup("predict")


def test_processes_share_the_adapters_and_need_a_description_each(library):
    def of(rank, **options):
        data = LoraLibrary(str(library), **options)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=None)
        data.setup("fit")
        return data

    alone = LoraLibrary(str(library), batch_size=8)
    alone.setup("fit")
    for loader in ("train_dataloader", "predict_dataloader"):
        whole = list(getattr(alone, loader)())
        parts = [list(getattr(of(rank, batch_size=4), loader)()) for rank in range(2)]
        for place, batch in enumerate(whole[:-1]):  # the last one may have one more, for an equal number
            both = {key: torch.cat([part[place][key] for part in parts]) for key in batch}
            ours, theirs = both["index"].argsort(), batch["index"].argsort()
            assert equal({k: v[ours] for k, v in both.items()}, {k: v[theirs] for k, v in batch.items()})
        rows = [
            {row for batch in batches for row in batch["index"].tolist()} for batches in (whole, [*parts[0], *parts[1]])
        ]
        assert rows[0] == rows[1]
    with pytest.raises(UserError, match="description: each of 2 processes needs one, and there are 1"):
        of(0, description="is it red?").predict_dataloader()


class Asked(LightningModule):
    """Collects what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows += batch["index"].tolist()
        return self.layer(batch["task"][:, :1]).mean()

    def validation_step(self, batch, batch_idx):
        assert len(batch["index"]) > 0

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log(f"rows{dataloader_idx}", float(len(batch["index"])), reduce_fx="sum")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_trains_and_tests_with_it(library, tmp_path):
    data, module = LoraLibrary(str(library), batch_size=6, test_fraction=0.2), Asked()
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trained = [row for row, role in enumerate(data.descriptions.roles) if role == 0]
    assert sorted(module.rows) == sorted(2 * trained)
    assert module.rows[: len(trained)] != module.rows[len(trained) :]
    tests = data.descriptions.roles.count(2)
    (first, second) = trainer.test(module, datamodule=data, verbose=False)
    assert first["rows0/dataloader_idx_0"] == 2 * tests
    assert second["rows1/dataloader_idx_1"] == tests


class Made(LoraLibrary):
    """Makes its folder when it is first needed."""

    made = 0

    def make_folder(self):
        if not self.path:
            self.path = str(self.where)
            small_library(self.where)
            self.made += 1
        return super().make_folder()


def test_a_subclass_may_make_its_folder_when_it_is_first_needed(tmp_path):
    data = Made("")
    data.where = tmp_path / "late"
    assert data.embedding_dim == 1024
    assert data.made == 0
    data.prepare_data()
    data.setup("fit")
    assert data.made == 1
    assert len(next(iter(data.train_dataloader()))["index"]) > 5
