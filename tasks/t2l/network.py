"""The hypernetwork: from the embedding of a task's description to the LoRA factors of every adapted layer.

    task (B, E) ── Linear, LayerNorm ─────┐
    depth of the layer ── LayerNorm ──────┼─ mixer ─ residual block ─ (+ part) ─ residual block ─ MLP ─ head of its type
    module type of the layer ─ LayerNorm ─┘

All layers of all tasks pass through at once; heads alone differ by module type. The three sizes differ in what a head
writes in one go, and so in the number of its outputs: L both factors with all ranks, r·(in + out); M one factor with
all ranks, r·max(in, out), told which by a learnt embedding, the part; S one rank of one factor, max(in, out), its part
being the sum of an embedding of the factor and one of the rank. M and S leave unused what is beyond the narrower
factor's width, as the paper's do.

Source: R. Charakorn, E. Cetin, Y. Tang, R. T. Lange, 'Text-to-LoRA: instant Transformer adaption', ICML 2025
(arXiv:2506.06105). Ours: what a head writes is z-scored by the library's statistics whatever the loss, so that training
begins at the library's mean adapter.

B: tasks, E: width of their embeddings, L: layers, n: layers of one type, d: latent width, H: head width, P: parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainerkit.adapter_layout import AdapterLayout, Factors, ModuleType

Size = Literal["L", "M", "S"]
# Of the first outputs, in standard deviations of the library: near the mean, and yet with gradients everywhere. With
# zeros none would reach the trunk in the first step, and none at all where the mean is zero too: ΔW is a product.
_FIRST_SCALE = 0.1


class HyperNetwork(nn.Module):
    """Writes an adapter from the embedding of a task.

    Args:
        layers: (name, in_features, out_features) of each adapted layer of the base model; all that is known of it.
        rank: r of the adapters.
        embedding_dim: E.
        size: 'L', 'M' or 'S', see above.
        latent_dim: d; a multiple of 4.
        head_dim: H, what a head is given.
        dropout: probability, before, inside and after the mixer and in the blocks.
        scaling: alpha / r of the adapters.

    Raises:
        ValueError: for layers of which no layout can be made, or a number that is not allowed.
    """

    depth_index: Tensor
    type_index: Tensor
    scaling_bits: Tensor

    def __init__(
        self,
        layers: Sequence[Sequence[Any]],
        rank: int,
        embedding_dim: int,
        size: Size = "L",
        latent_dim: int = 128,
        head_dim: int = 256,
        dropout: float = 0.0,
        scaling: float = 1.0,
    ) -> None:
        super().__init__()
        if size not in ("L", "M", "S"):
            raise ValueError(f"size={size}: must be L, M or S")
        if latent_dim < 4 or latent_dim % 4:
            raise ValueError(f"latent_dim={latent_dim}: must be a multiple of 4")
        for name, value in {"embedding_dim": embedding_dim, "head_dim": head_dim}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be from 0 to below 1")
        self.layout = layout = AdapterLayout(layers, rank, scaling)
        self.embedding_dim = embedding_dim
        self.size = size
        half, quarter = latent_dim // 2, latent_dim // 4
        self.task_encoder = nn.Sequential(nn.Linear(embedding_dim, half), nn.LayerNorm(half))
        self.depth_encoder = nn.Sequential(nn.Embedding(layout.depths, quarter), nn.LayerNorm(quarter))
        self.type_encoder = nn.Sequential(nn.Embedding(len(layout.types), quarter), nn.LayerNorm(quarter))
        self.mixer = nn.Sequential(
            _dropout(dropout),
            nn.Linear(latent_dim, 4 * latent_dim),
            nn.SiLU(),
            _dropout(dropout),
            nn.Linear(4 * latent_dim, latent_dim),
            nn.SiLU(),
            _dropout(dropout),
        )
        self.first_block = _ResidualBlock(latent_dim, dropout)
        self.parts = None if size == "L" else _Parts(latent_dim, rank if size == "S" else 1)
        self.second_block = _ResidualBlock(latent_dim, dropout)
        self.to_head = nn.Sequential(
            nn.LayerNorm(latent_dim),
            nn.Linear(latent_dim, 4 * latent_dim),
            nn.SiLU(),
            _dropout(dropout),
            nn.Linear(4 * latent_dim, head_dim),
            nn.SiLU(),
        )
        # A bare label could be the name of one of ModuleDict's methods.
        self.heads = nn.ModuleDict({f"to_{t.label}": _Head(t, rank, head_dim, size) for t in layout.types})
        depths = [depth for t in layout.types for depth in t.depths]
        numbers = [number for number, t in enumerate(layout.types) for _ in t.names]
        # Saved, since weights and statistics are in its units; as an integer, which no change of precision rounds.
        self.register_buffer("scaling_bits", torch.tensor(layout.scaling, dtype=torch.float64).view(torch.int64))
        self.register_buffer("depth_index", torch.tensor(depths), persistent=False)
        self.register_buffer("type_index", torch.tensor(numbers), persistent=False)

    def forward(self, task: Tensor) -> Factors:
        """Embeddings (B, E) to the factors of each type, `A/LABEL` (B, n, r, in) and `B/LABEL` (B, n, out, r).

        In the parameters' precision, float32 under autocast too.

        Raises:
            ValueError: for embeddings of another shape.
        """
        if task.ndim != 2 or task.shape[1] != self.embedding_dim:
            raise ValueError(f"task: shape {tuple(task.shape)}; must be (B, {self.embedding_dim})")
        hidden = self.trunk(task)
        types = self.layout.types
        factors: Factors = {}
        for t, part in zip(types, hidden.split([len(t.names) for t in types], dim=1), strict=True):
            factors[f"A/{t.label}"], factors[f"B/{t.label}"] = self.heads[f"to_{t.label}"](part)
        return factors

    @property
    def trained_scaling(self) -> float:
        """What B·A was multiplied with where the weights were trained; the layout has that of the library of today."""
        return float(self.scaling_bits.cpu().view(torch.float64))

    def trunk(self, task: Tensor) -> Tensor:
        """What the heads are given: (B, L, H) for size L, else (B, L, P, H) with P = 2 for M and 2·r for S."""
        batch, layers = len(task), len(self.depth_index)
        places = torch.cat([self.depth_encoder(self.depth_index), self.type_encoder(self.type_index)], dim=1)
        coded = self.task_encoder(task)[:, None].expand(-1, layers, -1)
        x = self.first_block(self.mixer(torch.cat([coded, places.expand(batch, -1, -1)], dim=2)))
        if self.parts is not None:
            x = x[:, :, None] + self.parts()
        hidden: Tensor = self.to_head(self.second_block(x))
        return hidden

    @torch.no_grad()
    def set_statistics(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take the mean and the standard deviation of a library's factors: outputs are mean + std · what heads write.

        They are 0 and 1 before, and are saved with the weights.

        Args:
            statistics: for each key of the factors two tensors, (n, r, in) or (n, out, r).

        Raises:
            ValueError: for a missing or unknown key, another shape, or values that are not finite or below 0.
        """
        targets = self.statistics()
        if statistics.keys() != targets.keys():
            raise ValueError(f"statistics={sorted(statistics)}: the keys must be {sorted(targets)}")
        for key, pair in statistics.items():
            for name, buffer, value in zip(("mean", "std"), targets[key], pair, strict=True):
                if value.shape != buffer.shape:
                    found, wanted = tuple(value.shape), tuple(buffer.shape)
                    raise ValueError(f"statistics: {name} of {key} has shape {found}; must be {wanted}")
                if not value.isfinite().all() or (name == "std" and (value < 0).any()):
                    raise ValueError(f"statistics: {name} of {key} must be finite{', 0 or more' * (name == 'std')}")
        for key, pair in statistics.items():
            for buffer, value in zip(targets[key], pair, strict=True):
                buffer.copy_(value)

    def mean_adapter(self) -> Factors:
        """The mean of the library's factors, without a batch: `A/LABEL` (n, r, in), `B/LABEL` (n, out, r)."""
        return {key: mean for key, (mean, _) in self.statistics().items()}

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each key, the network's own tensors."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for t in self.layout.types:
            head: Any = self.heads[f"to_{t.label}"]
            found[f"A/{t.label}"], found[f"B/{t.label}"] = (head.mean_a, head.std_a), (head.mean_b, head.std_b)
        return found


