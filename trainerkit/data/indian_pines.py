"""Indian Pines: 21,025 spectra of 200 bands over farmland in Indiana, 10,249 of them labelled in 16 classes.

One AVIRIS picture of 145x145 pixels, 400 to 2,500 nm, taken on 12 June 1992. The corrected version, without the bands
of water absorption, comes with the package tensorly (extra `examples`); nothing is fetched.

Source: M. F. Baumgardner, L. L. Biehl, D. A. Landgrebe, Purdue University Research Repository, 2015,
doi:10.4231/R7RX991C, CC BY 3.0.
"""

import numpy as np
from numpy.typing import NDArray

from trainerkit.data.spectra import FitLength, Normalize, SpectraData, split_blocks
from trainerkit.data.tables import Table
from trainerkit.extras import folder_of

SIDE = 145
CLASS_NAMES = (
    "unlabelled", "alfalfa", "corn-notill", "corn-mintill", "corn", "grass-pasture", "grass-trees",
    "grass-pasture-mowed", "hay-windrowed", "oats", "soybean-notill", "soybean-mintill", "soybean-clean", "wheat",
    "woods", "buildings-grass-trees", "stone-steel-towers",
)  # fmt: skip


class IndianPines(SpectraData):
    """Indian Pines, split by square blocks of pixels: neighbouring pixels resemble each other, so that a random split
    would measure memory.

    A batch has `y`, the class, with 0 for pixels without a label.

    Args:
        seq_len: length of a spectrum as the network sees it; None for the 200 bands.
        fit_length: 'exact', 'pad' or 'crop', see `SpectraData`.
        normalize: 'zscore', 'snv' or 'none', see `SpectraData`.
        block_size: side of a block in pixels.
        val_fraction: share of the blocks for validation.
        test_fraction: share of the blocks for the test.
        batch_size: spectra a batch and process.
        num_workers: processes that read ahead.
        seed: of the split and of the order of the batches.
    """

    def __init__(
        self,
        *,
        seq_len: int | None = None,
        fit_length: FitLength = "exact",
        normalize: Normalize = "zscore",
        block_size: int = 10,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            "Indian Pines (tensorly)",
            seq_len=seq_len,
            fit_length=fit_length,
            normalize=normalize,
            split="blocks",
            block_size=block_size,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )

    def load(self) -> tuple[Table, Table | None]:
        """The picture's pixels, row by row, and their classes."""
        # Read by path: importing tensorly would take seconds.
        folder = folder_of("tensorly", "data=indian_pines") / "datasets" / "data"
        spectra = np.load(folder / "Indian_pines_corrected.npy").reshape(SIDE * SIDE, -1)
        classes = np.load(folder / "Indian_pines_gt.npy").reshape(-1)
        return spectra, classes

    def roles(self, rows: int) -> NDArray[np.int64]:
        """Each pixel's part, by squares of `block_size` pixels."""
        row, column = np.divmod(np.arange(rows), SIDE)
        across = -(-SIDE // self._block_size)
        block = row // self._block_size * across + column // self._block_size
        return split_blocks(block, self._fractions, self.seed)

    @property
    def class_names(self) -> list[str]:
        """What grows there; number 0 is not labelled."""
        return list(CLASS_NAMES)
