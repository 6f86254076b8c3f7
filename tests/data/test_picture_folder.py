import numpy as np
import pytest
import torch
from PIL import Image

from trainerkit.data import PictureFolder, picture_folder
from trainerkit.errors import UserError


def fill(folder, count, value=0, size=(9, 9), suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (value, i, 255)).save(folder / f"{i:03d}.{suffix}")
    return folder


@pytest.fixture
def animals(tmp_path):
    for number, name in enumerate(("cat", "dog", "owl")):
        fill(tmp_path / "animals" / name, 10, 50 * number)
    return tmp_path / "animals"


def test_classes_are_folders_and_pixels_are_shares(animals):
    data = PictureFolder(str(animals), image_size=9)
    assert data.classes == ["cat", "dog", "owl"]
    assert data.shape == (3, 9, 9)
    assert data.class_counts == [7, 7, 7]
    batch = data.rows("train")
    assert batch["x"].dtype == torch.float32
    torch.testing.assert_close(batch["x"][:, 0, 0, 0], batch["y"] * 50 / 255)
    torch.testing.assert_close(batch["x"][:, 1, 4, 4], batch["index"] % 10 / 255)
    parts = torch.cat([data.rows(part)["index"] for part in ("train", "val", "test")])
    assert sorted(parts.tolist()) == list(range(30))


def test_grey_and_resized(animals):
    data = PictureFolder(str(animals), image_size=4, channels=1)
    assert data.rows("train")["x"].shape == (21, 1, 4, 4)


def test_pictures_decoded_for_each_batch_equal_those_in_memory(animals, monkeypatch):
    def batches():
        data = PictureFolder(str(animals), image_size=5, batch_size=4)
        loaders = data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()
        return data, [batch for loader in loaders for batch in loader]

    first, kept = batches()
    monkeypatch.setattr(picture_folder, "_IN_MEMORY", 0)
    second, decoded = batches()
    assert type(first.sets.predicted) is not type(second.sets.predicted)
    assert (first.shape, first.class_counts) == (second.shape, second.class_counts)
    for a, b in zip(kept, decoded, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_folder_without_classes_gives_pictures_alone(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(picture_folder, "_IN_MEMORY", limit)
    data = PictureFolder(str(fill(tmp_path / "flat", 10)), image_size=9, batch_size=3)
    assert data.classes == []
    assert data.class_counts == []
    assert next(iter(data.train_dataloader())).keys() == {"x", "index"}
    assert [len(data.rows(part)["x"]) for part in ("train", "val", "test")] == [7, 1, 2]


def test_prediction_reads_another_folder_in_order_of_names(animals, tmp_path):
    other = fill(tmp_path / "other", 5, 200)
    data = PictureFolder(str(animals), image_size=9, predict_path=str(other), batch_size=5)
    (batch,) = data.predict_dataloader()
    torch.testing.assert_close(batch["x"][:, 1, 0, 0], torch.arange(5) / 255)
    assert "y" not in batch
    assert data.classes == ["cat", "dog", "owl"]


def test_jpeg_and_capital_letters_are_read_and_hidden_files_are_not(tmp_path):
    for name in "ab":
        fill(tmp_path / name, 3, suffix="JPG")
        (tmp_path / name / ".hidden.png").write_bytes(b"no picture")
        (tmp_path / name / "notes.txt").write_text("no picture")
    data = PictureFolder(str(tmp_path))
    data.setup("fit")
    assert len(data.files) == 6


def test_workers_read_the_same(animals, monkeypatch):
    monkeypatch.setattr(picture_folder, "_IN_MEMORY", 0)
    here, there = (
        list(PictureFolder(str(animals), num_workers=workers, batch_size=8).train_dataloader()) for workers in (0, 1)
    )
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(here, there, strict=True))


def test_what_cannot_be_used_is_named(animals, tmp_path):
    def refused(match, **options):
        with pytest.raises(UserError, match=match):
            PictureFolder(**({"path": str(animals)} | options)).setup("fit")

    refused("nowhere: there is no such folder", path=str(tmp_path / "nowhere"))
    refused("no such folder", predict_path=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused(r"empty: has no picture \(.bmp", path=str(tmp_path / "empty"))
    fill(tmp_path / "one" / "cat", 5)
    refused("has one class, cat; needed are two", path=str(tmp_path / "one"))
    fill(tmp_path / "one", 1)
    refused("has pictures .* beside folders .cat", path=str(tmp_path / "one"))
    refused("of which none is left to train on", path=str(fill(tmp_path / "two", 2)))
    fill(animals / "eel", 2)
    refused("class eel: has 2 rows; needed are 3 or more")
    (animals / "eel" / "002.png").write_bytes(b"no picture")
    refused("002.png: is no picture that can be read")
    (animals / "eel" / "003.png").touch()
    refused("1 more cannot be read either")


@pytest.mark.parametrize(
    "options", [{"image_size": 0}, {"channels": 2}, {"fit": "squeeze"}, {"test_fraction": 1.0}, {"batch_size": 0}]
)
def test_bad_arguments_are_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: must be"):
        PictureFolder("anywhere", **options)


def test_a_damaged_file_is_no_half_of_an_array(animals):
    path = animals / "cat" / "000.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="000.png: is no picture that can be read"):
        PictureFolder(str(animals)).setup("fit")
    assert np.asarray(Image.open(animals / "cat" / "001.png")).shape == (9, 9, 3)
