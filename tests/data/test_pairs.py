import csv
import json

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.support import ROOT
from trainerkit.data import Glyphs, PairData, StdlibPairs
from trainerkit.data.stdlib_pairs import documented_functions
from trainerkit.errors import UserError
from trainerkit.signatures import parameters
from trainerkit.testing import check_data

ROWS = [{"query": f"question {i}", "positive": f"a/b answer {i}", "score": i / 8} for i in range(40)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_all(loader):
    """Texts' tokens by row."""
    return {
        int(index): (query[query > 0].tolist(), positive[positive > 0].tolist())
        for batch in loader
        for index, query, positive in zip(*(batch[k] for k in ("index", "query_text", "positive_text")), strict=True)
    }


def write(path, rows):
    if path.suffix == ".jsonl":
        jsonl(path, rows)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            parquet.write_table(table, path)
        else:  # as `Dataset.save_to_disk` does it
            path.mkdir()
            for number, part in enumerate((table[:7], table[7:])):
                with arrow.ipc.new_stream(path / f"data-{number}.arrow", table.schema) as stream:
                    stream.write_table(part)
            files = [{"filename": f"data-{number}.arrow"} for number in (0, 1)]
            (path / "state.json").write_text(json.dumps({"_data_files": files, "_indices_files": None}))
    return str(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.tsv", "p.parquet", "saved"])
def test_all_kinds_of_files_give_the_same_rows(tmp_path, name):
    data = PairData(write(tmp_path / name, ROWS), tokenizer="bytes", batch_size=7)
    assert (data.mode, data.modalities, data.vocab_size, data.channels) == ("t2t", ["text"], 257, 1)
    data.setup("predict")
    [loader] = data.predict_dataloader()
    assert read_all(loader) == {
        i: tuple([byte + 1 for byte in row[part].encode()] for part in ("query", "positive"))
        for i, row in enumerate(ROWS)
    }
    scores = torch.cat([batch["score"] for batch in loader])
    assert scores.tolist() == [row["score"] for row in ROWS]
    assert data.describe(3, "positive") == "a/b answer 3"


def test_a_folder_that_the_library_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert PairData(str(tmp_path / "saved")).rows.query == [row["query"] for row in ROWS]
    datasets.Dataset.from_list(ROWS).select([1, 5]).save_to_disk(tmp_path / "some")
    assert PairData(str(tmp_path / "some")).rows.query == ["question 1", "question 5"]


def test_the_contract_is_kept_with_and_without_workers(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [row | {"negatives": ["no", f"no {i}"][: i % 3]} for i, row in enumerate(ROWS)])
    check_data(lambda: PairData(path, batch_size=4, mined_negatives=2))
    check_data(lambda: PairData(path, batch_size=4, mined_negatives=2, num_workers=1))


@pytest.fixture
def pictures(tmp_path):
    for i in range(40):
        Image.new("RGB", (6, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("t2i", {"query_text", "positive_image"}),
        ("i2i", {"query_image", "positive_image"}),
        ("i2t", {"query_image", "positive_text"}),
        ("composed", {"query_text", "query_image", "positive_image"}),
    ],
)
def test_the_mode_follows_from_the_columns_or_is_chosen(pictures, mode, keys):
    columns = {"query": lambda i: f"text {i}", "query_image": lambda i: f"{i}.png"}
    columns |= {"positive": lambda i: f"answer {i}", "positive_image": lambda i: f"{39 - i}.png"}
    needed = [key.removesuffix("_text") for key in keys]
    alone = jsonl(pictures / "some.jsonl", [{name: columns[name](i) for name in needed} for i in range(40)])
    every = jsonl(pictures / "every.jsonl", [{name: make(i) for name, make in columns.items()} for i in range(40)])
    with pytest.raises(UserError, match="no mode can be told; say one of t2t, t2i"):
        PairData(every).setup("fit")
    for data in (PairData(alone, image_size=8), PairData(every, image_size=8, mode=mode)):
        data.setup("fit")
        assert data.mode == mode
        for batch in data.predict_dataloader()[0]:
            assert {key for key in batch if key != "index" and not key.endswith("mask")} == keys
            for key, sign in (("query_image", 1), ("positive_image", -1)):
                if key in keys:
                    red = (batch[key][:, 0, 0, 0] * 255).round().long()
                    assert torch.equal(red, batch["index"] if sign == 1 else 39 - batch["index"])


@pytest.mark.filterwarnings("ignore:Rows of pairs left out")
def test_rows_with_a_bad_picture_or_a_blank_text_leave_as_a_whole(pictures):
    rows = [{"query": f"text {i}", "positive_image": f"{i}.png"} for i in range(40)]
    rows[3]["positive_image"], rows[7]["query"] = "gone.png", " "
    (pictures / "9.png").write_bytes((pictures / "9.png").read_bytes()[:40])
    path = jsonl(pictures / "p.jsonl", rows)
    with pytest.raises(UserError, match=r"p.jsonl: line 8: the query is missing or a blank text\. on_empty_text=skip"):
        PairData(path).setup("fit")
    with pytest.raises(
        UserError, match=r"p.jsonl: line 4: .*gone.png: there is no such picture\. 2 rows are like that"
    ):
        PairData(path, on_empty_text="skip").setup("fit")
    data = PairData(path, on_empty_text="skip", on_bad_image="skip", tokenizer="bytes", image_size=4)
    [loader] = data.predict_dataloader()
    kept = [i for i in range(40) if i not in (3, 7, 9)]
    assert [data.describe(k, "query") for k in range(37)] == [f"text {i}" for i in kept]
    red = torch.cat([(batch["positive_image"][:, 0, 0, 0] * 255).round().long() for batch in loader])
    assert red.tolist() == kept
    assert data.rows.skipped == {"a blank text": 1, "a picture that cannot be read": 2}


def test_rows_that_share_a_label_a_query_or_a_positive_are_on_one_side(tmp_path):
    rows = [{"query": f"q{i // 2}", "positive": f"p{(i + 1) // 2 % 45}"} for i in range(60)]
    rows += [{"query": f"q{100 + i}", "positive": f"p{100 + i // 3}"} for i in range(120)]
    data = PairData(jsonl(tmp_path / "p.jsonl", rows), val_fraction=0.2, test_fraction=0.3)
    sides = [[rows[i] for i in part.rows] for part in (data.sets.train, *data.sets.val, *data.sets.test)]
    assert [len(side) for side in sides if len(side) > 5] == [len(side) for side in sides]
    for part in ("query", "positive"):
        values = [{row[part] for row in side} for side in sides]
        assert sum(map(len, values)) == len(set.union(*values))
    labelled = [{"query": f"q{i}", "positive": f"p{i}", "label": i % 30} for i in range(90)]
    data = PairData(jsonl(tmp_path / "l.jsonl", labelled), val_fraction=0.3)
    [val] = data.val_dataloader()
    held_out = torch.cat([batch["label"] for batch in val])
    assert not set(held_out.tolist()) & {i % 30 for i in data.sets.train.rows.tolist()}


def test_own_files_for_validation_and_a_corpus_are_searched_in_evaluation(tmp_path):
    paths = [
        jsonl(tmp_path / f"{name}.jsonl", ROWS[a:b]) for name, a, b in (("a", 0, 20), ("b", 20, 25), ("c", 25, 32))
    ]
    data = PairData(paths[0], val_path=paths[1], corpus_path=paths[2], test_fraction=0, tokenizer="bytes", batch_size=3)
    [val] = data.val_dataloader()
    assert data.test_dataloader() == []
    assert len(data.train_dataset) == len(data.sets.rows) == 20
    found, texts = read_all(val), []
    assert sorted(found) == list(range(20, 25))
    for batch in val:
        texts += [row[row > 0] - 1 for row in batch["negatives_text"][batch["negatives_mask"]]]
    assert sorted(bytes(t.tolist()).decode() for t in texts) == sorted(row["positive"] for row in ROWS[25:32])


def test_negatives_come_from_lists_or_several_columns(tmp_path):
    lists = [row | {"negatives": [f"n{i}", f"m{i}"][: i % 3]} for i, row in enumerate(ROWS)]
    several = [
        row | {"n1": f"n{i}" if i % 3 else "", "n2": f"m{i}" if i % 3 == 2 else ""} for i, row in enumerate(ROWS)
    ]
    one = PairData(jsonl(tmp_path / "p.jsonl", lists), batch_size=6)
    other = PairData(write(tmp_path / "p.csv", several), negatives_column=["n1", "n2"], batch_size=6)
    for a, b in zip(one.train_dataloader(), other.train_dataloader(), strict=True):
        assert a["negatives_text"].shape[1] == 2
        assert a["negatives_mask"].sum(1).tolist() == [int(i) % 3 for i in a["index"]]
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_query_is_searched_among_the_rows(pictures):
    texts = jsonl(pictures / "t.jsonl", ROWS)
    data = PairData(texts, query="a/b", tokenizer="bytes")
    assert data.predict_names == ["query", "corpus"]
    query, corpus = data.predict_dataloader()
    assert next(iter(query))["query_text"].tolist() == [[98, 48, 99]]
    assert sum(len(batch["index"]) for batch in corpus) == 40
    images = jsonl(pictures / "i.jsonl", [{"query_image": f"{i}.png", "positive_image": f"{i}.png"} for i in range(40)])
    query, _ = PairData(images, query=str(pictures / "7.png"), image_size=4).predict_dataloader()
    assert next(iter(query))["query_image"][0, 0, 0, 0] * 255 == 7
    with pytest.raises(UserError, match="query: .*gone.png: there is no such picture"):
        PairData(images, query=str(pictures / "gone.png")).predict_dataloader()
    with pytest.raises(UserError, match="mode=t2t searches by query"):
        PairData(texts, query_image="7.png").predict_dataloader()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"query": "a", "positive": 1}\n', {}, r"p.jsonl: line 1, positive: is int '1'; needed is a text"),
        ('{"query": "a", "positive": "b"}\n\n{"query": "a"}\n', {}, r"line 3: the positive is missing or a blank text"),
        ('{"query": "a"\n', {}, r"line 1 is no JSON"),
        ("[1]\n", {}, r"line 1 is list, not an object"),
        ("", {}, r"has no rows"),
        ('{"query": "a", "answer": "b"}\n', {}, r"of query no mode can be told.*The file has query, answer"),
        ('{"query": "a", "answer": "b"}\n', {"positive_column": "anwser"}, r"has no column anwser .*mean answer\?"),
        ('{"query": "a", "positive": "b"}\n', {"mode": "t2i"}, r"mode=t2i needs positive_image_column=positive_image"),
        ('{"query": "a", "positive": "b", "label": 1.5}\n', {}, r"line 1, label: is float '1.5'; needed is a label"),
        ('{"query": "a", "positive": "b", "score": "x"}\n', {}, r"line 1, score: is str 'x'; needed is a finite"),
        ('{"query": "a", "positive": "b", "negatives": [2]}\n', {}, r"line 1, negatives: is int '2'; needed is a text"),
        ('{"query": "a", "positive": "b"}\n', {}, r"p.jsonl: of 1 rows in 1 groups none is there for"),
    ],
)
def test_what_cannot_be_used_is_said_with_file_and_row(tmp_path, content, options, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        PairData(str(tmp_path / "p.jsonl"), **options).setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "query,positive\na,b,c\n", "line 2 has 3 columns, line 1 has 2"),
        ("p.csv", "query,query\na,b\n", "names a column twice"),
        ("p.csv", 'query,positive\na,"b\n', "line 2 is damaged"),
        ("p.csv", "query,positive\n", "has no rows"),
        ("p.parquet", "no", "cannot be read as parquet"),
        ("p.txt", "no", "is not of a kind that can be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        PairData(str(tmp_path / name)).setup("fit")
    with pytest.raises(UserError, match="there is no such file"):
        PairData(str(tmp_path / "gone.csv")).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "t2x"}, "mode=t2x: must be one of null, t2t"),
        ({"fit": "stretch"}, "fit=stretch: must be one of resize, crop, pad"),
        ({"channels": 2}, "channels=2: must be one of 1, 3"),
        ({"on_bad_image": "black"}, "on_bad_image=black: must be one of error, skip"),
        ({"image_size": 0}, "image_size=0: must be 1 or more"),
        ({"mean": [0.5]}, r"mean=\[0.5\]: must have a number for each of channels=3"),
        ({"std": [1, 0, 1]}, r"std=\[1, 0, 1\]: must be above 0"),
        ({"mined_negatives": -1}, "mined_negatives=-1: must be 0 or more"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "test_fraction=0.4: with val_fraction=0.6 nothing is left"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PairData("p.jsonl", **options)


@pytest.mark.parametrize("kind", [PairData, Glyphs, StdlibPairs])
def test_the_config_lists_every_parameter_with_the_signatures_default(kind):
    name = {"PairData": "pairs", "Glyphs": "glyphs", "StdlibPairs": "stdlib_pairs"}[kind.__name__]
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "data" / f"{name}.yaml"))
    assert node.pop("_target_") == f"trainerkit.data.{kind.__name__}"
    node.pop("path", None)
    defaults = {key: known.default for key, known in parameters(kind).items() if key != "path"}
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in node.items()} == defaults


