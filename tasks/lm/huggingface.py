"""GPT-2's weights in the layout of Hugging Face, in and out.

There the four matrices of a block are stored input first (a 'Conv1D'), and the output layer is the token embedding.
A folder holds `config.json` with `model.safetensors` or, older, `pytorch_model.bin`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainerkit.errors import UserError
from trainerkit.files import write_json
from trainerkit.loading import read_json
from trainerkit.nn.lora import Lora, add_lora
from trainerkit.nn.weights import fill, read_weights

if TYPE_CHECKING:
    from trainerkit.tasks.lm.network import GPT

_OUTSIDE = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
_IN_BLOCK = {
    "ln_1": "norm1",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "norm2",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}
_BLOCK = re.compile(r"h\.(\d+)\.(.+)\.(weight|bias)")
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # in older files, and no weights
_FILES = ("model.safetensors", "pytorch_model.bin")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def load_weights(network: "GPT", path: str | Path, adapters: Lora | None = None) -> None:
    """Copy the weights of a file, of this network or of Hugging Face's GPT-2, into `network`.

    Args:
        network: takes them; for GPT-2 itself it has positions=learned, activation=gelu_tanh and tied embeddings.
        path: see `trainerkit.nn.weights.read_weights`; or a folder with GPT-2's weights, whose `config.json` is
            compared with the network.
        adapters: are put on the network, before the weights if the file has those of adapters as well, else after.

    Raises:
        UserError: if there is no such file, or it cannot be read, or does not fit; it lists what does not.
    """
    path = Path(path).expanduser()
    file = _file_in(path) if path.is_dir() else path
    state = read_weights(file)
    if is_huggingface(state):
        if (file.parent / "config.json").is_file():
            _check_config(network, file.parent / "config.json")
        state = from_huggingface(state, tied=network.output is None)
        if network.output is None and "output.weight" in state:
            problem = "their output layer is not the token embedding; give tie_embeddings=false"
            raise UserError(f"weights={path}: {problem}.")
    has_adapters = any(".lora_" in name for name in state)
    if has_adapters and adapters is None:
        raise UserError(
            f"weights={path}: holds adapters besides the network's weights; give lora= as it was when they were "
            "trained, or merge them first (trainerkit.tasks.lm.merge_lora)."
        )
    if adapters is not None and has_adapters:
        add_lora(network, adapters)
    fill(network, state, path)
    if adapters is not None and not has_adapters:
        add_lora(network, adapters)


def is_huggingface(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of GPT-2 in the layout of Hugging Face."""
    return any(name.removeprefix("transformer.") == "wte.weight" for name in state)


def from_huggingface(state: Mapping[str, Tensor], tied: bool = True) -> dict[str, Tensor]:
    """The same weights by the names and in the layout of `GPT`; names that are not known stay what they are.

    Args:
        state: of `GPT2LMHeadModel` or of `GPT2Model`.
        tied: leave out an output layer that repeats the token embedding.
    """
    found = {}
    embedding, output = (
        next((state[name] for name in (f"transformer.{own}", own) if name in state), None)
        for own in ("wte.weight", "lm_head.weight")
    )
    repeats = embedding is not None and output is not None and torch.equal(embedding, output)
    for full_name, tensor in state.items():
        name = full_name.removeprefix("transformer.")
        if _MASK.fullmatch(name) or (tied and repeats and name == "lm_head.weight"):
            continue
        outside, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(name)
        if block and block[2] in _IN_BLOCK:
            is_matrix = tensor.ndim == 2
            found[f"blocks.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"] = (
                tensor.T.contiguous() if is_matrix else tensor
            )
        elif name == "lm_head.weight":
            found["output.weight"] = tensor
        else:
            found[f"{_OUTSIDE[outside]}.{kind}" if outside in _OUTSIDE else full_name] = tensor
    return found


