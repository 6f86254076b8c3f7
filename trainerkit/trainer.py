"""Lightning's Trainer with a faster loop, and the switches that Lightning has elsewhere."""

from typing import Any, Literal

import torch
from lightning import pytorch as pl
from lightning.fabric.connector import _PRECISION_INPUT  # type: ignore[attr-defined] # a name of Lightning's own

from trainerkit.fsdp import FSDP2, policy
from trainerkit.loop import FastTrainingEpochLoop, NoProfiler

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Trainer(pl.Trainer):
    """`lightning.pytorch.Trainer` and `enable_tf32`, `compile`, `checkpoint_activations`, `precision='auto'`.

    All else is Lightning's.

    Small steps cost less: see `trainerkit.loop`.

    Args:
        precision: 'auto' takes bf16-mixed where the device multiplies bfloat16 in hardware (`multiplies_bfloat16`),
            else 32-true; all others are Lightning's.
        enable_tf32: let CUDA matrix products and convolutions round float32 inputs to TF32 (Ampere and later):
            several times faster, about three decimal digits. False leaves torch's settings as they are.
        compile: have a Task's networks compiled by `torch.compile`, in place, so that no name in a checkpoint changes;
            True, a mode of torch.compile, or its keyword arguments. Where no compiler works, a warning says so.
        checkpoint_activations: have the repeated blocks of a Task's networks keep their inputs only, and compute the
            rest again in the backward pass: less memory, about a third more time (`trainerkit.networks`).
        **kwargs: see `lightning.pytorch.Trainer`.

    Raises:
        ValueError: for a negative `gradient_clip_val`, which Lightning would take for no clipping; for another
            `compile`; for a precision that FSDP2 does not have.

    Attributes:
        compiler: keyword arguments for `torch.compile`, or None; `Task.configure_model` reads it.
        checkpoint_activations: likewise.
    """

    # Lightning's connectors set these, so that type checkers do not see them.
    callbacks: list[pl.Callback]
    datamodule: pl.LightningDataModule | None

    def __init__(
        self,
        *,
        enable_tf32: bool = False,
        compile: bool | str | dict[str, Any] = False,
        checkpoint_activations: bool = False,
        precision: _PRECISION_INPUT | Literal["auto"] | None = None,
        **kwargs: Any,
    ) -> None:
        clip = kwargs.get("gradient_clip_val")
        if clip is not None and clip < 0:
            raise ValueError(f"gradient_clip_val={clip}: must be 0 or more, or null not to clip")
        self.compiler = _compiler(compile)
        self.checkpoint_activations = checkpoint_activations
        if precision == "auto":
            precision = "bf16-mixed" if multiplies_bfloat16(str(kwargs.get("accelerator", "auto"))) else "32-true"
        if isinstance(kwargs.get("strategy"), FSDP2):
            policy(str(precision or "32-true"))  # refuses in plainer words than Lightning
            # The memory that FSDP2 gathers into in an evaluation serves training too, which has no use for
            # inference tensors; Lightning knows that of its first FSDP strategy only.
            kwargs["inference_mode"] = False
        if enable_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        if kwargs.get("profiler") is None and not kwargs.get("barebones"):
            kwargs["profiler"] = NoProfiler()
        super().__init__(precision=precision, **kwargs)
        given = self.fit_loop.epoch_loop
        self.fit_loop.epoch_loop = FastTrainingEpochLoop(self, min_steps=given.min_steps, max_steps=given.max_steps)


def multiplies_bfloat16(accelerator: str = "auto") -> bool:
    """Whether a device has units for matrix products of bfloat16; emulated ones are slower than float32.

    True for CUDA from Ampere on, and for CPUs with AVX512-BF16 or AMX.

    Args:
        accelerator: as the Trainer takes it; 'auto' is CUDA, MPS or the CPU, whichever is there first.
    """
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _compiler(given: bool | str | dict[str, Any]) -> dict[str, Any] | None:
    if isinstance(given, bool):
        return {} if given else None
    if isinstance(given, dict):
        return dict(given)
    if given not in _MODES:
        modes = ", ".join(_MODES)
        raise ValueError(f"compile={given}: must be true, false, one of {modes}, or arguments of torch.compile")
    return {"mode": given}
