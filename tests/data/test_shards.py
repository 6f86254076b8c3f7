"""Tokens on disk: the cache, real processes, and a real kill."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support import ROOT, small_text
from trainerkit.data import TextData
from trainerkit.data.shards import TokenStream
from trainerkit.errors import UserError

SHARD = 4000


def tokenise(path, cache, **options):
    data = TextData(str(path), cache_dir=str(cache), context_length=8, shard_bytes=SHARD, **options)
    return data.corpus


def tokens(corpus):
    return [corpus.stream(split).read(0, corpus.tokens[split]) for split in range(3)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(tokens(a), tokens(b), strict=True))


def finished(cache):
    """Each finished part's file and when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("text/*/0*.json")}


def start(path, cache, workers=1):
    code = (
        "import sys; from trainerkit.data import TextData;"
        f"TextData(sys.argv[1], cache_dir=sys.argv[2], context_length=8, shard_bytes={SHARD}, "
        "tokenize_workers=int(sys.argv[3])).prepare_data()"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(path), str(cache), str(workers)], cwd=ROOT)


def children(process):
    answer = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in answer.stdout.split()]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_process_loses_the_part_it_was_at_and_no_more(tmp_path, workers):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    small_text(path, words=40_000)
    process = start(path, cache, workers)
    while len(finished(cache)) < 5:
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.002)
    helpers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(cache)
    corpus = tokenise(path, cache)
    parts = len(corpus.job.parts)
    assert 5 <= len(before) < parts
    # A helper that was at a part may finish it, or find that its files are gone; what was finished is not done again.
    after = finished(cache)
    assert len(after) == parts
    assert all(after[name] == written for name, written in before.items())
    assert not list(cache.rglob(".*.tmp")) or helpers
    assert same(corpus, tokenise(path, tmp_path / "other"))
    assert len(helpers) == (workers if workers > 1 else 0)
    for _ in range(200):
        if not any(os.path.exists(f"/proc/{pid}") for pid in helpers):
            break
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in helpers)


