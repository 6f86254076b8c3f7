"""Rows of pairs in batches: texts, pictures, negatives that were given and negatives that were mined.

Shapes: B rows, K negatives a row, T tokens, C channels, H and W the side of a picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from trainerkit.data.loader import Batch, EpochBatches
from trainerkit.data.pair_pictures import Pictures
from trainerkit.data.pair_texts import TokenRows
from trainerkit.functional.picture_moves import Augmentation, moved
from trainerkit.functional.row_draws import row_draws

# What a random number is for.
_CHOICE, _QUERY, _POSITIVE, _NEGATIVES = range(4)


@dataclass(frozen=True)
class Side:
    """Texts, pictures, or both of the same rows: one side of pairs, or the negatives."""

    texts: TokenRows | None = None
    pictures: Pictures | None = None

    @property
    def modalities(self) -> list[str]:
        """'image' and 'text', what is there of them."""
        return [name for name, what in {"image": self.pictures, "text": self.texts}.items() if what is not None]


@dataclass(frozen=True)
class Negatives:
    """What is no answer to a query.

    Args:
        side: all of them.
        members: those of each row of the data set, in their order, (n, K) int64, numbers in `side`; -1 for none.
    """

    side: Side
    members: Tensor


class PairDataset(Dataset[Batch]):
    """Pairs; indexing with a tensor of positions gives a whole batch.

    A batch has `index` (B,): the row numbers; `query_image`, `positive_image` (B, C, H, W); `query_text`,
    `positive_text` (B, T) with `…_mask`; `negatives_image` (B, K, C, H, W), `negatives_text`, `negatives_text_mask`
    (B, K, T) with `negatives_mask` (B, K); `label` (B,), `score` (B,). What the data do not have is absent.

    Args:
        query: its side.
        positive: its side.
        rows: which rows belong to this data set, (n,) int64, ascending.
        negatives: those that were given, of the same modalities as `positive`.
        labels: (rows,) int64, or None.
        scores: (rows,) float32, or None.
        augmentation: how pictures are moved; None for not at all.
        mined: how many mined negatives a row has room for.
        seed: of what is left to chance, which is the same for (seed, epoch, row), whoever reads it and after whatever.
        counted: give positions as `index`, instead of row numbers.

    Raises:
        ValueError: if there is no row, or the negatives are of other modalities or for another number of rows.
    """

    seeded_by_index = True  # ExactResume asks

    def __init__(
        self,
        query: Side,
        positive: Side,
        rows: Tensor,
        *,
        negatives: Negatives | None = None,
        labels: Tensor | None = None,
        scores: Tensor | None = None,
        augmentation: Augmentation | None = None,
        mined: int = 0,
        seed: int = 0,
        counted: bool = False,
    ) -> None:
        if len(rows) == 0:
            raise ValueError("rows=0: a data set needs at least one row")
        if negatives is not None and negatives.side.modalities != positive.modalities:
            here, there = ("+".join(side.modalities) for side in (negatives.side, positive))
            raise ValueError(f"negatives={here}: must be of the same modalities as the positives, {there}")
        if negatives is not None and len(negatives.members) != len(rows):
            raise ValueError(f"negatives={len(negatives.members)}: must be given for each of rows={len(rows)}")
        self.query = query
        self.positive = positive
        self.rows = rows
        self.negatives = negatives
        self.labels = labels
        self.scores = scores
        self.augmentation = augmentation
        self.seed = seed
        self.counted = counted
        # Shared memory: workers that live on see a new epoch, and new negatives, too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._mined = torch.full((len(rows), mined), -1).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose what is drawn from now on."""
        self._epoch.fill_(epoch)

    def set_mined(self, rows: Tensor) -> None:
        """Give each row negatives: the positives of other rows.

        Args:
            rows: (n, K) int64 for the n rows of this data set in their order, whose positives become row i's negatives,
                as positions in this data set; -1 for none.

        Raises:
            ValueError: for another shape, or a position that is not there.
        """
        if rows.shape != self._mined.shape:
            raise ValueError(
                f"rows={tuple(rows.shape)}: must have shape {tuple(self._mined.shape)}: the rows of the data set, and "
                "mined_negatives"
            )
        if rows.numel() and not -1 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ValueError(f"rows={int(rows.min())}…{int(rows.max())}: must be from -1 to {len(self) - 1}")
        self._mined.copy_(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Tensor) -> Batch:
        rows = self.rows[positions]
        batch = {"index": positions.clone() if self.counted else rows}
        for name, side, stream in (("query", self.query, _QUERY), ("positive", self.positive, _POSITIVE)):
            batch |= {f"{name}_{kind}": tensor for kind, tensor in self._take(side, rows, stream).items()}
        found = []
        if self.negatives is not None:
            found.append(self._members(self.negatives.side, self.negatives.members[positions]))
        if self._mined.shape[1]:
            mined = self._mined[positions]
            found.append(self._members(self.positive, torch.where(mined < 0, mined, self.rows[mined])))
        batch |= {f"negatives_{kind}": tensor for kind, tensor in _joined(found).items()}
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        if self.scores is not None:
            batch["score"] = self.scores[rows]
        return batch

    def _take(self, side: Side, rows: Tensor, stream: int) -> Batch:
        taken = {}
        if side.pictures is not None:
            # Both sides of a row get the same numbers here, so that they can choose different pictures by them.
            pictures = side.pictures.take(rows, row_draws(self.seed, int(self._epoch), rows, 2, _CHOICE))
            if self.augmentation is not None and len(rows):
                draws = row_draws(self.seed, int(self._epoch), rows, 4, stream)
                pictures = moved(pictures, draws, self.augmentation)
            taken["image"] = pictures
        if side.texts is not None:
            taken["text"], taken["text_mask"] = side.texts.take(rows)
        return taken

    def _members(self, side: Side, members: Tensor) -> Batch:
        """(B, K, …) of `side`; zeros where there is none."""
        mask = members >= 0
        batch = {"mask": mask}
        for kind, taken in self._take(side, members[mask], _NEGATIVES).items():
            batch[kind] = taken.new_zeros(*members.shape, *taken.shape[1:])
            batch[kind][mask] = taken
        return batch


class PairBatches(EpochBatches):
    """`EpochBatches` that tell their data set the epoch as well: what is left to chance is drawn anew in each."""

    def __init__(self, dataset: PairDataset, batch_size: int, *, shuffle: bool, seed: int, even: bool, **world: int):
        super().__init__(len(dataset), batch_size, shuffle=shuffle, seed=seed, even=even, **world)
        self._dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation and the draws."""
        super().set_epoch(epoch)
        self._dataset.set_epoch(epoch)


def _joined(parts: list[Batch]) -> Batch:
    """Negatives of two kinds beside each other; texts are padded to the longest of both."""
    joined = {}
    for kind in parts[0] if parts else ():
        tensors = [part[kind] for part in parts]
        if kind.startswith("text"):
            longest = max(tensor.shape[-1] for tensor in tensors)
            tensors = [pad(tensor, (0, longest - tensor.shape[-1])) for tensor in tensors]
        joined[kind] = torch.cat(tensors, 1)
    return joined
