import json
import os

import pytest
import torch
from PIL import Image

from trainerkit.data import PairData
from trainerkit.data.pair_groups import groups, own_negatives, row_labels
from trainerkit.data.pair_rows import PairRows, with_keys
from trainerkit.errors import UserError


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def negatives(loader):
    """The texts of an evaluation set's negatives."""
    found = []
    for batch in loader:
        rows = batch["negatives_text"][batch["negatives_mask"]] if "negatives_text" in batch else []
        found += [bytes((row[row > 0] - 1).tolist()).decode() for row in rows]
    return sorted(found)


def pairs(n, start=0, **more):
    return [{"query": f"question {i}", "positive": f"answer {i}"} | more for i in range(start, start + n)]


def test_what_equals_a_positive_of_an_evaluation_set_is_no_negative_there_and_others_stand_once(tmp_path):
    train = jsonl(tmp_path / "t.jsonl", pairs(5, 100, negatives=["x"]))
    rows = [row | {"negatives": [f"answer {(i + 1) % 6}", "wrong", f"wrong {i}"]} for i, row in enumerate(pairs(6))]
    corpus = jsonl(tmp_path / "c.jsonl", [{"positive": f"answer {i}"} for i in (0, 3, 7, 7)] + [{"positive": "wrong"}])
    val = jsonl(tmp_path / "v.jsonl", rows)
    data = PairData(train, val_path=val, corpus_path=corpus, test_fraction=0, tokenizer="bytes", batch_size=4)
    [loader] = data.val_dataloader()
    assert negatives(loader) == sorted(["answer 7", "wrong", *(f"wrong {i}" for i in range(6))])
    for batch in loader:  # a row's own stay with it
        for index, texts, mask in zip(batch["index"], batch["negatives_text"], batch["negatives_mask"], strict=True):
            own = [bytes((text[text > 0] - 1).tolist()).decode() for text in texts[mask]]
            assert f"wrong {int(index) - 5}" in own


