"""Several optimizers in one loop: a generator and a discriminator, an actor and a critic.

In each batch the optimizers take their turns in the order of their names. A turn computes the loss of its own
parameters, while those of all others need no gradient, so that none reaches them. What Lightning has for one optimizer
each of them has for itself: schedule, clipping, accumulation, a gradient scaler, and how often it takes a turn.

    class GAN(AlternatingTask):
        def turn_loss(self, name, batch, batch_idx):
            fake = self.generator(noise(batch))
            if name == "generator":
                return softplus(-self.discriminator(fake)).mean()
            …

Method of the usual loop: I. Goodfellow et al., 'Generative adversarial nets', NeurIPS 2014, algorithm 1.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from trainerkit.errors import either, nearest
from trainerkit.optim import make_optimizer, make_scheduler
from trainerkit.part import Part
from trainerkit.task import OptimizerFactory, SchedulerFactory, Task


class Turn(Part):
    """One optimizer of an `AlternatingTask`.

    Args:
        modules: names of the task's modules that it trains, such as 'generator' or 'encoder.head'.
        optimizer: makes it from parameter groups; a class or a partial of one; None for the task's.
        scheduler: makes its schedule, counted in its own steps; None for the task's.
        gradient_clip_val: the largest norm of its gradients together; None for any.
        accumulate_grad_batches: batches of a step. They are kept until there are so many, or the epoch ends; then it
            goes through all of them, one after the other, and steps by the mean of their gradients. So networks that
            accumulate alike batches of one size do what they would do with one batch of that size. Above 1, batches
            must be made of tensors and plain values, which checkpoints can hold.
        every_n_batches: it has a batch in every n-th of the run, the first time in the n-th.

    Raises:
        ValueError: for a number that is not allowed, or no module.
    """

    def __init__(
        self,
        modules: str | Sequence[str],
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        every_n_batches: int = 1,
    ) -> None:
        self.modules = [modules] if isinstance(modules, str) else list(modules)
        if not self.modules:
            raise ValueError("modules=[]: must name at least one module of the task")
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(f"gradient_clip_val={gradient_clip_val}: must be above 0, or null")
        counts = {"accumulate_grad_batches": accumulate_grad_batches, "every_n_batches": every_n_batches}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.gradient_clip_val = gradient_clip_val
        self.accumulate_grad_batches = accumulate_grad_batches
        self.every_n_batches = every_n_batches

    def steps_after(self, batches: int, per_epoch: int | None = None) -> int:
        """How many steps this optimizer has made after so many batches of a run.

        Args:
            batches: of the run.
            per_epoch: batches of an epoch, at whose end a shorter window steps too; None for an epoch without an end.
        """
        if per_epoch is None:
            return batches // self.every_n_batches // self.accumulate_grad_batches
        epochs, rest = divmod(batches, per_epoch)
        ends = [epoch * per_epoch // self.every_n_batches for epoch in range(epochs + 1)]
        whole = sum(-(-(end - start) // self.accumulate_grad_batches) for start, end in pairwise(ends))
        last = (epochs * per_epoch + rest) // self.every_n_batches - ends[-1]
        return whole + last // self.accumulate_grad_batches


class AlternatingTask(Task):
    """A LightningModule whose optimizers take turns; a subclass writes `turn_loss`.

    - `trainer.global_step`, `max_steps` and Lightning's ModelCheckpoint count the steps of the optimizer that is named
      first; CrashSafeCheckpoint and the loggers' axes count batches. `batches` and `steps` have all counts.
    - Weight decay is left off biases, norms, embeddings and tokens, as in `Task`.
    - `trainer.gradient_clip_val` and `accumulate_grad_batches` are refused by Lightning: each `Turn` has its own.
    - Under DDP parameters that have no part in a turn are looked for by torch; nothing has to be set for it.
    - A checkpoint holds the batches that wait for a step.
    - With float16 a step that the scaler leaves out counts as one.
    - A turn whose parameters are all frozen, as before an unfreezing, is left out.

    Args:
        optimizers: the turns by name, in their order.
        optimizer: of turns that have none of their own, as in `Task`.
        scheduler: of turns that have none of their own; None keeps the rate constant.

    Raises:
        ValueError: without a turn; before training for a module that is not there, a trainable parameter that no
            optimizer holds, parameters in pieces, or batches that wait and cannot be in a checkpoint.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Turn],
        optimizer: OptimizerFactory = Adam,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if not optimizers:
            raise ValueError("optimizers={}: must hold at least one Turn")
        self.automatic_optimization = False
        self.turns = dict(optimizers)
        self.batches = 0  # of the run
        self.steps = dict.fromkeys(self.turns, 0)  # of each optimizer
        self._waiting: dict[str, list[tuple[Any, int]]] = {name: [] for name in self.turns}  # batches and their numbers
        self._scalers: dict[str, Any] = {}
        self._resumed = False

    def turn_loss(self, name: str, batch: Any, batch_idx: int) -> Tensor:
        """The loss that an optimizer lowers; a subclass writes it.

        Args:
            name: of the optimizer, whose parameters alone need a gradient here.
            batch: as the loader gives it.
            batch_idx: its number in the epoch.

        Returns:
            A scalar.

        Raises:
            NotImplementedError: if a subclass has none.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method turn_loss(name, batch, batch_idx)")

    def setup(self, stage: str) -> None:
        """Have DDP look for parameters without a part in a turn, before it wraps the module."""
        strategy = self.trainer.strategy
        if stage == "fit" and isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"strategy={type(strategy).__name__}: optimizers cannot take turns with parameters in pieces, which "
                "need a gradient all the time; use DDP or one device"
            )
        if stage == "fit" and isinstance(strategy, DDPStrategy):
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def configure_optimizers(self) -> Any:
        """One for each turn, with its schedule."""
        self._check_parameters()
        self.trainer.fit_loop.setup_data()  # or the number of batches is not known
        configured = []
        for name, turn in self.turns.items():
            modules = nn.ModuleList([self.get_submodule(module) for module in turn.modules])
            allow_fused = "mixed" not in str(self.trainer.precision)
            optimizer = make_optimizer(turn.optimizer or self._optimizer_factory, modules, allow_fused=allow_fused)
            entry: dict[str, Any] = {"optimizer": optimizer}
            factory = turn.scheduler or self._scheduler_factory
            if factory is not None:
                total, in_epoch = self._lengths(turn)
                scheduler = make_scheduler(factory, optimizer, total_steps=total, steps_per_epoch=in_epoch)
                entry["lr_scheduler"] = {"scheduler": scheduler, "name": f"lr-{name}"}
            configured.append(entry)
        return configured

    def on_train_start(self) -> None:
        """Begin anew, or with what a checkpoint had."""
        resumed, self._resumed = self._resumed, False
        if not resumed and self.trainer.global_step == 0:  # it may have been trained before
            self.batches, self.steps = 0, dict.fromkeys(self.turns, 0)
            self._waiting, self._scalers = {name: [] for name in self.turns}, {}
        to_device = self.trainer.strategy.batch_to_device
        for name, waiting in self._waiting.items():
            self._waiting[name] = [(to_device(batch), batch_idx) for batch, batch_idx in waiting]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Every optimizer whose turn it is, one after the other."""
        optimizers = self._optimizers()
        for optimizer in optimizers[1:]:
            # Set anew by Lightning in each batch: the first one's steps alone are global steps.
            optimizer._on_before_step = optimizer._on_after_step = _nothing
        for (name, turn), optimizer in zip(self.turns.items(), optimizers, strict=True):
            waiting = self._waiting[name]
            if (self.batches + 1) % turn.every_n_batches == 0:
                if turn.accumulate_grad_batches > 1 and not waiting:
                    _check_plain(batch, f"optimizers.{name}.accumulate_grad_batches={turn.accumulate_grad_batches}")
                waiting.append((batch, batch_idx))
            if waiting and (len(waiting) >= turn.accumulate_grad_batches or self.trainer.is_last_batch):
                self._take_turn(name, optimizer, waiting)
                waiting.clear()
        self.batches += 1

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip, after callbacks have seen the gradients; they are unscaled here."""
        place = next(i for i, known in enumerate(self.trainer.optimizers) if known is optimizer)
        turn = list(self.turns.values())[place]
        if turn.gradient_clip_val is not None:
            modules = [self.get_submodule(module) for module in turn.modules]
            nn.utils.clip_grad_norm_(nn.ModuleList(modules).parameters(), turn.gradient_clip_val)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log how often each optimizer has stepped, where anything is logged."""
        if self.trainer._logger_connector.should_update_logs:
            counts = {"batches": self.batches, **{f"{name}_steps": count for name, count in self.steps.items()}}
            # Not by `self.log`: a run that goes on to end at once would not have them among its results.
            metrics = {f"train/{name}": float(count) for name, count in counts.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.trainer.fit_loop.epoch_loop._batches_that_stepped)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts, scalers, and the batches that wait for a step."""
        super().on_save_checkpoint(checkpoint)
        own = {name: move_data_to_device(list(waiting), "cpu") for name, waiting in self._waiting.items()}
        of_ranks: list[Any] = [own]
        if self.trainer.world_size > 1:  # the first process writes for all
            of_ranks = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(of_ranks, own)
        if "optimizer_states" not in checkpoint:  # weights alone, which are no place for data
            of_ranks = [{name: [] for name in self.turns}]
        checkpoint["turns"] = {
            "batches": self.batches,
            "steps": dict(self.steps),
            "waiting": of_ranks,
            "scalers": {name: scaler.state_dict() for name, scaler in self._scalers.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("turns")
        if state is None or self._trainer is None or self.trainer.state.fn != "fit":
            return
        if list(state["steps"]) != list(self.turns):
            raise ValueError(f"optimizers={list(self.turns)}: the checkpoint was written with {list(state['steps'])}")
        self.batches, self.steps, self._resumed = state["batches"], dict(state["steps"]), True
        # Loaders refuse to go on in mid-epoch with another number of processes, and at its end nothing waits.
        of_ranks, rank = state["waiting"], self.trainer.global_rank
        own = of_ranks[rank] if len(of_ranks) == self.trainer.world_size else {name: [] for name in self.turns}
        self._waiting = {name: [tuple(pair) for pair in pairs] for name, pairs in own.items()}
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            for name, scaler in state["scalers"].items():
                self._scaler_of(name).load_state_dict(scaler)

    def _take_turn(self, name: str, optimizer: Any, window: list[tuple[Any, int]]) -> None:
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            return
        optimizer.zero_grad()
        for place, (batch, batch_idx) in enumerate(window, start=1):
            with self._alone(name, optimizer, synchronize=place == len(window)):
                self.manual_backward(self.turn_loss(name, batch, batch_idx))
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if len(window) > 1 and gradients:  # they are sums so far
            torch._foreach_div_(gradients, len(window))
        with self._own_scaler(name):
            optimizer.step()
        optimizer.zero_grad()
        self.steps[name] += 1
        scheduled = [other for other, turn in self.turns.items() if turn.scheduler or self._scheduler_factory]
        if name in scheduled:
            schedulers: Any = self.lr_schedulers()
            (schedulers if isinstance(schedulers, list) else [schedulers])[scheduled.index(name)].step()

    @contextmanager
    def _alone(self, name: str, optimizer: Any, synchronize: bool) -> Iterator[None]:
        """Parameters of other optimizers need no gradient; processes exchange theirs only where a step follows."""
        with _block_parallel_sync_behavior(self.trainer.strategy, block=not synchronize), self._own_scaler(name):
            self.toggle_optimizer(optimizer)
            try:
                yield
            finally:
                self.untoggle_optimizer(optimizer)

    @contextmanager
    def _own_scaler(self, name: str) -> Iterator[None]:
        """With float16: what one optimizer's infinite gradient does to the scale is nothing to the others."""
        plugin: Any = self.trainer.precision_plugin
        common = getattr(plugin, "scaler", None)
        if common is None:
            yield
            return
        plugin.scaler = self._scaler_of(name)
        try:
            yield
        finally:
            plugin.scaler = common

    def _scaler_of(self, name: str) -> Any:
        if name not in self._scalers:
            plugin: Any = self.trainer.precision_plugin
            self._scalers[name] = copy.deepcopy(plugin.scaler)
        return self._scalers[name]

    def _optimizers(self) -> list[Any]:
        found: Any = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _lengths(self, turn: Turn) -> tuple[int | None, int | None]:
        """Steps of the run, and of an epoch (on average, rounded up)."""
        trainer, first = self.trainer, next(iter(self.turns.values()))
        endless = trainer.num_training_batches == float("inf")
        per_epoch = None if endless else max(1, int(trainer.num_training_batches))
        in_epoch = (
            None if per_epoch is None else max(1, -(-per_epoch // turn.every_n_batches // turn.accumulate_grad_batches))
        )
        ends = []
        if trainer.max_steps > 0:  # of the first: the batch in which it makes the last one
            batches = trainer.max_steps
            while first.steps_after(batches, per_epoch) < trainer.max_steps:
                batches += 1
            ends.append(batches)
        if per_epoch is not None and trainer.max_epochs not in (None, -1):
            ends.append(per_epoch * int(trainer.max_epochs))
        return (max(1, turn.steps_after(min(ends), per_epoch)) if ends else None), in_epoch

    def _check_parameters(self) -> None:
        known = [name for name, _ in self.named_modules(remove_duplicate=False) if name]
        for name, turn in self.turns.items():
            for module in turn.modules:
                if module not in known:
                    near = either(nearest(module, known) or known[:3])
                    where = f"optimizers.{name}.modules={module}"
                    raise ValueError(f"{where}: there is no such module; the nearest are {near}")
        held = {id(p) for turn in self.turns.values() for m in turn.modules for p in self.get_submodule(m).parameters()}
        free = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in held]
        if free:
            more = f" and {len(free) - 3} more" if len(free) > 3 else ""
            raise ValueError(
                f"optimizers={list(self.turns)}: none of them trains {', '.join(free[:3])}{more}; name their module in "
                "one (put a parameter of the task itself into a module), or freeze them by requires_grad=False"
            )


def _check_plain(batch: Any, key: str) -> None:
    """Refuse what a checkpoint cannot hold (`weights_only=True`), before it is lost with a run."""
    if isinstance(batch, dict):
        parts: list[Any] = [*batch, *batch.values()]
    else:
        parts = list(batch) if isinstance(batch, list | tuple) else []
    plain = (dict, list, tuple, bool, int, float, str, bytes, type(None))
    if type(batch) not in plain and not isinstance(batch, Tensor):
        kind = f"{type(batch).__module__}.{type(batch).__qualname__}"
        raise ValueError(
            f"{key}: batches wait for a step and stand in checkpoints, which hold tensors, numbers and texts in dicts, "
            f"lists and tuples; these batches have a {kind}"
        )
    for part in parts:
        _check_plain(part, key)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of Lightning's counting."""
