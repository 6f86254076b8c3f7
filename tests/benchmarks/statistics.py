"""What the statistics callbacks cost: `python -m tests.benchmarks.statistics`.

The documented masked autoencoder, batches of 128, gradient clipping, a CSV logger. In each run every second step is
measured; the cost is the median difference of neighbouring steps, so that a machine that slows down slows both, and a
measurement's share of the time in which ParameterStats logs what waits. All default callbacks together beside none.
Then the reduction alone, on 800 small tensors, beside Lightning's `grad_norm`, which has no weights' norms.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning import pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm
from torch import nn

from tests.benchmarks.mae_training import LENGTH, OPTIMIZER, SCHEDULE, SIZES, by_hand, default_callbacks
from tests.benchmarks.turns import measure, quiet, table
from trainerkit.callbacks import ActivationStats, GradientFlow, ParameterStats
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.functional.statistics import NormPlan, norms
from trainerkit.tasks.mae import MaskedAutoencoder, MaskedAutoencoderTask
from trainerkit.trainer import Trainer

BATCH, STEPS, TENSORS = 128, 24, 800
NEVER = 10**9
SMALLEST = 8  # times as many pairs of the smallest difference
NORMS = "ParameterStats, norms and their ratio"

# Each measures every second step.
MEASURED: dict[str, Callable[[], pl.Callback]] = {
    NORMS: lambda: ParameterStats(every_n_steps=2, full_every_n_steps=NEVER),
    "ParameterStats, everything": lambda: ParameterStats(every_n_steps=2, full_every_n_steps=2),
    "GradientFlow without its picture": lambda: GradientFlow(every_n_steps=2, picture=False),
    "GradientFlow": lambda: GradientFlow(every_n_steps=2),
    "ActivationStats": lambda: ActivationStats(every_n_steps=2),
}


class Starts(pl.Callback):
    """When each batch began, and the last one ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, *_) -> None:
        self.times.append(time.perf_counter())


def steps(callbacks: list[pl.Callback], folder: Path) -> list[float]:
    """Seconds of each step, the first two left out."""
    starts = Starts()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=CSVLogger(folder), callbacks=[starts, *callbacks],
        gradient_clip_val=1.0, enable_model_summary=False, enable_progress_bar=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks), default_root_dir=folder,
    )  # fmt: skip
    task = MaskedAutoencoderTask(MaskedAutoencoder(**SIZES), optimizer=OPTIMIZER, scheduler=SCHEDULE)
    x = torch.randn(BATCH * STEPS, LENGTH).cumsum(1)
    trainer.fit(task, BatchLoader(ArrayDataset({"x": x}), EpochBatches(len(x), BATCH, shuffle=True)))
    return [end - start for start, end in zip(starts.times, starts.times[1:], strict=False)][2:]


def pairs(callback: pl.Callback, folder: Path) -> tuple[list[tuple[float, float]], float]:
    """Seconds of each step that is not measured and of the measured one after it; a measurement's of the logging.

    All that waits is logged in the last step, which is in no pair.
    """
    logging = Inside([callback], ("_log_waiting",))
    took = steps([callback], folder)[:-2]
    return list(zip(took[::2], took[1::2], strict=True)), logging.seconds / (STEPS // 2)


HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_train_batch_end", "_after_step",
)  # fmt: skip


class Inside:
    """Seconds spent inside callbacks during batches: their hooks, and what they do after the optimizer's step."""

    def __init__(self, callbacks: list[pl.Callback], names: Sequence[str] = HOOKS) -> None:
        self.seconds = 0.0
        for callback in callbacks:
            for name in names:
                if hasattr(callback, name):
                    setattr(callback, name, self.timed(getattr(callback, name)))

    def timed(self, hook: Callable[..., object]) -> Callable[..., object]:
        def call(*args, **kwargs):
            start = time.perf_counter()
            hook(*args, **kwargs)
            self.seconds += time.perf_counter() - start

        return call


