"""Command lines and files that nobody meant: each is done or answered in one screen, and none is a traceback."""

import contextlib
import copy
import difflib
import io
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tests.support import SMALL_MAE, smooth_spectra
from trainerkit.compose import _keys, compose_config

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
    """A tensor as large as an override says must fail, not take the machine down."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(arguments):
    """The command line in this process; gives exit code and what stderr says."""
    from trainerkit.cli import main

    return outcome(lambda: main(arguments))


def run_with(texts):
    """The same without Hydra's composing, which takes most of the time: values set in a config composed before."""
    from trainerkit.cli import answering
    from trainerkit.plugins import AllowList
    from trainerkit.run import run

    def call():
        cfg = copy.deepcopy(COMPOSED)
        for key, value in texts:
            try:
                OmegaConf.update(cfg, key, value, force_add=True)
            except OmegaConfBaseException:
                return  # the first change took away what the second would set
        with answering():
            run(cfg, [], AllowList())

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
GROUPS = ["task", "data", "optimizer", "scheduler", "callbacks", "trainer", "logger", "experiment", "optimizer@task"]
# Would start further processes, or build for hours what was asked for.
LEFT_OUT = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "data.num_workers", "num_layers", "trainer.accelerator")

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
        return word[:place] + draw(st.sampled_from([".", "..", "_", "/", "@", " ", "=", "é", "1", "[0]"])) + word[place:]
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
    st.tuples(st.sampled_from(KEYS).filter(lambda key: not is_left_out(key)), values.map(as_hydra_reads)), min_size=1, max_size=2
)

overrides = st.lists(
    st.one_of(override(), override(), override(), st.text(max_size=8)).filter(lambda text: not is_left_out(text)),
    min_size=1,
    max_size=3,
)


@given(settings_of_keys)
@SHORT
def test_no_value_of_a_key_gives_a_traceback(changes):
    check_outcome(*run_with(changes))


@given(overrides)
@SHORT
def test_no_override_gives_a_traceback(given_overrides):
    check_outcome(*run([*BASE, *given_overrides]))


@pytest.mark.slow
@given(overrides)
@LONG
def test_no_override_gives_a_traceback_at_length(given_overrides):
    check_outcome(*run([*BASE, *given_overrides]))
