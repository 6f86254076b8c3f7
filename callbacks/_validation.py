"""Whether a run validates, which Lightning's own answer leaves open."""

from lightning.pytorch import Trainer


def validates(trainer: Trainer) -> bool:
    """Whether this fit has validation batches; `trainer.enable_validation` is True for an empty loader too."""
    return trainer.enable_validation and sum(trainer.num_val_batches) > 0
