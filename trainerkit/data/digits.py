"""1,797 handwritten digits of 8x8 pixels, which come with scikit-learn (extra `examples`); nothing is fetched.

Source: E. Alpaydin, C. Kaynak, Optical recognition of handwritten digits, UCI Machine Learning Repository, 1998,
doi:10.24432/C50P49, CC BY 4.0. These are the digits of its test part, by 13 writers.
"""

import numpy as np
import torch

from trainerkit.data.labelled import LabelledSets, PictureModule, array_sets, split_classes
from trainerkit.data.pair_module import check_fractions
from trainerkit.extras import folder_of

SIDE = 8


class Digits(PictureModule):
    """Handwritten digits, the first 898 to train and validate, the other 899 to test.

    A batch is `{"x": (B, 1, 8, 8) in 0..1, "y": (B,), "index": (B,)}`; prediction gives out all 1,797 in order.

    Args:
        val_fraction: share of the first half for validation, the same of each digit.
        batch_size: digits a batch and process.
        num_workers: processes that read ahead; 0 is fastest.
        seed: of the validation part and of the order of the batches; not of the test part.

    Raises:
        ValueError: for an impossible argument.
    """

    def __init__(self, *, val_fraction: float = 0.1, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fractions({"val_fraction": val_fraction})
        self._val_fraction = val_fraction

    def make_sets(self) -> LabelledSets:
        """Read the packaged table and split it."""
        # Read by path: importing scikit-learn would take a second.
        path = folder_of("sklearn", "data=digits") / "datasets" / "data" / "digits.csv.gz"
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
        y = table[:, -1].astype(np.int64)
        names = [str(digit) for digit in range(10)]
        half = len(y) // 2
        roles = np.full(len(y), 2)
        roles[:half] = split_classes(y[:half], (self._val_fraction, 0.0), self.seed, names)
        arrays = {"x": torch.from_numpy(table[:, :-1] / 16).view(-1, 1, SIDE, SIDE), "y": torch.from_numpy(y)}
        return array_sets(arrays, roles, names)