def to_huggingface(network: "GPT") -> dict[str, Tensor]:
    """The weights by the names and in the layout of `GPT2LMHeadModel`.

    Raises:
        ValueError: if GPT-2 has no place for a part of the network.
    """
    problems = _differences(network)
    if problems:
        raise ValueError(f"network: is no GPT-2, whose weights Hugging Face could read; {'; '.join(problems)}")
    names = {ours: theirs for theirs, ours in _IN_BLOCK.items()}
    outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    found = {}
    for name, tensor in network.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module in outside:
            found[f"transformer.{outside[module]}.{kind}"] = tensor
        else:
            _, number, part = module.split(".", 2)
            found[f"transformer.h.{number}.{names[part]}.{kind}"] = _transposed(tensor)
    return found


def save_huggingface(network: "GPT", folder: str | Path, end_of_text: int | None = None) -> None:
    """Write a folder that `transformers.GPT2LMHeadModel.from_pretrained` reads; raises as `to_huggingface`.

    Args:
        network: whose weights are written.
        folder: made if it is not there.
        end_of_text: the token at which its `generate` begins and stops; None for none.
    """
    from safetensors.torch import save_file

    weights = to_huggingface(network)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _config(network, end_of_text))


def _config(network: "GPT", end_of_text: int | None) -> dict[str, Any]:
    up = network.blocks[0].get_parameter("feed_forward.up.weight")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": network.vocab_size,
        "n_positions": network.context_length,
        "n_embd": network.d_model,
        "n_layer": network.n_layers,
        "n_head": network.n_heads,
        "n_inner": up.shape[0],
        "activation_function": "gelu_new" if network.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def _differences(network: "GPT") -> list[str]:
    """What of the network GPT-2 has not."""
    names = set(network.state_dict())
    attention = network.blocks[0].get_submodule("attention")
    found = {
        "positions=rope": "position_embedding.weight" not in names,
        "tie_embeddings=false": network.output is not None,
        f"activation={network.activation}": network.activation not in _ACTIVATIONS.values(),
        "norm=rmsnorm or bias=false": "final_norm.bias" not in names,
        "qk_norm=true": "blocks.0.attention.query_norm.weight" in names,
        "n_kv_heads": attention.n_kv_heads != network.n_heads,
        "logit_softcap": network.logit_softcap is not None,
        "lora, which must be merged first": any(".lora_" in name for name in names),
    }
    return [f"it has {name}" for name, differs in found.items() if differs]


def _transposed(tensor: Tensor) -> Tensor:
    """A matrix the other way round; a vector as it is."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


def _file_in(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    indexes = sorted(path.name for path in folder.glob("*.index.json"))
    if indexes:
        raise UserError(
            f"weights={folder}: its weights are in several files ({indexes[0]}), which are not read; save them as one, "
            "save_pretrained(FOLDER, max_shard_size='100GB')."
        )
    raise UserError(f"weights={folder}: this folder has none of {', '.join(_FILES)}; name the file itself.")


def _check_config(network: "GPT", path: Path) -> None:
    """Compare what no shape shows: heads and activation."""
    config = read_json(path, "weights")
    given = str(config.get("activation_function", "gelu_new"))
    wrong = []
    if config.get("n_head", network.n_heads) != network.n_heads:
        wrong.append(f"n_heads={network.n_heads}: the weights need {config['n_head']}")
    if _ACTIVATIONS.get(given) != network.activation:
        wrong.append(f"activation={network.activation}: the weights need {_ACTIVATIONS.get(given, given)}")
    for key, usual in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}.items():
        if config.get(key, usual) is not usual:
            wrong.append(f"{key}={config[key]} in the file: this network has it {usual}")
    if config.get("layer_norm_epsilon", 1e-5) != 1e-5:
        wrong.append(f"layer_norm_epsilon={config['layer_norm_epsilon']} in the file: this network's is 1e-05")
    if wrong:
        raise UserError(f"weights={path.parent}: do not fit this network:\n  " + "\n  ".join(wrong))
