import numpy as np
import pytest
import torch

from trainerkit.data import TableData
from trainerkit.errors import UserError


def write(path, x, labels, name="kind"):
    header = ",".join([*(f"c{i}" for i in range(x.shape[1])), name])
    rows = [",".join([*(repr(float(v)) for v in row), str(label)]) for row, label in zip(x, labels, strict=True)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


@pytest.fixture
def flowers(tmp_path):
    x = np.random.default_rng(0).normal(3, 5, (60, 4)).astype(np.float32)
    labels = ["rose", "lily", "iris"] * 20
    return write(tmp_path / "flowers.csv", x, labels), x, labels


def test_columns_are_scaled_by_the_training_rows(flowers):
    path, x, labels = flowers
    data = TableData(path, "kind")
    assert (data.shape, data.features, data.classes) == ((4,), 4, ["iris", "lily", "rose"])
    train = data.rows("train")
    torch.testing.assert_close(train["x"].mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(train["x"].std(0, correction=0), torch.ones(4))
    seen = x[train["index"].numpy()].astype(np.float64)
    test = data.rows("test")
    expected = (x[test["index"].numpy()] - seen.mean(0)) / seen.std(0)
    np.testing.assert_allclose(test["x"].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert [data.classes[number] for number in test["y"]] == [labels[row] for row in test["index"]]
    assert data.class_counts == [14, 14, 14]


def test_parquet_gives_the_same_as_csv(flowers, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, x, labels = flowers
    pq.write_table(pa.table({**{f"c{i}": x[:, i] for i in range(4)}, "kind": labels}), tmp_path / "flowers.parquet")
    a, b = (TableData(source, "kind").rows("test") for source in (path, str(tmp_path / "flowers.parquet")))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_prediction_reads_another_file_on_the_same_scale(flowers, tmp_path):
    path, x, _ = flowers
    np.savez(tmp_path / "more.npz", x=x[:7])
    (batch,) = TableData(path, "kind", predict_path=str(tmp_path / "more.npz")).predict_dataloader()
    own = next(iter(TableData(path, "kind").predict_dataloader()))
    assert torch.equal(batch["x"], own["x"][:7])
    assert "y" not in batch


def test_what_cannot_be_used_is_named(flowers, tmp_path):
    path, x, labels = flowers

    def refused(match, source=path, label="kind", **options):
        with pytest.raises(UserError, match=match):
            TableData(source, label, **options).setup("fit")

    refused("has no column colour", label="colour")
    refused("kind is rose in every row", write(tmp_path / "same.csv", x, ["rose"] * 60))
    refused("class tulip: has 1 rows; needed are 3", write(tmp_path / "few.csv", x, [*labels[:-1], "tulip"]))
    np.savez(tmp_path / "narrow.npz", x=x[:, :3])
    refused("has 3 columns; needed are the 4 of", predict_path=str(tmp_path / "narrow.npz"))
    x[5, 2] = np.nan
    refused("row 5, column 2 .* is nan", write(tmp_path / "nan.csv", x, labels))


@pytest.mark.parametrize("options", [{"val_fraction": -0.1}, {"batch_size": 0}, {"label": ""}])
def test_bad_arguments_are_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: must be"):
        TableData(**({"path": "anywhere", "label": "kind"} | options))
