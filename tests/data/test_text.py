import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

from tests.support import small_text, toy_trainer, two_processes
from trainerkit.callbacks import ExactResume
from trainerkit.data import StdlibText, TextData
from trainerkit.data.prompts import read_prompts
from trainerkit.data.text_files import draw_split
from trainerkit.data.windows import training_windows
from trainerkit.errors import UserError

END = 256


@pytest.fixture
def folder(tmp_path):
    """Thirty files."""
    for i in range(30):
        small_text(tmp_path / "texts" / f"{i:02}.txt", words=60 + 4 * i, seed=i)
    return tmp_path / "texts"


def make(folder, **options):
    defaults = {"context_length": 16, "batch_size": 4, "split": "files", "cache_dir": str(folder.parent / "cache")}
    options = defaults | options
    data = TextData(str(folder), **options)
    data.prepare_data()
    data.setup("fit")
    return data


def naive_stream(folder, split, fractions=(0.1, 0.1)):
    """End of text and bytes, file by file."""
    tokens = []
    for path in sorted(Path(folder).rglob("*.txt")):
        if draw_split(path.relative_to(folder).as_posix().encode(), fractions) == split:
            tokens += [END, *path.read_bytes()]
    return tokens


def joined(loader, name):
    return torch.cat([batch[name] for batch in loader])


@pytest.mark.parametrize("stride", [None, 1, 5, 16])
@pytest.mark.parametrize("shard_bytes", [1500, 1 << 24])
def test_evaluation_counts_each_token_once_with_what_came_before_it(folder, stride, shard_bytes):
    data = make(folder, eval_stride=stride, shard_bytes=shard_bytes, val_fraction=0.2)
    stream = [*naive_stream(folder, 1, (0.2, 0.1)), END]
    counted = []
    for batch in data.val_dataloader():
        for tokens, targets, n_bytes, index in zip(
            *(batch[k] for k in ("tokens", "targets", "n_bytes", "index")), strict=True
        ):
            start = int(index) * (stride or 16)
            assert tokens.tolist() == (stream[:-1] + [END] * 16)[start : start + 16]
            places = [start + 1 + k for k in range(16) if targets[k] != -100]
            assert [stream[place] for place in places] == targets[targets != -100].tolist()
            assert int(n_bytes) == sum(stream[place] != END for place in places)
            counted += places
    assert counted == list(range(1, len(stream)))


