"""Every callback of ours keeps the contract; the YAMLs are the list, and it is held against the files."""

import pytest
from omegaconf import OmegaConf

from tests.support import ROOT
from trainerkit.build import build
from trainerkit.plugins import AllowList
from trainerkit.testing import check_callback
from trainerkit.testing.callback import PROPERTIES

ALLOW = AllowList()
FILES = {path.stem: path for path in sorted((ROOT / "configs" / "callbacks").glob("*.yaml"))}
OURS = [name for name, path in FILES.items() if "_target_: trainerkit.callbacks." in path.read_text()]

# Where the defaults are for longer runs than the bench's two epochs of four batches.
BENCH = {
    "ema": {"decay": 0.9, "buffers": "average"},
    "early_stopping": {"patience": 1, "start_ratio": 0.0},
    "gradient_accumulation": {"steps": 3},
    "parameter_norm_clip": {"max_norm": 0.5},
    "progressive_unfreezing": {"warmup_steps": 3},
}
# That measure every so many steps: at every one. A picture of each would take a third of a second.
MEASURING = {
    name: {"every_n_steps": 1} for name in ("activation_stats", "memory_monitor", "parameter_stats", "throughput")
}
MEASURING["gradient_flow"] = {"every_n_steps": 1, "picture": False}
# Told to begin after the end of the run: must change nothing.
IDLE = {
    "ema": {"start_step": 1000},
    "early_stopping": {"patience": None},
    "parameter_norm_clip": {"max_norm": 1e6},
    "progressive_unfreezing": {"initial": "*"},
}
# What a callback cannot keep, and why.
SKIP = {
    "step_hashes": {"no waiting for the device": "every tensor is copied to the host, where it is hashed"},
    "gradient_accumulation": {
        "manual optimization": "a module that optimizes by hand accumulates by hand; refused in setup",
        "accumulated batches": "it sets the Trainer's accumulate_grad_batches itself and refuses another",
    },
}


def maker(name, options=None):
    """Makes the callback that the YAML describes, with other options."""
    node = OmegaConf.merge(OmegaConf.load(FILES[name])[name], options or {})
    return lambda: build(node, f"callbacks.{name}", ALLOW)


def test_the_yamls_are_the_files():
    assert sorted(path.stem for path in (ROOT / "callbacks").glob("[!_]*.py")) == OURS


@pytest.mark.parametrize("name", OURS)
def test_it_keeps_the_contract(name, tmp_path):
    idle = maker(name, IDLE[name]) if name in IDLE else None
    check_callback(maker(name, BENCH.get(name)), tmp_path, idle=idle, skip=SKIP.get(name, {}))


def test_options_and_exceptions_are_of_callbacks_that_exist():
    assert {*BENCH, *IDLE, *SKIP, *MEASURING} <= set(OURS)
    assert all(set(skipped) <= set(PROPERTIES) and all(skipped.values()) for skipped in SKIP.values())
