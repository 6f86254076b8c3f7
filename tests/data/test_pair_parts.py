import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from trainerkit.data.hashed_words import HashedWords
from trainerkit.data.pair_dataset import Negatives, PairBatches, PairDataset, Side
from trainerkit.data.pair_pictures import PictureFiles, decoded, problems
from trainerkit.data.pair_texts import TokenRows, pair_tokenizer
from trainerkit.errors import UserError
from trainerkit.functional.picture_moves import Augmentation, moved

ROWS = torch.arange(50)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("read_text_file", ["read", "text", "file"]),
        ("HTTPServer parseURL2", ["http", "server", "parse", "url2"]),
        ("don't größeWert", ["don", "t", "größe", "wert"]),
        ("a/b", ["a", "b"]),
        ("हिन्दी किताब", ["हिन्दी", "किताब"]),
        ("กินข้าว กัน", ["กินข้าว", "กัน"]),
        ("cafe\u0301 caf\u00e9", ["caf\u00e9", "caf\u00e9"]),
        ("C++ or C#, not C", ["c++", "or", "c#", "not", "c"]),
        ("abc++ i++b a+b x#y", ["abc", "i", "b", "a", "b", "x", "y"]),
        ("== !", ["== !"]),
        ("  ", []),
    ],
)
def test_identifiers_are_taken_apart(text, words):
    assert HashedWords().words(text) == words


def test_whole_identifiers_are_kept_where_they_are_not_split():
    assert HashedWords(split_identifiers=False, lowercase=False).words("a_b CamelCase") == ["a_b", "CamelCase"]


def test_tokens_are_in_the_buckets_and_the_same_in_another_process():
    words = HashedWords(97, word_ngrams=2, char_ngrams=(3, 4))
    tokens = words.encode("the quick_brown fox")
    assert all(1 <= token <= 97 < words.vocab_size for token in tokens)
    code = "from trainerkit.data.hashed_words import HashedWords as H; "
    code += "print(H(97, word_ngrams=2, char_ngrams=(3, 4)).encode('the quick_brown fox'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == tokens
    assert HashedWords(97, seed=1).encode("the quick") != HashedWords(97).encode("the quick")


def test_ngrams_follow_the_word_that_they_begin_with():
    plain = HashedWords()
    a, b, c = (plain.encode(word)[0] for word in "abc")
    tokens = HashedWords(word_ngrams=3).encode("a b c")
    assert [tokens[0], tokens[3], tokens[5]] == [a, b, c]
    assert len(tokens) == 6
    letters = HashedWords(char_ngrams=(3, 3)).encode("abc")
    assert letters == [c for word in ("abc",) for c in plain.encode(word)] + [
        plain._hash(gram) for gram in ("<ab", "abc", "bc>")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_buckets": 0}, "n_buckets=0: must be 1 or more"),
        ({"word_ngrams": 0}, "word_ngrams=0: must be 1 or more"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"char_ngrams": (4, 3)}, r"char_ngrams=\[4, 3\]: must be \[shortest, longest\]"),
    ],
)
def test_impossible_hashes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HashedWords(**options)


def test_token_rows_equal_their_lists_padded_to_the_longest_of_the_batch():
    rows = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9]]
    kept = TokenRows(rows, max_length=4)
    for chosen in ([0, 2], [1], [3, 1, 0], []):
        ids, mask = kept.take(torch.tensor(chosen, dtype=torch.int64))
        lists = [rows[row][:4] for row in chosen]
        longest = max([1, *map(len, lists)])
        assert ids.tolist() == [row + [0] * (longest - len(row)) for row in lists] or not chosen
        assert mask.sum(1).tolist() == [len(row) for row in lists]


def test_a_tokenizer_that_has_no_token_for_any_text_is_refused_and_one_for_some_is_not(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 1, "b": 2}, []))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = pair_tokenizer(str(tmp_path), 4)
    assert tokenizer.encode_many(["ab", "xyz", ""]) == [[1, 2], [], []]
    assert tokenizer.encode_many([" ", ""]) == [[], []]
    with pytest.raises(UserError, match=r"tokenizer.json: gives no token for any text, such as 'xyz'"):
        tokenizer.encode_many([" ", "xyz", "z"])


