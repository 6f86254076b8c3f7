"""The weights that won, as safetensors for whoever uses the model.

One file, or where it would be larger than `max_shard_size` several and an index, in Hugging Face's layout.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from trainerkit.callbacks._parameters import plain_name
from trainerkit.callbacks._sharded import gathered
from trainerkit.callbacks._trainer import is_in_pieces, refuse_sharded, validates, warn_of_monitor
from trainerkit.errors import UserError
from trainerkit.files import replacing, write_json
from trainerkit.loading import read_json, read_safetensors

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class BestWeights(Callback):
    """Export the weights whenever a validation gives the best `monitor` so far.

    What is exported is what was scored: the weights that the module held during the validation, the average's where
    `EMA` is on, in whatever order the callbacks stand. Without validation the metric is read after each epoch. Names
    are those without `torch.compile`.

    Args:
        monitor: a logged metric.
        mode: 'min' if smaller is better, else 'max'.
        filename: where to write, relative to `trainer.default_root_dir`.
        max_shard_size: bytes, or a text like '5GB' or '500MiB'. Weights that take more go to several files
            `best_model-00001-of-00003.safetensors`, named by `best_model.safetensors.index.json`.

    The header has, as text, `monitor`, `value`, `epoch` (from 1), `step`, and `config`: the module's `hparams` as JSON,
    where what JSON has not stands as its `repr`. Tied weights are written once, their other names stand in the header
    under `tied`. A file without tied weights loads with `safetensors.torch.load_file`, any with `load_best_weights`.

    Under FSDP2 each process copies its pieces at each validation; a file holds whole weights, which are gathered for it
    one after the other into the first process's host memory.

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters other than FSDP2's.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        filename: str = "best_model.safetensors",
        max_shard_size: int | str = "5GB",
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode}: must be min or max")
        self.monitor = monitor
        self.mode = mode
        self.filename = filename
        self.max_shard_size = max_shard_size
        self._limit = size_in_bytes(max_shard_size, "max_shard_size")
        self.best = math.inf if mode == "min" else -math.inf
        self._scored: dict[str, Tensor] = {}
        self._epoch = 0  # from 1, in which they were scored
        self._last: Any = None  # the metric that was looked at last, to tell a new one from an old one
        self._waits = False  # whether the weights of an epoch's end wait for their metric

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value."""
        self.best = state_dict["best"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work while it is cheap."""
        refuse_sharded(trainer, self, takes_pieces=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new run has no best yet; nor has one whose best's file is not there, as in a resumed run's new folder."""
        self._last, self._waits = None, False
        path = Path(trainer.default_root_dir) / self.filename
        if trainer.global_step == 0 or not (path.exists() or _index_of(path).exists()):
            self.best = math.inf if self.mode == "min" else -math.inf

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold on to the tensors that were just scored; when the metric is known, EMA may have left."""
        # It leaves pointers behind, unless it was told to write into the live weights' own storage.
        overwritten = any(getattr(callback, "swap", None) == "copy" for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._hold(pl_module, copy=overwritten)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what was scored if it is the best."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._export_if_best(trainer, pl_module)
        self._scored = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without validation: export the weights of the epoch's end.

        A metric that the module logs in its own `on_train_epoch_end` is not there yet; then the weights wait for it.
        """
        if validates(trainer):
            return
        self._hold(pl_module)
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or value is self._last:
            self._waits = True
        else:
            self._export_if_best(trainer, pl_module)
            self._scored = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The metric of the epoch before is there by now."""
        self._catch_up(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The metric of the last epoch is there by now; say so if there never was one."""
        self._catch_up(trainer, pl_module)
        if self._last is None and trainer.global_step > 0:
            warn_of_monitor(trainer, self, self.monitor, f"there is no {self.filename}")

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waits:
            self._waits = False
            self._export_if_best(trainer, pl_module)
            self._scored = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of what an interrupted validation scored."""
        self._scored = {}

    def _hold(self, pl_module: LightningModule, copy: bool = False) -> None:
        self._epoch = pl_module.current_epoch + 1
        if is_in_pieces(pl_module.trainer):
            self._scored = _copies_of_pieces(pl_module)
            return
        state = pl_module.state_dict()  # which may have extra state that is no tensor
        held = {plain_name(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
        if copy:
            copies = {_place(tensor): tensor.clone() for tensor in held.values()}
            held = {name: copies[_place(tensor)] for name, tensor in held.items()}
        self._scored = held

    def _export_if_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metric = trainer.callback_metrics.get(self.monitor)
        if metric is None or metric is self._last:
            return
        self._last = metric
        value = float(metric)
        better = value < self.best if self.mode == "min" else value > self.best
        if is_in_pieces(trainer):  # all ranks gather if one does: a metric may differ between them
            better = trainer.strategy.broadcast(better)
        if not better:
            return
        self.best = value
        if is_in_pieces(trainer):
            self._scored = gathered(self._scored)
        if trainer.is_global_zero:
            facts = {"monitor": self.monitor, "value": value, "epoch": self._epoch}
            facts |= {"step": trainer.global_step, "config": json.dumps(as_json(pl_module.hparams))}
            path = Path(trainer.default_root_dir) / self.filename
            save_weights(self._scored, path, {key: str(fact) for key, fact in facts.items()}, self._limit)


def _copies_of_pieces(pl_module: LightningModule) -> dict[str, Tensor]:
    """Copies of the pieces, which training moves and EMA writes into; of tied weights one under all their names."""
    state = pl_module.state_dict(keep_vars=True)
    copies: dict[int, Tensor] = {}
    for tensor in state.values():
        if isinstance(tensor, Tensor) and id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
    return {plain_name(name): copies[id(value)] for name, value in state.items() if isinstance(value, Tensor)}


def save_weights(state: Mapping[str, Tensor], path: Path, facts: Mapping[str, str], max_shard_size: int) -> None:
    """Write tensors as one safetensors file, or as several and an index if they take more than `max_shard_size` bytes.

    A crash at any moment leaves the files before or the files after, complete: new shards have names that the present
    index does not use, the index is replaced last, and what is no longer used is removed after it.

    Args:
        state: names and tensors; tied ones are written once.
        path: the file, or what names shards and index.
        facts: for the header of each file, and for the index.
        max_shard_size: a single tensor larger than this has a shard of its own.
    """
    from safetensors.torch import save_file  # late: the other callbacks need only torch and lightning

    first_names: dict[Any, str] = {}
    for name, tensor in state.items():
        first_names.setdefault(_place(tensor), name)
    own = {name: state[name] for name in first_names.values()}
    tied = {name: first_names[_place(tensor)] for name, tensor in state.items() if name not in own}
    facts = {"format": "pt"} | dict(facts) | ({"tied": json.dumps(tied)} if tied else {})
    shards = split(own, max_shard_size)
    index = _index_of(path)
    names = [path.name] if len(shards) == 1 else _free_names(path, len(shards))
    for name, shard in zip(names, shards, strict=True):
        with replacing(path.with_name(name)) as temporary:
            save_file(_apart(shard), temporary, facts)
    if len(shards) == 1:
        index.unlink(missing_ok=True)
    else:
        total = sum(tensor.nbytes for tensor in own.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(index, {"metadata": {"total_size": total} | facts, "weight_map": weight_map})
        path.unlink(missing_ok=True)
    for shard_path in _shards_of(path):
        if shard_path.name not in names:
            shard_path.unlink()


def load_best_weights(path: str | Path, module: nn.Module | None = None) -> dict[str, Tensor]:
    """Read what `BestWeights` has written, in one file or in several, on the CPU.

    Args:
        path: the file or its index; where the file is not, its index is looked for.
        module: if given, the weights are loaded into it, compiled or not.

    Returns:
        All names and tensors; those of tied weights share one tensor.

    Raises:
        FileNotFoundError: if there is neither.
        RuntimeError: if the weights do not fit the module.
        trainerkit.errors.UserError: if a file is damaged, or its header says what cannot be.
    """
    path = Path(path)
    files = [path]
    if path.name.endswith(".index.json") or not path.exists():
        index = path if path.name.endswith(".index.json") else _index_of(path)
        if not index.exists():
            raise FileNotFoundError(f"{path}: there is no such file, and no {index.name}")
        files = [index.with_name(name) for name in _shard_names(index)]
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for file in files:
        tensors, facts = read_safetensors(file, "weights")
        state |= tensors
        tied |= _tied(file, facts)
    missing = sorted(set(tied.values()) - set(state))
    if missing:
        raise UserError(f"weights={path}: says that weights are tied to {missing[0]}, which is not there.")
    state |= {name: state[first] for name, first in tied.items()}
    if module is not None:
        names = {plain_name(name): name for name in module.state_dict()}
        extra = {name: value for name, value in module.state_dict().items() if not isinstance(value, Tensor)}
        module.load_state_dict({names.get(name, name): tensor for name, tensor in state.items()} | extra)
    return state


def _tied(file: Path, facts: Mapping[str, str]) -> dict[str, str]:
    try:
        tied = json.loads(facts.get("tied", "{}"))
    except (ValueError, RecursionError):
        tied = None
    if not isinstance(tied, dict) or not all(isinstance(first, str) for first in tied.values()):
        raise UserError(f"weights={file}: 'tied' in its header must be a JSON object of names.")
    return tied


def split(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, in as few parts as that allows, each of at most `limit` bytes or of one tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def size_in_bytes(size: int | str, argument: str) -> int:
    """Bytes of a text like '5GB' or '500MiB'.

    Raises:
        ValueError: for anything else, and for less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]I?B)", str(size).upper())
    found = int(float(match[1]) * _UNITS[match[2]]) if match else size
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"{argument}={size}: must be a number of bytes above 0, or a text like '5GB' or '500MiB'")
    return found


def as_json(value: Any) -> Any:
    """The same in types that JSON has; what it has not becomes its `repr`."""
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (str, bool, int, type(None))) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [as_json(part) for part in value]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address would differ from run to run


def _place(tensor: Tensor) -> Any:
    """The same for two tensors only if they are one: in the same memory in the same way. Empty ones are all apart."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and without shared memory, which safetensors refuses."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return apart


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def _shard_names(index: Path) -> list[str]:
    if not index.exists():
        return []
    weight_map = read_json(index, "weights", "weight_map")["weight_map"]
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and name == Path(name).name != "" for name in names):
        raise UserError(f"weights={index}: weight_map must give each weight a file in the same folder.")
    return sorted(set(map(str, names)))


def _free_names(path: Path, count: int) -> list[str]:
    """Names of shards, of two sets in turn."""
    taken = set(_shard_names(_index_of(path)))
    first, second = (
        [f"{path.stem}{turn}-{number:05d}-of-{count:05d}{path.suffix}" for number in range(1, count + 1)]
        for turn in ("", "-b")
    )
    return second if taken & set(first) else first


def _shards_of(path: Path) -> list[Path]:
    pattern = re.compile(rf"{re.escape(path.stem)}(-b)?-\d{{5}}-of-\d{{5}}{re.escape(path.suffix)}")
    return [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]