def test_code_has_neither_its_docstring_nor_its_name():
    source = b'def add(a, b):\n    """Add two numbers."""\n    c = a + b  # sum\n    return c\n\n\ndef f():\n    """Too short."""\n'
    assert list(documented_functions(source)) == [("Add two numbers.", "def _(a, b):\n    c = a + b\n    return c", 1)]
    assert list(documented_functions(b"def (:\n")) == []


def test_files_of_the_standard_library_are_on_one_side_and_all_code_is_searched(tmp_path, monkeypatch):
    import shutil
    import sysconfig
    from pathlib import Path

    library = Path(sysconfig.get_path("stdlib"))
    for package in ("asyncio", "email", "json", "http", "multiprocessing", "logging"):
        shutil.copytree(library / package, tmp_path / package)
    where = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else where(name))
    data = StdlibPairs()
    files = [
        {data.rows.places[i].partition(":")[0] for i in part.rows} for part in (data.sets.train, *data.sets.test[1:])
    ]
    assert not set.intersection(*files)
    among_1000, among_all = data.test_dataloader()
    assert data.evaluation_names == ["among_1000", "among_all"]
    assert sum(len(batch["index"]) for batch in among_1000) <= 1000
    codes, held_out = data.rows.positive, data.sets.test[1].rows.tolist()
    candidates = sum(len(batch["index"]) + int(batch["negatives_mask"].sum()) for batch in among_all)
    assert candidates == len(set(codes)) - len({codes[i] for i in held_out}) + len(held_out) > 300
    check_data(StdlibPairs)


