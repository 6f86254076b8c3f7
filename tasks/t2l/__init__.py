"""A hypernetwork that writes LoRA adapters from descriptions of their tasks: `python -m trainerkit task=t2l`."""

from trainerkit.tasks.t2l.frozen_base import FrozenBase
from trainerkit.tasks.t2l.layer_weights import LayerWeighting, layer_weights
from trainerkit.tasks.t2l.losses import LossParts, ReconstructionLoss
from trainerkit.tasks.t2l.metrics import adapter_metrics
from trainerkit.tasks.t2l.network import HyperNetwork
from trainerkit.tasks.t2l.progressive import Progressive
from trainerkit.tasks.t2l.report import AdapterReport
from trainerkit.tasks.t2l.task import TextToLoraTask
from trainerkit.tasks.t2l.written_adapters import WriteAdapters

__all__ = [
    "AdapterReport", "FrozenBase", "HyperNetwork", "LayerWeighting", "LossParts", "Progressive", "ReconstructionLoss",
    "TextToLoraTask", "WriteAdapters", "adapter_metrics", "layer_weights",
]  # fmt: skip
