"""What ParameterStats and GradientFlow share: what a layer is, and when an optimizer's step is measured."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from trainerkit.callbacks._parameters import select
from trainerkit.callbacks._trainer import step_number

MOST_LAYERS = 150


def layers_of(names: Sequence[str], depth: int | None = None) -> list[str]:
    """The layer of each parameter: the first `depth` components of its module's name.

    `encoder.blocks.3.attention.weight` belongs to `encoder.blocks.3` at depth 3. A parameter of the outermost module
    is a layer of its own.

    Args:
        names: of parameters.
        depth: None for as deep as gives at most 150 layers.

    Returns:
        One name of a layer for each parameter.
    """
    paths = [name.rpartition(".")[0] or name for name in names]
    depths = [depth] if depth is not None else range(max((p.count(".") for p in paths), default=0) + 1, 0, -1)
    layers: list[str] = []
    for components in depths:
        layers = [".".join(path.split(".")[:components]) for path in paths]
        if len(set(layers)) <= MOST_LAYERS:
            break
    return layers


def measurable(pl_module: LightningModule, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters to measure, by name: those that hold real or complex numbers, and any at all.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    chosen = select(pl_module, patterns)
    return {n: p for n, p in chosen.items() if (p.is_floating_point() or p.is_complex()) and p.numel()}


def optimizer_index(trainer: Trainer, optimizer: Optimizer) -> int:
    """Which of the trainer's optimizers this is."""
    return next(index for index, known in enumerate(trainer.optimizers) if known is optimizer)


def loss_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """What the gradients are still multiplied by in `on_before_optimizer_step`, or None.

    Fused optimizers divide by the gradient scaler's factor within their step. Asking the scaler for it would wait for
    the device; its tensor does not.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scale: Tensor | None = scaler._scale
    return scale


class Cadence:
    """Every n-th step, for each optimizer; one that makes no step then is due at its next.

    Args:
        every_n_steps: n, counted as loggers count.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.last: list[int] = []  # the step of each optimizer's last measurement

    def start(self, trainer: Trainer) -> None:
        """Go on from what was restored, if that is of this run; in `on_train_start`."""
        before = step_number(trainer) - 1
        if len(self.last) != len(trainer.optimizers) or any(step > before for step in self.last):
            self.last = [before] * len(trainer.optimizers)

    def due(self, index: int, step: int) -> bool:
        """Whether this step of an optimizer is to be measured; if so, it counts as measured."""
        if step // self.every_n_steps == self.last[index] // self.every_n_steps:
            return False
        self.last[index] = step
        return True
