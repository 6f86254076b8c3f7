"""LoRA adapters in folders as the package `peft` reads and writes them.

An adapter adds ΔW = scaling·B·A to the weight (out, in) of each layer that it changes, with A (r, in), B (out, r) and
scaling = alpha / r. A folder holds `adapter_model.safetensors` and `adapter_config.json`.

Source: E. Hu et al., LoRA: Low-rank adaptation of large language models, ICLR 2022, arXiv:2106.09685; the folder is
that of https://huggingface.co/docs/peft, checkpoint format. With `use_rslora` the scaling is alpha / √r
(arXiv:2312.03732).
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from trainerkit.adapter_layout import AdapterLayout, Factors, LayerFactors, ModuleType
from trainerkit.errors import UserError
from trainerkit.files import replacing
from trainerkit.loading import read_json, read_safetensors

__all__ = [
    "Adapter", "AdapterLayout", "Factors", "LayerFactors", "ModuleType", "check_finite", "map_adapter", "read_adapter",
    "write_adapter",
]  # fmt: skip

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Before the name of a layer: PEFT's wrapper of a model, where there was one.
_PREFIX = "base_model.model."
# After it: the name of the adapter stands there where a state_dict was saved as it was.
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
# What makes more, or something else, of a layer than W + scaling·B·A.
_OTHER_METHODS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "arrow_config", "layer_replication",
    "target_parameters", "alora_invocation_tokens",
)  # fmt: skip
# Initialisations that leave the base model's weights as they are; pissa, olora, corda, loftq change these too.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """What a folder holds: [name, in, out] of each layer, the rank, alpha / r, and A and B of each layer."""

    layers: list[list[Any]]
    rank: int
    scaling: float
    factors: LayerFactors


def read_adapter(folder: Path, key: str) -> Adapter:
    """An adapter from a folder of PEFT, in float32, the layers sorted by name and number.

    Args:
        folder: with `adapter_model.safetensors` and `adapter_config.json`.
        key: the key that named it, for messages.

    Raises:
        UserError: if a file is missing or damaged, holds anything but A and B of linear layers with one rank, or a
            number that is not finite.
    """
    adapter = map_adapter(folder, key)
    factors = {name: (a.float(), b.float()) for name, (a, b) in adapter.factors.items()}
    for name, pair in factors.items():
        check_finite(pair, folder, key, name)
    return adapter._replace(factors=factors)


def map_adapter(folder: Path, key: str) -> Adapter:
    """The same without reading a number: the tensors lie in the file, in its type, until they are used."""
    rank, scaling = _read_config(folder, key)
    file = folder / WEIGHTS
    if not file.is_file():
        instead = folder / "adapter_model.bin"
        hint = "; save adapter_model.bin again as .safetensors" if instead.is_file() else ""
        raise UserError(f"{key}={folder}: has no {WEIGHTS}{hint}.")
    tensors, _ = read_safetensors(file, key)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            problem = f"holds {name!r}, which is no A or B of a layer (….lora_A.weight, ….lora_B.weight)"
            raise UserError(f"{key}={file}: {problem}; adapters of linear layers alone are read.")
        sides = found.setdefault(match["layer"].removeprefix(_PREFIX), {})
        if match["side"] in sides:
            raise UserError(f"{key}={file}: holds two adapters of the layer {match['layer']!r}; one is read.")
        sides[match["side"]] = tensor
    if not found:
        raise UserError(f"{key}={file}: holds no tensor; needed are ….lora_A.weight and ….lora_B.weight.")
    layers, factors = [], {}
    for name in sorted(found, key=natural):
        a, b = _pair(found[name], rank, name, file, key)
        layers.append([name, a.shape[1], b.shape[0]])
        factors[name] = (a, b)
    return Adapter(layers, rank, scaling, factors)


def check_finite(tensors: Sequence[Tensor], folder: Path, key: str, name: str) -> None:
    """Refuse numbers that are none, by a UserError that names the file and the layer."""
    # The sum of what is finite may overflow, but only then are all looked at.
    if not all(math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all()) for tensor in tensors):
        raise UserError(f"{key}={folder / WEIGHTS}: the layer {name!r} has numbers that are not finite (NaN or inf).")


def write_adapter(
    folder: str | Path,
    layout: AdapterLayout,
    factors: Factors,
    base_model_name_or_path: str = "",
    task_type: str | None = None,
) -> None:
    """Write one adapter as a folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    The configuration is written last and taken away first, so that a folder that has one is whole.

    Args:
        folder: made if it is not there.
        layout: which layers.
        factors: (n, r, in) and (n, out, r) for each type; written in their type, float32 or another.
        base_model_name_or_path: what the adapter is for.
        task_type: of PEFT, as 'CAUSAL_LM'.

    Raises:
        ValueError: for factors of another layout, or numbers that are not finite.
        OSError: if the folder cannot be written.
    """
    from safetensors.torch import save  # late: callbacks need only torch and lightning

    shapes = {name: tuple(tensor.shape) for name, tensor in factors.items()}
    if shapes != layout.shapes:
        raise ValueError(f"factors={shapes}: must have the shapes {layout.shapes}")
    bad = [name for name, tensor in factors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise ValueError(f"factors={bad}: must be finite")
    alpha = layout.scaling * layout.rank
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path or None,
        "r": layout.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": layout.names,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for name, (a, b) in layout.unpack(factors).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    folder = Path(folder)
    (folder / CONFIG).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(save(tensors, {"format": "pt"}))
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_config(folder: Path, key: str) -> tuple[int, float]:
    """Rank and scaling."""
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{key}={folder}: has no {CONFIG}; a folder of an adapter has it and {WEIGHTS}.")
    config = read_json(file, key)

    def refuse(name: str, allowed: str) -> UserError:
        return UserError(f"{key}={file}: {name}={json.dumps(config.get(name))}: must be {allowed}.")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", '"LORA"')
    for name in _OTHER_METHODS:
        if config.get(name):
            raise refuse(name, "absent or false: adapters that are W + scaling·B·A alone are read")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise refuse("init_lora_weights", "one that leaves the base model as it is; let PEFT convert the adapter")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise refuse("r", "a whole number from 1 on")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
        raise refuse("lora_alpha", "a number other than 0")
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or any(value != alpha for value in pattern.values()):
        raise refuse("alpha_pattern", f"empty: all layers need the same alpha, here {alpha}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pair(sides: dict[str, Tensor], rank: int, name: str, file: Path, key: str) -> tuple[Tensor, Tensor]:
    if len(sides) != 2:
        raise UserError(f"{key}={file}: the layer {name!r} has a lora_{next(iter(sides))} without its other half.")
    a, b = sides["A"], sides["B"]
    shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or a.numel() == 0 or b.numel() == 0 or a.shape[0] != b.shape[1]:
        raise UserError(f"{key}={file}: the layer {name!r} has {shapes}: must be (r, in) and (out, r).")
    if a.shape[0] != rank:
        raise UserError(
            f"{key}={file}: the layer {name!r} has rank {a.shape[0]}, and {CONFIG} says r={rank}; all must have one."
        )
    if not a.is_floating_point() or not b.is_floating_point():
        raise UserError(f"{key}={file}: the layer {name!r} has {a.dtype} and {b.dtype}: must be floating point.")
    return a, b


def natural(name: str) -> list[Any]:
    """Sorts 'blocks.2.up' before 'blocks.10.down', and 'rule9' before 'rule10'."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]
