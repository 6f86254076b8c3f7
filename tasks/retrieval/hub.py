"""Networks of `transformers` from a folder, and which of their parameters are trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainerkit.errors import UserError, first_lines
from trainerkit.extras import require
from trainerkit.nn.lora import Lora, add_lora, as_lora

Adapters = Lora | Mapping[str, Any] | None


def load_transformers(kind: str, name_or_path: str, trust_remote_code: bool) -> Any:
    """A model of `transformers` in float32, in training mode, without the pooling layer that is not used here.

    Args:
        kind: its class, such as 'AutoModel'.
        name_or_path: see `PretrainedText`.
        trust_remote_code: see `PretrainedText`.

    Raises:
        UserError: if `transformers` is not installed, the folder cannot be read, or lacks weights.
    """
    transformers = require("transformers", f"name_or_path={name_or_path}")
    try:
        network, found = getattr(transformers, kind).from_pretrained(
            str(name_or_path),
            trust_remote_code=trust_remote_code,
            use_safetensors=None if trust_remote_code else True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"name_or_path={name_or_path}: {first_lines(error)}") from error
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(
            f"name_or_path={name_or_path}: has no weights for {', '.join(missing[:3])}; {len(missing)} in all"
        )
    without_pooler(network)
    # from_pretrained leaves it in evaluation mode, and Lightning leaves modes as they are.
    return network.train()


def without_pooler(network: nn.Module) -> None:
    """Take away the pooling layers after the last hidden states, whose parameters would stay without a gradient."""
    module: Any
    for module in network.modules():
        # Of some models it is a setting.
        if isinstance(getattr(module, "pooler", None), nn.Module):
            module.pooler = None


def train_only(network: nn.Module, lora: Adapters, frozen: bool) -> None:
    """Freeze `network`, or all of it but adapters, or nothing; in place.

    Raises:
        ValueError: for adapters that are not possible, or that are to be frozen.
        UserError: if `peft` is not installed.
    """
    if frozen and lora is not None:
        raise ValueError("frozen=True: cannot be given together with lora, whose adapters are trained")
    if frozen:
        network.requires_grad_(False)
    elif lora is not None:
        add_lora(network, as_lora({"targets": "*", **lora} if isinstance(lora, Mapping) else lora))


def attended(mask: Tensor) -> Tensor:
    """The mask as `transformers` has it; a row of nothing is looked at whole, for attention over nothing is NaN."""
    return (mask | ~mask.any(1, keepdim=True)).long()
