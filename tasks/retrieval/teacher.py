"""A frozen encoder that a student learns from."""

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainerkit.nn.weights import fill, read_weights
from trainerkit.tasks.retrieval.embedding_cache import CacheDtype, EmbeddingCache, fingerprint
from trainerkit.tasks.retrieval.similarity import normalized
from trainerkit.tasks.retrieval.trees import concatenated, number_of_rows, part

Side = Literal["query", "positive"]
Precision = Literal["float32", "bfloat16", "float16"]
_PLAIN = (bool, int, float, str, type(None))


class Teacher(nn.Module):
    """Any encoder as a teacher: frozen, in eval mode, without a graph, in its own precision.

    A task that holds one does not own its weights: they are not among the task's parameters, in its state dict,
    checkpoints and optimizer; `task.train()` and the strategy's wrappers do not reach the encoders. They go to the
    device of what they are asked about.

    A cache is right where a row has the same input in each epoch: no random augmentation before the teacher. If it has
    not, nothing wrong comes out, since each record is known by its input too, but every step embeds and writes anew.
    The files stand in a folder by a digest of the weights, classes and plain attributes of the encoders, so another
    teacher has another cache. A row's embedding is the same whether it was there or not; it is rounded once, to
    `cache_dtype`. 100,000 pairs of width 384 take 156 MB in float16.

    Args:
        encoder: of queries and, if there is no other, of positives; see the task for what it takes and gives.
        candidate_encoder: of positives, if they have their own.
        weights: a .safetensors or .pt file for the encoders (`trainerkit.nn.weights`). Of the weights of a whole run
            the names that begin with 'encoder.' and 'candidate_encoder.' are taken.
        dtype: 'float32', 'bfloat16' or 'float16', in which it computes; None: as the encoder is.
        cache_dir: the folder below which embeddings are kept; None: nowhere.
        cache_dtype: of the numbers in it.
        dataset: a name for the rows' data set, where two share the folder and teacher: their rows have the same
            numbers and would drive each other out.
        chunk_size: rows it embeds at a time; None: all, or with the gradient cache of a `RetrievalTask` as many as
            that takes.

    Raises:
        UserError: for weights that do not fit, or a cache folder that cannot be written.
        ValueError: for a word or number that is not allowed.
    """

    def __init__(
        self,
        encoder: nn.Module,
        candidate_encoder: nn.Module | None = None,
        weights: str | Path | None = None,
        dtype: Precision | None = None,
        cache_dir: str | Path | None = None,
        cache_dtype: CacheDtype = "float16",
        dataset: str = "",
        chunk_size: int | None = None,
    ) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype}: must be float32, bfloat16 or float16, or null for the encoder's own")
        if cache_dtype not in ("float16", "float32"):
            raise ValueError(f"cache_dtype={cache_dtype}: must be float16 or float32")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be 1 or more, or null for all rows at once")
        super().__init__()
        self.chunk_size = chunk_size
        self._towers = {"encoder": encoder}  # a plain dict, which registers nothing
        if candidate_encoder is not None:
            self._towers["candidate_encoder"] = candidate_encoder
        if weights is not None:
            _load(self._towers, weights)
        for tower in self._towers.values():
            tower.requires_grad_(False).eval()
            if dtype is not None:
                tower.to(getattr(torch, dtype))
        self._cache: EmbeddingCache | None = None
        if cache_dir is not None:
            folder = Path(cache_dir).expanduser() / "teacher" / self.digest(dataset)
            self._cache = EmbeddingCache(folder, cache_dtype)

    def embed(self, inputs: dict[str, Tensor], side: Side = "query", index: Tensor | None = None) -> Tensor:
        """Embeddings of length 1 in float32, without a graph, on the inputs' device.

        Args:
            inputs: what the encoder takes, (B, …) each; `image`, `text`, `text_mask`.
            side: which of a pair's two they are.
            index: (B,) int64, the rows' numbers, from 0; without them the cache is not asked.

        Returns:
            (B, D), or (B, T, D) of an encoder that does not pool.

        Raises:
            ValueError: for another side, or a cache beside an encoder that does not pool.
            UserError: if the cache cannot be written.
        """
        if side not in ("query", "positive"):
            raise ValueError(f"side={side}: must be query or positive")
        if self._cache is None or index is None or not len(index):
            return self._compute(inputs, side)
        rows, known_by = index.tolist(), fingerprint(inputs).tolist()
        place = _place(side, inputs)
        found, kept = self._cache.read(place, rows, known_by)
        absent = [position for position, there in enumerate(found) if not there]
        made = None
        if absent:
            of_absent = {name: tensor[absent] for name, tensor in inputs.items()}
            embeddings = self._compute(of_absent, side)
            if embeddings.ndim != 2:
                raise ValueError(f"cache_dir: keeps embeddings (B, D); this teacher's are {tuple(embeddings.shape)}")
            made = self._cache.write(
                place, [rows[i] for i in absent], [known_by[i] for i in absent], embeddings.cpu().numpy()
            )
        parts = [torch.from_numpy(part) for part in (kept, made) if part is not None]
        there = [position for position, is_there in enumerate(found) if is_there]
        order = torch.tensor([*there, *absent]).argsort()
        return torch.cat(parts)[order].float().to(index.device)

    def digest(self, more: str = "") -> str:
        """A name for what this teacher computes: a hash of its weights, classes and plain attributes, and of `more`."""
        found = hashlib.sha256(f"1 {more}".encode())
        for name, tower in self._towers.items():
            for key, value in _facts(tower):
                found.update(f"{name}.{key}={value}\n".encode())
            for key, tensor in tower.state_dict().items():
                found.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                # Every tensor has bytes; NumPy has no bfloat16.
                found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()[:32]

    @torch.no_grad()
    def _compute(self, inputs: dict[str, Tensor], side: Side) -> Tensor:
        tower = self._towers.get("candidate_encoder") if side == "positive" else None
        tower = tower if tower is not None else self._towers["encoder"]
        device = next(iter(inputs.values())).device
        weight = next((t for t in chain(tower.parameters(), tower.buffers()) if t.is_floating_point()), None)
        if weight is not None and weight.device != device:
            tower.to(device)
        dtype = torch.float32 if weight is None else weight.dtype
        inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        rows = number_of_rows(inputs)
        step = self.chunk_size or max(1, rows)
        chunks = [slice(start, start + step) for start in range(0, max(1, rows), step)]
        with torch.autocast(device.type, enabled=False):
            return concatenated([normalized(tower(part(inputs, chunk))) for chunk in chunks])


def _place(side: Side, inputs: dict[str, Tensor]) -> str:
    """Side and modalities, such as 'query-image+text'."""
    return f"{side}-{'+'.join(sorted(name for name in inputs if not name.endswith('_mask')))}"


def _load(towers: dict[str, nn.Module], weights: str | Path) -> None:
    state = read_weights(weights)
    for name, tower in towers.items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        fill(tower, own or state, weights)


def _facts(tower: nn.Module) -> Iterator[tuple[str, Any]]:
    """What tells two modules with the same weights apart: classes, and attributes like pooling='mean'."""
    for name, module in tower.named_modules():
        yield f"{name}.class", f"{type(module).__module__}.{type(module).__qualname__}"
        for key, value in sorted(vars(module).items()):
            if isinstance(value, _PLAIN) and key != "training":
                yield f"{name}.{key}", repr(value)
