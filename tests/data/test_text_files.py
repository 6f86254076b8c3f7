import gzip
import json
import random
from pathlib import Path

import pytest

from trainerkit.data import text_pieces
from trainerkit.data.text_files import Source, draw_split, find_sources
from trainerkit.data.text_pieces import Segment, plan_parts, read_segment
from trainerkit.errors import UserError

TENTHS = (0.1, 0.1)


def all_pieces(sources, part_bytes=1 << 24, fractions=TENTHS, field="text"):
    parts = plan_parts(sources, part_bytes)
    return [piece for part in parts for s in part for piece in read_segment(s, sources[s.source], fractions, field)]


def documents(pieces):
    """(split, text) of each document; its pieces follow each other within a split."""
    found = []
    for piece in pieces:
        if piece.opens:
            found.append([piece.split, ""])
        assert found[-1][0] == piece.split
        found[-1][1] += piece.text
    return [tuple(document) for document in found]


def lines(count, seed=0):
    draw = random.Random(seed)
    words = ["oat", "rye", "größe", "日本", "🙂", "wheat"]
    return [" ".join(draw.choices(words, k=draw.randrange(1, 12))) for _ in range(count)]


def compressed(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data, mtime=0))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as `cat a.zst b.zst` gives
        path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])))
    else:
        path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("part_bytes", [700, 5000, 1 << 24])
def test_one_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, suffix, part_bytes):
    text = "\n".join(lines(600))
    path = compressed(tmp_path / f"a.txt{suffix}", text.encode())
    found = documents(all_pieces(find_sources([path], "auto"), part_bytes))
    assert [split for split, _ in found] == [0, 1, 2]
    assert "".join(part for _, part in found) == text
    shares = [len(part.encode()) / len(text.encode()) for _, part in found]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert all(part.endswith("\n") for _, part in found[:2])


@pytest.mark.parametrize("text", ["x" * 5000, "größe日本🙂" * 1500, "\r\n".join(["a", "b"] * 900), "\n\n\n", "a"])
@pytest.mark.parametrize("part_bytes", [64, 333, 1 << 24])
def test_text_without_lines_is_cut_between_characters(tmp_path, text, part_bytes):
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = all_pieces(find_sources([str(tmp_path / "a.txt")], "within"), part_bytes)
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[0].opens
    if len(text) > 100:
        assert [split for split, _ in documents(pieces)] == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_of_json_are_the_same_documents_however_the_work_is_cut(tmp_path, suffix):
    texts = lines(400)
    content = "\n".join(json.dumps({"id": i, "body": text}) + "\n" * (i % 3 == 0) for i, text in enumerate(texts))
    path = compressed(tmp_path / f"a.jsonl{suffix}", content.encode())
    expected = [(draw_split(text.encode(), TENTHS), text) for text in texts]
    for part_bytes in (100, 3000, 1 << 24):
        found = all_pieces(find_sources([path], "auto"), part_bytes, field="body")
        assert [(piece.split, piece.text) for piece in found] == expected
        assert all(piece.opens for piece in found)


def test_parts_are_of_the_size_that_is_asked_for(tmp_path):
    (tmp_path / "large.txt").write_text("\n".join(lines(900)), encoding="utf-8")
    for i in range(30):
        (tmp_path / f"small{i}.txt").write_text("\n".join(lines(5)), encoding="utf-8")
    sources = find_sources([str(tmp_path)], "auto")
    parts = plan_parts(sources, 4000)
    sizes = [sum((s.stop or sources[s.source].path.stat().st_size) - s.start for s in part) for part in parts]
    assert sum(sizes) == sum(source.path.stat().st_size for source in sources)
    assert all(4000 <= size <= 8200 for size in sizes[:-1])


