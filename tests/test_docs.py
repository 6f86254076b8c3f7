"""README and docs: every block of Python and every command runs, links lead somewhere, tables are true."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from omegaconf import OmegaConf

from tests.support import ROOT, small_library, small_pictures, small_text, smooth_spectra
from trainerkit.compose import compose_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Keeps a documented run to a few steps; what it shows is the same.
SHORT = [
    "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1", "callbacks.progress_bar=null",
    "callbacks.reconstruction_report.pictures=false",
]  # fmt: skip
# The same for a language model.
SMALL_LM = [
    "task.network.n_layers=1", "task.network.d_model=24", "task.network.n_heads=3", "task.max_new_tokens=4",
    "trainer.max_steps=2", "trainer.val_check_interval=2",
]  # fmt: skip
# The same for retrieval.
SMALL_RETRIEVAL = ["data.batch_size=8", "trainer.check_val_every_n_epoch=1", "callbacks.neighbours.n_queries=2"]
# The same for the library of rules, which is trained before.
SMALL_RULES = ["data.rules=24", "data.val_rules=1", "data.test_rules=2", "data.steps=2", "data.base_steps=2"]
# The same for classification: the support vector machine takes seconds of MNIST.
SMALL_CLASSIFICATION = ["callbacks.classification_report.baselines=false"]
# The same for a GAN, whose judge is trained first.
SMALL_GAN = ["callbacks.sample_report.judge_steps=2", "callbacks.sample_report.limit=64"]
# CI runs the first of these as they are (.ci/run); benchmarks are run by hand, and imported below; test_kill.py kills.
BY_CI = ("pip install", ".ci/run", "pytest tests/callbacks", "ruff check", "python -m tests.benchmarks")
BY_CI += ("python -m trainerkit.testing.kill",)


def blocks(page, language):
    return [(m[2].strip(), m[3]) for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m[1] == language]


def ident(page):
    return str(page.relative_to(ROOT))


def environment():
    scripts = os.path.dirname(sys.executable)
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the pages speak of: tables of 200 bands, with and without labels, a text, pairs, and
    adapters.

    Of the standard library two packages: all of it takes seconds to tokenise.
    """
    library, where = Path(sysconfig.get_path("stdlib")), sysconfig.get_path
    for package in ("asyncio", "email"):
        shutil.copytree(library / package, tmp_path / "lib" / package)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: f"{tmp_path}/lib" if name == "stdlib" else where(name))
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
    table = smooth_spectra(rows=120, bands=200)
    np.save(tmp_path / "mine.npy", table)
    header = ",".join([*(f"b{i}" for i in range(200)), "kind"])
    rows = [",".join([*(f"{v:.5f}" for v in row), "oat" if i % 2 else "rye"]) for i, row in enumerate(table)]
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows]))
    small_text(tmp_path / "mine.txt")
    small_text(tmp_path / "books" / "one.md", words=40_000)
    lines = small_text(tmp_path / "more.txt", seed=6).splitlines()
    documents = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "more.jsonl.zst").write_bytes(zstandard.compress(documents.encode()))
    pairs = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(100)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "prompts.txt").write_text("def \nclass \n")
    small_library(tmp_path / "adapters")
    small_pictures(tmp_path / "pictures")
    small_pictures(tmp_path / "new_pictures", classes=1, each=3)
    (tmp_path / "descriptions.txt").write_text("say yes to red ones\nis it blue and long?\n")
    return tmp_path


def commands(page):
    """The commands of a page's bash blocks, without comments; those that CI runs are left out."""
    lines = [line for _, text in blocks(page, "bash") for line in text.splitlines() if line.strip()]
    cleaned = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in cleaned if not line.startswith(BY_CI)]


def shortened(line):
    """A documented command with overrides that keep it short, unless it trains nothing."""
    words = shlex.split(line)
    if "trainerkit" not in line or not any(word.startswith(("task=", "out_dir=")) for word in words):
        return line
    short = [*SHORT, "callbacks.reconstruction_report.probes=false"]
    if "task=mae" not in words:
        short = [option for option in short if "callbacks" not in option]
    if "task=lm" in words:
        short = [option for option in short if "epochs" not in option] + SMALL_LM
    if "task=retrieval" in words:
        short = short + SMALL_RETRIEVAL
    if "task=classification" in words:
        short = short + SMALL_CLASSIFICATION
    if "task=gan" in words:
        short = short + SMALL_GAN
    if "task=t2l" in words and "data=lora_library" not in words:
        short = short + SMALL_RULES
    chosen = {word.partition("=")[0] for word in words}
    extra = [option for option in short if option.partition("=")[0] not in chosen]
    return f"{line} {' '.join(extra)}"


