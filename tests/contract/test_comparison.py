"""Lightning's own callbacks under the same eyes: docs/callbacks/comparison.md says what is found, this holds it.

`python -m tests.contract.test_comparison` prints the page's tables anew.
"""

import re
import tempfile
from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch import callbacks as lightning
from lightning.pytorch.callbacks.spike import SpikeDetection

from tests.support import ROOT
from trainerkit.testing import examine_callback


class Frozen(lightning.BaseFinetuning):
    """As its documentation has it, the norm layers frozen too."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        """The backbone stays frozen."""


PAGE = ROOT / "docs" / "callbacks" / "comparison.md"
MAKERS = {
    "EMAWeightAveraging()": lightning.EMAWeightAveraging,
    "StochasticWeightAveraging(0.01)": partial(lightning.StochasticWeightAveraging, 0.01),
    "BackboneFinetuning(unfreeze_backbone_at_epoch=0)": partial(
        lightning.BackboneFinetuning, unfreeze_backbone_at_epoch=0
    ),
    "BackboneFinetuning(unfreeze_backbone_at_epoch=1)": partial(
        lightning.BackboneFinetuning, unfreeze_backbone_at_epoch=1
    ),
    "BaseFinetuning with freeze(train_bn=False)": lambda: Frozen(),
    "EarlyStopping('val/loss', patience=1)": partial(lightning.EarlyStopping, "val/loss", patience=1),
    "GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})": partial(
        lightning.GradientAccumulationScheduler, {0: 1, 1: 2, 2: 3}
    ),
    "SpikeDetection()": SpikeDetection,
    "ThroughputMonitor(lambda batch: 8)": partial(lightning.ThroughputMonitor, lambda batch: 8),
    "DeviceStatsMonitor(cpu_stats=False)": partial(lightning.DeviceStatsMonitor, cpu_stats=False),
    "LearningRateMonitor()": lightning.LearningRateMonitor,
    "ModelCheckpoint(monitor='val/loss')": partial(lightning.ModelCheckpoint, monitor="val/loss"),
    "Timer()": lightning.Timer,
}
IDLE = {
    "EMAWeightAveraging()": partial(lightning.EMAWeightAveraging, update_starting_at_epoch=1000),
}


def listed():
    """The page's findings: callback -> property -> what is said there."""
    page: dict[str, dict[str, str]] = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n### ")[1:]:
        name = re.match(r"`([^`]+)`", part)[1]
        rows = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", part, flags=re.MULTILINE))
        page[name] = {what: finding for what, finding in rows.items() if what != "property"}
    return page


# The faults that are known from elsewhere, and have to be found.
KNOWN = {
    "EMAWeightAveraging()": {
        # an average that is never updated overwrites the weights, and is validated before its first update
        "idle": "weights and validations .* differ",
        "one number": "a checkpoint with weights only .* trainer.test with ckpt_path after fit",
        "exceptions": "does not have its trained weights",
        "module as it was": "a batch norm has counted",
        "weights after fit": "does not have its trained weights",
        "both namespaces": "Expected a parent",
        "sharded parameters": "FSDP does not support deepcopy",
        "odd modules": "must match the size",
    },
    "BackboneFinetuning(unfreeze_backbone_at_epoch=1)": {
        "resume at every batch": "weights .* differ",
        "two ranks": "end with different weights",
    },
    "BackboneFinetuning(unfreeze_backbone_at_epoch=0)": {"trained what needs it": "in no optimizer: backbone"},
    "BaseFinetuning with freeze(train_bn=False)": {"module as it was": "track_running_stats of backbone.1 has changed"},
    "EarlyStopping('val/loss', patience=1)": {
        "new arguments win": "patience takes the place",
        "stopping": "although its value, 0.5, was the best",
    },
    "GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})": {
        "mean of the window": "times their mean",
        "resume at every batch": "weights .* differ",
    },
    "SpikeDetection()": {
        "resume at every batch": "cannot be resumed",
        "no waiting for the device": "copies to the host in 11 steps",
    },
    "DeviceStatsMonitor(cpu_stats=False)": {"any loggers": "Cannot use"},
    "LearningRateMonitor()": {"any loggers": "no logger"},
}


def examine(name, folder):
    examined = examine_callback(MAKERS[name], folder, idle=IDLE.get(name))
    return {what: finding for what, finding in examined.items() if finding}


@pytest.mark.parametrize("name", MAKERS)
def test_the_page_lists_what_is_found_and_the_known_faults_are_among_it(name, tmp_path):
    found = examine(name, tmp_path)
    assert set(found) == set(listed()[name])
    for what, says in KNOWN.get(name, {}).items():
        assert re.search(says, found[what])


def test_the_page_lists_no_other():
    assert set(listed()) == set(MAKERS) >= set(KNOWN)


def main():
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        for name in MAKERS:
            found = examine(name, Path(folder) / str(len(name)))
            rows = [f"| {what} | {finding} |" for what, finding in found.items()]
            table = ["| property | what is found |", "|---|---|", *rows] if rows else ["Nothing."]
            print("\n".join(["", f"### `{name}`", "", *table]))


if __name__ == "__main__":
    main()
