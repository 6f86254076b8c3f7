"""Command lines and files that nobody meant: each is done or answered in one screen, and none is a traceback."""

import contextlib
import copy
import difflib
import functools
import io
import json
import resource
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save

from tests.support import SMALL_MAE, smooth_spectra
from trainerkit import cli
from trainerkit.callbacks.best_weights import load_best_weights
from trainerkit.cli import answering, main
from trainerkit.compose import _keys, compose_config
from trainerkit.data.tables import check_finite, read_table
from trainerkit.errors import UserError
from trainerkit.loading import check_checkpoint, read_json, read_pickle
from trainerkit.plugins import AllowList
from trainerkit.run import run as run_config

SHORT = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
LONG = settings(SHORT, max_examples=4000, derandomize=False)

# Builds everything and validates one batch with initial weights; trains nothing and writes nothing.
BASE = [
    *(option for option in SMALL_MAE if not option.startswith(("callbacks", "trainer.m"))),
    "data.path=spectra.npy", "stage=validate", "resume=null", "logger=none", "trainer.limit_val_batches=1",
    "callbacks.progress_bar=null", "out_dir=run",
]  # fmt: skip


@contextlib.contextmanager
def limited_memory(spare=3 * 2**30):
    """A tensor as large as an override says must fail, not take the machine down (where Linux says what is used)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(arguments):
    """The command line in this process; gives exit code and what stderr says."""
    return outcome(lambda: main(arguments))


def run_with(texts):
    """The same without Hydra's composing, which takes most of the time: values set in a config composed before."""

    def call():
        cfg = copy.deepcopy(COMPOSED)
        for key, value in texts:
            try:
                OmegaConf.update(cfg, key, value, force_add=True)
            except OmegaConfBaseException:
                return  # the first change took away what the second would set
        with answering():
            run_config(cfg, [], AllowList())

    return outcome(call)


def outcome(call):
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), limited_memory():
        warnings.simplefilter("ignore")
        try:
            call()
        except SystemExit as stop:
            code = stop.code
    return code, err.getvalue()


def check_outcome(code, screen):
    assert code in (0, None, 2), (code, screen)
    assert "Traceback" not in screen
    if code == 2:
        said = screen[screen.index("trainerkit: ") :]
        assert len(said.splitlines()) <= 16, screen
        assert len(said) < 4000, screen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    np.save(folder / "spectra.npy", smooth_spectra(rows=60))
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["trainerkit"])


COMPOSED = compose_config(BASE)
KEYS = sorted(_keys(COMPOSED))
GROUPS = [*cli.GROUPS, "optimizer@task"]
# Would start further processes, or build for hours what was asked for.
LEFT_OUT = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "data.num_workers",
    "num_layers",
    "trainer.accelerator",
)

ODD = [
    "", " ", "null", "true", "false", "???", "nan", "inf", "-inf", "1e400", "-1", "0", "1", "2", "3", "7", "0.5", "-0.5",
    "1e-9", "2147483648", "9223372036854775808", "1" + "0" * 40, "[]", "{}", "[1,2]", "[[1]]", "{a:1}", "{1:2}", "[null]",
    "${seed}", "${nothing}", "${oc.env:HOME}", "${oc.env:NOT_THERE}", "${data_module:seq_len}", "${data_module:nothing}",
    "${data_module:}", "${oc.create:{a:1}}", "${oc.decode:'{'}", "${", "}", "${}", "${${seed}}", "\\${seed}", "[", "]", "{", "(",
    "'", '"', "'a", '"a', "a'b", "\\", "a\\", "é", "日本", "\u202e", "\x00", "\n", "\t", "a b", "a=b", "a:b", "1,2", "a,b", "choice(1,2)",
    "range(1,3)", "glob(*)", "interval(0,1)", "tag(a,1)", "shuffle(1,2)", "sort(1,2)", "int(1)", "str(1)", "float(x)", "cast(1)",
    "auto", "none", "default", "mae", "min", "max", "{_target_:os.system}", "{_target_:torch.nn.Identity}", "{_target_:torch.nn.Linear}",
    "{_target_:5}", "[{_target_:os.system}]", "spectra.npy", ".", "/", "~", "nowhere/x", "x" * 300, "../..", "file://x", "http://[",
]  # fmt: skip


