"""A hypernetwork that writes LoRA adapters from descriptions of their tasks: `python -m trainerkit task=t2l`."""

from trainerkit.tasks.t2l.losses import LossParts, ReconstructionLoss
from trainerkit.tasks.t2l.network import HyperNetwork

__all__ = ["HyperNetwork", "LossParts", "ReconstructionLoss"]
