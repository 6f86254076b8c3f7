"""Lightning's Trainer with the few switches that a run needs and Lightning has elsewhere."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import pytorch as pl
from lightning.pytorch.profilers import Profiler


class Trainer(pl.Trainer):
    """`lightning.pytorch.Trainer` plus `enable_tf32`; all other arguments are Lightning's.

    Args:
        enable_tf32: let CUDA matrix products and convolutions round float32 inputs to TF32 (Ampere and later):
            several times faster, about three decimal digits. False leaves torch's settings as they are.
        **kwargs: see `lightning.pytorch.Trainer`.

    Raises:
        ValueError: for a negative `gradient_clip_val`, which Lightning would take for no clipping.
    """

    def __init__(self, *, enable_tf32: bool = False, **kwargs: Any) -> None:
        clip = kwargs.get("gradient_clip_val")
        if clip is not None and clip < 0:
            raise ValueError(f"gradient_clip_val={clip}: must be 0 or more, or null not to clip")
        if enable_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        if kwargs.get("profiler") is None:
            kwargs["profiler"] = NoProfiler()
        super().__init__(**kwargs)


class NoProfiler(Profiler):
    """Measures nothing, at no cost.

    Lightning enters a generator-based context about sixty times a step even when nothing is profiled; one shared
    `nullcontext` takes a tenth of that time.
    """

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """The shared empty context."""
        return self._nothing

    def start(self, action_name: str) -> None:
        """Nothing to start."""

    def stop(self, action_name: str) -> None:
        """Nothing to stop."""
