"""What trainerkit's Trainer adds to Lightning's."""

import pytest
import torch

from trainerkit.trainer import Trainer, multiplies_bfloat16

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


@pytest.mark.parametrize(("has_avx512", "has_amx"), [(False, False), (True, False), (False, True)])
def test_automatic_precision_is_bf16_where_the_cpu_multiplies_it(has_avx512, has_amx, monkeypatch):
    # A machine has one kind of processor: what the others would say is given here.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    trainer = Trainer(precision="auto", **QUIET)
    assert trainer.precision == ("bf16-mixed" if has_avx512 or has_amx else "32-true")


def test_a_gpu_that_is_not_there_multiplies_nothing():
    assert multiplies_bfloat16("cuda") == (torch.cuda.is_available() and torch.cuda.is_bf16_supported(False))
    assert not multiplies_bfloat16("mps")


def test_what_is_asked_for_is_taken():
    assert Trainer(precision="bf16-mixed", **QUIET).precision == "bf16-mixed"
    assert Trainer(**QUIET).precision == "32-true"