def test_bytes_of_the_targets_sum_to_the_bytes_of_the_files_whatever_the_tokenizer(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[SEP]": 1, "der": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["[SEP]"])
    library.save(str(tmp_path / "words.json"))
    held_out = sum(token != END for token in naive_stream(folder, 1))
    for options in (
        {"tokenizer": "bytes"},
        {"tokenizer": "bpe", "vocab_size": 280, "eval_stride": 3},
        {"tokenizer": str(tmp_path / "words.json"), "eval_stride": 7},
    ):
        data = make(folder, **options)
        assert int(joined(data.val_dataloader(), "n_bytes").sum()) == held_out == data.corpus.bytes[1]
        counted = (joined(data.val_dataloader(), "targets") != -100).sum()
        assert int(counted) == data.corpus.tokens[1]
    assert "".join(data.texts("val")).encode() == bytes(token for token in naive_stream(folder, 1) if token != END)


@pytest.mark.parametrize("shift", [False, True])
def test_training_windows_are_disjoint_and_come_from_the_training_text(folder, shift):
    data = make(folder, shift_windows=shift)
    stream = [*naive_stream(folder, 0), END]
    loader = data.train_dataloader()
    shifts = set()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        tokens, targets = (torch.cat([batch[name] for batch in batches]) for name in ("tokens", "targets"))
        index = torch.cat([batch["index"] for batch in batches])
        assert sorted(index.tolist()) == list(range(len(tokens)))
        assert index.tolist() != sorted(index.tolist())
        whole = tokens[index.argsort()].flatten().tolist()
        first = next(k for k in range(17) if stream[k : k + len(whole)] == whole)
        shifts.add(first)
        assert targets[index.argsort()].flatten().tolist() == stream[first + 1 : first + 1 + len(whole)]
        assert len(stream) - 1 - len(whole) < (32 if shift else 16)
    assert (shifts == {0}) != shift


def test_windows_shifted_by_all_that_is_allowed_stay_in_the_text():
    for length in (1, 4, 7):
        for tokens in range(length, 60):
            for shift in (False, True):
                windows, slack = training_windows(tokens, length, shift)
                assert windows >= 1
                assert 1 <= slack <= length
                assert windows * length + slack - 1 <= tokens
                assert tokens - windows * length < 2 * length


def test_separate_documents_equal_each_document_on_its_own(folder):
    data = make(folder, documents="separate", context_length=200)
    rows = [
        (row["tokens"][k], row["targets"][k], row["document"][k])
        for row in data.val_dataloader()
        for k in range(len(row["tokens"]))
    ]
    pairs, row_pairs = [], []
    for tokens, targets, document in rows:
        assert document[0] == 0
        for number in range(int(document[-1]) + 1):
            chosen = (document == number) & (targets != -100)
            row_pairs += list(zip(tokens[chosen].tolist(), targets[chosen].tolist(), strict=True))
            # Within a row's document, each target is the next token of that same document, or its end.
            inside = tokens[document == number].tolist()
            wanted = targets[document == number].tolist()
            assert all(t in (-100, i) for t, i in zip(wanted, inside[1:], strict=False))
            assert inside.count(END) <= 1
    for path in sorted(folder.glob("*.txt")):
        if draw_split(path.name.encode(), (0.1, 0.1)) == 1:
            document = [END, *path.read_bytes(), END]
            pairs += list(pairwise(document))
    assert row_pairs == pairs


class _Tokens(LightningModule):
    """Learns how often each byte comes, and remembers what it saw."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(257))
        self.seen = []
        self.stop_after = stop_after

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["tokens"].flatten().tolist())
        return torch.nn.functional.cross_entropy(
            self.logits.expand(batch["targets"].numel(), -1), batch["targets"].flatten()
        )

    def validation_step(self, batch, batch_idx):
        self.log("val/bytes", batch["n_bytes"].float().mean())

    def on_train_batch_end(self, *_):
        if self.global_step == self.stop_after:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "cut.ckpt")
            raise KeyError("killed")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumed_in_mid_epoch_sees_the_same_shifted_windows(folder, tmp_path, workers):
    def fit(where, stop_after=None, resume=None, **options):
        module = _Tokens(stop_after)
        trainer = toy_trainer(tmp_path / where, [ExactResume()], max_epochs=2, limit_val_batches=0)
        data = make(folder, batch_size=64, num_workers=workers, **options)
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return module

    whole = fit("whole")
    steps = len(whole.seen)
    cut = steps // 2 + 3
    with pytest.raises(KeyError, match="killed"):
        fit("cut", stop_after=cut)
    rest = fit("cut", resume=tmp_path / "cut" / "cut.ckpt")
    assert rest.seen == whole.seen[cut:]
    assert torch.equal(rest.logits, whole.logits)

    if workers:  # what follows does not depend on them
        return
    for options, message in (
        ({"seed": 1}, "seed=1: the checkpoint stands in the middle of an epoch with seed=0"),
        (
            {"context_length": 8},
            "context_length=8: the checkpoint stands in the middle of an epoch with context_length=16",
        ),
        ({"shift_windows": False}, "shift_windows=False: the checkpoint stands in the middle of an epoch with .*=True"),
    ):
        with pytest.raises(ValueError, match=message):
            fit("cut", resume=tmp_path / "cut" / "cut.ckpt", **options)
    (folder / "new.txt").write_text("one more\n")
    with pytest.raises(UserError, match=r"path=.*texts: the text, how it is split, or shard_bytes has changed since"):
        fit("cut", resume=tmp_path / "cut" / "cut.ckpt")


def test_prompts_come_in_order_padded_on_the_left(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("def\n\nöl\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"text": "def"}\n\n{"text": ""}\n{"text": "öl"}\n', encoding="utf-8")
    for name in ("prompts.txt", "prompts.jsonl"):
        data = TextData("nowhere.txt", prompt_file=str(tmp_path / name), context_length=8, batch_size=2)
        batches = list(data.predict_dataloader())
        assert torch.cat([b["prompt"] for b in batches]).tolist() == [
            [END, *b"def"], [END] * 4, [END, *"öl".encode()],
        ]  # fmt: skip
        assert torch.cat([b["length"] for b in batches]).tolist() == [4, 1, 4]
        assert torch.cat([b["index"] for b in batches]).tolist() == [0, 1, 2]
    empty = next(iter(TextData("nowhere.txt").predict_dataloader()))
    assert (empty["prompt"].tolist(), empty["length"].tolist()) == ([[END]], [1])


@pytest.mark.parametrize("break_", ["\u2028", "\x85"])
def test_only_a_line_feed_ends_a_prompt(tmp_path, break_):
    (tmp_path / "p.txt").write_text(f"a{break_}b\nc\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(f'{{"text": "a{break_}b"}}\n{{"text": "c"}}\n', encoding="utf-8")
    for name in ("p.txt", "p.jsonl"):
        assert read_prompts(str(tmp_path / name), "text") == [f"a{break_}b", "c"]


def test_a_checkpoint_brings_its_tokenizer_for_prediction(folder, tmp_path):
    pytest.importorskip("tokenizers")
    state = json.loads(json.dumps(make(folder, tokenizer="bpe", vocab_size=270).state_dict()))
    shutil.rmtree(folder)

    class Predicting:
        world_size, global_rank = 1, 0
        strategy = None

        class state:
            fn = "predict"

    data = TextData(str(folder), tokenizer="bpe", vocab_size=270, prompt="größe", cache_dir=str(tmp_path / "other"))
    data.trainer = Predicting()
    data.prepare_data()
    data.setup("predict")
    data.load_state_dict(state)
    batch = next(iter(data.predict_dataloader()))
    assert data.tokenizer.decode(batch["prompt"][0].tolist()) == "größe"
    assert not (tmp_path / "other").exists()


def test_the_standard_library_is_split_by_file_and_has_no_tests(tmp_path):
    data = StdlibText(tokenizer="bytes", vocab_size=None, cache_dir=str(tmp_path))
    sources = data.sources()
    names = [source.name for source in sources]
    assert names == sorted(names)
    assert len(names) > 400
    assert {"abc.py", "json/decoder.py"} <= set(names)
    assert not any("test" in Path(name).parts or "site-packages" in name for name in names)
    held_out = sum(s.path.stat().st_size for s in sources if draw_split(s.name.encode(), (0.1, 0.0)) == 1)
    assert 0.03 < held_out / sum(s.path.stat().st_size for s in sources) < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": "apart"}, "documents=apart: must be one of packed, separate"),
        ({"split": "random"}, "split=random: must be one of auto, files, within"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: must be from 0 to below 1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction=0.5: with val_fraction=0.5 nothing is left"),
        ({"context_length": 0}, "context_length=0: must be 1 or more"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
        ({"num_workers": -1}, "num_workers=-1: must be 0 or more"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"tokenize_workers": -2}, "tokenize_workers=-2: must be 1 or more"),
        ({"eval_stride": 300}, "eval_stride=300: must be from 1 to context_length=256, or null"),
        ({"prompt": "a", "prompt_file": "b"}, "prompt_file=b: give a prompt or a file of them, not both"),
        ({"path": ""}, "path='': needed is a file, a folder .* or a pattern"),
        ({"path": ["a.txt", ""]}, "needed is a file, a folder .* or a pattern"),
        ({"end_of_text": "</s>"}, "end_of_text=</s>: tokenizer=bytes has its own; say null"),
        ({"end_of_text": "</s>", "tokenizer": "bpe"}, "end_of_text=</s>: tokenizer=bpe has its own; say null"),
        ({"vocab_size": 300}, "vocab_size=300: tokenizer=bytes has 257; say null, or tokenizer=bpe"),
        ({"tokenizer": "bpe", "vocab_size": 257}, "vocab_size=257: must be above 257"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextData(**({"path": "a.txt"} | options))


def test_too_little_text_is_said_for_the_split_that_lacks_it(folder):
    with pytest.raises(UserError, match=r"context_length=99999: \d+ tokens of the text are there to train on"):
        make(folder, context_length=99_999)
    with pytest.raises(
        UserError,
        match=r"val_fraction=0.1: \d+ tokens of the text are there to validate on.*split=within, or val_fraction=0 with",
    ):
        make(folder, context_length=9_000)
    assert make(folder, context_length=9_000, val_fraction=0.0, test_fraction=0.0).val_dataloader() == []


def test_prompts_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "a"}\n')
    for options, message in (
        ({"prompt_file": str(tmp_path / "no.txt")}, "no.txt: cannot be read"),
        ({"prompt_file": str(tmp_path / "empty.txt")}, "empty.txt: is empty"),
        ({"prompt_file": str(tmp_path / "bad.jsonl")}, "line 2 is no object of JSON with text in the field 'text'"),
        ({"prompt": "x" * 256}, "prompt: 257 tokens, the end of text among them; allowed are context_length=256"),
    ):
        with pytest.raises(UserError, match=message):
            TextData("nowhere.txt", **options).predict_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 16, "split": "within"}, r"val_fraction=0.1: \d+ tokens .* for each of 9 processes"),
        ({"context_length": 100, "val_fraction": 0}, r"context_length=100: \d+ tokens .* train on, .* each of 9"),
    ],
)
def test_fewer_windows_than_processes_are_refused(folder, options, message):
    class Nine:
        world_size, global_rank = 9, 0
        strategy = None

    cache = str(folder.parent / "cache")
    data = TextData(str(folder / "29.txt"), cache_dir=cache, test_fraction=0.0, **options)
    data.setup("fit")
    data.trainer = Nine()
    with pytest.raises(UserError, match=message):
        data.setup("fit")


def test_fewer_prompts_than_processes_are_refused(tmp_path):
    class Two:
        world_size, global_rank = 2, 0
        strategy = None

    (tmp_path / "prompts.txt").write_text("a\nb\n")
    for options in ({"prompt": "a"}, {}):
        data = TextData("nowhere.txt", **options)
        data.trainer = Two()
        with pytest.raises(UserError, match="prompt: each of 2 processes needs a prompt, and there are 1"):
            data.predict_dataloader()
    data = TextData("nowhere.txt", prompt_file=str(tmp_path / "prompts.txt"))
    data.trainer = Two()
    assert len(data.predict_dataloader()) == 1


def test_a_run_on_a_learnt_bpe_goes_on_with_its_tokenizer_json(folder):
    pytest.importorskip("tokenizers")

    class Fitting:
        class state:
            fn = "fit"

    learnt = make(folder, tokenizer="bpe", vocab_size=270)
    state = learnt.state_dict()
    given = TextData(
        str(folder),
        split="files",
        tokenizer=str(learnt.corpus.job.folder / "tokenizer.json"),
        cache_dir=str(folder.parent / "cache"),
    )
    given.trainer = Fitting()
    given.load_state_dict(state)
    assert given.corpus.tokens == learnt.corpus.tokens
    other = TextData(
        str(folder),
        split="files",
        tokenizer="bpe",
        vocab_size=270,
        cache_dir=str(folder.parent / "cache"),
        shard_bytes=999,
    )
    other.trainer = Fitting()
    with pytest.raises(UserError, match="the text, how it is split, or shard_bytes has changed"):
        other.load_state_dict(state)


def test_two_ranks_tokenise_once_and_share_each_batch(folder, tmp_path, capfd):
    def work(rank):
        module = _Tokens()
        trainer = toy_trainer(tmp_path / f"ddp{rank}", max_epochs=1, devices=2, strategy="ddp", limit_val_batches=0)
        trainer.fit(module, datamodule=TextData(
            str(folder), split="files", context_length=16, batch_size=32, cache_dir=str(tmp_path / "cache")
        ))  # fmt: skip
        return [np.reshape(step, (-1, 16)).tolist() for step in module.seen]

    first, second = (outcome["result"] for outcome in two_processes(work, tmp_path / "out"))
    assert capfd.readouterr().err.count("trainerkit: tokenising 30 files") == 1
    alone = [batch["tokens"].tolist() for batch in make(folder, batch_size=64).train_dataloader()]
    assert len(alone) == len(first) == len(second) > 5
    for one, a, b in zip(alone[:-1], first, second, strict=False):
        assert sorted(a + b) == sorted(one)
    # The last batch may hold a row twice, so that both have as many.
    assert {*map(tuple, first[-1] + second[-1])} >= {*map(tuple, alone[-1])}
    assert 0 <= len(first[-1] + second[-1]) - len(alone[-1]) <= 1
