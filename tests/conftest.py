"""Fixtures that all tests share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything

from tests.support import smooth_spectra


@pytest.fixture(autouse=True)
def _steady():
    """The same numbers whatever ran before, and one thread, since small matrices gain nothing from two."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)


@pytest.fixture
def spectra_file(tmp_path: Path) -> Path:
    """400 spectra of 40 bands as a .npy file."""
    path = tmp_path / "spectra.npy"
    np.save(path, smooth_spectra())
    return path
