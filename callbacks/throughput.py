"""How fast training is: steps, samples and tokens a second, waiting for data, FLOP/s and MFU.

Training time is the host's wall time from one log step to the next, without validation, checkpoints and the ends of
epochs. Steps are issued asynchronously, so that the time of one says little; over a window the device holds the host
back, and the one synchronization at its end makes the figure exact. No other step waits for anything.

Source: model FLOPs utilization (MFU), A. Chowdhery et al., 'PaLM: Scaling Language Modeling with Pathways', 2022,
appendix B.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.callbacks._measure import FlopCounter, Stopwatch, leading_dimension, sum_over_ranks, synchronize
from trainerkit.callbacks._peak_flops import dense_peak, matmul_kind
from trainerkit.callbacks._trainer import is_stepping, log_metrics, step_number
from trainerkit.fsdp import same_batch

Count = int | Tensor


@runtime_checkable
class TellsFlops(Protocol):
    """A module that knows by a formula what it needs (`trainerkit.functional.flops`)."""

    def flops_per_sample(self) -> float:
        """Floating-point operations of a sample's forward and backward pass."""


@dataclass
class Window:
    """What happened between two log steps; over several processes the sums of all but `steps`.

    Attributes:
        seconds: training time.
        waited: seconds of it in which the loop waited for the next batch.
        steps: optimizer steps.
        samples: samples seen.
        tokens: tokens seen; None if they are not counted.
        flops: floating-point operations made; None if they are not known.
    """

    seconds: float
    waited: float
    steps: float
    samples: float
    tokens: float | None = None
    flops: float | None = None


def throughput(window: Window, processes: int = 1, peak_flops: float | None = None) -> dict[str, float]:
    """The rates of a window.

    Args:
        window: sums over all processes.
        processes: how many there are; each one's time is the mean.
        peak_flops: what one device can do in a second.
    """
    seconds, waited = window.seconds / processes, window.waited / processes
    rates = {
        "steps_per_second": window.steps / seconds,
        "samples_per_second": window.samples / seconds,
        "data_wait_seconds": waited,
        "data_wait_fraction": waited / seconds,
    }
    if window.tokens is not None:
        rates["tokens_per_second"] = window.tokens / seconds
    if window.flops is not None:
        rates["flops_per_second"] = window.flops / seconds
        if peak_flops is not None:
            rates["mfu"] = rates["flops_per_second"] / (peak_flops * processes)
    return rates


