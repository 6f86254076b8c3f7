"""Pictures of the user's, a folder a class: `data=picture_folder data.path=mine` (extra `retrieval`, for pillow)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainerkit.data.labelled import LabelledSets, PictureModule, array_sets, counts_of, split_classes
from trainerkit.data.loader import ArrayDataset, Batch
from trainerkit.data.pair_module import check_fractions
from trainerkit.data.pair_pictures import FITS, Fit, PictureFiles, problems
from trainerkit.data.spectra import split_blocks
from trainerkit.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Of pictures as float32; more are decoded anew for each batch.
_IN_MEMORY = 1 << 30


class PictureFolder(PictureModule):
    """Pictures from files, a folder a class, or one folder without classes, as to generate more like them.

    A batch is `{"x": (B, channels, image_size, image_size) in 0..1, "y": (B,), "index": (B,)}`, without `y` where there
    are no classes. Classes and the files of each are in the order of their names. Each class's files are split in the
    same shares. A turned picture is put upright as its EXIF says; what is transparent becomes white.

    Args:
        path: a folder with a folder for each class, and at least one picture in each, also in folders below it; or a
            folder with nothing but pictures. Names that begin with a dot are left out.
        image_size: side of a picture as the network sees it.
        channels: 1 (grey) or 3 (RGB).
        fit: what is done with one that is no square: 'resize' stretches it, 'crop' takes the middle, 'pad' adds black.
        predict_path: what prediction reads instead of `path`: a folder of pictures, in order of their names.
        val_fraction: share of each class's files for validation.
        test_fraction: share of each class's files for the test.
        batch_size: pictures a batch and process.
        num_workers: processes that read ahead; 0 is fastest where the decoded pictures fit into 1 GiB and are kept.
        seed: of the split and of the order of the batches.

    Raises:
        ValueError: for an impossible argument.
        trainerkit.errors.UserError: for a folder that cannot be used; it names the file or the class.
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int = 32,
        channels: int = 3,
        fit: Fit = "resize",
        predict_path: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fractions({"val_fraction": val_fraction, "test_fraction": test_fraction})
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: must be 1 or more")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: must be 1 (grey) or 3 (RGB)")
        if fit not in FITS:
            raise ValueError(f"fit={fit}: must be one of {', '.join(FITS)}")
        self.path = path
        self._image_size = image_size
        self._channels = channels
        self._fit: Fit = fit
        self._predict_path = predict_path
        self._fractions = (val_fraction, test_fraction)
        self.files: list[Path] = []  # of the rows, once they are read

    def make_sets(self) -> LabelledSets:
        """Find the files, look whether each can be read, and split them."""
        folder = Path(self.path).expanduser()
        self.files, classes, numbers = labelled_files(folder)
        y = np.array(numbers, np.int64)
        if classes:
            roles = split_classes(y, self._fractions, self.seed, classes)
        else:
            roles = split_blocks(np.arange(len(self.files)), self._fractions, self.seed)
        if not (roles == 0).any():
            raise UserError(f"{folder}: has {len(self.files)} pictures, of which none is left to train on.")
        sets = self._sets_of(self.files, torch.from_numpy(y) if classes else None, roles, classes)
        if self._predict_path is None:
            return sets
        others = pictures_in(Path(self._predict_path).expanduser())
        return replace(sets, predicted=self._sets_of(others, None, np.zeros(len(others), np.int64), []).predicted)

    def _sets_of(
        self, files: list[Path], y: Tensor | None, roles: "np.typing.NDArray[np.int64]", classes: list[str]
    ) -> LabelledSets:
        found = problems(files)
        if found:
            why = next(iter(found.values()))
            more = f" {len(found) - 1} more cannot be read either." if len(found) > 1 else ""
            raise UserError(f"{why}{more}")
        names = [str(file) for file in files]
        pictures = PictureFiles(
            files, names.__getitem__, image_size=self._image_size, channels=self._channels, fit=self._fit
        )
        shape = (self._channels, self._image_size, self._image_size)
        if 4 * len(files) * int(np.prod(shape)) <= _IN_MEMORY:
            every = torch.arange(len(files))
            x = pictures.take(every, every)
            return array_sets({"x": x} if y is None else {"x": x, "y": y}, roles, classes)
        rows = {name: torch.from_numpy(np.flatnonzero(roles == i)) for i, name in enumerate(("train", "val", "test"))}
        return LabelledSets(
            parts={name: _DecodedPictures(pictures, y, part) for name, part in rows.items() if len(part)},
            predicted=_DecodedPictures(pictures, y, torch.arange(len(files))),
            shape=shape,
            classes=classes,
            counts=[] if y is None else counts_of(y[rows["train"]], classes),
        )


class _DecodedPictures(Dataset[Batch]):
    """As an ArrayDataset, of pictures that are decoded for each batch."""

    seeded_by_index = True

    def __init__(self, pictures: PictureFiles, y: Tensor | None, rows: Tensor) -> None:
        self.pictures = pictures
        self.labels = ArrayDataset({"y": torch.zeros(len(pictures)) if y is None else y}, rows)
        self.has_labels = y is not None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Batch:
        batch = self.labels[index]
        x = self.pictures.take(batch["index"], batch["index"])  # nothing is left to chance, so no draws
        return {"x": x, **batch} if self.has_labels else {"x": x, "index": batch["index"]}


def labelled_files(folder: Path) -> tuple[list[Path], list[str], list[int]]:
    """Pictures of a folder with a folder a class, or without classes.

    Returns:
        The files, the classes' names, and each file's class; no name and no number where there are no classes.

    Raises:
        UserError: if the folder is not there, has no picture, or has pictures beside folders with some.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder.")
    folders = sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
    loose = [item for item in folder.iterdir() if _is_picture(item)]
    if not folders:
        return pictures_in(folder), [], []
    if loose:
        raise UserError(
            f"{folder}: has pictures ({loose[0].name}, …) beside folders ({folders[0].name}, …); needed is either a "
            "folder for each class, or pictures alone."
        )
    if len(folders) < 2:
        raise UserError(
            f"{folder}: has one class, {folders[0].name}; needed are two, or pictures alone: data.path={folders[0]}."
        )
    files: list[Path] = []
    numbers: list[int] = []
    for number, item in enumerate(folders):
        found = pictures_in(item)
        files += found
        numbers += [number] * len(found)
    return files, [item.name for item in folders], numbers


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it, in order of their names.

    Raises:
        UserError: if the folder is not there, or there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder.")
    found = sorted(item for item in folder.rglob("*") if _is_picture(item))
    if not found:
        raise UserError(f"{folder}: has no picture ({', '.join(SUFFIXES)}).")
    return found


def _is_picture(item: Path) -> bool:
    return item.suffix.lower() in SUFFIXES and not item.name.startswith(".") and item.is_file()
