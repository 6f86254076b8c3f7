"""Predictions into files, one row a sample, in the order of the data."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainerkit.files import replacing


class SavePredictions(Callback):
    """Write what `predict_step` returns, a dict of tensors (B, …) with `index` (B,), the rows' numbers in the data.

    The rows of all batches and ranks are put in the order of `index`; a row that a distributed sampler repeated stands
    once. Of several loaders, whose rows may have the same numbers, each has a folder named by its number: `0`, `1`, …

    Args:
        format: 'npy' writes one file a key, 'safetensors' one file for all keys.
        dirname: folder, relative to `trainer.default_root_dir`.

    Raises:
        ValueError: for another format; in predict, if a step returns something else.
    """

    def __init__(self, format: Literal["npy", "safetensors"] = "npy", dirname: str = "predictions") -> None:
        if format not in ("npy", "safetensors"):
            raise ValueError(f"format={format}: must be npy or safetensors")
        self.format = format
        self.dirname = dirname
        self.paths: list[Path] = []
        self._parts: dict[int, list[dict[str, Tensor]]] = {}  # by loader

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._parts, self.paths = {}, []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move a batch's predictions to the host."""
        if not isinstance(outputs, dict) or "index" not in outputs:
            raise ValueError(f"predict_step: must return a dict of tensors with 'index', got {type(outputs).__name__}")
        self._parts.setdefault(dataloader_idx, []).append({name: tensor.cpu() for name, tensor in outputs.items()})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the rows in order and write the files."""
        found = {loader: _joined(parts) for loader, parts in self._parts.items()}
        self._parts = {}
        everybodys: list[dict[int, dict[str, Tensor]]] = [found]
        if trainer.world_size > 1:
            everybodys = [{}] * trainer.world_size
            torch.distributed.all_gather_object(everybodys, found)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / self.dirname
        for loader in range(len(trainer.num_predict_batches)):
            parts = [part[loader] for part in everybodys if loader in part]
            if parts:
                several = len(trainer.num_predict_batches) > 1
                self._write(folder / str(loader) if several else folder, _in_order(_joined(parts)))

    def _write(self, folder: Path, rows: dict[str, Tensor]) -> None:
        if self.format == "safetensors":
            from safetensors.torch import save_file  # late: the other callbacks need only torch and lightning

            path = folder / "predictions.safetensors"
            with replacing(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in rows.items()}, temporary)
            self.paths.append(path)
            return
        for name, tensor in rows.items():
            path = folder / f"{name}.npy"
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, tensor.numpy(), allow_pickle=False)
            self.paths.append(path)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _in_order(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    index, order = rows["index"].sort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    return {name: tensor[order[first]] for name, tensor in rows.items()}
