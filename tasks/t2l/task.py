"""Text to LoRA as a task: `python -m trainerkit task=t2l`.

A hypernetwork writes a LoRA adapter from the embedding of a task's description. It learns either from adapters that
were trained before (reconstruction), or through a frozen base model that the adapters it writes are put into (sft).

Source: R. Charakorn, E. Cetin, Y. Tang, R. T. Lange, 'Text-to-LoRA: Instant transformer adaption', ICML 2025,
arXiv:2506.06105.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import AdamW

from trainerkit.adapter_layout import AdapterLayout, Factors
from trainerkit.task import OptimizerFactory, SchedulerFactory, Task
from trainerkit.tasks.t2l.frozen_base import FrozenBase
from trainerkit.tasks.t2l.layer_weights import LayerWeighting
from trainerkit.tasks.t2l.losses import ReconstructionLoss
from trainerkit.tasks.t2l.metrics import adapter_metrics
from trainerkit.tasks.t2l.network import HyperNetwork
from trainerkit.tasks.t2l.progressive import Progressive

Mode = Literal["reconstruction", "sft"]


@runtime_checkable
class HasLibrary(Protocol):
    """A data module that knows the library of adapters as a whole."""

    def factor_statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each factor over the training adapters."""

    def shares_initial_a(self) -> bool | None:
        """Whether all adapters were trained from one initial A; None if that cannot be told."""


@runtime_checkable
class HasBase(Protocol):
    """A data module that brings the base model of its adapters."""

    def base_network(self) -> nn.Module:
        """The frozen base model."""


