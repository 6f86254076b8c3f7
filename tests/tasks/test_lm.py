import json
import math

import pytest
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from tests.support import toy_trainer
from trainerkit.cli import main
from trainerkit.compose import compose_config, with_text_quoted
from trainerkit.errors import UserError
from trainerkit.functional.padding import left_padded
from trainerkit.tasks.lm import GPT, LanguageModelTask, TextSamples
from trainerkit.testing._kill_runs import SMALL

VOCABULARY = 11  # ten letters and the end of text
SIZES = {"vocab_size": VOCABULARY, "context_length": 24, "n_layers": 1, "d_model": 16, "n_heads": 2}


class Letters:
    """A tokenizer of ten letters."""

    end_of_text = 10

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + number) for number in ids)


class Given(LightningDataModule):
    """Batches as they are given."""

    tokenizer = Letters()

    def __init__(self, train=(), val=(), predict=()):
        super().__init__()
        self.batches = {"train": train, "val": val, "predict": predict}

    def loader(self, name):
        return DataLoader(list(self.batches[name]), batch_size=None)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("val")

    def predict_dataloader(self):
        return self.loader("predict")


def make_batch(rows, seed, ignored=0.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY - 1, (rows, 9), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < ignored] = -100
    n_bytes = 3 * (targets >= 0).sum(1)
    return {"tokens": tokens[:, :-1], "targets": targets, "n_bytes": n_bytes}


def naive_nll(task, batches):
    """Nats of all targets that count, in float64, and how many there are."""
    total, count = 0.0, 0
    network = task.network.double()
    for batch in batches:
        logits = network(batch["tokens"]).detach()
        for row in range(len(logits)):
            for place, target in enumerate(batch["targets"][row].tolist()):
                if target >= 0:
                    total -= float(logits[row, place].log_softmax(0)[target])
                    count += 1
    return total, count


# Metrics


