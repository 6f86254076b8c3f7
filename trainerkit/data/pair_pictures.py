"""Pictures from files, read batch by batch."""

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from trainerkit.errors import UserError, first_lines
from trainerkit.extras import require

Fit = Literal["resize", "crop", "pad"]
FITS = ("resize", "crop", "pad")
PictureSource = Path | bytes


class Pictures(Protocol):
    """Pictures by their row numbers."""

    def __len__(self) -> int: ...

    def take(self, rows: Tensor, draws: Tensor) -> Tensor:
        """(B, C, H, W) float32 in 0..1, of `rows` (B,); `draws` (B, 2) in [0, 1) is what may be left to chance."""


class PictureFiles:
    """Pictures that are decoded when they are asked for.

    Args:
        sources: a path of a file, or a file's content, for each row.
        name: what a message calls row i.
        image_size: side of a picture as the network sees it.
        channels: 1 (grey) or 3 (RGB).
        fit: what is done with one that is no square: 'resize' stretches it, 'crop' takes the middle, 'pad' adds black.
        mean: of each channel, subtracted; None for 0.
        std: of each channel, divided by; None for 1.

    A turned picture is put upright as its EXIF says; what is transparent becomes white.
    """

    def __init__(
        self,
        sources: Sequence[PictureSource],
        name: Callable[[int], str],
        *,
        image_size: int,
        channels: int = 3,
        fit: Fit = "resize",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        require("PIL.Image", "pictures")
        self.sources = list(sources)
        self._name = name
        self._size = image_size
        self._channels = channels
        self._fit = fit
        self._mean = torch.tensor([0.0] * channels if mean is None else list(mean))[:, None, None]
        self._std = torch.tensor([1.0] * channels if std is None else list(std))[:, None, None]

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Decode some pictures; raises `UserError` for one that has been damaged since `problems` looked at it."""
        pictures = [self._picture(int(row)) for row in rows]
        found = torch.stack(pictures) if pictures else torch.zeros(0, self._channels, self._size, self._size)
        return (found - self._mean) / self._std

    def _picture(self, row: int) -> Tensor:
        try:
            return decoded(self.sources[row], self._size, self._channels, self._fit)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise UserError(f"{self._name(row)}: {_why(self.sources[row], error)}") from error


def decoded(source: PictureSource, image_size: int, channels: int, fit: Fit) -> Tensor:
    """A picture from a file or a file's content, (channels, image_size, image_size) float32 in 0..1.

    Resized by Pillow's bicubic filter, which is wide enough not to alias where it makes smaller.

    Raises:
        Exception: of many kinds, if it cannot be decoded.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        picture = _plain(_upright(file), "L" if channels == 1 else "RGB")
    size, filter_ = (image_size, image_size), Image.Resampling.BICUBIC
    if fit == "crop":
        picture = ImageOps.fit(picture, size, filter_)
    elif fit == "pad":
        # By hand: ImageOps.pad() leaves nothing of a picture that is thinner than a pixel of the square.
        longer = max(picture.size)
        inner = [max(1, round(side * image_size / longer)) for side in picture.size]
        square = Image.new(picture.mode, size)
        square.paste(picture.resize(inner, filter_), tuple((image_size - side) // 2 for side in inner))
        picture = square
    else:
        picture = picture.resize(size, filter_)
    array = np.asarray(picture, dtype=np.float32).reshape(image_size, image_size, channels) / 255
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def problems(sources: Sequence[PictureSource]) -> dict[int, str]:
    """Which pictures cannot be decoded, and why; each is decoded once, several at a time.

    A JPEG is decoded at an eighth of its size, which reads all of it and takes less.
    """
    require("PIL.Image", "pictures")
    distinct = list(dict.fromkeys(sources))
    with ThreadPoolExecutor() as pool:
        found = dict(zip(distinct, pool.map(_problem, distinct), strict=True))
    return {row: why for row, source in enumerate(sources) if (why := found[source]) is not None}


def digests(sources: Sequence[PictureSource]) -> list[str]:
    """A digest of each picture's file, several at a time; none of them is decoded."""
    distinct = list(dict.fromkeys(sources))
    with ThreadPoolExecutor() as pool:
        found = dict(zip(distinct, pool.map(_digest, distinct), strict=True))
    return [found[source] for source in sources]


def _digest(source: PictureSource) -> str:
    content = source if isinstance(source, bytes) else source.read_bytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _problem(source: PictureSource) -> str | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            file.draft("RGB", (1, 1))
            # As in a batch, but for the size.
            _plain(_upright(file), "RGB")
    except Exception as error:  # Pillow raises many kinds for a damaged file
        return _why(source, error)
    return None


def _upright(file: Any) -> Any:
    """The picture turned as its EXIF says; as it is if its EXIF is damaged, but not if itself is."""
    from PIL import ImageOps

    file.load()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF that is damaged
            return ImageOps.exif_transpose(file)
    except Exception:  # Pillow raises many kinds
        return file


def _plain(picture: Any, mode: str) -> Any:
    """8 bits a channel, and nothing transparent."""
    from PIL import Image

    if picture.mode in ("F", "I"):
        raise ValueError("pixels of 32 bits have no known range")
    if picture.mode.startswith("I;16"):  # 16 bits, which convert() would clip instead of scale
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def _why(source: PictureSource, error: Exception) -> str:
    if source == b"":
        return "a picture is missing."
    what = "a picture" if isinstance(source, bytes) else str(source)
    if isinstance(error, FileNotFoundError):
        return f"{what}: there is no such picture."
    return f"{what}: is no picture that can be read ({first_lines(error, 1)})."
