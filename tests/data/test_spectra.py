import numpy as np
import pytest
import torch

from tests.support import smooth_spectra
from trainerkit.data import IndianPines, SpectraData, snv
from trainerkit.data.spectra import fit_length, split_blocks
from trainerkit.data.tables import read_table
from trainerkit.errors import UserError


def save(folder, kind, table, labels=None):
    path = folder / f"table.{kind}"
    if kind == "npy":
        np.save(path, table)
    elif kind == "npz":
        np.savez(path, x=table, **({} if labels is None else {"label": labels}))
    elif kind == "csv":
        header = [f"b{i}" for i in range(table.shape[1])] + ([] if labels is None else ["label"])
        rows = [[repr(float(v)) for v in row] for row in table]
        if labels is not None:
            rows = [[*row, str(label)] for row, label in zip(rows, labels, strict=True)]
        path.write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {f"b{i}": table[:, i] for i in range(table.shape[1])}
        pq.write_table(pa.table(columns if labels is None else {**columns, "label": labels}), path)
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_spectra(tmp_path, kind):
    table = smooth_spectra(rows=50, bands=8)
    data = SpectraData(str(save(tmp_path, kind, table)), normalize="none", batch_size=7)
    data.setup("fit")
    assert data.seq_len == 8
    found = torch.cat([batch["x"] for batch in data.predict_dataloader()])
    np.testing.assert_allclose(found.numpy(), table, rtol=1e-6)
    assert [batch["index"].tolist() for batch in data.predict_dataloader()][1] == list(range(7, 14))


@pytest.mark.parametrize("kind", ["npz", "csv", "parquet"])
def test_labels_become_class_numbers(tmp_path, kind):
    labels = np.array(["oat", "rye", "oat", "barley"] * 5)
    path = save(tmp_path, kind, smooth_spectra(rows=20, bands=4), labels)
    data = SpectraData(str(path), label="label", normalize="none")
    data.setup("fit")
    assert data.class_names == ["barley", "oat", "rye"]
    assert next(iter(data.predict_dataloader()))["y"].tolist() == [1, 2, 1, 0] * 5


def test_memory_mapped_and_in_memory_tables_give_the_same_batches(tmp_path):
    table = smooth_spectra(rows=60, bands=8)
    for normalize in ("zscore", "snv", "none"):
        batches = []
        for kind in ("npy", "npz"):
            data = SpectraData(str(save(tmp_path, kind, table)), normalize=normalize, batch_size=16)
            data.setup("fit")
            batches.append(torch.cat([batch["x"] for batch in data.train_dataloader()]))
        torch.testing.assert_close(*batches)
    assert isinstance(read_table(tmp_path / "table.npy")[0], np.memmap)


