"""Low-rank adaptation: train small additions to chosen linear layers and leave the network as it is.

W becomes W + (α/r)·B·A with A (r, inputs) random and B (outputs, r) zero at first. Layers and arithmetic are those of
the package `peft`.

Source: E. Hu et al., 'LoRA: Low-rank adaptation of large language models', 2021, arXiv:2106.09685.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trainerkit.errors import either, nearest
from trainerkit.extras import require

_NEEDS = "lora"


@dataclass
class Lora:
    """What is added, and where.

    Attributes:
        r: rank of the additions, 1 or more.
        alpha: α; the additions count α/r times. No file of weights says it: give what they were trained with.
        dropout: probability, of their inputs in training.
        targets: patterns for names of linear layers ('*' matches dots too), such as '*.attention.qkv',
            '*.attention.out', '*.feed_forward.up', '*.feed_forward.down'.

    Raises:
        ValueError: for a value that is not possible.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | Sequence[str] = ("*.attention.qkv",)

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"lora.r={self.r}: must be a whole number, 1 or more")
        if not isinstance(self.alpha, int | float) or not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha}: must be a number above 0")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout}: must be from 0 to below 1")
        self.targets = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        if not self.targets:
            raise ValueError("lora.targets=[]: must be a pattern for names, like '*.attention.qkv', or a list of them")


def as_lora(given: Lora | Mapping[str, Any]) -> Lora:
    """A `Lora` from its own attributes in a mapping, as a config has them.

    Raises:
        ValueError: for something else, or a key that it has not.
    """
    if isinstance(given, Lora):
        return given
    known = [field.name for field in fields(Lora)]
    if not isinstance(given, Mapping):
        raise ValueError(f"lora={given}: must be null or have the keys {', '.join(known)}")
    for key in given:
        if key not in known:
            raise ValueError(f"lora.{key}={given[key]}: there is no such key; it has {', '.join(known)}")
    return Lora(**given)


def add_lora(network: nn.Module, lora: Lora) -> None:
    """Put adapters on the chosen linear layers of `network`, and freeze everything else.

    Raises:
        ValueError: for a pattern that matches no linear layer; it names the nearest.
        trainerkit.errors.UserError: if `peft` is not installed.
    """
    layers = _chosen(network, lora.targets)
    peft = require("peft", _NEEDS)
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=layers)
    peft.inject_adapter_in_model(config, network)


def merge_lora(network: nn.Module) -> None:
    """Add the adapters to the weights that they adapt, and remove them; afterwards everything can be trained again."""
    peft = require("peft.tuners.tuners_utils", _NEEDS)
    for name, module in list(network.named_modules()):
        if isinstance(module, peft.BaseTunerLayer):
            layer: Any = module
            layer.merge(safe_merge=True)
            network.set_submodule(name, layer.get_base_layer())
    network.requires_grad_(True)


def _chosen(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the linear layers that match any of the patterns."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in layers if fnmatchcase(name, pattern)]
        if not found:
            near = nearest(pattern, layers) or layers[:3]
            raise ValueError(f"lora.targets={pattern}: matches no linear layer; the nearest are {either(near)}")
        chosen |= dict.fromkeys(found)
    return list(chosen)
