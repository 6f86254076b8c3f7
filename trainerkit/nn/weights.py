"""Weights from a file into a network, without running code from the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainerkit.errors import UserError
from trainerkit.loading import read_pickle, read_safetensors

# Where a state dict may stand inside a .pt or .ckpt file: this project's checkpoints, chemomae's artifacts and trainer.
_CONTAINERS = ("state_dict", "model")


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Copy the weights of a file into `network`, every one of them; see `read_weights` and `fill`."""
    fill(network, read_weights(path), path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Names and tensors of a file of weights.

    Args:
        path: .safetensors, or a .pt/.pth/.ckpt/.bin that `torch.load(weights_only=True)` reads (any that it writes,
            with trust=true); 'network.', with which the names begin in files that a run writes, is left out.

    Raises:
        UserError: if there is no such file, or it cannot be read, or holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"weights={path}: there is no such file.")
    if path.suffix == ".safetensors":
        content: Any = read_safetensors(path, "weights")[0]
    else:
        content = read_pickle(path, "weights")
        for name in _CONTAINERS:
            if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
                content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights={path}: holds no state dict, that is names with tensors.")
    return {str(name).removeprefix("network."): tensor for name, tensor in content.items()}


def fill(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `network`, every tensor of it and nothing else.

    Args:
        network: takes the weights.
        state: tensors by the network's names.
        source: where they are from, for messages.

    Raises:
        UserError: if names or shapes do not fit; it lists the first five that do not.
    """
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not in the network" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the network's {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"weights={source}: does not fit this network; give it the sizes and parts it was trained with:\n  "
            + "\n  ".join(problems[:5]) + more
        )  # fmt: skip
    network.load_state_dict(dict(state))
