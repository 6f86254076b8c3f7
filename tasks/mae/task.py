"""The masked autoencoder as a task: `python -m trainerkit task=mae`.

Loss: squared error over the hidden patches. Training draws new patches each step; validation, test and prediction hide
the same patches of the same row every time, and touch no random state.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim import AdamW

from trainerkit.task import OptimizerFactory, SchedulerFactory, Task
from trainerkit.tasks.mae.losses import Reduction, masked_mse, masked_sse
from trainerkit.tasks.mae.masking import fixed_visible
from trainerkit.tasks.mae.network import MaskedAutoencoder

_LOSSES = {"mse": masked_mse, "sse": masked_sse}


class MaskedAutoencoderTask(Task):
    """Trains a `MaskedAutoencoder`.

    A batch is signals (B, L); or a tuple or list that begins with them; or a mapping with `x`, and optionally `index`,
    the rows' numbers in the data. Without `index`, rows are numbered in the order in which they come.

    Logged: `train/loss`, `val/loss`, `test/loss`; and `test/mse`, the masked mean squared error whatever the loss.
    Predicted, for each row: `index`, `latent` (Z,) of the whole signal, `error`: masked mean squared error.

    Args:
        network: what is trained.
        loss: 'mse' or 'sse'; they differ in the reduction that `reduction: null` stands for.
        reduction: 'mean' over the hidden positions, 'sum' of all, 'batch_mean' the sum over the number of signals; None
            for mean (mse) or batch_mean (sse). An epoch's value is that of the epoch as one single batch.
        augment: applied to the training signals; the target stays the signal as it was. None for nothing.
        mask_seed: of the masks in evaluation.
        optimizer: see `Task`.
        scheduler: see `Task`.

    Raises:
        ValueError: for another loss or reduction, or `n_mask=0`, which would leave nothing to learn.
    """

    def __init__(
        self,
        network: MaskedAutoencoder,
        loss: Literal["mse", "sse"] = "mse",
        reduction: Reduction | None = None,
        augment: nn.Module | None = None,
        mask_seed: int = 0,
        optimizer: OptimizerFactory = AdamW,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters()
        if loss not in _LOSSES:
            raise ValueError(f"loss={loss}: must be one of {', '.join(_LOSSES)}")
        if reduction not in (None, "mean", "sum", "batch_mean"):
            raise ValueError(f"reduction={reduction}: must be one of mean, sum, batch_mean, or null")
        if network.n_mask == 0:
            raise ValueError(f"network.n_mask=0: nothing is hidden; must be from 1 to {network.n_patches - 1}")
        self.network = network
        self.augment = augment
        self.mask_seed = mask_seed
        self._loss = _LOSSES[loss]
        self._reduction: Reduction = reduction or ("mean" if loss == "mse" else "batch_mean")

    def forward(self, x: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `MaskedAutoencoder.forward`."""
        result: tuple[Tensor, Tensor, Tensor] = self.network(x, visible)
        return result

    def shard(self, mesh: DeviceMesh) -> None:
        """As every task; latents are asked for by a method beside `forward`."""
        super().shard(mesh)
        register_fsdp_forward_method(self.network, "encode")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Hide random patches, reconstruct, compare where hidden."""
        x = signals(batch)
        x_recon, _, visible_mask = self.network(x if self.augment is None else self.augment(x))
        loss = self._loss(x_recon, x, ~visible_mask, reduction=self._reduction)
        self._track("train/loss", loss, len(x))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The loss with this row's own masks."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The loss and the masked mean squared error with this row's own masks."""
        self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Latents of the whole signals, and how well each row's hidden patches are reconstructed."""
        x = signals(batch)
        rows = self._rows(batch, batch_idx)
        x_recon, _, visible_mask = self.network(x, self.fixed_visible(rows))
        hidden = ~visible_mask
        error = (x_recon.float() - x).square().mul(hidden).sum(1) / hidden.sum(1)
        return {"index": rows, "latent": self.network.encode(x).float(), "error": error}

    def fixed_visible(self, rows: Tensor) -> Tensor:
        """The patches (B, V) that these rows (B,) show in evaluation."""
        network = self.network
        return fixed_visible(rows, network.n_patches, network.n_patches - network.n_mask, self.mask_seed)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int) -> None:
        x = signals(batch)
        x_recon, _, visible_mask = self.network(x, self.fixed_visible(self._rows(batch, batch_idx)))
        self._track(f"{stage}/loss", self._loss(x_recon, x, ~visible_mask, reduction=self._reduction), len(x))
        if stage == "test":
            self.track("test/mse", masked_mse(x_recon, x, ~visible_mask), weight=len(x))

    def _track(self, name: str, loss: Tensor, samples: int) -> None:
        self.track(name, loss, weight=samples, reduction="sum" if self._reduction == "sum" else "mean")

    def _rows(self, batch: Any, batch_idx: int) -> Tensor:
        x = signals(batch)
        if isinstance(batch, Mapping) and "index" in batch:
            index: Tensor = batch["index"]
            return index
        # All batches but the last have the size of the first.
        if batch_idx == 0:
            self._first_size = len(x)
        start = batch_idx * getattr(self, "_first_size", len(x))
        return start + x.new_ones(len(x)).cumsum(0).long() - 1


def signals(batch: Any) -> Tensor:
    """The signals (B, L) of a batch: the batch itself, its first element, or its `x`.

    Raises:
        ValueError: if there is no tensor at that place.
    """
    x = batch
    if isinstance(batch, Mapping):
        x = batch.get("x")
    elif isinstance(batch, Sequence) and len(batch):
        x = batch[0]
    if not isinstance(x, Tensor):
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"batch: must be a tensor x, a tuple (x, …) or a mapping with 'x', got {found}")
    return x
