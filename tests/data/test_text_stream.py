import pytest
import torch

from tests.data.test_text import _Tokens
from tests.support import small_text, toy_trainer
from trainerkit.callbacks import ExactResume
from trainerkit.data import TextData, TextStream
from trainerkit.data.text_stream import write_stream
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


def test_a_run_resumed_in_mid_epoch_goes_on_at_its_place(folder, tmp_path):
    def fit(where, stop_after=None, resume=None):
        module = _Tokens(stop_after)
        trainer = toy_trainer(tmp_path / where, [ExactResume()], max_epochs=2, limit_val_batches=0)
        trainer.fit(module, datamodule=make(folder, batch_size=128), ckpt_path=resume, weights_only=True)
        return module

    whole = fit("whole")
    cut = len(whole.seen) // 2 + 2
    with pytest.raises(KeyError, match="killed"):
        fit("cut", stop_after=cut)
    rest = fit("cut", resume=tmp_path / "cut" / "cut.ckpt")
    assert len(whole.seen) > 6
    assert rest.seen == whole.seen[cut:]


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
