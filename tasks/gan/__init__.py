"""Generative adversarial networks for pictures: `python -m trainerkit task=gan`."""

from trainerkit.tasks.gan.augment import DiffAugment
from trainerkit.tasks.gan.grids import SampleGrid
from trainerkit.tasks.gan.losses import discriminator_loss, generator_loss
from trainerkit.tasks.gan.network import Discriminator, Generator
from trainerkit.tasks.gan.penalties import gradient_penalty, r1_penalty
from trainerkit.tasks.gan.report import SampleReport
from trainerkit.tasks.gan.task import GanTask

__all__ = [
    "DiffAugment",
    "Discriminator",
    "GanTask",
    "Generator",
    "SampleGrid",
    "SampleReport",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "r1_penalty",
]