def test_evaluation_gives_nats_perplexity_and_bits_per_byte_of_all_targets_as_one_batch(tmp_path):
    task = LanguageModelTask(GPT(**SIZES), label_smoothing=0.3, focal_gamma=1.0, z_loss=1e-2)
    batches = [make_batch(3, 0), make_batch(5, 1, ignored=0.7), make_batch(1, 2, ignored=0.3)]
    trainer = toy_trainer(tmp_path)
    trainer.test(task, datamodule=Given(val=batches), verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    nats, count = naive_nll(task, batches)
    assert found["test/loss"] == pytest.approx(nats / count, rel=1e-6)
    assert found["test/perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-6)
    n_bytes = sum(int(batch["n_bytes"].sum()) for batch in batches)
    assert found["test/bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_bits_per_byte_do_not_depend_on_how_text_is_cut_into_batches(tmp_path):
    task = LanguageModelTask(GPT(**SIZES))
    whole = make_batch(8, 3, ignored=0.5)
    pieces = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(0, 1), slice(1, 8))]
    found = []
    for batches in ([whole], pieces):
        trainer = toy_trainer(tmp_path)
        trainer.validate(task, datamodule=Given(val=batches), verbose=False)
        found.append(float(trainer.callback_metrics["val/bits_per_byte"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_what_is_minimized_is_logged_in_training_and_the_plain_loss_in_evaluation(tmp_path):
    torch.manual_seed(0)
    batches = [make_batch(4, seed) for seed in range(3)]
    logged = {}
    for smoothing in (0.0, 0.5):
        task = LanguageModelTask(
            GPT(**SIZES), label_smoothing=smoothing, optimizer=lambda groups: torch.optim.SGD(groups, 0.0)
        )
        torch.manual_seed(1)
        task.network.load_state_dict(GPT(**SIZES).state_dict())
        trainer = toy_trainer(tmp_path, max_epochs=1)
        trainer.fit(task, datamodule=Given(batches, batches))
        logged[smoothing] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged[0.0]["train/loss"] == pytest.approx(logged[0.0]["val/loss"], rel=1e-6)
    assert logged[0.5]["val/loss"] == pytest.approx(logged[0.0]["val/loss"], rel=1e-6)
    assert logged[0.5]["train/loss"] != pytest.approx(logged[0.5]["val/loss"], rel=1e-3)


def test_tokens_alone_are_their_own_targets():
    tokens = torch.randint(VOCABULARY, (3, 9))
    task = LanguageModelTask(GPT(**SIZES))
    whole = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    assert torch.equal(task.training_step(tokens, 0), task.training_step(whole, 0))


@pytest.mark.parametrize("batch", [{"input_ids": torch.ones(2, 3)}, torch.ones(3), torch.ones(3, 1), "text", None])
def test_other_batches_are_refused(batch):
    with pytest.raises(ValueError, match="batch: must be a mapping with 'tokens' and 'targets'"):
        LanguageModelTask(GPT(**SIZES)).training_step(batch, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0: must be from 0 to below 1"),
        ({"focal_gamma": -1}, "focal_gamma=-1: must be 0 or more"),
        ({"z_loss": math.nan}, "z_loss=nan: must be 0 or more"),
        ({"chunk_size": 0}, "chunk_size=0: must be 1 or more, or null"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be 1 or more"),
        ({"temperature": math.inf}, "temperature=inf: must be 0 or more"),
        ({"top_k": 0}, "top_k=0: must be 1 or more, or null"),
        ({"top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
    ],
)
def test_impossible_tasks_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelTask(GPT(**SIZES), **options)


# Text


def test_rows_are_padded_on_the_left():
    tokens, length = left_padded([[10, 1, 2], [10]], 10)
    assert tokens.tolist() == [[10, 1, 2], [10, 10, 10]]
    assert length.tolist() == [3, 1]


def test_samples_are_kept_after_each_validation_and_move_no_random_state(tmp_path):
    batches = [make_batch(4, seed) for seed in range(3)]
    weights = []
    for callbacks in ([], [TextSamples(["", "abc"])]):
        torch.manual_seed(2)
        task = LanguageModelTask(GPT(**SIZES, dropout=0.5), max_new_tokens=5)
        toy_trainer(tmp_path, callbacks, max_epochs=2).fit(task, datamodule=Given(batches, batches))
        weights.append(task.network.token_embedding.weight)
    assert torch.equal(*weights)
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["step-00000003.txt", "step-00000006.txt"]
    last = files[1].read_text(encoding="utf-8")
    first, second = last.split("\n\n")
    assert first.startswith("--- ''\n")
    assert second.startswith("--- 'abc'\nabc")
    prompt, length = left_padded([[10], [10, 0, 1, 2]], 10)
    answer = task.generate(prompt, length).tolist()[1]
    end = answer.index(10) if 10 in answer else 5
    assert second.strip() == "--- 'abc'\nabc" + Letters().decode(answer[:end])


def test_answers_stand_in_the_order_of_the_prompts_cut_at_the_end_of_text(tmp_path, capsys):
    task = LanguageModelTask(GPT(**SIZES), max_new_tokens=20, temperature=1.5)
    prompt, length = left_padded([[10, 3], [10, 4, 5]], 10)
    batches = [
        {"prompt": prompt[1:], "length": length[1:], "index": torch.tensor([1])},
        {"prompt": prompt[:1], "length": length[:1], "index": torch.tensor([0])},
    ]
    toy_trainer(tmp_path, [TextSamples()]).predict(task, datamodule=Given(predict=batches), return_predictions=False)
    lines = [json.loads(line) for line in (tmp_path / "predictions" / "text.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    assert [line["prompt"] for line in lines] == ["d", "ef"]
    for line, row, steps in zip(lines, prompt, length, strict=True):
        answer = task.generate(row[None], steps[None])[0].tolist()
        end = answer.index(10) if 10 in answer else 20
        assert line["text"] == Letters().decode(answer[:end])
    screen = capsys.readouterr().out
    assert "\n--- 'd'\nd" in screen  # on a line of its own, below the progress bar
    assert "--- 'ef'\nef" in screen
    assert "2 prompts answered in " in screen


@pytest.mark.parametrize("prompts", ["def", [], [3]])
def test_prompts_that_are_none_are_refused(prompts):
    with pytest.raises(ValueError, match="prompts=.*must be a list of one or more texts"):
        TextSamples(prompts)


def test_without_a_tokenizer_samples_are_refused_before_training(tmp_path):
    task = LanguageModelTask(GPT(**SIZES))
    with pytest.raises(ValueError, match="needs a data module with a tokenizer"):
        toy_trainer(tmp_path, [TextSamples()]).fit(task, DataLoader([make_batch(2, 0)], batch_size=None))


# The command line


def test_the_documented_values_are_composed():
    cfg = compose_config(["task=lm", "experiment=tisslm_document", "out_dir=runs/a"])
    assert cfg.trainer.max_epochs == 10
    assert cfg.data.batch_size == 32
    assert cfg.optimizer.lr == 1e-4
    assert cfg.trainer.gradient_clip_val == 1.0
    checkpoint = cfg.callbacks.crash_safe_checkpoint
    assert (checkpoint.save_every, checkpoint.dirname, checkpoint.keep_checkpoints) == (1000, "checkpoints", 3)
    assert cfg.resume == "auto"  # from out_dir, if it holds a checkpoint
    assert cfg.trainer.precision == "32-true"
    assert cfg.trainer.accumulate_grad_batches == 1
    assert "parameter_stats" not in cfg.callbacks
    assert (cfg.trainer.val_check_interval, cfg.trainer.check_val_every_n_epoch) == (100, None)
    # What the document does not say, and these values would not mean the same without.
    assert cfg.trainer.max_steps == -1
    assert cfg.optimizer._target_ == "torch.optim.AdamW"
    assert cfg.scheduler._target_ == "torch.optim.lr_scheduler.ConstantLR"
    assert cfg.task.network.tie_embeddings


@pytest.mark.parametrize("name", ["gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl", "lm_gpu", "tisslm_document"])
def test_every_experiment_trains_when_it_is_small(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["task.network.n_layers=1", "task.network.d_model=16", "task.network.n_heads=2", "task.max_new_tokens=2"]
    data = [option for option in SMALL["lm"](tmp_path) if option.startswith(("data", "callbacks"))]
    short = ["trainer=cpu", "trainer.compile=false", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    quiet = ["callbacks.progress_bar=null", "logger=none", "data.vocab_size=null", "data.eval_stride=16"]
    checked = [] if name == "lm_gpu" else ["trainer.val_check_interval=2"]
    main(["task=lm", f"experiment={name}", *data, *small, *short, *quiet, *checked, "out_dir=run"])
    assert "val/bits_per_byte" in capsys.readouterr().out


TEXTS = [
    "def ", '"a" in "b"', '"""', "'hello'", "it's \\ \\'", "{a: 1}, [b", "a=b # c", "NULL", "$x", "é — 🙂", "", "one\ntwo",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_stands_for_itself(text):
    cfg = compose_config(["task=lm", with_text_quoted(f"prompt={text}")])
    OmegaConf.resolve(cfg.data)
    assert cfg.data.prompt == text
    assert compose_config(["task=lm", with_text_quoted("prompt=null")]).data.prompt is None


@pytest.mark.parametrize("text", ["a ${b}", "'${x}'", "???"])
def test_a_prompt_that_the_config_would_take_for_something_else_is_refused(text):
    with pytest.raises(UserError, match="this text has another meaning here; put it into a file"):
        with_text_quoted(f"prompt={text}")
