"""Keys and values of tokens that were seen, so that each new token costs one forward pass of its own only.

Shapes: B batch, K key and value heads, T new tokens, S tokens so far, E width of a head.
"""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, in memory that is allocated once.

    Args:
        capacity: tokens that there is room for.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, T, E); gives all so far, (B, K, S + T, E), which later ones do not change."""
        if self._keys is None or self._values is None:
            batch, heads, _, width = key.shape
            # With the first tokens, whose type and device autocast and the strategy have settled.
            self._keys = key.new_empty(batch, heads, self.capacity, width)
            self._values = value.new_empty(batch, heads, self.capacity, width)
        end = self.length + key.shape[2]
        self._keys[:, :, self.length : end] = key
        self._values[:, :, self.length : end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class KeyValueCache:
    """One `LayerCache` a layer, and how many tokens at the left of each row are padding.

    Args:
        n_layers: of the network.
        capacity: tokens that there is room for, padding included.
        padding: columns at the left of each row that hold nothing, (B,); None for none in any row.

    Raises:
        ValueError: if `capacity` is below 1.
    """

    def __init__(self, n_layers: int, capacity: int, padding: Tensor | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: must be 1 or more")
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]
        self.capacity = capacity
        self.padding = padding

    @property
    def length(self) -> int:
        """Tokens so far, padding included."""
        return self.layers[0].length

    def positions(self, columns: Tensor) -> Tensor:
        """Positions of the tokens in these columns (T,): (T,), or (B, T) with padding, where padding is at 0."""
        return columns if self.padding is None else (columns - self.padding[:, None]).clamp_min(0)

    def mask(self, columns: Tensor) -> Tensor | None:
        """What the new tokens in these columns (T,) may look at, (B or 1, 1, T, S + T); None for all not later ones."""
        if self.padding is None and (self.length == 0 or len(columns) == 1):
            return None
        seen = torch.arange(self.length + len(columns), device=columns.device)
        mask = (seen <= columns[:, None])[None, None]
        if self.padding is not None:
            # Padding looks at itself: a row of nothing but False would give NaN.
            mask = mask & (seen >= self.padding[:, None, None, None]) | (seen == columns[:, None])
        return mask
