"""Masked autoencoder for spectra and other one-dimensional signals: `python -m trainerkit task=mae`."""

from trainerkit.tasks.mae.augment import SpectraAugment
from trainerkit.tasks.mae.clusters import LatentClusters
from trainerkit.tasks.mae.losses import masked_mse, masked_sse
from trainerkit.tasks.mae.network import MaskedAutoencoder
from trainerkit.tasks.mae.report import ReconstructionReport
from trainerkit.tasks.mae.task import MaskedAutoencoderTask

__all__ = [
    "LatentClusters",
    "MaskedAutoencoder",
    "MaskedAutoencoderTask",
    "ReconstructionReport",
    "SpectraAugment",
    "masked_mse",
    "masked_sse",
]
