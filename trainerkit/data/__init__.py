"""Data modules of the default runs, one file per data set, and the loader they share."""

from trainerkit.data.digits import Digits
from trainerkit.data.glyphs import Glyphs
from trainerkit.data.hashed_words import HashedWords
from trainerkit.data.indian_pines import IndianPines
from trainerkit.data.loader import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.data.lora_library import LoraLibrary
from trainerkit.data.mnist_5k import MNIST5k
from trainerkit.data.pair_dataset import PairDataset
from trainerkit.data.pairs import PairData
from trainerkit.data.picture_folder import PictureFolder
from trainerkit.data.rule_adapters import RuleAdapters
from trainerkit.data.seeded import SeededSamples
from trainerkit.data.spectra import SpectraData, snv
from trainerkit.data.stdlib_pairs import StdlibPairs
from trainerkit.data.stdlib_text import StdlibText
from trainerkit.data.table import TableData
from trainerkit.data.task_embeddings import HashedNgrams, OneHot, PrecomputedEmbeddings, SentenceEmbeddings
from trainerkit.data.text import TextData
from trainerkit.data.text_stream import TextStream

__all__ = [
    "ArrayDataset", "BatchLoader", "Digits", "EpochBatches", "Glyphs", "HashedNgrams", "HashedWords", "IndianPines",
    "LoraLibrary", "MNIST5k", "OneHot", "PairData", "PairDataset", "PictureFolder", "PrecomputedEmbeddings",
    "RuleAdapters", "SeededSamples", "SentenceEmbeddings", "SpectraData", "StdlibPairs", "StdlibText", "TableData",
    "TextData", "TextStream", "snv",
]  # fmt: skip