def test_zscore_uses_the_training_rows_only_and_snv_each_spectrum(tmp_path):
    table = smooth_spectra(rows=60, bands=8) * 3 + 5
    path = str(save(tmp_path, "npy", table))
    data = SpectraData(path)
    x = data.rows("train")["x"].double()
    torch.testing.assert_close(x.mean(0), torch.zeros(8, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(8, dtype=torch.float64), atol=1e-5, rtol=0)
    assert abs(float(data.rows("test")["x"].mean())) > 1e-4
    x = SpectraData(path, normalize="snv").rows("test")["x"].double()
    torch.testing.assert_close(x.std(1), torch.ones(len(x), dtype=torch.float64), atol=1e-5, rtol=0)


def test_snv_equals_a_loop_and_ignores_offset_and_scale():
    x = torch.randn(5, 9)
    rows = [(row.double() - row.double().mean()) / np.std(row.double().numpy(), ddof=1) for row in x]
    torch.testing.assert_close(snv(x).double(), torch.stack(rows), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(snv(3 * x + 7), snv(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(snv(torch.full((1, 4), 2.0)), torch.zeros(1, 4))


def test_splits_are_whole_blocks_disjoint_and_the_same_for_a_seed():
    block = np.arange(1000) // 10
    roles = split_blocks(block, (0.1, 0.2), seed=0)
    assert np.bincount(roles).tolist() == [700, 100, 200]
    assert all(len(np.unique(roles[block == b])) == 1 for b in range(100))
    assert np.array_equal(roles, split_blocks(block, (0.1, 0.2), seed=0))
    assert not np.array_equal(roles, split_blocks(block, (0.1, 0.2), seed=1))
    assert np.bincount(split_blocks(np.arange(5), (0.01, 0.0), seed=0)).tolist() == [4, 1]


def test_lengths_are_padded_or_cropped_only_when_asked(tmp_path):
    table = smooth_spectra(rows=30, bands=10)
    path = str(save(tmp_path, "npy", table))

    def first(**options):
        data = SpectraData(path, normalize="none", **options)
        data.setup("fit")
        return next(iter(data.predict_dataloader()))["x"][0].numpy()

    np.testing.assert_array_equal(first(seq_len=12, fit_length="pad"), [*table[0], table[0, -1], table[0, -1]])
    np.testing.assert_array_equal(first(seq_len=8, fit_length="crop"), table[0, :8])
    np.testing.assert_array_equal(fit_length(torch.arange(3.0), 5).tolist(), [0, 1, 2, 2, 2])
    with pytest.raises(ValueError, match="seq_len=12: the data have 10 bands; take fit_length=pad, or seq_len=10"):
        first(seq_len=12)
    with pytest.raises(ValueError, match="fit_length=crop: to get from 10 bands to 12 takes pad"):
        first(seq_len=12, fit_length="crop")


def test_without_validation_or_test_rows_there_are_no_loaders(tmp_path):
    path = str(save(tmp_path, "npy", smooth_spectra(rows=30, bands=4)))
    data = SpectraData(path, val_fraction=0.0, test_fraction=0.0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert not data.has("test")
    assert len(data.rows("train")["x"]) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "max"}, "normalize=max: must be one of zscore, snv, none"),
        ({"fit_length": "stretch"}, "fit_length=stretch: must be one of exact, pad, crop"),
        ({"split": "odd"}, "split=odd: must be one of random, blocks"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: must be from 0 to below 1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction=0.5: with val_fraction=0.5 nothing is left"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
        ({"seq_len": 0}, "seq_len=0: must be 1 or more, or null"),
    ],
)
def test_impossible_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        SpectraData("x.npy", **options)


def text(folder, content, name="bad.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.csv: the file is empty"),
        ("a,b\n", "bad.csv: has a header and no rows"),
        ("1,2\n3,4,5\n", "bad.csv: line 2 has 3 columns, line 1 has 2"),
        ("1,2\n3\n", "bad.csv: line 2 has 1 columns, line 1 has 2"),
        ("a,b\n1,2\n3,four\n", "bad.csv: line 3, column 2 is 'four', not a number"),
        ("1,2\n3,\n", "bad.csv: line 2, column 2 is '', not a number"),
        (b"\xff\xfe\x00\x01" * 9, "bad.csv: is not a text file"),
    ],
)
def test_bad_csv_files_name_line_and_column(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_table(text(tmp_path, content))


def test_a_first_line_of_names_numbers_or_both(tmp_path):
    table, _ = read_table(text(tmp_path, "400,410\n1,2\n", "a.csv"), header=True)
    assert table.tolist() == [[1, 2]]
    assert len(read_table(text(tmp_path, "400,410\n1,2\n", "a.csv"))[0]) == 2
    with pytest.raises(
        UserError, match="line 1, column 2 is 'N/A', not a number. If line 1 holds names, say header=true"
    ):
        read_table(text(tmp_path, "1,N/A\n1,2\n", "a.csv"))


def test_nan_is_named_by_row_and_column(tmp_path):
    table = smooth_spectra(rows=20, bands=6)
    table[13, 4] = np.nan
    with pytest.raises(UserError, match=r"table.npy: row 13, column 4 \(both from 0\) is nan, not a finite number"):
        SpectraData(str(save(tmp_path, "npy", table))).setup("fit")
    with pytest.raises(UserError, match=r"bad.csv: row 1, column 0 \(both from 0\) is nan"):
        SpectraData(str(text(tmp_path, "1,2\nnan,3\n4,5\n"))).setup("fit")


def test_arrays_that_are_no_table_are_refused(tmp_path):
    cases = {
        "flat": (np.zeros(5), "has shape (5,); needed are two dimensions"),
        "none": (np.zeros((0, 5)), "there must be a row and a column at least"),
        "text": (np.array([["a", "b"]]), "holds <U1; needed are integers or floating-point numbers"),
        "object": (
            np.array([[{}, 1]], dtype=object),
            "holds Python objects, which are not read because they can run code",
        ),
    }
    for name, (array, message) in cases.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(UserError) as error:
            read_table(tmp_path / f"{name}.npy")
        assert message in str(error.value)
    np.savez(tmp_path / "object.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="holds Python objects, which are not read because they can run code"):
        read_table(tmp_path / "object.npz")
    np.savez(tmp_path / "flat.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="has no two-dimensional array; it has a"):
        read_table(tmp_path / "flat.npz")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        read_table(tmp_path / "none.npy")
    with pytest.raises(UserError, match=r"is not of a kind that can be read: .npy, .npz, .csv, .parquet"):
        read_table(text(tmp_path, "x", "a.xlsx"))
    with pytest.raises(UserError, match="cannot be read as .npy"):
        read_table(text(tmp_path, "not numpy at all", "a.npy"))
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_table(text(tmp_path, "not parquet", "a.parquet"))
    with pytest.raises(UserError, match="has no column kind; its first row is a, b"):
        read_table(text(tmp_path, "a,b\n1,2\n", "a.csv"), label="kind")


def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs the package pyarrow.*\n  pip install .*\[parquet\]"):
        read_table(text(tmp_path, "x", "a.parquet"))


def test_indian_pines_is_what_its_source_says():
    data = IndianPines()
    sizes = {split: len(data.rows(split)["x"]) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == 21025
    assert data.seq_len == 200
    labels = torch.cat([data.rows(split)["y"] for split in sizes])
    assert int((labels > 0).sum()) == 10249
    assert len(labels.unique()) == len(data.class_names) == 17


def test_indian_pines_is_split_by_squares_of_pixels():
    roles = IndianPines().roles(145 * 145).reshape(145, 145)
    squares = [roles[i : i + 10, j : j + 10] for i in range(0, 145, 10) for j in range(0, 145, 10)]
    assert len(squares) == 225
    assert all((square == square[0, 0]).all() for square in squares)
    assert np.bincount([square[0, 0] for square in squares]).tolist() == [181, 22, 22]