def run(line, folder):
    python = line.replace("python -m", f"{shlex.quote(sys.executable)} -m")
    answer = subprocess.run(
        ["bash", "-c", python], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert answer.returncode == 0, f"{line}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


def test_the_readme_opens_with_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = BLOCK.search(text)
    assert text[: first.start()].strip() == "# trainerkit"
    assert first[3].splitlines() == [
        "pip install -c constraints.txt -e '.[examples]' && python -m trainerkit task=mae",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]


WORD_BY_WORD = ("your_task.md", "your_parts.md")  # pages that write files: tests of their own follow them
PYTHON_PAGES = [page for page in PAGES if blocks(page, "python") and page.name not in WORD_BY_WORD]


@pytest.mark.filterwarnings("ignore:.*tensorboardX.*")  # of a Trainer that is made without a logger argument
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=ident)
def test_every_python_block_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace = {}
    for _, code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


COMMAND_PAGES = [page for page in PAGES if commands(page) and page.name not in WORD_BY_WORD]
SLOW_PAGES = ("scaling.md",)  # several processes for each command


@pytest.mark.filterwarnings("ignore:progressive.layer_addition_interval")  # an epoch is too short for its layers
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] * (p.name in SLOW_PAGES), id=ident(p)) for p in COMMAND_PAGES]
)
def test_every_command_runs(page, folder, monkeypatch):
    """In this process: what a process of its own does is tested in test_cli.py."""
    from trainerkit.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.delenv("TRAINERKIT_RESOLVED_CONFIG", raising=False)
    for line in commands(page):
        words = shlex.split(shortened(line))
        assert words[:3] == ["python", "-m", "trainerkit"], line
        if any(word.startswith("trainer.devices=") for word in words):  # whose processes would run pytest again
            run(shortened(line), folder)
            continue
        with monkeypatch.context() as context, contextlib.redirect_stdout(io.StringIO()):
            context.setattr(sys, "argv", words[2:])
            main(words[3:])