def test_a_models_tokenizer_puts_its_tokens_around_a_text_and_cuts_inside(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    library.enable_padding(length=10)
    library.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = pair_tokenizer(str(name), 4)
        assert tokenizer.encode_many(["a", "a b a b"]) == [[2, 4, 3], [2, 4, 5, 3]]
        assert tokenizer.vocab_size == 6
    with pytest.raises(ValueError, match="max_length=2: must be above 2"):
        pair_tokenizer(str(tmp_path), 2)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        pair_tokenizer(str(tmp_path), 4)
    with pytest.raises(UserError, match=r"tokenizer=wrods: must be words or bytes, .* Did you mean words\?"):
        pair_tokenizer("wrods", 4)


def test_bytes_leave_zero_to_padding():
    assert pair_tokenizer("bytes", 9).encode_many(["a\0"]) == [[98, 1]]


def test_a_picture_is_moved_as_far_as_was_drawn():
    picture = torch.zeros(1, 1, 16, 16)
    picture[0, 0, 8, 8] = 1
    by = Augmentation(shift=0.125, rotation=90, scale=0.5)
    still = torch.full((1, 4), 0.5)
    assert torch.allclose(moved(picture, still, by), picture, atol=1e-6)
    right = moved(picture, torch.tensor([[0.0, 0.5, 0.5, 0.5]]), by)
    assert right[0, 0].argmax() == 8 * 16 + 10  # an eighth of 16 pixels
    theta = torch.tensor([[[0.5**-0.5 * 0 + 1, 0, 0.25], [0, 1, 0]]])
    grid = torch.nn.functional.affine_grid(theta, [1, 1, 16, 16], align_corners=False)
    left = moved(picture, torch.tensor([[1.0, 0.5, 0.5, 0.5]]), by)
    wanted = torch.nn.functional.grid_sample(picture, grid, padding_mode="border", align_corners=False)
    assert torch.allclose(left, wanted, atol=1e-6)
    # A picture of one grey stays one, and pictures do not touch each other.
    draws = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(moved(torch.full((5, 3, 9, 9), 0.3), draws, by), torch.tensor(0.3), atol=1e-6)
    several = torch.rand(5, 1, 9, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(moved(several, draws, by)[3:4], moved(several[3:4], draws[3:4], by))


def test_a_move_beyond_the_picture_is_refused():
    with pytest.raises(ValueError, match="shift=1.0: must be from 0 to below 1"):
        Augmentation(shift=1.0)


def picture(path, size=(8, 4), mode="RGB", colour=(255, 0, 0)):
    Image.new(mode, size, colour).save(path)
    return path


def test_pictures_are_fitted_as_asked(tmp_path):
    array = np.zeros((4, 8, 3), np.uint8)
    array[:, 2:6] = 255
    Image.fromarray(array).save(tmp_path / "wide.png")
    crop = decoded(tmp_path / "wide.png", 4, 3, "crop")
    assert torch.equal(crop, torch.ones(3, 4, 4))
    pad = decoded(tmp_path / "wide.png", 8, 1, "pad")
    assert pad.shape == (1, 8, 8)
    assert pad[0, :2].sum() == pad[0, 6:].sum() == 0
    assert torch.equal(pad[0, 2:6], torch.from_numpy(array[..., 0] / 255).float())
    assert decoded(tmp_path / "wide.png", 4, 3, "resize").shape == (3, 4, 4)
    assert torch.equal(decoded((tmp_path / "wide.png").read_bytes(), 4, 3, "crop"), crop)


def test_what_is_transparent_is_white_and_16_bits_are_scaled(tmp_path):
    clear = picture(tmp_path / "clear.png", (4, 4), "RGBA", (9, 9, 9, 0))
    assert torch.equal(decoded(clear, 4, 3, "resize"), torch.ones(3, 4, 4))
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert torch.allclose(decoded(tmp_path / "deep.png", 4, 1, "resize"), torch.tensor(128 / 255))


def test_mean_and_std_are_taken_channel_by_channel(tmp_path):
    files = PictureFiles([picture(tmp_path / "a.png")], str, image_size=2, mean=[0.5, 0.0, 0.25], std=[0.5, 1.0, 0.25])
    taken = files.take(torch.tensor([0]), torch.zeros(1, 2))
    assert taken[0, :, 0, 0].tolist() == [1.0, 0.0, -1.0]
    assert files.take(torch.tensor([], dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 3, 2, 2)


def test_damaged_pictures_are_found_and_a_row_is_named(tmp_path):
    good, cut = picture(tmp_path / "good.jpg", (64, 64)), tmp_path / "cut.jpg"
    cut.write_bytes(good.read_bytes()[:-200])
    text, gone = tmp_path / "text.png", tmp_path / "gone.png"
    text.write_text("no picture")
    found = problems([good, cut, text, gone, cut])
    assert sorted(found) == [1, 2, 3, 4]
    assert re.search(r"cut.jpg: is no picture that can be read \(.*[tT]runcated", found[1])
    assert "gone.png: there is no such picture" in found[3]
    files = PictureFiles([good, cut], lambda row: f"mine.csv: line {row}", image_size=4)
    with pytest.raises(UserError, match=r"mine.csv: line 1: .*cut.jpg: is no picture that can be read"):
        files.take(torch.tensor([0, 1]), torch.zeros(2, 2))


class Ramp:
    """Picture i is i everywhere, plus what was drawn."""

    def __len__(self):
        return 20

    def take(self, rows, draws):
        return (rows + draws[:, 0])[:, None, None, None].expand(-1, 1, 3, 3)


def toy(**options):
    texts = TokenRows([[row + 1] * (1 + row % 3) for row in range(20)], 9)
    return PairDataset(Side(texts), Side(texts, Ramp()), torch.tensor([2, 3, 5, 7, 11, 13]), **options)


def test_a_batch_does_not_depend_on_its_neighbours_and_changes_with_the_epoch():
    data = toy(augmentation=Augmentation(), seed=4)
    whole = data[torch.arange(6)]
    some = data[torch.tensor([4, 1])]
    assert torch.equal(some["positive_image"], whole["positive_image"][[4, 1]])
    assert some["index"].tolist() == [11, 3]
    data.set_epoch(1)
    assert not torch.equal(data[torch.arange(6)]["positive_image"], whole["positive_image"])
    batches = PairBatches(data, 2, shuffle=True, seed=0, even=True)
    batches.set_epoch(0)
    assert torch.equal(data[torch.arange(6)]["positive_image"], whole["positive_image"])


def test_given_and_mined_negatives_stand_beside_each_other_and_are_masked():
    members = torch.full((6, 2), -1)
    members[1] = torch.tensor([1, 0])
    side = Side(TokenRows([[91], [92, 93]], 9), Ramp())
    data = toy(negatives=Negatives(side, members), mined=2)
    before = data[torch.arange(6)]
    assert before["negatives_mask"].tolist() == [[row == 1, row == 1, False, False] for row in range(6)]
    data.set_mined(torch.tensor([[5, -1], [0, 2], *[[-1, -1]] * 4]))
    batch = data[torch.tensor([1, 0])]
    assert batch["negatives_mask"].tolist() == [[True] * 4, [False, False, True, False]]
    texts = batch["negatives_text"]
    assert [row[:2].tolist() for row in texts[0][:2]] == [[92, 93], [91, 0]]
    assert texts[0, 2].tolist() == [3, 3, 3]
    assert texts[0, 3].tolist() == [6, 6, 6]
    assert texts[1, 2].tolist() == [14, 14, 0]
    assert batch["negatives_text_mask"].sum(-1).tolist() == [[2, 1, 3, 3], [0, 0, 2, 0]]
    assert batch["negatives_image"][:, :, 0, 0, 0].floor().tolist() == [[1, 0, 2, 5], [0, 0, 13, 0]]


def test_mined_rows_and_modalities_that_do_not_fit_are_refused():
    data = toy(mined=1)
    with pytest.raises(ValueError, match=r"rows=\(6, 2\): must have shape \(6, 1\)"):
        data.set_mined(torch.zeros(6, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"rows=0…6: must be from -1 to 5"):
        data.set_mined(torch.arange(1, 7)[:, None] * 0 + torch.tensor([[0]] * 5 + [[6]]))
    with pytest.raises(ValueError, match="negatives=text: must be of the same modalities as the positives, image"):
        toy(negatives=Negatives(Side(TokenRows([[1]], 2)), torch.zeros(20, 1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="rows=0: a data set needs at least one row"):
        PairDataset(Side(), Side(), torch.zeros(0))
    with pytest.raises(ValueError, match="negatives=20: must be given for each of rows=6"):
        toy(negatives=Negatives(Side(TokenRows([[1]], 2), Ramp()), torch.zeros(20, 1, dtype=torch.int64)))


def test_a_thin_picture_keeps_a_pixel_and_damaged_exif_turns_nothing(tmp_path):
    thin = picture(tmp_path / "thin.png", (3, 2000), colour=(255, 255, 255))
    padded = decoded(thin, 32, 3, "pad")
    assert padded[0].sum() == 32
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x01\x00\0\x05\0\0\0\x01\0\0\0\x00\0\0\0\0"
    Image.new("RGB", (8, 4)).save(tmp_path / "exif.jpg", exif=exif)
    assert problems([thin, tmp_path / "exif.jpg"]) == {}
    assert decoded(tmp_path / "exif.jpg", 4, 3, "resize").shape == (3, 4, 4)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(tmp_path, kind):
    Image.fromarray(np.full((4, 4), 200, kind)).save(tmp_path / "deep.tif")
    assert "pixels of 32 bits have no known range" in problems([tmp_path / "deep.tif"])[0]
    with pytest.raises(ValueError, match="32 bits"):
        decoded(tmp_path / "deep.tif", 4, 1, "resize")
