"""The language model as a task: `python -m trainerkit task=lm`.

Loss: cross-entropy of the next token, with label smoothing, focal weights and z-loss as asked. Evaluation reports the
plain cross-entropy in nats a token, its exponential, and bits per byte, which compares across tokenizers.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW

from trainerkit import fsdp
from trainerkit.functional.cross_entropy import linear_cross_entropy
from trainerkit.functional.flops import decoder_flops_per_token
from trainerkit.task import OptimizerFactory, SchedulerFactory, Task
from trainerkit.tasks.lm.generation import check_sampling, generate
from trainerkit.tasks.lm.network import GPT
from trainerkit.tasks.lm.tensor_parallel import parallelize

IGNORED = -100  # a target that is not predicted


class LanguageModelTask(Task):
    """Trains a `GPT` to predict the next token.

    A batch is a mapping with `tokens` (B, T) and `targets` (B, T) int64, -100 where nothing is predicted; in evaluation
    also `n_bytes` (B,), the bytes of text that the row's targets spell; and, as the data like, `document` (B, T), the
    document that each token belongs to. Data modules of `trainerkit.data` give these. A tensor (B, T + 1) of tokens is
    taken as well: each is the target of the one before it.

    Logged, each a mean over tokens:

    - `train/loss`: what is minimized; `train/loss_step` since the last log step.
    - `val/loss`, `test/loss`: negative log likelihood in nats a token, whatever is minimized.
    - `val/perplexity`, `test/perplexity`: exp of it.
    - `val/bits_per_byte`, `test/bits_per_byte`: all nats / ln 2 / all bytes; `val/bits` and `val/bytes` are these sums.

    Predicted, for each prompt: `index` and `tokens` (B, `max_new_tokens`), what was generated, filled up with the end
    of text.

    Args:
        network: what is trained.
        label_smoothing: ε, from 0 to below 1: each target shares ε/V with all V tokens, as in torch.
        focal_gamma: γ ≥ 0 of the focal loss, (1 − p)^γ times the cross-entropy; 0 is the cross-entropy.
        z_loss: weight of the mean squared logsumexp of the logits, which holds them near 0 (PaLM takes 1e-4).
        chunk_size: rows of logits that exist at once; None chooses by vocabulary and device.
        max_new_tokens: tokens that are generated for a prompt.
        temperature: of sampling; 0 takes the likeliest token.
        top_k: sample among the k likeliest; None among all.
        top_p: sample among the likeliest that make up this probability; None among all.
        generation_seed: of sampling; training's random state is not moved.
        optimizer: see `Task`.
        scheduler: see `Task`.

    Raises:
        ValueError: for a number that is out of its range.
    """

    def __init__(
        self,
        network: GPT,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        z_loss: float = 0.0,
        chunk_size: int | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        generation_seed: int = 0,
        optimizer: OptimizerFactory = AdamW,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: must be from 0 to below 1")
        for name, number in {"focal_gamma": focal_gamma, "z_loss": z_loss}.items():
            if not (0 <= number < math.inf):
                raise ValueError(f"{name}={number}: must be 0 or more")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be 1 or more, or null to choose by vocabulary and device")
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        self.network = network
        self._loss: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "focal_gamma": focal_gamma,
            "z_loss": z_loss,
            "logit_softcap": network.logit_softcap,
            "chunk_size": chunk_size,
        }
        self._group: DeviceMesh | None = None  # of the devices that see the same batches
        self.max_new_tokens = max_new_tokens
        self._sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": generation_seed,
        }

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        logits: Tensor = self.network(tokens)
        return logits

    def parallelize(self, mesh: DeviceMesh) -> None:
        """Share attention heads and feed-forward layers out (`trainerkit.tasks.lm.tensor_parallel`)."""
        parallelize(self.network, mesh)
        self._group = mesh

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Predict each next token."""
        batch = with_targets(batch)
        if self._group is not None and batch_idx == 0:
            fsdp.check_same_batch(batch, self._group)
        loss, _ = self._losses(batch)
        self.track("train/loss", loss, weight=_counted(batch["targets"]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The held-out text, each token once."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same on the test data."""
        self._evaluate("test", batch)

    def on_predict_start(self) -> None:
        """Refuse parameters in pieces: processes whose texts end at different tokens would wait for each other."""
        if fsdp.is_cut(self):
            raise ValueError(
                "trainer=fsdp: text is not generated from sharded weights; give trainer=auto and "
                "resume=OUT_DIR/best_model.safetensors, which holds them whole"
            )

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """What follows each prompt: a batch has `prompt` (B, P), padded on the left, `length` (B,) and `index` (B,)."""
        tokens = self.generate(batch["prompt"], batch["length"])
        return {"index": batch["index"], "tokens": tokens}

    def generate(self, prompt: Tensor, length: Tensor | None = None) -> Tensor:
        """Tokens (B, `max_new_tokens`) after prompts (B, P) of these lengths (B,), as the task's arguments say."""
        end = self._end_of_text
        wanted = self.max_new_tokens
        tokens = generate(self.network, prompt, length, max_new_tokens=wanted, end_of_text=end, **self._sampling)
        if end is None:
            return tokens
        return torch.nn.functional.pad(tokens, (0, wanted - tokens.shape[1]), value=end)  # where every row has ended

    def flops_per_sample(self) -> int:
        """Operations of a row's forward and backward pass, for `Throughput`: `decoder_flops_per_token` times T."""
        network = self.network
        looked_up = {id(p) for p in (network.position_embedding or torch.nn.Module()).parameters()}
        if network.output is not None:
            looked_up.add(id(network.token_embedding.weight))
        matrices = [p for p in network.parameters() if p.ndim > 1 and id(p) not in looked_up]
        trained = sum(p.numel() for p in matrices if p.requires_grad)
        frozen = sum(p.numel() for p in matrices) - trained
        length = network.context_length
        return length * decoder_flops_per_token(trained, network.n_layers, network.d_model, length, frozen)

    def derived_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Perplexity and bits per byte of a whole evaluation; means of those of its batches would be other numbers."""
        derived = {}
        for stage in ("val", "test"):
            if f"{stage}/loss" in metrics:
                derived[f"{stage}/perplexity"] = _exp(metrics[f"{stage}/loss"])
            if metrics.get(f"{stage}/bytes"):
                derived[f"{stage}/bits_per_byte"] = metrics[f"{stage}/bits"] / metrics[f"{stage}/bytes"]
        return derived

    @property
    def _end_of_text(self) -> int | None:
        data = getattr(self._trainer, "datamodule", None)
        return getattr(getattr(data, "tokenizer", None), "end_of_text", None)

    def _losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and the plain negative log likelihood: means over the targets that count."""
        losses: tuple[Tensor, Tensor] = self.network(
            batch["tokens"],
            document=batch.get("document"),
            head=lambda hidden, weight: linear_cross_entropy(
                hidden, weight, batch["targets"], ignore_index=IGNORED, **self._loss
            ),
        )
        return losses

    def _evaluate(self, stage: str, batch: Any) -> None:
        batch = with_targets(batch)
        _, nll = self._losses(batch)
        counted = _counted(batch["targets"])
        self.track(f"{stage}/loss", nll, weight=counted)
        if "n_bytes" in batch:
            self.track(f"{stage}/bits", nll * counted / math.log(2), reduction="sum")
            self.track(f"{stage}/bytes", batch["n_bytes"].sum(), reduction="sum")


def with_targets(batch: Any) -> Mapping[str, Tensor]:
    """A batch with `tokens` and `targets`: itself, or of a tensor (B, T + 1) each token but the last, and the next.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(batch, Tensor) and batch.ndim == 2 and batch.shape[1] > 1:
        return {"tokens": batch[:, :-1], "targets": batch[:, 1:]}
    if isinstance(batch, Mapping) and isinstance(batch.get("tokens"), Tensor) and "targets" in batch:
        return batch
    found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"batch: must be a mapping with 'tokens' and 'targets', or a tensor (B, T + 1), got {found}")


def _counted(targets: Tensor) -> Tensor:
    """How many targets are predicted; stays on the device."""
    return (targets != IGNORED).sum()


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:  # the first steps of a run that diverges
        return math.inf