@st.composite
def misspelt(draw, words):
    word = draw(st.sampled_from(words))
    how = draw(st.integers(0, 5))
    place = draw(st.integers(0, len(word)))
    if how == 0:
        return word[:place] + word[place + 1 :]
    if how == 1:
        return (
            word[:place] + draw(st.sampled_from([".", "..", "_", "/", "@", " ", "=", "é", "1", "[0]"])) + word[place:]
        )
    if how == 2:
        return word.upper()
    if how == 3:
        return f"{word}.{draw(st.sampled_from(['x', '0', '_target_', 'decay']))}"
    return word


values = st.one_of(
    st.sampled_from(ODD),
    st.integers(-5, 40).map(str),
    st.floats().map(str),
    st.text(max_size=12),
    st.lists(st.sampled_from(ODD), max_size=3).map(lambda parts: f"[{','.join(parts)}]"),
    st.dictionaries(st.text("ab_.1", max_size=3), st.sampled_from(ODD), max_size=2).map(
        lambda parts: "{" + ",".join(f"{key}:{value}" for key, value in parts.items()) + "}"
    ),
)


@st.composite
def override(draw):
    keys = draw(st.sampled_from([KEYS, KEYS, KEYS, GROUPS]))
    key = draw(st.one_of(st.sampled_from(keys), misspelt(keys)))
    sign = draw(st.sampled_from(["", "", "", "", "+", "++", "~"]))
    if sign == "~" and draw(st.booleans()):
        return f"~{key}"
    return f"{sign}{key}={draw(values)}"


def is_left_out(text):
    key = text.partition("=")[0].lstrip("+~")
    return any(name in key or difflib.SequenceMatcher(None, name, key).ratio() > 0.9 for name in LEFT_OUT) or (
        key.startswith("trainer") and any(name in text for name in ("ddp", "fsdp"))
    )


def as_hydra_reads(text):
    """A value as the command line would give it, or the text itself where Hydra reads none."""
    try:
        value = OverridesParser.create().parse_override(f"a={text}").value()
        OmegaConf.create({"a": value})
    except (HydraException, OmegaConfBaseException):  # no value, or a sweep
        return "text"
    return value


settings_of_keys = st.lists(
    st.tuples(st.sampled_from(KEYS).filter(lambda key: not is_left_out(key)), values.map(as_hydra_reads)),
    min_size=1,
    max_size=2,
)

overrides = st.lists(
    st.one_of(override(), override(), override(), st.text(max_size=8)).filter(lambda text: not is_left_out(text)),
    min_size=1,
    max_size=3,
)


@given(settings_of_keys)
@SHORT
@example([("trainer", "a")])
@example([("callbacks", True)])
@example([("callbacks.best_weights", "???")])
@example([("callbacks.save_predictions", {"_target_": "torch.nn.Identity"})])
@example([("task", "é")])
@example([("optimizer", 1)])
@example([("data.seed", -4)])
@example([("out_dir", "x" * 300)])
@example([("out_dir", "a\0b")])
@example([("out_dir", "~nobody-of-this-name/x")])
@example([("resume", {"": "${${seed}}"})])
@example([("task.augment", {"_target_": "torch.nn.Identity", 1: 2})])
@example([("task.augment", {"_target_": "torch.nn.Identity", "_partial_": 5})])
@example([("task.augment", {"_target_": "torch.nn.Identity", "_args_": 5})])
def test_no_value_of_a_key_gives_a_traceback(changes):
    check_outcome(*run_with(changes))