class _Head(nn.Module):
    """Writes both factors of the layers of one module type."""

    mean_a: Tensor
    std_a: Tensor
    mean_b: Tensor
    std_b: Tensor

    def __init__(self, module_type: ModuleType, rank: int, head_dim: int, size: Size) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.width_in, self.width_out = module_type.in_features, module_type.out_features
        if size == "L":  # two maps, since to split what one writes takes copies on the way back
            self.a = _linear(head_dim, rank * self.width_in)
            self.b = _linear(head_dim, rank * self.width_out)
        else:
            widest = max(self.width_in, self.width_out)
            self.either = _linear(head_dim, rank * widest if size == "M" else widest)
        layers = len(module_type.names)
        for name, shape in {"a": (layers, rank, self.width_in), "b": (layers, self.width_out, rank)}.items():
            self.register_buffer(f"mean_{name}", torch.zeros(shape))
            self.register_buffer(f"std_{name}", torch.ones(shape))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, [P,] H) to A (B, n, r, in) and B (B, n, out, r)."""
        if self.size == "L":
            a = self.a(hidden).unflatten(-1, (self.rank, self.width_in))
            b = self.b(hidden).unflatten(-1, (self.width_out, self.rank))
        else:
            written = self.either(hidden).reshape(*hidden.shape[:2], 2, self.rank, -1)
            a, b = written.unbind(2)
            a, b = a[..., : self.width_in], b[..., : self.width_out].mT
        return _scaled(self.mean_a, self.std_a, a), _scaled(self.mean_b, self.std_b, b)


class _ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            _dropout(dropout),
            nn.Linear(4 * width, width),
            nn.SiLU(),
            _dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(x)
        return y


class _Parts(nn.Module):
    """Embeddings of what a head is to write: A or B, and which rank."""

    def __init__(self, width: int, ranks: int) -> None:
        super().__init__()
        self.factor = nn.Embedding(2, width)
        self.rank = nn.Embedding(ranks, width) if ranks > 1 else None
        self.norm = nn.LayerNorm(width)

    def forward(self) -> Tensor:
        """(P, d): all ranks of A, then all ranks of B."""
        parts = self.factor.weight
        if self.rank is not None:
            parts = (parts[:, None] + self.rank.weight).flatten(0, 1)
        normed: Tensor = self.norm(parts)
        return normed


def _scaled(mean: Tensor, std: Tensor, raw: Tensor) -> Tensor:
    return torch.addcmul(mean, std, raw.to(mean.dtype))


def _linear(width_in: int, width_out: int) -> nn.Linear:
    linear = nn.Linear(width_in, width_out)
    nn.init.normal_(linear.weight, std=_FIRST_SCALE / width_in**0.5)
    nn.init.zeros_(linear.bias)
    return linear


def _dropout(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability > 0 else nn.Identity()
