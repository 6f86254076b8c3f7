import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainerkit.data.hashed_words import HashedWords
from trainerkit.data.task_embeddings import (
    HashedNgrams,
    OneHot,
    PrecomputedEmbeddings,
    SentenceEmbeddings,
    checked,
    embed_library,
)
from trainerkit.errors import UserError

TRAIN = ["answer yes if it is red", "say yes if it is red and not round", "is it blue and blue and blue?", "round"]


def naive(text, train, *, dim, word_ngrams, sublinear, idf, min_count, seed):
    """The definition, in Python's floats, token by token."""
    words = HashedWords(2 * dim, word_ngrams=word_ngrams, seed=seed)
    vector = [0.0] * dim
    tokens = words.encode(text)
    for token in set(tokens):
        having = sum(token in words.encode(other) for other in train)
        if having < min_count:
            continue
        weight = 1 + math.log(tokens.count(token)) if sublinear else tokens.count(token)
        if idf:
            weight *= math.log((1 + len(train)) / (1 + having)) + 1
        vector[(token - 1) // 2] += weight * (-1 if (token - 1) % 2 else 1)
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length if length else 0.0 for value in vector]


@pytest.mark.parametrize("word_ngrams", [1, 3])
@pytest.mark.parametrize("sublinear", [False, True])
@pytest.mark.parametrize(("idf", "min_count"), [(False, 0), (True, 1), (True, 2)])
@pytest.mark.parametrize("dim", [5, 64])  # with and without much falling together
def test_hashed_ngrams_are_the_naive_sum(word_ngrams, sublinear, idf, min_count, dim):
    options = {"word_ngrams": word_ngrams, "sublinear": sublinear, "idf": idf, "min_count": min_count, "seed": 3}
    embedding = HashedNgrams(dim, **options)
    embedding.fit(TRAIN)
    texts = [*TRAIN, "is it red, red or green?"]
    expected = torch.tensor([naive(text, TRAIN, dim=dim, **options) for text in texts], dtype=torch.float64)
    torch.testing.assert_close(embedding(texts).double(), expected, rtol=1e-5, atol=1e-6)


def test_hashed_ngrams_have_length_one_whatever_the_case_the_signs_and_the_company():
    embedding = HashedNgrams(256)
    embedding.fit(TRAIN)
    both = embedding(TRAIN)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(4))
    assert torch.equal(embedding(["Say: YES, if it is red and not round!"])[0], both[1])
    assert torch.equal(embedding(TRAIN[2:3])[0], both[2])
    assert torch.equal(embedding(TRAIN), HashedNgramsTwin(TRAIN))


def HashedNgramsTwin(texts):
    other = HashedNgrams(256)
    other.fit(texts)
    return other(texts)


def test_words_that_no_training_description_has_change_nothing():
    embedding = HashedNgrams(4096, word_ngrams=1)
    embedding.fit(TRAIN)
    known, framed = embedding(["red and round", "red whenever and furthermore round"])
    assert torch.equal(known, framed)
    assert embedding(["whenever furthermore"]).abs().sum() == 0
    keeping = HashedNgrams(4096, word_ngrams=1, min_count=0)
    keeping.fit(TRAIN)
    known, framed = keeping(["red and round", "red whenever and furthermore round"])
    assert not torch.equal(known, framed)


def test_the_order_of_words_matters_from_two_word_ngrams_on():
    texts = ["not red and round", "red and not round"]
    one, two = HashedNgrams(4096, word_ngrams=1, min_count=0), HashedNgrams(4096, word_ngrams=2, min_count=0)
    torch.testing.assert_close(*one(texts))
    assert (two(texts)[0] - two(texts)[1]).norm() > 0.1


def test_letters_bring_misspelt_words_near():
    near, far = HashedNgrams(4096, char_ngrams=(3, 4), min_count=0), HashedNgrams(4096, min_count=0)
    texts = ["rectangular", "rectangulr"]
    assert near(texts).prod(0).sum() > 0.4
    assert far(texts).prod(0).sum() == 0


def test_what_was_fitted_is_kept_in_a_state():
    fitted, other = HashedNgrams(64), HashedNgrams(64)
    fitted.fit(TRAIN)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(TRAIN), fitted(TRAIN))
    with pytest.raises(ValueError, match="dim=32: must be what was trained with, 64"):
        HashedNgrams(32).load_state_dict(fitted.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0: must be 1 or more"),
        ({"word_ngrams": 0}, "word_ngrams=0: must be 1 or more"),
        ({"char_ngrams": (3, 2)}, r"char_ngrams=\[3, 2\]: must be"),
        ({"min_count": -1}, "min_count=-1: must be 0 or more"),
    ],
)
def test_impossible_hashes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HashedNgrams(**options)


