"""A run that was killed and is resumed gives the bits of the uninterrupted one, in any Lightning project."""

import warnings
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer

from trainerkit.callbacks._epoch_metrics import (
    add_sums,
    forget_sums,
    metrics_so_far,
    register_sums,
    restore_last,
    restore_metrics,
)
from trainerkit.callbacks._inexact import inexact_reasons
from trainerkit.callbacks._loader_position import LoaderPosition, Replay
from trainerkit.callbacks._trainer import of_every_rank
from trainerkit.functional.random import State, random_state, set_random_state

__all__ = ["ExactResume", "random_state", "set_random_state"]


class ExactResume(Callback):
    """Save what Lightning leaves out of a checkpoint, and put each piece back at its moment.

    - The state of Python's, NumPy's and torch's generators, of each CUDA device, and of the generators that loaders,
      samplers and data sets hold; each rank's own.
    - The position of the training loaders in their epoch: of one with `state_dict` (`trainerkit.data.BatchLoader`,
      torchdata's StatefulDataLoader) its own, of any other what its epoch began with and how many batches were seen.
    - Between two steps of an accumulation window, the gradients so far.
    - What was logged so far: an epoch's mean is over its batches before the checkpoint too.

    At the start of fit it warns of what cannot be exact, with the reason; `callbacks/_loader_position.py` says how a
    loader's position is found again.

    Args:
        replay: how batches that were seen are passed over where workers read them. 'samples' reads them again, since
            samples may draw from their worker's random state. 'indices' does not, whatever their number: for samples
            that draw nothing, or from seed, epoch and index (`trainerkit.data.SeededSamples`, which is recognized).

    Raises:
        ValueError: for another `replay`; on resuming in mid-epoch with another kind of loader.
    """

    def __init__(self, replay: Replay = "samples") -> None:
        if replay not in ("samples", "indices"):
            raise ValueError(f"replay={replay}: must be samples or indices")
        self.replay = replay
        self._restored: State | None = None
        self._position: LoaderPosition | None = None
        self._sums: State = {}  # of what was logged, until the first batch after a resume

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the training loaders from their first use, which may be in `configure_optimizers`."""
        self._restored = None  # of a fit that failed before it came to it; this one's checkpoint is read later
        if stage == "fit":
            self._position = LoaderPosition(trainer, self.replay)
            self._position.attach()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where nothing was left to train, what was logged last is what the run ends with."""
        if self._restored is not None:
            restore_last(trainer, self._restored["ranks"][0]["logged"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the loaders as they were."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the loaders as they were."""
        self._detach()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather every rank's state; only the first rank's checkpoint is written."""
        mine = {"random": random_state(), "logged": metrics_so_far(trainer, pl_module)}
        if self._position is not None and trainer.fit_loop._combined_loader is not None:
            mine["position"] = self._position.state()
            mine["generators"] = self._position.generators(trainer.fit_loop._combined_loader.flattened)
            mine["gradients"] = _partial_gradients(trainer, pl_module)
        checkpoint["callbacks"][self.state_key] = {"ranks": of_every_rank(trainer, mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what cannot be exact; go to where the run was."""
        loader = trainer.fit_loop._combined_loader
        assert loader is not None
        for reason in dict.fromkeys(inexact_reasons(trainer, loader.flattened, self.replay)):
            rank_zero_warn(f"ExactResume: a resumed run may differ from an uninterrupted one: {reason}")
        if self._restored is None or self._position is None:
            return
        ranks, self._restored = self._restored["ranks"], None
        if len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"ExactResume: the checkpoint is of {len(ranks)} processes and this run has {trainer.world_size}: its "
                "random state and position are not used, and the epoch begins anew"
            )
            return
        self._resume(trainer, pl_module, ranks[trainer.global_rank])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the next epoch log as it likes."""
        forget_sums(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what was logged before the checkpoint."""
        if self._sums:
            add_sums(trainer, self._sums)
            self._sums = {}

    def _resume(self, trainer: Trainer, pl_module: LightningModule, state: State) -> None:
        loop, position = trainer.fit_loop, self._position
        combined = loop._combined_loader
        assert position is not None
        assert combined is not None
        # None: saved when fit was over.
        place = state.get("position", {"reloaded": loop._last_train_dl_reload_epoch, "batches": None, "ends": False})
        restore_last(trainer, state["logged"])
        loop._last_train_dl_reload_epoch = place["reloaded"]
        loop._combined_loader_states_to_load = []  # those of the first rank; each has its own
        if position.is_in(place):
            _silence_lightning()
            position.go_to(place)
            _restore_gradients(pl_module, state["gradients"])
            self._sums = state["logged"]["sums"]
            _validate_if_due(loop)
        else:
            _end_epoch(loop)
            if place.get("ended"):
                _step_plateau_schedules(loop)
            _begin_next_epoch(loop)
        if position.is_in(place) or place["ends"]:
            restore_metrics(pl_module, state["logged"])
        if place["ends"]:
            register_sums(trainer, pl_module, state["logged"]["sums"])
        loop._restarting = (
            False  # else it takes an epoch's metrics for incomplete, and leaves schedules of them as they are
        )

        def put_back() -> None:
            position.set_generators(combined._flattened, state.get("generators", {}))
            set_random_state(state["random"])

        position.before_next_use(put_back)

    def _detach(self) -> None:
        if self._position is not None:
            self._position.detach()
            self._position = None


def _begin_next_epoch(loop: Any) -> None:
    """Have Lightning iterate the loaders anew, which it does not do after a resume: its iterators are too old.

    With `max_steps` it also takes an epoch that is over for one that is not, and would end it twice.
    """
    loop._resuming_from_checkpoint = False
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.epoch_loop.restarting = False
        loop.reset_restart_stage()


def _step_plateau_schedules(loop: Any) -> None:
    """Make up for schedules by an epoch's metric, which step after `on_train_epoch_end`: that has the checkpoint."""
    counts = loop.epoch_progress.current
    epochs, counts.completed = counts.completed, counts.processed - 1
    loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    counts.completed = epochs


def _end_epoch(loop: Any) -> None:
    """Have Lightning end an epoch if the checkpoint was written in `on_train_batch_end` of its last batch.

    It would take it for ended, without validation and `on_train_epoch_end`.
    """
    batches = loop.epoch_loop
    if not (batches.restarted_on_train_batch_end and loop.restarted_mid_epoch and batches.batch_progress.is_last_batch):
        return
    for counts in (loop.epoch_progress.current, loop.epoch_progress.total):
        counts.processed -= 1
        counts.completed -= 1
    _validate_if_due(loop)
    batches.batch_progress.increment_completed()
    batches.reset_restart_stage()
    # Nothing more comes of this epoch.
    loop._data_fetcher.batches = []
    loop._data_fetcher.done = True


def _validate_if_due(loop: Any) -> None:
    """Have Lightning make up for a validation that was due after the batch; it would leave it out."""
    batches = loop.epoch_loop
    if batches.restarted_on_train_batch_end and batches._should_check_val_fx(loop._data_fetcher):
        batches.val_loop.restarting = False
        batches.val_loop._restart_stage = "restarted_mid_evaluation"
        if not batches._should_accumulate():
            batches._batches_that_stepped -= 1  # it is counted now, and after the validation


def _silence_lightning() -> None:
    # It says that the loader is not resumable, which looks at the loader alone.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")


def _partial_gradients(trainer: Trainer, pl_module: LightningModule) -> dict[str, torch.Tensor]:
    """The gradients of a window that is not at its end, by parameter; nothing at its end."""
    loop = trainer.fit_loop.epoch_loop
    ready = loop.batch_progress.current.ready
    if not (pl_module.automatic_optimization and ready and loop._should_accumulate()):
        return {}
    return {name: p.grad.detach().cpu() for name, p in pl_module.named_parameters() if p.grad is not None}


def _restore_gradients(pl_module: LightningModule, gradients: dict[str, torch.Tensor]) -> None:
    for name, parameter in pl_module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)