def test_all_blocks_are_of_a_kind_that_a_test_reads():
    kinds = {m[1] for page in PAGES for m in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert kinds <= {"bash", "python", "text", "yaml", "toml"}
    assert len(PYTHON_PAGES) >= 10
    assert len(COMMAND_PAGES) >= 4


def test_what_the_pages_show_of_the_screen_is_what_it_says(tmp_path):
    """Blocks of text that begin with a prompt: the command, then exactly its answer."""
    shown = 0
    for page in PAGES:
        for _, text in blocks(page, "text"):
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, expected = part.partition("\n")
                answer = subprocess.run(
                    [sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, env=environment(),
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert answer.stderr.strip() == expected.strip(), command
                shown += 1
    assert shown >= 3


def write_files(page, folder):
    """Every block of a page as the file that it names; how many there are."""
    named = [block for language in ("python", "yaml") for block in blocks(page, language)]
    for info, text in named:
        assert info.startswith("file="), info
        path = folder / info.removeprefix("file=")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return len(named)


def test_your_own_metric_callback_data_set_and_optimizers_word_by_word(tmp_path):
    page = ROOT / "docs" / "your_parts.md"
    assert write_files(page, tmp_path) == 5
    first, second = (f"{line} trainer=cpu callbacks.progress_bar=null trainer.max_epochs=2" for line in commands(page))
    run(first, tmp_path)
    metrics = json.loads((tmp_path / "runs/bars/results.json").read_text())["metrics"]
    assert metrics["train/rows_seen"] == 2 * 400
    worst = min(metrics["test/upright/recall"], metrics["test/flat/recall"])
    assert metrics["test/worst"] == pytest.approx(worst, abs=1e-6)
    assert metrics["test/accuracy"] > 0.9
    saved = torch.load(tmp_path / "runs/bars/checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["RowsSeen"] == {"rows": 800}
    assert all(list(state) == ["mean"] for state in saved["optimizer_states"][0]["state"].values())  # Lion's
    # The same command goes on, with all of it.
    run(first.replace("max_epochs=2", "max_epochs=3"), tmp_path)
    assert json.loads((tmp_path / "runs/bars/results.json").read_text())["metrics"]["train/rows_seen"] == 3 * 400

    run(second, tmp_path)
    turns = torch.load(tmp_path / "runs/encoder/checkpoints/last.ckpt", weights_only=True)["turns"]
    assert turns["steps"] == {"discriminator": 26, "generator": 26, "encoder": 13}
    assert json.loads((tmp_path / "runs/encoder/results.json").read_text())["metrics"]["train/encoder_loss"] < 1.2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("data.batch_size=0", "data.batch_size=0: must be 1 or more"),
        ("optimizer.lr=-1", "lr=-1"),
        ("data=bar", "Did you mean bars?"),
    ],
)
def test_what_is_wrong_with_your_own_parts_is_answered_like_the_rest(tmp_path, wrong, said):
    page = ROOT / "docs" / "your_parts.md"
    write_files(page, tmp_path)
    line = commands(page)[0] if wrong != "data=bar" else commands(page)[0].replace("data=bars", "")
    python = f'{line} trainer=cpu "{wrong}"'.replace("python -m", f"{shlex.quote(sys.executable)} -m")
    answer = subprocess.run(
        ["bash", "-c", python], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr
    assert len(answer.stderr.splitlines()) <= 6


def test_your_own_task_in_ten_minutes_word_by_word(tmp_path):
    page = ROOT / "docs" / "your_task.md"
    assert write_files(page, tmp_path) == 3
    first, second, contract = commands(page)
    screen = run(f"{first} trainer=cpu callbacks.progress_bar=null", tmp_path)
    accuracy = float(re.search(r"val/accuracy +([\d.]+)", screen)[1])
    assert accuracy > 0.9
    run(shortened(second), tmp_path)
    assert "1 passed" in run(contract, tmp_path)


def test_every_benchmark_that_is_named_can_be_started():
    import importlib

    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    named = re.findall(r"python -m (tests\.benchmarks\.\w+)", text)
    assert len(named) == 19
    assert all(callable(importlib.import_module(name).main) for name in named)


def test_links_lead_somewhere():
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{ident(page)}: {target}"
                checked += 1
    assert checked > 30


def shown_as(value):
    text = str(value)
    return {"True": "true", "False": "false", "None": "null"}.get(text, text)


@pytest.mark.parametrize(
    ("task", "experiment", "number"),
    [
        ("mae", "chemomae_document", 31),
        ("lm", "tisslm_document", 12),
        ("retrieval", "vembed_document", 13),
        ("t2l", "t2l_document", 18),
    ],
)
def test_the_table_of_documented_keys_is_what_the_configs_say(task, experiment, number):
    """'The documented keys' of a task's page: each key's value in both columns, from the composed config."""
    OmegaConf.register_new_resolver("data_module", lambda key: 200, replace=True)
    plain = compose_config([f"task={task}"])
    document = compose_config([f"task={task}", f"experiment={experiment}"])
    text = (ROOT / "docs" / "tasks" / f"{task}.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.partition("## The documented keys")[2].splitlines()
        if line.startswith("|") and not line.startswith(("|---", "| documented"))
    ]
    assert len(rows) == number
    for documented, _, here, in_document, in_plain in rows:
        key = re.search(r"`([^`]+)`", here)[1]
        if key in ("out_dir", "trainer=auto"):
            assert plain.out_dir.startswith(f"runs/{task}/")
            assert plain.trainer.accelerator == document.trainer.accelerator == "auto"
            continue
        for cfg, cell in ((document, in_document), (plain, in_plain)):
            if key.startswith("callbacks.") and key.count(".") == 1:
                assert cell == ("present" if cfg.callbacks.get(key.partition(".")[2]) else "absent")
            elif key == "task.network.seq_len":
                assert cell == str(cfg.data.seq_len or 200)
            else:
                assert cell == shown_as(OmegaConf.select(cfg, key, throw_on_missing=True)), (documented, key)


def test_the_documents_example_is_to_the_letter():
    """The figures of the ChemoMAE document, in the config that bears its name."""
    cfg = compose_config(["task=mae", "experiment=chemomae_document"])
    figures = {
        "data.seq_len": 256, "task.network.n_patches": 16, "task.network.n_mask": 12, "task.network.latent_dim": 64,
        "task.network.d_model": 256, "task.network.nhead": 4, "task.network.num_layers": 4,
        "task.network.dim_feedforward": None, "task.network.dropout": 0.0, "task.network.latent_normalize": True,
        "task.network.decoder": "latent", "task.network.decoder_num_layers": 2,
        "optimizer._target_": "torch.optim.AdamW", "optimizer.lr": 2e-4, "optimizer.weight_decay": 0.05,
        "optimizer.betas": [0.9, 0.95], "scheduler._target_": "trainerkit.optim.warmup_cosine",
        "scheduler.warmup_epochs": 5, "scheduler.min_lr_scale": 0.1, "trainer.max_epochs": 100,
        "trainer.precision": "bf16-mixed", "trainer.enable_tf32": False, "trainer.gradient_clip_val": 1.0,
        "callbacks.ema.decay": 0.999, "callbacks.ema.warmup": False, "callbacks.early_stopping.patience": 20,
        "callbacks.early_stopping.start_ratio": 0.5, "callbacks.early_stopping.min_delta": 0.0,
        "task.loss": "mse", "task.reduction": "mean", "resume": "auto",
    }  # fmt: skip
    for key, value in figures.items():
        assert OmegaConf.select(cfg, key) == value, key


def test_pictures_in_the_docs_are_small():
    pictures = list((ROOT / "docs").rglob("*.png"))
    assert pictures
    assert all(Path(path).stat().st_size < 200_000 for path in pictures)