@pytest.mark.filterwarnings("ignore:Rows of pairs left out")
@pytest.mark.parametrize("value", [None, "", "~1.png", "gone.png"])
def test_a_picture_that_is_missing_is_a_bad_row(pictures, value):
    rows = [{"query": f"text {i}", "positive_image": f"{i}.png"} for i in range(40)]
    rows.append({"query": "odd", "positive_image": value})
    path = jsonl(pictures / "p.jsonl", rows)
    with pytest.raises(UserError, match=r"p.jsonl: line 41: .*on_bad_image=skip leaves"):
        PairData(path).setup("fit")
    data = PairData(path, on_bad_image="skip")
    assert data.rows.skipped == {"a picture that cannot be read": 1}
    assert len(data.rows) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "query,positive\ncafé,b\n".encode("latin-1"), "is not in UTF-8 .*; save it in that encoding"),
        ("p.csv", b"query;positive\na;b\n", "line 1 has semicolons between the columns"),
        ("p.jsonl", b"[" * 200_000, "line 1 is no JSON"),
        ("p.jsonl", b'{"query": "a", "positive": "b", "score": 1' + b"0" * 400 + b"}", "line 1, score: .* finite"),
        ("p.jsonl", b'{"query": "a", "positive": "b", "score": 1e39}', "line 1, score: .* finite"),
    ],
)
def test_odd_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        _ = PairData(str(tmp_path / name)).rows


def test_cells_may_be_long(tmp_path):
    (tmp_path / "p.csv").write_text("query,positive\na," + "x " * 70_000 + "\n")
    assert PairData(str(tmp_path / "p.csv")).rows.positive == ["x " * 70_000]


def test_columns_of_one_name_and_a_damaged_state_are_said(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table([arrow.array(["a"]), arrow.array(["b"]), arrow.array(["c"])], ["query", "query", "positive"])
    parquet.write_table(table, tmp_path / "p.parquet")
    (tmp_path / "saved").mkdir()
    with arrow.ipc.new_stream(tmp_path / "saved" / "d.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}')
    for name in ("p.parquet", "saved"):
        with pytest.raises(UserError, match=f"{name}: names a column twice: query, query, positive"):
            _ = PairData(str(tmp_path / name)).rows
    (tmp_path / "saved" / "state.json").write_text("{bad")
    with pytest.raises(UserError, match=r"state\.json: is damaged"):
        _ = PairData(str(tmp_path / "saved")).rows
