"""Which patches a network sees: random ones in training, the same ones every time in evaluation.

Masks are given as indices of the visible patches, (B, V): every sample has the same number V, so that nothing is padded
and nothing has to be read back from the device. Shapes: B batch, P patches, V visible ones, L length of a signal.
"""

import torch
from torch import Tensor


def random_visible(
    batch: int, n_patches: int, n_visible: int, *, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draw for each sample its own `n_visible` of `n_patches`, uniformly without replacement: (B, V) int64."""
    return torch.rand(batch, n_patches, device=device, generator=generator).argsort(1)[:, :n_visible]


def fixed_visible(rows: Tensor, n_patches: int, n_visible: int, seed: int = 0) -> Tensor:
    """The patches that a row of the data always shows in evaluation: (B, V) int64.

    A function of (seed, row number) alone: the same in every epoch, for any batch size and any number of processes, and
    no random state is read or moved. Patches are ranked by the splitmix64 hash of (seed, row, patch).

    Args:
        rows: row numbers, (B,) int64.
        n_patches: P.
        n_visible: V.
        seed: another seed gives another set of masks.
    """
    patches = torch.arange(n_patches, device=rows.device)
    # The golden ratio spreads seeds over all bits, and keeps any seed within int64.
    spread = seed * 0x9E3779B97F4A7C15 % 2**62
    return _splitmix64((rows[:, None] * n_patches + patches) ^ spread).argsort(1)[:, :n_visible]


def hidden_positions(visible: Tensor, n_patches: int, patch_size: int) -> Tensor:
    """True where a position of the signal is hidden: (B, L) bool from the visible patches' indices (B, V)."""
    hidden = torch.ones(len(visible), n_patches, dtype=torch.bool, device=visible.device)
    hidden.scatter_(1, visible, False)
    return hidden.repeat_interleave(patch_size, dim=1, output_size=n_patches * patch_size)


def visible_from_mask(visible_mask: Tensor, n_patches: int) -> Tensor:
    """Indices (B, V) of the visible patches from a mask (B, L) over positions, True where visible.

    Reads the mask back from the device; for masks from outside, not for the training loop.

    Raises:
        ValueError: if a patch is seen in part, or samples see different numbers of patches.
    """
    batch, length = visible_mask.shape
    if length % n_patches:
        raise ValueError(f"visible_mask: has {length} positions, not a multiple of n_patches={n_patches}")
    patches = visible_mask.view(batch, n_patches, -1)
    if not torch.equal(patches.all(2), patches.any(2)):
        raise ValueError("visible_mask: each patch must be visible or hidden as a whole")
    counts = patches.all(2).sum(1)
    if len(counts.unique()) > 1:
        raise ValueError(
            f"visible_mask: all samples must see the same number of patches, got {counts.unique().tolist()}"
        )
    return patches.all(2).int().argsort(dim=1, descending=True, stable=True)[:, : int(counts[0])]


def _splitmix64(x: Tensor) -> Tensor:
    """The finaliser of Steele, Lea & Flood, 'Fast splittable pseudorandom number generators', OOPSLA 2014, on int64."""
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign: torch shifts int64 arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