@given(overrides)
@settings(SHORT, max_examples=25)  # Hydra takes a third of a second for each
@example(["~data=[${nothing},null]"])
@example(["~trust"])
@example(["trust=${nothing}"])
@example(["++experiment=interval(0,1)"])
@example(["optimizer@task=adam"])
@example(["seed=1,2", "seed=["])
def test_no_override_gives_a_traceback(given_overrides):
    check_outcome(*run([*BASE, *given_overrides]))


@pytest.mark.slow
@given(overrides)
@LONG
def test_no_override_gives_a_traceback_at_length(given_overrides):
    check_outcome(*run([*BASE, *given_overrides]))


# Files

FILES = ("checkpoint.ckpt", "legacy.pt", "weights.safetensors", "table.npy", "table.npz", "table.csv", "results.json")


def read(path):
    """As a run reads a file of this kind."""
    if path.suffix == ".ckpt":
        check_checkpoint(path, "resume", to_train=True)
    elif path.suffix == ".pt":
        read_pickle(path, "weights")
    elif path.suffix == ".safetensors":
        load_best_weights(path)
    elif path.suffix == ".json":
        read_json(path, "out_dir", "metrics", "stopped", "finished", "limits")
    else:
        table, _ = read_table(path, label="y" if path.suffix == ".npz" else None)
        check_finite(table, path)


@functools.cache
def sound(name):
    """The bytes of a sound file of each kind."""
    buffer = io.BytesIO()
    table = smooth_spectra(rows=6, bands=5)
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.float16)}
    if name == "checkpoint.ckpt":
        parts = {"loops": {}, "callbacks": {}, "optimizer_states": [{"state": {0: state}}], "lr_schedulers": []}
        facts = {"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.6.6", "hyper_parameters": {"width": 3}}
        torch.save({"state_dict": state} | facts | parts, buffer)
    elif name == "legacy.pt":
        torch.save(state, buffer, _use_new_zipfile_serialization=False)
    elif name == "weights.safetensors":
        buffer.write(save(state, {"tied": '{"c": "a"}'}))
    elif name == "table.npy":
        np.save(buffer, table)
    elif name == "table.npz":
        np.savez_compressed(buffer, x=table, y=np.array(["a", "b"] * 3))
    elif name == "table.csv":
        buffer.write("\n".join(["a,b,c,d,e", *(",".join(map(str, row)) for row in table)]).encode())
    else:
        buffer.write(json.dumps({"metrics": {"a": 1.5}, "stopped": "", "finished": True, "limits": {}}).encode())
    return buffer.getvalue()


@st.composite
def damaged(draw):
    """A sound file with some bytes changed, inserted, repeated or cut off."""
    name = draw(st.sampled_from(FILES))
    content = bytearray(sound(name))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "flip", "set", "number", "insert", "cut", "drop", "repeat"]))
        if how == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "set" and content:
            content[place] = draw(st.integers(0, 255))
        elif how == "number":
            content[place : place + 8] = struct.pack(
                "<Q", draw(st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
            )
        elif how == "insert":
            content[place:place] = draw(st.binary(max_size=9))
        elif how == "cut":
            del content[place:]
        elif how == "drop":
            del content[place : place + draw(st.integers(1, 40))]
        elif how == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 40))]
    return name, bytes(content)


def check_file(name, content):
    path = Path("damaged") / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # a file that is mapped into memory must not be cut
    path.write_bytes(content)
    with warnings.catch_warnings(), limited_memory():
        warnings.simplefilter("ignore")
        said = None
        try:
            read(path)
        except UserError as error:
            said = str(error)
    if said is not None:
        assert str(path) in said
        assert len(said.splitlines()) <= 4
        assert len(said) < 1500


@pytest.mark.parametrize("name", FILES)
def test_sound_files_are_read(name, tmp_path):
    (tmp_path / name).write_bytes(sound(name))
    read(tmp_path / name)


@given(damaged())
@settings(SHORT, max_examples=300)
def test_no_damaged_file_gives_a_traceback(file):
    check_file(*file)


@pytest.mark.slow
@given(damaged())
@settings(LONG, max_examples=20_000)
def test_no_damaged_file_gives_a_traceback_at_length(file):
    check_file(*file)
