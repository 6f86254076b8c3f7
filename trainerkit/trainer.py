"""Lightning's Trainer with a faster loop, and the switches that Lightning has elsewhere."""

from typing import Any

import torch
from lightning import pytorch as pl

from trainerkit.loop import FastTrainingEpochLoop, NoProfiler


class Trainer(pl.Trainer):
    """`lightning.pytorch.Trainer` plus `enable_tf32`; all other arguments are Lightning's.

    Small steps cost less: see `trainerkit.loop`.

    Args:
        enable_tf32: let CUDA matrix products and convolutions round float32 inputs to TF32 (Ampere and later):
            several times faster, about three decimal digits. False leaves torch's settings as they are.
        **kwargs: see `lightning.pytorch.Trainer`.

    Raises:
        ValueError: for a negative `gradient_clip_val`, which Lightning would take for no clipping.
    """

    # Lightning's connectors set these, so that type checkers do not see them.
    callbacks: list[pl.Callback]
    datamodule: pl.LightningDataModule | None

    def __init__(self, *, enable_tf32: bool = False, **kwargs: Any) -> None:
        clip = kwargs.get("gradient_clip_val")
        if clip is not None and clip < 0:
            raise ValueError(f"gradient_clip_val={clip}: must be 0 or more, or null not to clip")
        if enable_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        if kwargs.get("profiler") is None and not kwargs.get("barebones"):
            kwargs["profiler"] = NoProfiler()
        super().__init__(**kwargs)
        given = self.fit_loop.epoch_loop
        self.fit_loop.epoch_loop = FastTrainingEpochLoop(self, min_steps=given.min_steps, max_steps=given.max_steps)
