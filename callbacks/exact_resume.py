"""Random state through checkpoints, so that a resumed run draws what the uninterrupted one would have drawn."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class ExactResume(Callback):
    """Save the state of Python's, NumPy's and torch's generators, each rank's own, and set it before the next step.

    Lightning saves none of it. Together with a training loader that knows its position (one with `state_dict` and
    `load_state_dict`, like `trainerkit.data.BatchLoader`, or torchdata's StatefulDataLoader) a run that is resumed in
    the middle of an epoch gives the weights of the uninterrupted one, bit for bit. Random augmentation inside worker
    processes is not covered.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather every rank's state; only the first rank's checkpoint is written."""
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["callbacks"][self.state_key] = {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the training loader its position if Lightning did not.

        A module that asks for `trainer.estimated_stepping_batches` in `configure_optimizers` has the loader set up
        before the checkpoint's loops are restored; Lightning then never hands the loader's state over.
        """
        loop = trainer.fit_loop
        states, loader = loop._combined_loader_states_to_load, loop._combined_loader
        if states and loader is not None and loop._data_fetcher is not None:
            loader._load_state_dicts(states)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the state before the first step: what happens on the way to it draws random numbers too."""
        if self._restored is None:
            return
        ranks, self._restored = self._restored["ranks"], None
        if trainer.global_rank < len(ranks):
            set_random_state(ranks[trainer.global_rank])


def random_state() -> dict[str, Any]:
    """The state of all global generators of this process, in types that `torch.load(weights_only=True)` reads."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo whatever was drawn since `random_state()` gave `state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
