import pytest
import torch
from torch.nn.functional import normalize

from trainerkit.data import Glyphs
from trainerkit.data.glyphs import FACES, role_of
from trainerkit.testing import check_data

pytest.importorskip("PIL")
pytest.importorskip("fontTools")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="module")
def data(cache):
    data = Glyphs(cache_dir=cache, image_size=32, val_fraction=0.1)
    data.prepare_data()
    data.setup("fit")
    return data


def column(loader, name):
    return torch.cat([batch[name] for batch in loader])


def test_half_of_the_characters_are_unseen_and_another_tenth_validates(data):
    assert len(FACES) == 12
    assert len(data.codes) == 2149
    parts = [data.sets.train.rows, data.sets.val[0].rows, data.sets.test[0].rows]
    assert len(parts[2]) == 1087
    assert 80 < len(parts[1]) < 130
    assert sorted(torch.cat(parts).tolist()) == list(range(2149))
    assert [role_of(data.codes[int(i)], 0.1) for i in parts[1]] == [1] * len(parts[1])


def test_the_characters_are_the_same_at_every_size(data, cache):
    assert Glyphs(cache_dir=cache, image_size=20).codes == data.codes


def test_pixels_find_what_the_documents_say(data):
    found = {}
    for name, loader in list(zip(data.evaluation_names, data.test_dataloader(), strict=True))[:3]:
        query, positive = (normalize(column(loader, f"{s}_image").flatten(1)) for s in ("query", "positive"))
        found[name] = float(((query @ positive.T).argmax(1) == torch.arange(len(query))).float().mean())
    # Another FreeType, or one without Raqm, draws other edges.
    assert found == pytest.approx(
        {"sans_to_serif": 0.754, "sans_to_mono_oblique": 0.386, "sans_to_serif_bolditalic": 0.526}, abs=0.05
    )


def test_a_row_shows_one_character_in_two_faces_drawn_anew_each_epoch(cache):
    data = Glyphs(cache_dir=cache, augment=False)
    pictures = data.train_dataset.query.pictures.pictures
    chosen = []
    for epoch in (0, 1):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        faces = {"query_image": [], "positive_image": []}
        for batch in loader:
            for name, seen in faces.items():
                given = (batch[name] * 255).round().byte()
                same = (pictures[:, batch["index"]] == given[:, 0]).flatten(2).all(2)  # (faces, B)
                assert same.any(0).all()
                seen.append((batch["index"], same))
        order = torch.cat([index for index, _ in faces["query_image"]]).argsort()
        two = [torch.cat([same for _, same in seen], 1)[:, order] for seen in faces.values()]
        # A tenth of the characters looks the same in two faces (an arrow, or Sans Bold and Sans Bold Oblique).
        assert float((two[0] & two[1]).any(0).float().mean()) < 0.15
        chosen.append(two[0])
    assert float((chosen[0] & chosen[1]).any(0).float().mean()) < 0.25


def test_the_contract_is_kept(cache):
    check_data(lambda: Glyphs(cache_dir=cache, mined_negatives=1))
    check_data(lambda: Glyphs(cache_dir=cache, queries=["image"], num_workers=1))


def test_names_and_queries_are_told(data, cache, tmp_path):
    from PIL import Image

    place = data.codes.index(ord("λ"))
    assert data.describe(place, "query") == "λ GREEK SMALL LETTER LAMDA"
    text = Glyphs(cache_dir=cache, query="greek letter")
    query, corpus = text.predict_dataloader()
    assert text.predict_names == ["query", "corpus"]
    assert column(query, "query_text").shape == (1, 2)
    assert column(corpus, "positive_image").shape == (1087, 1, 48, 48)
    Image.new("L", (9, 9), 255).save(tmp_path / "a.png")
    query, _ = Glyphs(cache_dir=cache, query=str(tmp_path / "a.png")).predict_dataloader()
    assert torch.equal(column(query, "query_image"), torch.ones(1, 1, 48, 48))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "image_size=4: must be 8 or more"),
        ({"queries": []}, r"queries=\[\]: must be of image and text"),
        ({"queries": ["sound"]}, r"queries=\['sound'\]: must be of image and text"),
        ({"max_shift": 1.0}, "shift=1.0: must be from 0 to below 1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: must be from 0 to below 1"),
        ({"max_length": 0}, "max_length=0: must be 1 or more"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Glyphs(**options)