def default_stack(rounds: int) -> None:
    """All default callbacks beside none, run by run in turns; a round's ratio is of runs made one after the other."""
    found: dict[str, list[float]] = {"none": [], "all": []}
    for turn in range(rounds):
        for name in sorted(found, reverse=bool(turn % 2)):
            with tempfile.TemporaryDirectory() as folder:
                # The last step has the end of the epoch in it: checkpoint, history, export.
                took = steps(default_callbacks() if name == "all" else [], Path(folder))[:-1]
                found[name].append(statistics.median(took))
    medians = {name: statistics.median(took) for name, took in found.items()}
    more = sorted(all_ / none - 1 for none, all_ in zip(found["none"], found["all"], strict=True))
    print(f"\nThe default callbacks, batches of {BATCH}")
    print(f"  a step takes {medians['none'] * 1e3:.2f} ms without, {medians['all'] * 1e3:.2f} ms with them", end="")
    print(
        f": {statistics.median(more):+.1%} (half of the rounds: {more[rounds // 4]:+.1%} to {more[-1 - rounds // 4]:+.1%})"
    )
    callbacks = default_callbacks()
    inside = Inside(callbacks)
    with tempfile.TemporaryDirectory() as folder:
        whole = statistics.mean(steps(callbacks, Path(folder))[:-1])
    mine = inside.seconds / STEPS
    print(f"  of which {mine * 1e3:.2f} ms are spent inside them: {mine / whole:.1%} of a step")


def measured_steps(rounds: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in MEASURED}
    logging: dict[str, list[float]] = {name: [] for name in MEASURED}
    for turn in range(SMALLEST * rounds):
        for name, make in MEASURED.items():
            if turn % SMALLEST == 0 or name == NORMS:  # a small difference needs many pairs
                with tempfile.TemporaryDirectory() as folder:
                    more, seconds = pairs(make(), Path(folder))
                    found[name] += more
                    logging[name].append(seconds)
    by_hand_step = measure({"hand-written": by_hand(BATCH)}, min(rounds, 3))["hand-written"]
    print(f"\nA measured step of the documented model, batches of {BATCH}")
    print(f"  the hand-written step takes {by_hand_step * 1e3:.1f} ms")
    for name, steps in found.items():
        without = statistics.median(off for off, _ in steps)
        differences = sorted(on - off for off, on in steps)
        more = statistics.median(differences) + statistics.median(logging[name])
        # Of a median: 1.25 standard errors of a mean, these from the middle half.
        spread = (differences[len(steps) * 3 // 4] - differences[len(steps) // 4]) / 1.35
        error = 1.25 * spread / len(steps) ** 0.5
        print(
            f"  {name:<38}  {more * 1e3:+8.3f} ± {error * 1e3:.3f} ms on {without * 1e3:.1f} ms: {more / without:+.2%}"
        )


def many_tensors() -> nn.Module:
    module = nn.ParameterList([nn.Parameter(torch.randn(32, 32)) for _ in range(TENSORS)])
    for parameter in module:
        parameter.grad = torch.randn_like(parameter)
    return module


def reduction(prepare: Callable[[nn.Module], Callable[[], object]], repeats: int = 30) -> Callable[[Path], float]:
    def run(folder: Path) -> float:
        reduce = prepare(many_tensors())
        start = time.perf_counter()
        for _ in range(repeats):
            reduce()
        return (time.perf_counter() - start) / repeats

    return run


def gradients_to_host(module: nn.Module) -> Callable[[], object]:
    parameters = list(module.parameters())  # the callback has them at hand
    plan = NormPlan([parameter.grad for parameter in parameters])
    return lambda: norms([parameter.grad for parameter in parameters], plan=plan).tolist()


def both_to_host(module: nn.Module) -> Callable[[], object]:
    parameters = list(module.parameters())
    plan = NormPlan([*parameters, *(parameter.grad for parameter in parameters)])
    return lambda: norms([*parameters, *(parameter.grad for parameter in parameters)], plan=plan).tolist()


def main(rounds: int = 5) -> None:
    quiet()
    default_stack(2 * rounds)
    measured_steps(rounds)
    contenders = {
        "Lightning's grad_norm": reduction(lambda module: lambda: grad_norm(module, norm_type=2)),
        "ours, gradients": reduction(gradients_to_host),
        "ours, gradients and weights": reduction(both_to_host),
    }
    table(f"Norms of {TENSORS} tensors, on the host", measure(contenders, rounds), "Lightning's grad_norm")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