def test_a_files_split_depends_on_its_name_alone_and_shares_are_kept():
    names = [f"folder/file{i}.py" for i in range(20_000)]
    splits = [draw_split(name.encode(), (0.1, 0.2)) for name in names]
    assert [splits.count(k) / len(names) for k in range(3)] == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    # A larger share takes more, and gives none back.
    larger = [draw_split(name.encode(), (0.2, 0.3)) for name in names]
    assert all(after == before for before, after in zip(splits, larger, strict=True) if before)


def test_a_tenth_is_held_out_by_the_last_digit_of_the_hash():
    import hashlib

    for name in (f"{i}.py".encode() for i in range(500)):
        number = int(hashlib.md5(name).hexdigest(), 16)
        assert draw_split(name, (0.1, 0.0)) == (number % 10 == 0)
        assert draw_split(name, (0.0, 0.3)) == 2 * (number % 10 >= 7)


def test_adding_files_moves_none_to_another_split(tmp_path):
    for i in range(25):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n")
    before = {p.text: p.split for p in all_pieces(find_sources([str(tmp_path)], "files"))}
    for i in range(25, 60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n")
    after = {p.text: p.split for p in all_pieces(find_sources([str(tmp_path)], "files"))}
    assert len(before) == 25
    assert before.items() <= after.items()


def test_from_sixty_files_on_whole_files_are_held_out_and_no_split_is_without(tmp_path):
    for count in (59, 60):
        for i in range(count):
            (tmp_path / f"{i}.txt").write_text(f"text {i}\n")
        (tmp_path / "lines.jsonl").write_text("")
        modes = {source.mode for source in find_sources([str(tmp_path)], "auto") if source.path.suffix == ".txt"}
        assert modes == {"cut" if count < 60 else "file"}
    draws = [{draw_split(f"{draw}/{i}.txt".encode(), TENTHS) for i in range(60)} for draw in range(1000)]
    assert sum(len(found) < 3 for found in draws) < 15


def test_what_a_run_wrote_is_no_text_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "text.txt",
        "runs/notes.md",
        "runs/lm/1/config.yaml",
        "runs/lm/1/overrides.txt",
        "project/config.yaml",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x\n")
    before = find_sources(["."], "auto")
    for name in ("runs/lm/1/samples/a.txt", "runs/lm/1/metrics.csv"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x\n")
    assert find_sources(["."], "auto") == before
    assert [source.name for source in before] == ["project/config.yaml", "runs/notes.md", "text.txt"]
    # Who wants it names it.
    assert [source.name for source in find_sources(["runs/lm/1/samples"], "auto")] == ["a.txt"]
    with pytest.raises(UserError, match="path=runs/lm: the folder has no text in it .*; what runs wrote is left out"):
        find_sources(["runs/lm"], "auto")


def test_folders_give_known_suffixes_in_order_and_patterns_anything(tmp_path):
    for name in ("b/z.txt", "a.md", "b/c.py.gz", "picture.png", ".hidden/x.txt", "b/.secret.txt", "notes.foo"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert [source.name for source in find_sources([str(tmp_path)], "auto")] == ["a.md", "b/c.py.gz", "b/z.txt"]
    found = find_sources([f"{tmp_path}/*.foo", str(tmp_path / "b" / "z.txt"), f"{tmp_path}/**/z.txt"], "auto")
    assert [source.name for source in found] == ["notes.foo", "z.txt"]
    assert {source.mode for source in found} == {"cut"}


@pytest.mark.parametrize("given", ["nowhere.txt", "nowhere/*.txt", "empty", "pictures"])
def test_what_is_not_there_is_said(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    messages = {
        "nowhere.txt": "path=nowhere.txt: there is no such file or folder",
        "nowhere/*.txt": "no file matches this pattern",
        "empty": "path=empty: the folder has no text in it",
        "pictures": "by suffix there are 1 .png; a pattern takes any",
    }
    with pytest.raises(UserError, match=messages[given].replace("*", r"\*")):
        find_sources([given], "auto")


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\n" * 9 + b"x\0y\n", r"a\.txt: is a binary file, not text \(byte 37 is zero\)"),
        ("a.txt", b"abc\n" * 9 + b"gr\xf6\xdfe\n", r"a\.txt: byte 38 is no UTF-8 .* iconv"),
        (
            "a.jsonl",
            GOOD * 3 + b'{"body": 1}\n',
            r"a\.jsonl: line 4 has no field 'text'; it has 'body'; choose by field=",
        ),
        ("a.jsonl", GOOD + b"\n" + b"{oops}\n", r"a\.jsonl: line 3 is no JSON"),
        ("a.jsonl", GOOD * 2 + b'{"text": 7}\n', r"line 3 has a int in the field 'text'; needed is text"),
        ("a.jsonl", b"[1]\n", r"line 1 is a list; needed is an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1 has half a character"),
        ("a.txt", "größe\n".encode("utf-16"), r"a\.txt: is UTF-16, needed is UTF-8.*iconv -f UTF-16"),
        ("a.txt", "日本\u3000日本".encode("utf-16-be").join([b"\xfe\xff", b""]), r"a\.txt: is UTF-16, needed"),
        ("a.txt.gz", gzip.compress(b"abc\n" * 99, mtime=0)[:-20], r"a\.txt\.gz: cannot be read"),
        ("a.txt.zst", b"no archive", r"a\.txt\.zst: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    for part_bytes in (10, 1 << 24):
        with pytest.raises(UserError, match=message):
            all_pieces(find_sources([str(tmp_path / name)], "within"), part_bytes)


def test_an_archive_that_ends_early_is_no_shorter_text(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.ZstdCompressor().compress("\n".join(lines(300)).encode())
    path = tmp_path / "a.txt.zst"
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="it ends in the middle of a frame"):
        list(read_segment(Segment(0, 0, None), Source(path, "a", "file"), TENTHS, "text"))


def test_a_frame_that_ends_where_a_read_does_is_followed_by_the_next(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.ZstdCompressor().compress(part) for part in (b"one\n" * 50, b"two\n", b"three\n")]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(frames))
    for size in range(1, len(frames[0]) + 2):
        monkeypatch.setattr(text_pieces, "_PIECE_BYTES", size)
        pieces = read_segment(Segment(0, 0, None), Source(path, "a", "file"), TENTHS, "text")
        assert "".join(piece.text for piece in pieces) == "one\n" * 50 + "two\nthree\n"


def test_an_archive_with_a_longer_window_than_usual_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)  # 27 is usual
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    head = stream.compress(b"text\n") + stream.flush()
    (tmp_path / "a.txt.zst").write_bytes(head)
    pieces = read_segment(Segment(0, 0, None), Source(tmp_path / "a.txt.zst", "a", "file"), TENTHS, "text")
    assert "".join(piece.text for piece in pieces) == "text\n"


def test_a_byte_order_mark_before_lines_of_json_is_no_part_of_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD * 2)
    for part_bytes in (10, 1 << 24):
        found = all_pieces(find_sources([str(tmp_path / "a.jsonl")], "auto"), part_bytes)
        assert [piece.text for piece in found] == ["a", "a"]


def test_a_line_is_put_together_once_however_long_it_is(tmp_path, monkeypatch):
    """Copying what is there with each chunk made the time of a line grow with the square of its length."""
    monkeypatch.setattr(text_pieces, "_PIECE_BYTES", 10)
    copied = 0

    class Counting(bytes):
        def __radd__(self, before):
            nonlocal copied
            copied += len(before) + len(self)
            return before + bytes(self)

    original = text_pieces._chunks
    monkeypatch.setattr(text_pieces, "_chunks", lambda *given: map(Counting, original(*given)))
    line = json.dumps({"text": "x" * 5000}).encode()
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + line)
    found = list(text_pieces._lines(tmp_path / "a.jsonl", 0, None))
    assert found == [(0, line), (len(line) + 1, line)]
    assert copied < 4 * len(line)
