"""Contenders measured turn by turn, so that a machine that slows down slows all of them."""

import contextlib
import io
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path


def measure(contenders: dict[str, Callable[[Path], float]], rounds: int) -> dict[str, float]:
    """Run each contender once a round, after a round that does not count.

    Args:
        contenders: name to a function that takes an empty folder and gives seconds a step.
        rounds: that count.

    Returns:
        Each contender's median, in seconds a step.
    """
    quiet()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                took = contender(Path(folder))
            if number:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title: str, medians: dict[str, float], against: str, unit: float = 1e3) -> None:
    """Print milliseconds a step and the ratio to one of them."""
    print(f"\n{title}")
    width = max(map(len, medians))
    for name, seconds in medians.items():
        print(f"  {name:<{width}}  {seconds * unit:9.3f} ms  {seconds / medians[against]:6.3f}")


def quiet() -> None:
    """No advice, no device lines."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
