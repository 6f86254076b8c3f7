"""Rows of equal length from a stream of tokens, for next-token prediction.

Each token of the stream has a target: the one that follows, and the end of text after the last. A document begins with
an end of text and ends with that of the next one, so that documents kept apart have no target across a boundary.

Shapes: B rows, T tokens a row.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainerkit.data.loader import Batch, EpochBatches
from trainerkit.data.shards import TokenStream

IGNORED = -100


class Windows(Dataset[Batch]):
    """Windows of a stream; indexing with a tensor of first tokens gives a batch.

    `{"tokens": (B, T), "targets": (B, T), "n_bytes": (B,), "index": (B,)}`, all int64; `n_bytes` is what the counted
    targets of a row spell, `index` the row's number. With `separate` also `"document": (B, T)`, from 0 in each row.

    Args:
        stream: the tokens.
        length: T.
        stride: from one window's beginning to the next one's; where windows overlap, only the last `stride` targets of
            a window count, but for the first window: each is counted once, with `length - stride` tokens before it
            or more.
        separate: whether to say which document a token belongs to.
    """

    seeded_by_index = True

    def __init__(self, stream: TokenStream, length: int, stride: int, separate: bool) -> None:
        self.stream = stream
        self.length = length
        self.stride = stride
        self.separate = separate

    def __len__(self) -> int:
        """Windows that are needed to have each target once."""
        return 1 + max(0, -(-(len(self.stream) - self.length) // self.stride))

    def __getitem__(self, starts: Tensor) -> Batch:
        rows = [self._row(int(start)) for start in starts]
        tokens, targets, sizes = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        batch = {"tokens": tokens, "targets": targets, "n_bytes": sizes, "index": starts // self.stride}
        if self.separate:
            document = (tokens == self.stream.end_of_text).cumsum(1)
            batch["document"] = document - document[:, :1]
        return batch

    def _row(self, start: int) -> tuple[np.ndarray, np.ndarray, np.int64]:
        window = self.stream.read(start, self.length + 1)
        targets = window[1:].copy()
        sizes = self.stream.sizes(start + 1, targets)
        first = self.length - self.stride if start else 0
        last = len(self.stream) - start
        targets[:first] = targets[last:] = IGNORED
        return window[:-1], targets, sizes[first:last].sum()


class WindowBatches(EpochBatches):
    """First tokens of windows instead of row numbers; see `EpochBatches` for the other arguments.

    Args:
        windows: how many there are.
        batch_size: windows a batch and process.
        stride: tokens from one to the next.
        slack: in each epoch all windows begin later by a number of tokens below this, drawn from (seed, epoch); 1 for
            never.
    """

    def __init__(
        self,
        windows: int,
        batch_size: int,
        *,
        stride: int,
        slack: int = 1,
        shuffle: bool,
        seed: int = 0,
        even: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            windows, batch_size, shuffle=shuffle, seed=seed, even=even, num_replicas=num_replicas, rank=rank
        )
        self.stride = stride
        self.slack = slack

    @property
    def settings(self) -> dict[str, int]:
        """By the names that data modules give them: in training, the stride is the context."""
        return {"context_length": self.stride, "shift_windows": self.slack > 1, **super().settings}

    def _order(self) -> Tensor:
        shift = int(np.random.default_rng([self.seed, self.epoch, 1]).integers(self.slack))
        return super()._order() * self.stride + shift


def training_windows(tokens: int, length: int, shift: bool) -> tuple[int, int]:
    """How many whole windows fit one after the other, and by how much less than what they may be shifted.

    Args:
        tokens: of the stream, `length` at least.
        length: of a window.
        shift: whether room is left for windows to begin at any of `length` places.

    Returns:
        Windows, and the `slack` of `WindowBatches`.
    """
    if not shift:
        return tokens // length, 1
    windows = max(1, (tokens + 1) // length - 1)
    return windows, min(length, tokens - windows * length + 1)