def test_one_hot_knows_the_adapter_alone():
    embedding = OneHot()
    embedding.fit(["a"])
    rows = embed_library(embedding, ["a", "b", "a"], [2, 0, 2], 3)
    assert torch.equal(rows, torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 1]]))
    assert embedding.dim == 3
    with pytest.raises(UserError, match="description=red: OneHot reads no texts"):
        embedding(["red"])
    with pytest.raises(ValueError, match="dim: is known once the library was read"):
        _ = OneHot().dim


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_precomputed_rows_stand_for_the_descriptions_in_their_order(tmp_path, kind):
    rows = torch.randn(3, 5)
    path = tmp_path / f"rows.{kind}"
    np.save(path, rows.double().numpy()) if kind == "npy" else save_file({"x": rows}, path)
    embedding = PrecomputedEmbeddings(str(path))
    assert embedding.dim == 5
    embedding.fit(["a"])
    assert torch.equal(embed_library(embedding, ["a", "b", "c"], [0, 0, 1], 2), rows)
    assert torch.equal(embedding(["c", "a"]), rows[[2, 0]])
    torch.testing.assert_close(
        embed_library(PrecomputedEmbeddings(str(path), normalize=True), ["a", "b", "c"], [0, 0, 1], 2).norm(dim=1),
        torch.ones(3),
    )
    with pytest.raises(UserError, match="description=d: the library has none like it"):
        embedding(["d"])
    with pytest.raises(UserError, match=r"rows\.\w+: has 3 rows, and the library 2 descriptions"):
        embed_library(embedding, ["a", "b"], [0, 0], 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(3, "float32"), r"has \(3,\) torch.float32: must be floats \(descriptions, numbers\)"),
        (np.zeros((3, 2), "int64"), "torch.int64: must be floats"),
        (np.array([[1.0, 2.0], [np.nan, 0.0]]), "not finite, first in row 1"),
        (np.array([["a"]], dtype=object), "cannot be read"),
    ],
)
def test_files_that_hold_no_vectors_are_refused(tmp_path, content, message):
    np.save(tmp_path / "rows.npy", content, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        PrecomputedEmbeddings(str(tmp_path / "rows.npy"))


def test_other_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"rows.npy: cannot be read"):
        PrecomputedEmbeddings(str(tmp_path / "rows.npy"))
    with pytest.raises(UserError, match=r"must be a .npy or .safetensors file"):
        PrecomputedEmbeddings(str(tmp_path / "rows.csv"))
    save_file({"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)}, tmp_path / "rows.safetensors")
    with pytest.raises(UserError, match=r"has 2 tensors: must be one"):
        PrecomputedEmbeddings(str(tmp_path / "rows.safetensors"))


class Wrong:
    dim = 3

    def __init__(self, given):
        self.given = given

    def fit(self, train_texts):
        pass

    def __call__(self, texts):
        return self.given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 4), r"embedding=Wrong: gave \(2, 4\) torch.float32: must be \(2, 3\) of floats"),
        (torch.zeros(2, 3, dtype=torch.int64), "torch.int64: must be"),
        (torch.full((2, 3), math.inf), "not finite"),
    ],
)
def test_what_an_embedding_of_the_users_gives_is_checked(given, message):
    with pytest.raises(ValueError, match=message):
        embed_library(Wrong(given), ["a", "b"], [0, 1], 2)
    assert checked(Wrong(None), torch.zeros(2, 3, dtype=torch.float64), 2).dtype == torch.float32


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    package = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sentences")
    ids = {"<pad>": 0, "<unk>": 1, "red": 2, "round": 3, "and": 4}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(source)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    BertModel(config).save_pretrained(source)
    network = package.SentenceTransformer(str(source), device="cpu")
    network.save(str(folder))
    return network.eval(), str(folder)


def test_sentence_embeddings_are_those_of_the_model(sentences):
    theirs, folder = sentences
    texts = ["red", "round and red", "red and round"]
    embedding = SentenceEmbeddings(folder, batch_size=2)
    assert embedding.dim == 12
    expected = theirs.encode(texts, convert_to_tensor=True, show_progress_bar=False, normalize_embeddings=True)
    found = embedding(texts)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert not found.is_inference()
    prefixed = SentenceEmbeddings(folder, prefix="red and ", normalize=False)(["round"])
    torch.testing.assert_close(torch.nn.functional.normalize(prefixed)[0], found[2])


def test_models_that_are_not_there_are_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match=f"name_or_path={tmp_path}: "):
        _ = SentenceEmbeddings(str(tmp_path)).dim
    with pytest.raises(ValueError, match="batch_size=0: must be 1 or more"):
        SentenceEmbeddings("x", batch_size=0)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"sentence_transformers, which is not installed:[\s\S]*pretrained"):
        SentenceEmbeddings("x")(["red"])