class Throughput(Callback):
    """Log the rates of training every `every_n_steps` optimizer steps, over all processes.

    The first optimizer step of a fit is not timed, for it compiles, allocates and chooses kernels. The operations of
    its first batch, forward and backward, are counted by torch's `FlopCounterMode` while it is trained; what is logged
    assumes that every other sample needs as many. That batch runs compiled functions uncompiled.

    Args:
        every_n_steps: optimizer steps in a window; its end is the only step that synchronizes.
        batch_size: samples in a batch, or a function of the batch; None takes the leading dimension of its first
            tensor.
        tokens: key of the batch whose elements are the tokens, or a function of the batch (a tensor that it gives is
            not read before the window's end); None counts none.
        flops: 'count'; 'model' asks the module's `flops_per_sample`; or the operations of a sample's forward and
            backward pass; or None for neither FLOP/s nor MFU.
        peak_flops: dense operations a second of one device; None takes them from a table, and gives no MFU for a device
            that is not in it.

    Logged as `throughput/…`: `steps_per_second`, `samples_per_second`, `tokens_per_second`, `data_wait_seconds` and
    `data_wait_fraction` of the window, `flops_per_second`, `mfu`, and since the run's beginning `samples` and `tokens`,
    which go through a checkpoint.

    Raises:
        ValueError: for a value that is not possible; in `setup` for tensor parallelism, and for `flops='model'` with a
            module that does not tell; at the first batch if there is
            nothing in it that can be counted.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        batch_size: int | Callable[[Any], int] | None = None,
        tokens: str | Callable[[Any], Count] | None = None,
        flops: float | Literal["count", "model"] | None = "count",
        peak_flops: float | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be 1 or more")
        if batch_size is not None and not callable(batch_size) and not (isinstance(batch_size, int) and batch_size > 0):
            raise ValueError(f"batch_size={batch_size}: must be 1 or more, a function of the batch, or null")
        if tokens is not None and not (callable(tokens) or (isinstance(tokens, str) and tokens)):
            raise ValueError(f"tokens={tokens!r}: must be a key of the batch, a function of the batch, or null")
        if not (flops is None or flops in ("count", "model") or (isinstance(flops, (int, float)) and flops > 0)):
            raise ValueError(f"flops={flops}: must be 'count', 'model', operations a sample above 0, or null")
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops={peak_flops}: must be above 0, or null to take it from the table")
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.tokens = tokens
        self.flops = flops
        self.peak_flops = peak_flops
        self._clock: Callable[[], float] = time.perf_counter
        self._before = {"samples": 0, "tokens": 0}  # in earlier processes, over all ranks
        self._counter: FlopCounter | None = None
        self._wrapped: list[tuple[Any, str]] = []  # methods of Lightning's loops
        self._begin()

    def _begin(self) -> None:
        """As before the first step of a fit."""
        self._watch = Stopwatch(self._clock)
        self._timing = False  # from the end of the first optimizer step on
        self._samples = 0  # this process's since the fit's beginning
        self._tokens: Count = 0
        self._steps = 0  # in this window
        self._at_start: tuple[int, Count] = (0, 0)  # samples and tokens when the window began
        self._flops_per_sample = self.flops if isinstance(self.flops, (int, float)) else None

    # The start and the end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to count operations of which each rank does a part; ask the module."""
        if self.flops == "model" and not isinstance(pl_module, TellsFlops):
            raise ValueError(
                f"flops=model: {type(pl_module).__name__} has no flops_per_sample(); take 'count' or a number"
            )
        mesh = getattr(trainer.strategy, "_device_mesh", None)
        if self.flops == "count" and mesh is not None and mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "flops=count: must be 'model' or a number under tensor parallelism, where each rank does a part of a "
                "sample's operations"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how much was seen before."""
        self._before = dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save how much was seen, over all ranks; the time of saving is not training's."""
        self._pause(trainer)
        samples, tokens = sum_over_ranks(trainer, [self._samples, self._tokens])
        checkpoint["callbacks"][self.state_key] = self._totals(samples, tokens)

    def _totals(self, samples: float, tokens: float) -> dict[str, int]:
        return {
            "samples": self._before["samples"] + round(samples),
            "tokens": self._before["tokens"] + round(tokens),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to time the loop."""
        if trainer.global_step == 0:
            self._before = {"samples": 0, "tokens": 0}
        self._begin()
        if self.flops == "model" and isinstance(pl_module, TellsFlops):
            self._flops_per_sample = pl_module.flops_per_sample()
        self._enter_loop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the training loop as it was."""
        self._stop_counting()
        self._leave_loop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the training loop as it was."""
        self._stop_counting()
        self._leave_loop()

    # The time

    def _enter_loop(self, trainer: Trainer) -> None:
        """Time `next(loader)`, around which Lightning calls two methods for its profiler, and stop for validation.

        A validation's loader starts its workers before any hook of a callback is called.
        """
        loop = trainer.fit_loop.epoch_loop
        before, after, validate = loop._on_before_fetch, loop._on_after_fetch, loop.val_loop.run

        def on_before_fetch() -> None:
            if self._timing:
                self._watch.start()
                self._watch.wait()
            before()

        def on_after_fetch() -> None:
            after()
            self._watch.go_on()

        def run() -> Any:
            self._pause(trainer)
            return validate()

        self._wrapped = [(loop, "_on_before_fetch"), (loop, "_on_after_fetch"), (loop.val_loop, "run")]
        for (owner, name), wrapper in zip(self._wrapped, (on_before_fetch, on_after_fetch, run), strict=True):
            owner.__dict__[name] = wrapper

    def _leave_loop(self) -> None:
        for owner, name in self._wrapped:
            owner.__dict__.pop(name, None)
        self._wrapped, self._timing = [], False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here to the first batch the loader starts anew, which is waiting for data."""
        if self._timing:
            self._watch.start()
            self._watch.wait()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What others do at the end of an epoch is not training."""
        self._stop_counting()  # of a batch that was skipped
        self._pause(trainer)

    def _pause(self, trainer: Trainer) -> None:
        """Stand still until the next batch is fetched; what was issued before still counts."""
        if self._timing and self._watch.running:
            synchronize(trainer)
            self._watch.stop()

    # A step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        if self._timing:
            self._watch.start()
            self._watch.go_on()
        elif self.flops == "count" and self._flops_per_sample is None and self._counter is None:
            self._counter = FlopCounter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at the end of a window, log."""
        samples = self._samples_in(batch)
        self._samples += samples
        if self.tokens is not None:
            self._tokens = self._tokens + self._tokens_in(batch)
        flops = self._stop_counting()
        if flops and samples:
            self._flops_per_sample = flops / samples
        if is_stepping(trainer, pl_module):
            self._after_step(trainer)

    def _after_step(self, trainer: Trainer) -> None:
        self._steps += 1
        if not self._timing:
            synchronize(trainer)
            self._timing = True
            self._watch.start()
        elif step_number(trainer) % self.every_n_steps == 0:
            synchronize(trainer)
            self._log(trainer)
        else:
            return
        self._steps, self._at_start = 0, (self._samples, self._tokens)
        self._watch.reset()

    def _log(self, trainer: Trainer) -> None:
        self._watch.read()
        in_window = self._samples - self._at_start[0]
        flops = in_window * (self._flops_per_sample or 0)
        counts: list[float | Tensor] = [in_window, self._tokens - self._at_start[1], flops, self._samples, self._tokens]
        group = same_batch(trainer.strategy)  # under tensor parallelism several ranks count the same samples
        sums = sum_over_ranks(trainer, [self._watch.seconds, self._watch.waited, *(count / group for count in counts)])
        window = Window(sums[0], sums[1], self._steps, sums[2])
        window.tokens = None if self.tokens is None else sums[3]
        window.flops = None if self._flops_per_sample is None else sums[4]
        rates = throughput(window, trainer.world_size, self._peak(trainer))
        totals = self._totals(sums[5], sums[6])
        if self.tokens is None:
            del totals["tokens"]
        log_metrics(trainer, {f"throughput/{name}": value for name, value in (rates | totals).items()})

    def _peak(self, trainer: Trainer) -> float | None:
        device = trainer.strategy.root_device
        if self.peak_flops is not None or device.type != "cuda":
            return self.peak_flops
        return dense_peak(torch.cuda.get_device_name(device), matmul_kind(str(trainer.precision)))

    def _samples_in(self, batch: Any) -> int:
        if callable(self.batch_size):
            return self.batch_size(batch)
        samples = self.batch_size if self.batch_size is not None else leading_dimension(batch)
        if samples is None:
            raise ValueError(
                f"batch_size=None: there is no tensor with a leading dimension in a batch of type "
                f"{type(batch).__name__}; give a number or a function of the batch"
            )
        return samples

    def _tokens_in(self, batch: Any) -> Count:
        if callable(self.tokens):
            count = self.tokens(batch)
            return count.detach() if isinstance(count, Tensor) else count
        try:
            return int(batch[self.tokens].numel())
        except (KeyError, TypeError, IndexError, AttributeError):
            there = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(
                f"tokens={self.tokens}: must be the key of a tensor in the batch, which has: {there}"
            ) from None

    def _stop_counting(self) -> int:
        counter, self._counter = self._counter, None
        return counter.stop() if counter is not None else 0
