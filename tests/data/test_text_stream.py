import shutil

import pytest
import torch

from tests.data.test_text import _Tokens
from tests.support import small_text, toy_trainer, trainerkit
from trainerkit.callbacks import ExactResume
from trainerkit.data import TextData, TextStream
from trainerkit.data.text_stream import write_stream
from trainerkit.data.tokenizers import train_bpe
from trainerkit.errors import UserError

pytest.importorskip("litdata")


@pytest.fixture
def folder(tmp_path):
    small_text(tmp_path / "a.txt")
    text = TextData(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), context_length=16)
    write_stream(text, str(tmp_path / "tokens"), chunk_bytes=17 * 4 * 300)
    return tmp_path / "tokens"


def make(folder, **options):
    return TextStream(str(folder), **({"context_length": 16, "batch_size": 8} | options))


def test_a_stream_has_the_texts_tokens_in_blocks(folder):
    text = TextData(str(folder.parent / "a.txt"), cache_dir=str(folder.parent / "cache"))
    stream = text.corpus.stream(1)
    data = make(folder)
    batches = list(data.val_dataloader())
    tokens, targets = (torch.cat([batch[name] for batch in batches]) for name in ("tokens", "targets"))
    assert data.vocab_size == 257
    assert len(tokens) == len(stream) // 17
    blocks = stream.read(0, 17 * len(tokens)).reshape(-1, 17)
    assert tokens.tolist() == blocks[:, :-1].tolist()
    assert targets.tolist() == blocks[:, 1:].tolist()
    assert int(sum(batch["n_bytes"].sum() for batch in batches)) == int((blocks[:, 1:] != 256).sum())


def test_each_epoch_has_every_block_once_in_another_order(folder):
    loader = make(folder).train_dataloader()
    epochs = [torch.cat([batch["tokens"] for batch in loader]).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    again = torch.cat([batch["tokens"] for batch in make(folder).train_dataloader()]).tolist()
    assert again == epochs[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumed_in_mid_epoch_goes_on_at_its_place(folder, tmp_path, workers):
    def fit(where, stop_after=None, resume=None):
        module = _Tokens(stop_after)
        trainer = toy_trainer(tmp_path / where, [ExactResume()], max_epochs=2, limit_val_batches=0)
        trainer.fit(
            module, datamodule=make(folder, batch_size=128, num_workers=workers), ckpt_path=resume, weights_only=True
        )
        return module

    whole = fit("whole")
    assert len(whole.seen) > 8
    for cut in (2, len(whole.seen) // 2 + 2):  # in the first epoch, and in the last
        with pytest.raises(KeyError, match="killed"):
            fit("cut", stop_after=cut)
        rest = fit("cut", resume=tmp_path / "cut" / "cut.ckpt")
        assert rest.seen == whole.seen[cut:]


def test_prompts_need_nothing_but_the_tokenizer(folder, tmp_path):
    shutil.rmtree(folder / "train")
    batch = next(iter(make(folder, prompt="größe").predict_dataloader()))
    assert batch["prompt"].tolist() == [[256, *"größe".encode()]]
    with pytest.raises(UserError, match="prompt: 17 tokens, .* allowed are context_length=16"):
        make(folder, prompt="x" * 16).predict_dataloader()
    with pytest.raises(ValueError, match="prompt_file=b: give a prompt or a file of them, not both"):
        make(folder, prompt="a", prompt_file="b")


def test_a_stream_knows_the_name_of_its_end_of_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    text = small_text(tmp_path / "a.txt")
    content = train_bpe([text], 270).replace("<|endoftext|>", "<|own|>")
    (tmp_path / "own.json").write_text(content)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "own.json")).token_to_id("<|own|>") == 0
    options = {"tokenizer": str(tmp_path / "own.json"), "end_of_text": "<|own|>", "context_length": 16}
    write_stream(TextData(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), **options), str(tmp_path / "out"))
    assert make(tmp_path / "out").tokenizer.end_of_text == 0


@pytest.mark.slow
def test_the_language_model_trains_on_a_stream_and_goes_on_from_a_prompt(folder, tmp_path):
    command = [
        "task=lm", "data=text_stream", f"data.path={folder}", "data.context_length=16", "data.batch_size=64",
        "task.network.n_layers=1", "task.network.d_model=16", "task.network.n_heads=2", "task.max_new_tokens=4",
        "trainer=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=2",
        "callbacks.progress_bar=null", "out_dir=run",
    ]  # fmt: skip
    answer = trainerkit(*command, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    answer = trainerkit(*command, "stage=predict", "prompt=der", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "der" in answer.stdout


def test_what_is_no_such_folder_is_said(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere: .*trainerkit\.json cannot be read .*\. write_stream makes such a folder"
    ):
        TextStream(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="tokenizer=null: is needed for s3://bucket/tokens"):
        TextStream("s3://bucket/tokens")
    with pytest.raises(ValueError, match="batch_size=0: must be 1 or more"):
        make(folder, batch_size=0)
    with pytest.raises(UserError, match="is not empty; give a new one"):
        write_stream(TextData(str(tmp_path / "a.txt")), str(folder))