class TextToLoraTask(Task):
    """Trains a `HyperNetwork`.

    A batch is a mapping of tensors with one row a task: `task` (B, E), the embedding of a description; `index` (B,);
    the adapter that was trained for it, `A/LABEL` (B, n, r, in) and `B/LABEL` (B, n, out, r) for each module type; and
    for `mode='sft'` examples of the task, `inputs` (B, S, …) and `targets` (B, S, …). Data modules of `trainerkit.data`
    give these.

    Logged: `train/loss`, `val/loss`, `test/loss`, their parts `…/consistency` and `…/sparsity`, and the loss of each
    layer in training and validation, `val/LAYER/loss`; of validation and test also what `adapter_metrics` measures,
    such as `val/delta_w_cosine`. Of several test loaders the names have that of the set in them, `test/unseen/loss`.
    The loss of validation and test counts every layer, whatever has been added so far.

    Predicted, for each row: `index`, and the factors.

    Args:
        network: what is trained.
        mode: 'reconstruction' compares with the library's adapters, 'sft' asks the base model on examples.
        loss: makes the loss of reconstruction from the layout, a class or a partial of one; None for
            `ReconstructionLoss`.
        layer_weighting: what each layer counts for in that; None for all the same.
        progressive: begin with some layers and add the others; None for all from the start.
        base: of `mode='sft'`: any module with the adapted layers; None for the data's own.
        base_loss: of `mode='sft'`: from the base model's answers (B·S, …) and the targets (B·S, …), their mean.
        compute_alignment: measure the cosine of the factors too.
        compute_effective_rank: measure the effective ranks of ΔW too.
        track_layer_accuracy: measure the share of layers that are nearer to their target than the mean adapter is.
        optimizer: see `Task`.
        scheduler: see `Task`.

    Raises:
        ValueError: for another mode, `base` or `base_loss` without `mode='sft'`, `progressive` with it, or what loss
            and weighting refuse; in `setup`, for `mode='sft'` without a base model.
    """

    layer_weights: Tensor

    def __init__(
        self,
        network: HyperNetwork,
        mode: Mode = "reconstruction",
        loss: Callable[..., ReconstructionLoss] | None = None,
        layer_weighting: LayerWeighting | None = None,
        progressive: Progressive | None = None,
        base: nn.Module | None = None,
        base_loss: nn.Module | None = None,
        compute_alignment: bool = True,
        compute_effective_rank: bool = False,
        track_layer_accuracy: bool = True,
        optimizer: OptimizerFactory = AdamW,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters()
        if mode not in ("reconstruction", "sft"):
            raise ValueError(f"mode={mode}: must be reconstruction or sft")
        if mode == "sft" and progressive is not None:
            raise ValueError("progressive: belongs to mode=reconstruction; the base model needs every layer at once")
        if mode != "sft" and (base is not None or base_loss is not None):
            raise ValueError(f"{'base' if base is not None else 'base_loss'}: belongs to mode=sft, and mode={mode}")
        self.network = network
        self.mode: Mode = mode
        self.progressive = progressive
        self.base_loss = nn.CrossEntropyLoss() if base_loss is None else base_loss
        self.reconstruction = _under("loss", lambda: (loss or ReconstructionLoss)(self.layout))
        weights = _under("layer_weighting", lambda: (layer_weighting or LayerWeighting())(self.layout))
        self.register_buffer("layer_weights", weights, persistent=False)
        if progressive is not None:
            _under("progressive", lambda: progressive.bind(self.layout))
        self._measures = {
            "alignment": compute_alignment,
            "effective_rank": compute_effective_rank,
            "layer_accuracy": track_layer_accuracy,
        }
        self._base = None if base is None else FrozenBase(base, self.layout)

    @property
    def layout(self) -> AdapterLayout:
        """The layers that adapters change."""
        return self.network.layout

    def forward(self, task: Tensor) -> Factors:
        """See `HyperNetwork.forward`."""
        factors: Factors = self.network(task)
        return factors

    def setup(self, stage: str) -> None:
        """Ask the data for what the library says as a whole, and for its base model."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, HasLibrary):
            self.network.set_statistics(data.factor_statistics())
            if self.mode == "reconstruction" and self.reconstruction.target != "delta_w":
                _warn_of_gauges(data.shares_initial_a(), self.reconstruction.target)
        if stage == "fit" and self.progressive is not None:
            _warn_of_missing_layers(self.progressive, self.trainer.max_epochs)
        if self.mode == "sft" and self._base is None:
            if not isinstance(data, HasBase):
                raise ValueError("base=null: mode=sft needs a base model, and these data bring none; give a _target_")
            self._base = FrozenBase(data.base_network(), self.layout)

    def on_train_start(self) -> None:
        """A run that goes on needs adapters in the same units."""
        self._check_scaling()

    def on_validation_start(self) -> None:
        """As in training."""
        self._check_scaling()

    def on_test_start(self) -> None:
        """As in training."""
        self._check_scaling()

    def on_predict_start(self) -> None:
        """Written adapters have the scaling that they were trained in, whatever the library has now."""
        self.layout.scaling = self.network.trained_scaling

    def on_train_epoch_start(self) -> None:
        """Add the layers that are due; a resume in mid-epoch knows of them by its checkpoint."""
        if self.progressive is not None:
            self.progressive.begin_epoch(self.trainer.current_epoch, self.trainer.global_step)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Write the adapters of the batch and compare them with the targets, or ask the base model with them."""
        shares = None
        if self.progressive is not None:
            shares = self.progressive.shares(self.trainer.global_step, self.device)
        return self._loss("train", self.network(batch["task"]), batch, shares)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and measures."""
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and measures of one of the test sets."""
        names = getattr(getattr(self.trainer, "datamodule", None), "evaluation_names", None) or []
        self._evaluate(f"test/{names[dataloader_idx]}" if len(names) > 1 else "test", batch)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The adapters that the descriptions ask for."""
        return {"index": batch["index"], **self.network(batch["task"])}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember when layers were added."""
        super().on_save_checkpoint(checkpoint)
        if self.progressive is not None:
            checkpoint["progressive"] = self.progressive.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the layers that were there."""
        super().on_load_checkpoint(checkpoint)
        if self.progressive is not None and "progressive" in checkpoint:
            self.progressive.load_state_dict(checkpoint["progressive"])

    def _check_scaling(self) -> None:
        now, before = self.layout.scaling, self.network.trained_scaling
        if now != before:
            raise ValueError(
                f"scaling={now}: that of most adapters of the library (alpha / r); the network was trained with "
                f"{before}, when the library had other adapters, and would compare unlike numbers"
            )

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        factors = self.network(batch["task"])
        self._loss(stage, factors, batch)
        if self._has_targets(batch):
            found = adapter_metrics(self.layout, factors, dict(batch), self.network.mean_adapter(), **self._measures)
            for name, values in found.items():
                self.track(f"{stage}/{name}", values.mean(), weight=len(values))

    def _loss(self, stage: str, factors: Factors, batch: Mapping[str, Tensor], shares: Tensor | None = None) -> Tensor:
        rows = len(batch["task"])
        if self.mode == "sft":
            loss = self._base_loss_of(factors, batch)
        else:
            parts = self.reconstruction(factors, batch, self.layer_weights, self.network.statistics(), shares)
            loss = parts.total
            self.track(f"{stage}/consistency", parts.consistency, weight=rows)
            self.track(f"{stage}/sparsity", parts.sparsity, weight=rows)
            for name, value in zip(self.layout.names, parts.layers.unbind(), strict=True):
                if stage in ("train", "val"):  # a test may have several sets
                    self.track(f"{stage}/{name}/loss", value, weight=rows)
        self.track(f"{stage}/loss", loss, weight=rows)
        return loss

    def _base_loss_of(self, factors: Factors, batch: Mapping[str, Tensor]) -> Tensor:
        if self._base is None or "inputs" not in batch:
            raise ValueError("mode=sft: needs examples of each task: give data.examples_per_task=32, or another number")
        answers = self._base(factors, batch["inputs"])
        loss: Tensor = self.base_loss(answers.flatten(0, 1), batch["targets"].flatten(0, 1))
        return loss

    def _has_targets(self, batch: Mapping[str, Tensor]) -> bool:
        return all(key in batch for key in self.layout.keys)


def _under(key: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; its complaint about a value names the key that the value stands under."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from error


def _warn_of_missing_layers(progressive: Progressive, max_epochs: int | None) -> None:
    last = max(progressive.groups) * progressive.layer_addition_interval
    if max_epochs is not None and 0 <= max_epochs <= last:
        rank_zero_warn(
            f"progressive.layer_addition_interval={progressive.layer_addition_interval}: the last layers are added in "
            f"epoch {last + 1}, and there are {max_epochs}; layers that are never added are never trained"
        )


def _warn_of_gauges(shares_initial_a: bool | None, target: str) -> None:
    if shares_initial_a is False:
        rank_zero_warn(
            f"target={target}: compares factors, and this library's adapters were trained from different initial A: "
            "(A, B) and (RA, BR⁻¹) do the same, so that similar tasks have unlike factors and their mean is none of "
            "them. Take task.loss.target=delta_w, or train the library from one initial A."
        )
