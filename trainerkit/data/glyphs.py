"""Characters in twelve faces of the DejaVu fonts, and their Unicode names: `data=glyphs`, nothing is fetched.

The twelve share 2,297 named characters, blanks, marks and controls left out, with 2,149 distinct pictures in Sans. Half
of them, 1,087, are unseen: no training row shows one, in any face. Of 898 of these all words of the name are known.

Among the unseen ones, the nearest by the cosine of 32 x 32 pixels is the same character for 0.754 from Sans to Serif,
0.386 to Mono Oblique, 0.526 to Serif Bold Italic, and for 0.746, 0.394, 0.567 where Pillow lacks the layout engine
Raqm.

The fonts come with the package matplotlib (extra `examples`). Licence: Bitstream Vera.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainerkit.data.pair_dataset import PairDataset, Side
from trainerkit.data.pair_module import PairModule, PairSets, check_fractions
from trainerkit.data.pair_pictures import PictureFiles
from trainerkit.data.pair_texts import TokenRows, pair_tokenizer
from trainerkit.data.text_cache import default_cache_dir
from trainerkit.data.text_files import draw_split
from trainerkit.extras import folder_of, require
from trainerkit.files import replacing
from trainerkit.functional.picture_moves import Augmentation

FACES = (
    "Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique",
    "SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique",
    "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic",
)  # fmt: skip
SANS = FACES.index("Sans")
# What is searched in, by the name of the evaluation set.
_TARGETS = {"sans_to_serif": "Serif", "sans_to_mono_oblique": "SansMono-Oblique"}
_TARGETS |= {"sans_to_serif_bolditalic": "Serif-BoldItalic", "text_to_sans": "Sans"}
_LEFT_OUT = "CZM"  # controls, blanks, and marks that stand over another character
_FORMAT = 2
_COMPARED_AT = 32  # pixels: which characters look the same does not depend on the size that a run takes


class Glyphs(PairModule):
    """The same character in two faces, and its name.

    A training row is a character: `query_image` and `positive_image` show it in two faces drawn anew each epoch,
    `query_text` has its name, `label` its number among the characters of training. The evaluation sets are
    `sans_to_serif`, `sans_to_mono_oblique`, `sans_to_serif_bolditalic` (pictures to pictures) and `text_to_sans` (names
    to pictures). Prediction gives the unseen characters in Sans.

    Args:
        image_size: side of a picture; the font's size is 11/16 of it.
        queries: what a training row's query has of 'image' and 'text'.
        augment: shift, turn and scale pictures in training.
        max_shift: see `Augmentation`, as the next two.
        max_rotation: degrees.
        max_scale: 0.1 is from 1/1.1 to 1.1 times the size.
        tokenizer: of the names, see `pair_tokenizer`, as the next three.
        n_buckets: of hashed words; the names have some 900 words.
        word_ngrams: longest sequence of words that has a token.
        char_ngrams: shortest and longest sequence of letters that has a token, or None.
        max_length: tokens of a name at most.
        val_fraction: share of the training half for validation.
        mined_negatives: how many mined negatives a row has room for.
        query: what is searched in prediction, among the unseen characters in Sans: a path of a picture, white on black,
            or else a text.
        batch_size: characters a batch and process.
        num_workers: processes that read ahead; 0 is fastest.
        cache_dir: where pictures are kept; None for `$XDG_CACHE_HOME/trainerkit`, or `~/.cache/trainerkit`.
        seed: of the order, the faces and the augmentation; not of the split.

    Raises:
        ValueError: for an impossible argument.
    """

    def __init__(
        self,
        *,
        image_size: int = 48,
        queries: Sequence[str] = ("image", "text"),
        augment: bool = True,
        max_shift: float = 0.04,
        max_rotation: float = 5.0,
        max_scale: float = 0.1,
        tokenizer: str = "words",
        n_buckets: int = 4096,
        word_ngrams: int = 1,
        char_ngrams: tuple[int, int] | None = None,
        max_length: int = 64,
        val_fraction: float = 0.05,
        mined_negatives: int = 0,
        query: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            mined_negatives=mined_negatives,
            seed=seed,
            searches=query is not None,
        )
        if image_size < 8:
            raise ValueError(f"image_size={image_size}: must be 8 or more")
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: must be 1 or more")
        if not queries or not set(queries) <= {"image", "text"}:
            raise ValueError(f"queries={list(queries)}: must be of image and text, one or both")
        check_fractions({"val_fraction": val_fraction})
        self._augmentation = Augmentation(max_shift, max_rotation, max_scale) if augment else None
        self.modalities = ["image", "text"]
        self.evaluation_names = list(_TARGETS)
        self.channels = 1
        self.image_size = image_size
        self._queries = tuple(queries)
        self._tokenizer = pair_tokenizer(
            tokenizer, max_length, n_buckets=n_buckets, word_ngrams=word_ngrams, char_ngrams=char_ngrams
        )
        self.vocab_size = self._tokenizer.vocab_size
        self._max_length = max_length
        self._val_fraction = val_fraction
        self._query = query
        self._cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._codes: list[int] = []

    # What tasks and callbacks read.

    query_mode = "separate"
    eval_shift = 2  # pixels, for characters are small

    @property
    def codes(self) -> list[int]:
        """The characters' code points, ascending; `index` is a place in it."""
        self.setup("test")
        return self._codes

    @property
    def n_classes(self) -> int:
        """How many characters are trained on."""
        return len(self.train_dataset)

    def describe(self, index: int, side: Literal["query", "positive"]) -> str:
        """The character and its name."""
        character = chr(self.codes[index])
        return f"{character} {unicodedata.name(character)}"

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Draw the characters if they are not in the cache; Lightning has one process of a machine do it."""
        glyphs(self.image_size, self._cache_dir)

    def make_sets(self) -> PairSets:
        """Split the characters by hashes of their code points."""
        codes, drawn = glyphs(self.image_size, self._cache_dir)
        self._codes = codes.tolist()
        pictures = torch.from_numpy(drawn)
        names = self._tokens([unicodedata.name(chr(code)) for code in self._codes])
        roles = torch.tensor([role_of(code, self._val_fraction) for code in self._codes])
        train, val, test = ((roles == role).nonzero()[:, 0] for role in range(3))
        labels = torch.full_like(roles, -1)
        labels[train] = torch.arange(len(train))
        query = Side(
            names if "text" in self._queries else None,
            TwoFaces(pictures, second=False) if "image" in self._queries else None,
        )
        positive = Side(None, TwoFaces(pictures, second=True))
        sans = Side(None, OneFace(pictures, SANS))

        def evaluation(rows: Tensor) -> list[PairDataset]:
            sides = {name: Side(None, OneFace(pictures, FACES.index(face))) for name, face in _TARGETS.items()}
            return [
                PairDataset(Side(names) if name.startswith("text") else sans, side, rows)
                for name, side in sides.items()
                if len(rows)
            ]

        return PairSets(
            train=PairDataset(
                query,
                positive,
                train,
                labels=labels,
                augmentation=self._augmentation,
                mined=self.mined_negatives,
                seed=self.seed,
            ),
            mining=PairDataset(query, positive, train, seed=self.seed, counted=True),
            val=evaluation(val),
            test=evaluation(test),
            rows=PairDataset(sans, sans, test),
            query=self._searched(),
        )

    def _tokens(self, texts: list[str]) -> TokenRows:
        return TokenRows(self._tokenizer.encode_many(texts), self._max_length)

    def _searched(self) -> PairDataset | None:
        if self._query is None:
            return None
        if _is_file(self._query):
            file = PictureFiles([Path(self._query)], ["query"].__getitem__, image_size=self.image_size, channels=1)
            return PairDataset(Side(None, file), Side(), torch.zeros(1, dtype=torch.int64))
        return PairDataset(Side(self._tokens([self._query])), Side(), torch.zeros(1, dtype=torch.int64))


def _is_file(query: str) -> bool:
    try:
        return Path(query).is_file()
    except (OSError, ValueError):  # a long text, or one with a zero, is no path
        return False


class TwoFaces:
    """Each row's character in a face that is drawn; the two sides of a row show different ones.

    Args:
        pictures: (faces, characters, H, W) uint8.
        second: whether it is the second side's.
    """

    def __init__(self, pictures: Tensor, second: bool) -> None:
        self.pictures = pictures
        self.second = second

    def __len__(self) -> int:
        return self.pictures.shape[1]

    def take(self, rows: Tensor, draws: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        faces = len(self.pictures)
        face = (draws[:, 0] * faces).long()
        if self.second:
            face = (face + 1 + (draws[:, 1] * (faces - 1)).long()) % faces
        return self.pictures[face, rows][:, None] / 255


class OneFace:
    """Each row's character in one face; pictures as in `TwoFaces`."""

    def __init__(self, pictures: Tensor, face: int) -> None:
        self.pictures = pictures
        self.face = face

    def __len__(self) -> int:
        return self.pictures.shape[1]

    def take(self, rows: Tensor, draws: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        return self.pictures[self.face, rows][:, None] / 255


def role_of(code: int, val_fraction: float) -> int:
    """What a character is for, from its code point alone: 0 to train, 1 to validate, 2 (the unseen half) to test."""
    if int(hashlib.md5(str(code).encode(), usedforsecurity=False).hexdigest(), 16) % 2 == 0:
        return 2
    # Another text than above: the digits of that hash would not be independent of its being even.
    return draw_split(f"validation {code}".encode(), (val_fraction, 0.0))


def glyphs(image_size: int, cache_dir: Path) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """The characters that all faces have, and their pictures: from the cache, or drawn now.

    Of characters that look the same in Sans (A in Latin, Greek and Cyrillic) the one with the smallest code point is
    kept.

    Args:
        image_size: side of a picture.
        cache_dir: the folder below which they are kept.

    Returns:
        Code points, (n,), ascending, and pictures, (faces, n, image_size, image_size), 255 on 0, as in `FACES`.

    Raises:
        trainerkit.errors.UserError: if a package that is needed is not installed.
    """
    features = require("PIL.features", "data=glyphs")
    folder = folder_of("matplotlib", "data=glyphs") / "mpl-data" / "fonts" / "ttf"
    files = [folder / f"DejaVu{face}.ttf" for face in FACES]
    # Another FreeType draws other edges; with the layout engine Raqm some characters stand a little elsewhere.
    made_by = [features.version("freetype2"), features.check("raqm"), unicodedata.unidata_version]
    key = hashlib.sha256(f"{_FORMAT} {image_size} {made_by}".encode())
    for file in files:
        key.update(file.read_bytes())
    path = cache_dir / "glyphs" / f"{key.hexdigest()[:24]}.npy"
    if not path.is_file():
        _draw_all(files, image_size, path)
    stored = np.load(path)
    pictures = stored["pictures"].transpose(1, 0, 2, 3)
    return stored["code"], np.ascontiguousarray(pictures)


def _draw_all(files: list[Path], image_size: int, path: Path) -> None:
    library = require("fontTools.ttLib", "data=glyphs")
    shared = set.intersection(*(set(library.TTFont(file).getBestCmap()) for file in files))
    named = [code for code in sorted(shared) if unicodedata.category(chr(code))[0] not in _LEFT_OUT]
    sans = drawn(files[SANS], named, _COMPARED_AT)
    first = {picture.tobytes(): place for place, picture in reversed(list(enumerate(sans)))}
    codes = [named[place] for place in sorted(first.values())]
    kind = np.dtype([("code", np.int64), ("pictures", np.uint8, (len(files), image_size, image_size))])
    stored = np.empty(len(codes), kind)
    stored["code"] = codes
    for number, file in enumerate(files):
        stored["pictures"][:, number] = drawn(file, codes, image_size)
    # One file, so that codes and pictures are always of one another.
    with replacing(path) as temporary, temporary.open("wb") as out:
        np.save(out, stored)


def drawn(file: Path, codes: Sequence[int], image_size: int) -> NDArray[np.uint8]:
    """Characters of a font, (n, image_size, image_size), 255 on 0: in the middle by advance and line, not by their ink,
    so that comma and apostrophe differ.
    """
    require("PIL.ImageFont", "data=glyphs")
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(file), round(image_size * 11 / 16))
    pictures = np.zeros((len(codes), image_size, image_size), np.uint8)
    for picture, code in zip(pictures, codes, strict=True):
        canvas = Image.new("L", (image_size, image_size))
        ImageDraw.Draw(canvas).text((image_size / 2, image_size / 2), chr(code), font=font, fill=255, anchor="mm")
        picture[:] = np.asarray(canvas)
    return pictures