def test_several_processes_write_what_one_does(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "a.txt"
    small_text(path, words=8000)
    one = tokenise(path, tmp_path / "one", tokenizer="bpe", vocab_size=290, tokenize_workers=1)
    two = tokenise(path, tmp_path / "two", tokenizer="bpe", vocab_size=290, tokenize_workers=2)
    assert len(one.job.parts) > 5
    assert same(one, two)
    assert one.bytes == two.bytes
    assert one.tokenizer.content == two.tokenizer.content


def test_an_error_of_another_process_is_the_one_of_this(tmp_path):
    path = tmp_path / "a.txt"
    text = small_text(path, words=8000).encode()
    place = text.index(b"\n", 9000) + 1
    path.write_bytes(text[:place] + b"\xff" + text[place:])
    for workers in (1, 2):
        with pytest.raises(UserError, match=rf"a\.txt: byte {place} is no UTF-8"):
            tokenise(path, tmp_path / f"cache{workers}", tokenize_workers=workers)


@pytest.fixture
def words(tmp_path):
    """The path of a tokenizer that leaves blanks out."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[SEP]": 1, "der": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["[SEP]"])
    library.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


@pytest.mark.parametrize("blank_at", ["the beginning", "the end", "both"])
def test_bytes_of_documents_without_a_token_are_not_lost(tmp_path, words, blank_at):
    first, last = blank_at != "the end", blank_at != "the beginning"
    texts = []
    for i in range(300):
        blank = " " * 50 + "\n" * i
        texts += [blank] * first + [f"der die das {i}"] + [blank + "\t"] * last
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = TextData(str(path), tokenizer=words, cache_dir=str(tmp_path / "cache"), context_length=8, shard_bytes=SHARD)
    corpus = data.corpus
    assert len(corpus.job.parts) > 3
    for split, name in enumerate(("train", "val", "test")):
        held = sum(len(text.encode()) for text in data.texts(name))
        stream = corpus.stream(split)
        tokens = stream.read(0, len(stream))
        assert corpus.bytes[split] == int(stream.sizes(0, tokens).sum()) == held


def test_a_text_of_blanks_alone_has_its_bytes_at_the_end_of_text(tmp_path, words):
    (tmp_path / "a.jsonl").write_text('{"text": "   "}\n' * 4)
    corpus = tokenise(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer=words, val_fraction=0.0, test_fraction=0.0)
    stream = corpus.stream(0)
    assert stream.sizes(0, stream.read(0, 4)).tolist() == [0, 0, 0, 12]
    assert corpus.bytes == (12, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_said_as_such_whoever_finds_it(tmp_path, workers):
    path = tmp_path / "a.txt"
    small_text(path, words=8000)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "from trainerkit.data import TextData; from trainerkit.errors import UserError\n"
        "try: TextData(sys.argv[1], cache_dir=sys.argv[2], shard_bytes=4000, tokenize_workers=int(sys.argv[3])).corpus\n"
        "except UserError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache"), str(workers)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "choose where by cache_dir=" in answer.stdout
    assert "memory" not in answer.stdout
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_ctrl_c_while_several_processes_tokenise_is_theirs_who_started_them(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    small_text(path, words=200_000)
    code = (
        "import sys; from trainerkit.data import TextData\n"
        f"data = TextData(sys.argv[1], cache_dir=sys.argv[2], shard_bytes={SHARD}, tokenize_workers=2)\n"
        "try: data.corpus\n"
        "except KeyboardInterrupt: print('stopped')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(cache)], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while len(finished(cache)) < 2:
        assert process.poll() is None, "it was over before it could be stopped"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all of them
    out, err = process.communicate(timeout=60)
    assert out == "stopped\n"
    assert "Traceback" not in err
    assert process.returncode == 0


def test_a_source_that_cannot_be_read_is_not_the_caches_fault(tmp_path):
    """Root may read everything; a file that vanishes between the listing and the hashing cannot be read by anyone."""
    path = tmp_path / "a.txt"
    small_text(path)
    data = TextData(str(path), cache_dir=str(tmp_path / "cache"))
    found = data.sources()
    path.unlink()
    data.sources = lambda: found
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(No such file") as raised:
        _ = data.corpus
    assert "cache_dir" not in str(raised.value)


def test_the_same_text_is_found_again_and_another_is_tokenised_anew(tmp_path, capsys):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    text = small_text(path)
    os.utime(path, (1, 1))
    first = tokenise(path, cache)
    assert "tokenising" in capsys.readouterr().err
    written = finished(cache)
    assert tokenise(path, cache).key == first.key
    assert finished(cache) == written
    assert capsys.readouterr().err == ""
    # The same size and place, another content and time.
    path.write_bytes(text.replace("wort", "Wort").encode())
    os.utime(path, (2, 2))
    changed = tokenise(path, cache)
    assert changed.key != first.key
    assert "a.txt has changed since it was last read: the text is tokenised anew" in capsys.readouterr().err
    assert not same(first, changed)
    # What was there before is not lost.
    path.write_bytes(text.encode())
    assert tokenise(path, cache).key == first.key
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "options", [{"val_fraction": 0.2}, {"tokenizer": "bpe", "vocab_size": 280}, {"split": "files"}]
)
def test_other_settings_have_other_tokens(tmp_path, options):
    if "tokenizer" in options:
        pytest.importorskip("tokenizers")
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    small_text(path)
    assert tokenise(path, cache).key != tokenise(path, cache, **options).key


def test_the_context_is_no_reason_to_tokenise_anew(tmp_path):
    small_text(tmp_path / "a.txt")
    keys = {
        TextData(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "c"), context_length=length, eval_stride=3, seed=length).corpus.key
        for length in (8, 64)
    }  # fmt: skip
    assert len(keys) == 1


@pytest.mark.parametrize("damage", ["short", "gone", "unsaid"])
def test_a_torn_shard_never_counts(tmp_path, damage):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    small_text(path)
    whole = tokens(tokenise(path, cache))
    shard = next(cache.rglob("000002.train.bin"))
    if damage == "short":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif damage == "gone":
        shard.unlink()
    else:
        next(cache.rglob("000002.json")).write_text('{"tokens": [')
    written = finished(cache)
    again = tokens(tokenise(path, cache))
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    assert [name for name, at in finished(cache).items() if written.get(name) != at] == ["000002.json"]


def test_a_text_that_changes_while_it_is_tokenised_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    small_text(path)
    corpus = tokenise(path, tmp_path / "cache")
    with path.open("ab") as file:
        file.write(b"more\n")
    with pytest.raises(UserError, match=r"a\.txt: has changed while it was tokenised; run the same command again"):
        list(corpus.job.pieces(0))


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    small_text(tmp_path / "a.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*choose where by cache_dir="):
        tokenise(tmp_path / "a.txt", tmp_path / "file")


def test_the_default_cache_is_where_the_system_wants_it(tmp_path, monkeypatch):
    small_text(tmp_path / "a.txt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (tmp_path / "xdg" / "trainerkit" / "text") in TextData(str(tmp_path / "a.txt")).corpus.job.folder.parents
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (tmp_path / "home" / ".cache") in TextData(str(tmp_path / "a.txt")).corpus.job.folder.parents


def test_large_vocabularies_take_four_bytes_and_small_ones_two(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "[SEP]": 1, **{f"w{i}": i for i in range(2, 70_000)}, "der": 70_000}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["[SEP]"])
    library.save(str(tmp_path / "large.json"))
    small_text(tmp_path / "a.txt")
    large = tokenise(tmp_path / "a.txt", tmp_path / "cache", tokenizer=str(tmp_path / "large.json"))
    small = tokenise(tmp_path / "a.txt", tmp_path / "cache")
    assert int(max(map(np.max, tokens(large)))) == 70_000
    for corpus, width in ((large, 4), (small, 2)):
        stored = sum(path.stat().st_size for path in corpus.job.folder.glob("*.bin"))
        assert stored == width * sum(corpus.tokens)


def test_a_stream_over_files_reads_as_one_array(tmp_path):
    draw = np.random.default_rng(0)
    arrays = [draw.integers(0, 9, size).astype(np.uint16) for size in (5, 0, 1, 12, 3)]
    paths = []
    for number, array in enumerate(arrays):
        paths.append(tmp_path / f"{number}.bin")
        array.tofile(paths[-1])
    stream = TokenStream(paths, np.dtype(np.uint16), 99, np.arange(100), None)
    whole = np.concatenate([*arrays, np.full(40, 99)])
    assert len(stream) == 21
    for opened in (stream, pickle.loads(pickle.dumps(stream))):
        for start_at in range(22):
            for count in (0, 1, 7, 30):
                found = opened.read(start_at, count)
                assert found.dtype == np.int64
                assert found.tolist() == whole[start_at : start_at + count].tolist()
    assert stream.sizes(3, stream.read(3, 4)).tolist() == whole[3:7].tolist()
    # What a worker process is given are places, not the tokens.
    assert b"memmap" not in pickle.dumps(stream)
