"""How long the next window is, from the gradients of those before.

Two rules: longer where the norm of the gradient is below its running average, or as many samples as the gradient noise
scale says. What is measured at one step is read by the host at the next, so that it waits for no step at hand.

Source of the noise scale: S. McCandlish, J. Kaplan, D. Amodei et al., 'An Empirical Model of Large-Batch Training',
2018.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from trainerkit.callbacks._accumulation import sum_over_ranks, total_norm


def window_by_norm(norm: float, average: float, minimum: int, maximum: int) -> int:
    """clamp(round(min + (max − min)·(1 − min(1, ‖g‖/EMA‖g‖)))): longer where the gradient is smaller than usual.

    Args:
        norm: ‖g‖, 0 or more.
        average: EMA‖g‖; 0 counts as a ratio of 1.
        minimum: batches.
        maximum: batches.
    """
    ratio = norm / average if average > 0 else 1.0
    length = round(minimum + (maximum - minimum) * (1 - min(1.0, ratio)))
    return min(max(length, minimum), maximum)


def gradient_noise(small_squared: float, small_size: float, big_squared: float, big_size: float) -> tuple[float, float]:
    """Unbiased estimates of |G|² and of tr(Σ), from the squared norms of a small and a big batch's mean gradients.

    E|g_B|² = |G|² + tr(Σ)/B, with G the true gradient and Σ the covariance of one sample's; solved for both.

    Args:
        small_squared: |g|² of the small batch.
        small_size: its samples.
        big_squared: |g|² of the big batch.
        big_size: its samples, more than `small_size`.

    Returns:
        |G|² and tr(Σ); either may come out negative, for they are noisy.

    Source: S. McCandlish, J. Kaplan, D. Amodei et al., 'An Empirical Model of Large-Batch Training', 2018, appendix A.
    """
    signal = (big_size * big_squared - small_size * small_squared) / (big_size - small_size)
    noise = (small_squared - big_squared) / (1 / small_size - 1 / big_size)
    return signal, noise


def noise_scale(signal: float, noise: float) -> float:
    """B_simple = tr(Σ)/|G|², in samples: 0 where no noise is left, infinite where no signal is."""
    if noise <= 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf


def window_by_noise(scale: float, batch_size: float, minimum: int, maximum: int) -> int:
    """clamp(ceil(B/b)): as many batches of b samples as the noise scale B needs."""
    length = scale / batch_size
    return maximum if length >= maximum else max(math.ceil(length), minimum)


class LateNumbers:
    """A few numbers of a device that the host reads a step later, when they have long arrived.

    Args:
        count: how many numbers.
        device: where they come from.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._host = torch.zeros(count, pin_memory=device.type == "cuda")
        self._view = self._host.numpy()
        self._arrival: torch.cuda.Event | None = None
        self._full = False

    def __len__(self) -> int:
        return len(self._view)

    def put(self, values: Tensor) -> None:
        """Ask for a copy of float32 numbers, (count,); those before it are forgotten."""
        self._host.copy_(values, non_blocking=True)
        if values.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(values.device))
        self._full = True

    def peek(self) -> list[float] | None:
        """The numbers, or None if there are none that were not taken."""
        if not self._full:
            return None
        if self._arrival is not None:
            self._arrival.synchronize()
        return [float(value) for value in self._view]

    def take(self) -> list[float] | None:
        """The numbers, once."""
        values = self.peek()
        self._full = False
        return values


class AdaptiveWindow:
    """Chooses the number of batches from one optimizer step to the next.

    Args:
        minimum: the shortest window, and the first.
        maximum: the longest.
        by: 'gradient_norm' or 'noise_scale'.
        decay: of the running averages.

    Attributes:
        length: batches in the next window.
        found: metrics of the last decision.
    """

    def __init__(self, minimum: int, maximum: int, by: str, decay: float) -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.by_noise = by == "noise_scale"
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        """Forget everything, for a new fit."""
        self.length = self.minimum
        self.found: dict[str, float] = {}
        self._count = 0
        self._averages: list[float] = []
        self._measured: list[float] | None = None  # of a checkpoint
        self._late: LateNumbers | None = None

    def start(self, device: torch.device) -> None:
        """Training begins, or goes on."""
        self._late = LateNumbers(4 if self.by_noise else 1, device)
        if self._measured is not None and len(self._measured) == len(self._late):
            self._late.put(torch.tensor(self._measured, device=device))

    def state_dict(self) -> dict[str, Any]:
        """Averages, and what was measured last and not yet looked at."""
        measured = None if self._late is None else self._late.peek()
        return {
            "by_noise": self.by_noise,
            "length": self.length,
            "count": self._count,
            "averages": list(self._averages),
            "measured": measured,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another run, if it had the same rule."""
        if state["by_noise"] == self.by_noise:
            self.length = min(max(state["length"], self.minimum), self.maximum)
            self._count, self._averages = state["count"], list(state["averages"])
            self._measured = state["measured"]

    def look(self, trainer: Trainer) -> None:
        """Decide with what was measured a step ago."""
        values = self._late.take() if self._late is not None else None
        if values is None:
            return
        ranks = trainer.world_size
        if self.by_noise:
            small_squared, small_size, big_squared, big_size = values
            if not 0 < small_size < big_size:
                return
            quantities: tuple[float, ...] = gradient_noise(small_squared, small_size, big_squared, big_size)
        else:
            quantities = (values[0],)
        if not all(math.isfinite(quantity) for quantity in quantities):
            return  # of a step that a gradient scaler skipped
        averages = self._average(quantities)
        if self.by_noise:
            scale = noise_scale(*averages)
            self.length = window_by_noise(scale, values[1] * ranks, self.minimum, self.maximum)
            self.found = {"accumulation/noise_scale": scale}
        else:
            self.length = window_by_norm(values[0], averages[0], self.minimum, self.maximum)
            self.found = {"accumulation/gradient_norm": values[0]}

    def _average(self, quantities: Sequence[float]) -> list[float]:
        """Running averages begun at 0, hence divided by what weight they have so far."""
        before = self._averages or [0.0] * len(quantities)
        pairs = zip(before, quantities, strict=True)
        self._averages = [self.decay * average + (1 - self.decay) * quantity for average, quantity in pairs]
        self._count += 1
        return [average / (1 - self.decay**self._count) for average in self._averages]

    def measure(self, trainer: Trainer, gradients: Sequence[Tensor], first: Tensor | None, size: Tensor | None) -> None:
        """Measure the gradient of a window.

        Args:
            trainer: whose processes all come to the same decision.
            gradients: the means over the window.
            first: |g|² of its first batch in this process alone, and the batch's size, (2,); None if it had no more.
            size: of the window in this process, 0-dimensional.
        """
        if self._late is None or not gradients:
            return
        norm = total_norm(gradients)
        ranks = trainer.world_size
        if not self.by_noise:
            self._late.put(sum_over_ranks(trainer, norm / ranks)[None])
        elif first is not None and size is not None:
            means = torch.cat([first, norm.square()[None]]) / ranks
            self._late.put(sum_over_ranks(trainer, torch.cat([means, size[None]])))
