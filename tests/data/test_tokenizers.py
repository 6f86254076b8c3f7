import json
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ROOT, small_text
from trainerkit.data.tokenizers import ByteTokenizer, JsonTokenizer, bytes_between, load_tokenizer, train_bpe
from trainerkit.errors import UserError

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    text = small_text(tmp_path_factory.mktemp("text") / "a.txt")
    return JsonTokenizer(train_bpe([text], 300), "bpe")


def word_pieces(text, **added):
    """A tokenizer that loses blanks and case, and knows few words."""
    words = ["[UNK]", "[SEP]", "a", "x", "##x", "hello", "größe", "!", *added]
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    library.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.add_special_tokens(["[SEP]"])
    return JsonTokenizer(library.to_str(), "words.json")


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_bytes_come_back_as_they_were(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text) if text.isascii() else tokenizer.encode(text.encode(errors="ignore").decode())
    assert tokenizer.decode([tokenizer.end_of_text, *ids]) == text.encode(errors="ignore").decode()
    assert len(ids) == tokenizer.token_bytes[ids].sum() if ids else True


def test_half_a_character_becomes_the_replacement_character():
    assert ByteTokenizer().decode("ö".encode()[:1]) == "\ufffd"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=60, deadline=None)
def test_bpe_loses_nothing_and_its_tokens_spell_every_byte(bpe, text):
    [(ids, sizes)] = bpe.encode_many([text])
    assert sizes is None
    assert bpe.decode(ids.tolist()) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())
    assert bpe.encode(text) == ids.tolist()


def test_each_bpe_token_spells_as_many_bytes_as_its_text(bpe):
    for number in range(1, bpe.vocab_size):
        text = bpe.decode([number])
        if "\ufffd" not in text:
            assert bpe.token_bytes[number] == len(text.encode())
    assert bpe.token_bytes[bpe.end_of_text] == 0


def test_the_name_of_the_end_of_text_in_a_text_is_text(bpe):
    text = "a <|endoftext|> b"
    assert bpe.end_of_text not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text


def test_the_same_text_gives_the_same_bpe_in_another_process(tmp_path, bpe):
    path = tmp_path / "a.txt"
    small_text(path)
    code = (
        "import sys; from trainerkit.data.tokenizers import train_bpe;"
        "sys.stdout.buffer.write(train_bpe([open(sys.argv[1], encoding='utf-8', newline='').read()], 300).encode())"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    assert answer.stdout.decode() == bpe.content


def test_a_vocabulary_that_the_text_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=5000: the training text gives BPE no more than 2\d\d tokens"):
        train_bpe(["a b c a b c"], 5000)


def test_a_tokenizer_that_loses_blanks_is_given_all_bytes_of_the_text():
    tokenizer = word_pieces("")
    assert tokenizer.token_bytes is None
    for text in ("hello  a", "  Größe, xxx!\n\n", "日本 unknown 🙂x", "a"):
        [(ids, sizes)] = tokenizer.encode_many([text])
        assert len(ids) == len(sizes)
        assert sizes.sum() == len(text.encode())
        assert (sizes >= 0).all()


def naive_bytes(text, ends):
    sizes, before = [], 0
    for number, end in enumerate(ends):
        end = len(text) if number == len(ends) - 1 else max(end, before)
        sizes.append(len(text[before:end].encode()))
        before = end
    return sizes


def test_bytes_between_equals_a_loop():
    draw = np.random.default_rng(0)
    alphabet = np.array(list("aß日🙂 \n"))
    for _ in range(50):
        text = "".join(draw.choice(alphabet, draw.integers(1, 30)))
        ends = np.sort(draw.integers(0, len(text) + 1, draw.integers(1, 12)))
        assert bytes_between(text, ends).tolist() == naive_bytes(text, ends.tolist())


def test_bytes_between_adds_up_when_texts_are_joined():
    first, second = bytes_between("aß ", np.array([1, 2])), bytes_between("日b", np.array([1, 2]))
    joined = bytes_between("aß 日b", np.array([1, 2, 4, 5]))
    assert joined.sum() == first.sum() + second.sum() == len("aß 日b".encode())
    assert joined.tolist() == [1, 2, 4, 1]


def test_a_prefix_blank_that_the_text_does_not_have_is_not_counted():
    library = tokenizers.Tokenizer.from_str(train_bpe(["hello hello hello world"], 262))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = JsonTokenizer(library.to_str(), "prefix.json")
    [(_, sizes)] = tokenizer.encode_many(["hello world größe"])
    assert sizes.sum() == len("hello world größe".encode())


def test_a_tokenizer_without_added_tokens_or_pretokenizers_is_read():
    content = json.loads(train_bpe(["hello hello hello world"], 262))
    del content["added_tokens"]
    assert JsonTokenizer(json.dumps(content), "none.json").token_bytes is not None
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": []}
    tokenizer = JsonTokenizer(json.dumps(content), "empty.json")
    [(ids, sizes)] = tokenizer.encode_many(["hello world"])
    assert sizes.sum() == len("hello world")
    assert len(ids) == len(sizes)


def test_what_is_no_tokenizer_is_said_with_what_is_allowed(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer=bites: must be bytes or bpe, or .* Did you mean bytes\?"):
        load_tokenizer("bites")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: is no tokenizer\.json"):
        load_tokenizer(str(path))
    content = json.loads(train_bpe(["a b"], 258))
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"end_of_text=null: .* has no such token; name the one that separates documents"
    ):
        load_tokenizer(str(path))
    assert load_tokenizer(str(path), end_of_text="!").vocab_size == 258


def test_the_extra_that_the_docs_name_is_the_one_of_the_error():
    """An error names the first extra that brings a package (`extra_for`), the docs and configs name `text`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package in ("tokenizers", "zstandard"):
        assert next(name for name, needs in extras.items() if any(n.startswith(package) for n in needs)) == "text"