def test_rows_with_the_same_positive_have_one_label_where_the_data_have_none(tmp_path):
    rows = [{"query": f"question {i}", "positive": f"answer {i // 2}"} for i in range(40)]
    data = PairData(jsonl(tmp_path / "p.jsonl", rows), batch_size=40)
    for loader in (data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
        for batch in loader:
            same = batch["label"][:, None] == batch["label"]
            assert torch.equal(same, batch["index"][:, None] // 2 == batch["index"] // 2)
    assert "label" not in next(iter(PairData(jsonl(tmp_path / "q.jsonl", pairs(40))).train_dataloader()))


def test_negatives_that_answer_their_own_query_are_left_out():
    rows = PairRows(
        query=["a", "a", "b", "c"],
        positive=["1", "2", "3", "4"],
        negatives=[["1", "2", "3"], ["x", "1"], ["3"], ["3", "4", "1"]],
        places=list("0123"),
    )
    with_keys(rows)
    assert row_labels(rows) is None
    assert own_negatives(rows) == [[2], [0], [], [0, 2]]
    rows.label = ["u", "v", "w", "w"]
    assert own_negatives(rows) == [[2], [0], [], [2]]


def test_training_takes_negatives_without_those_that_are_right(tmp_path):
    rows = [row | {"negatives": [row["positive"], "no", "no"][: 1 + i % 3]} for i, row in enumerate(pairs(30))]
    data = PairData(jsonl(tmp_path / "p.jsonl", rows), tokenizer="bytes", val_fraction=0, test_fraction=0)
    for batch in data.train_dataloader():
        assert batch["negatives_mask"].sum(1).tolist() == [int(i) % 3 for i in batch["index"]]
    assert set(negatives(data.train_dataloader())) == {"no"}


@pytest.fixture
def pictures(tmp_path):
    for i in range(60):
        Image.new("RGB", (6, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_split_depends_neither_on_where_the_data_are_nor_on_how_their_path_is_spelt(pictures, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"query": f"q{i}", "positive_image": f"{i}.png"} for i in range(60)]
    jsonl(pictures / "p.jsonl", rows)
    contents = [row | {"positive_image": (pictures / row["positive_image"]).read_bytes()} for row in rows]
    parquet.write_table(arrow.Table.from_pylist(contents), pictures / "p.parquet")
    found = []
    for folder, path in ((pictures, "p.jsonl"), (pictures.parent, f"{pictures.name}/p.jsonl"), ("/", pictures / "p.jsonl"),
                         (pictures, "p.parquet")):  # fmt: skip
        monkeypatch.chdir(folder)
        found.append(PairData(str(path), image_size=4).sets.test[0].rows.tolist())
    monkeypatch.undo()
    assert os.getcwd() != "/"
    assert found[0]
    assert found[1:] == found[:1] * 3


def test_the_same_picture_under_two_names_is_one(pictures):
    (pictures / "copy.png").write_bytes((pictures / "7.png").read_bytes())
    rows = [{"query": f"q{i}", "positive_image": f"{i}.png"} for i in range(40)] + [
        {"query": "q", "positive_image": "copy.png"}
    ]
    found = groups(PairData(jsonl(pictures / "p.jsonl", rows), image_size=4).rows)
    assert found[40] == found[7]
    assert len(set(found)) == 40


def test_a_label_a_query_a_positive_and_a_turned_pair_keep_rows_together(tmp_path):
    turned = [{"query": a, "positive": b} for i in range(100) for a, b in ((f"a{i}", f"b{i}"), (f"b{i}", f"a{i}"))]
    labelled = [{"query": f"q{i // 2}", "positive": f"p{i}", "label": (i + 1) // 2 % 70} for i in range(200)]
    labelled += [{"query": f"r{i}", "positive": f"s{i // 4}", "label": 1000 + i // 2} for i in range(200)]
    for rows in (turned, labelled[200:]):
        data = PairData(jsonl(tmp_path / "p.jsonl", rows), val_fraction=0.2, test_fraction=0.3)
        parts = [[rows[i] for i in part.rows] for part in (data.sets.train, *data.sets.val, *data.sets.test)]
        assert all(len(part) > 10 for part in parts)
        held = [{text for row in part for text in (row["query"], row["positive"])} for part in parts]
        assert sum(map(len, held)) == len(set.union(*held))
    assert len(set(groups(PairData(jsonl(tmp_path / "l.jsonl", labelled[:200])).rows))) == 1


def test_groups_do_not_depend_on_the_order_of_the_rows(tmp_path):
    rows = [{"query": f"q{i * 7 % 31}", "positive": f"p{i * 5 % 83}"} for i in range(60)]
    one = groups(PairData(jsonl(tmp_path / "p.jsonl", rows)).rows)
    other = groups(PairData(jsonl(tmp_path / "p.jsonl", rows[::-1])).rows)
    assert other == one[::-1]


def test_prediction_needs_no_split_and_training_says_how_to_do_without(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", pairs(4, label="one"))
    PairData(path).setup("predict")
    with pytest.raises(UserError, match=r"of 4 rows in 1 groups none is there for \w+; .*_(path|fraction)"):
        PairData(path).setup("fit")
    with pytest.raises(UserError, match="val_fraction=0 "):
        PairData(jsonl(tmp_path / "o.jsonl", pairs(3)), val_fraction=1e-9).setup("validate")
    PairData(path, val_fraction=0, test_fraction=0).setup("fit")


def test_a_file_without_negatives_may_be_evaluated_on_and_what_is_left_out_adds_up(tmp_path):
    train = jsonl(tmp_path / "t.jsonl", [*pairs(5, negatives=["n"]), {"query": None, "positive": "x"}])
    val = jsonl(tmp_path / "v.jsonl", [*pairs(5, 50), {"query": " ", "positive": "x"}])
    corpus = jsonl(tmp_path / "c.jsonl", [{"positive": "c"}, {"positive": ""}])
    data = PairData(train, val_path=val, corpus_path=corpus, test_fraction=0, on_empty_text="skip", tokenizer="bytes")
    with pytest.warns(UserWarning, match=r"Rows of pairs left out: 3 for a blank text\."):
        data.setup("fit")
    data.setup("fit")  # a second warning would be an error
    assert data.rows.skipped == {"a blank text": 3}
    assert negatives(data.val_dataloader()[0]) == ["c"]


def test_negatives_that_are_no_pictures_where_positives_are_name_the_right_key(pictures):
    rows = [{"query": f"q{i}", "positive_image": f"{i}.png", "negatives": ["0.png"]} for i in range(40)]
    path = jsonl(pictures / "p.jsonl", rows)
    with pytest.raises(UserError, match=r"positives are pictures; say negatives_image_column=negatives negatives_col"):
        PairData(path).setup("fit")
    data = PairData(path, image_size=4, negatives_column=None, negatives_image_column="negatives")
    assert "negatives_image" in next(iter(data.train_dataloader()))
