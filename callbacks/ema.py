"""Exponential moving average of the weights.

shadow ← d·shadow + (1 − d)·w after every optimizer step. The shadow starts at the initial weights, so that a fixed
d = 0.999 would still hold a third of them after 1,000 steps; therefore d warms up as min(decay, (1 + n)/(10 + n))
with n updates made before (the rule of TensorFlow's ExponentialMovingAverage with `num_updates`).

Source: B. T. Polyak, A. B. Juditsky, 'Acceleration of stochastic approximation by averaging', 1992.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from trainerkit.callbacks._averaged_module import GivesWay, SavesAverage
from trainerkit.callbacks._parameters import (
    as_patterns,
    is_built,
    matches,
    named_parameters,
    owners,
    plain_name,
    select,
)
from trainerkit.callbacks._second_validation import SecondValidation
from trainerkit.callbacks._sharded import assembled, gathered, is_piece, let_go, piece, piece_of
from trainerkit.callbacks._trainer import StepHooks, is_in_pieces, log_metrics, refuse_sharded


def ema_decay(decay: float, updates: int, warmup: bool = True) -> float:
    """The decay of the next update: `decay`, or with warm-up min(decay, (1 + n)/(10 + n)) with n = `updates` so far."""
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


@torch.no_grad()
def ema_update_(shadow: Sequence[Tensor], live: Sequence[Tensor], decay: float) -> None:
    """shadow ← decay·shadow + (1 − decay)·live in place, tensor by tensor, in one call for all of them."""
    torch._foreach_lerp_(list(shadow), list(live), 1 - decay)


@dataclass
class _Bucket:
    """Weights of one optimizer, device and type, and their shadows for each decay, as foreach wants them."""

    live: list[Tensor]
    shadows: list[list[Tensor]]

    def update(self, decays: Sequence[float]) -> None:
        like = self.shadows[0][0]
        # Looked for anew each time: FSDP2 may give a parameter another piece of memory.
        live = [piece(tensor) for tensor in self.live] if is_piece(self.live[0]) else self.live
        if like.dtype != live[0].dtype or like.device != live[0].device:
            live = [tensor.to(like) for tensor in live]
        for decay, shadow in zip(decays, self.shadows, strict=True):
            ema_update_(shadow, live, decay)


class EMA(Callback):
    """Keep an exponential moving average of the weights, and use it to validate, test, predict and save.

    - Evaluation sees the average: pointers are swapped, nothing is copied, and the live weights come back at the end,
      by an exception too.
    - A checkpoint's `state_dict` holds the average, also with `save_weights_only`, so that whoever loads the file gets
      the weights that were scored; the live weights stand in the callback's state, and training resumes from them.
    - After fit the module holds the live weights; `with ema.applied(module):` lets it have the average.
    - Evaluation of weights from a file (`trainer.test(ckpt_path=…)`) uses those as they are.
    - Before the first update the live weights are used.
    - With several optimizers a parameter is averaged when the optimizer that holds it has stepped, and n counts that
      optimizer's updates. What no optimizer holds does not change and is not averaged.
    - Half-precision weights are averaged in float32, for 1 − d is below their resolution.
    - Under FSDP2 each process averages its pieces, and an evaluation copies (`swap='copy'`). A checkpoint has the live
      weights whole, gathered one after the other into the first process's host memory.

    Args:
        decay: d, from 0 to below 1; or several. The first one's average is used and saved; the others' validation
            metrics are logged beside it as `val/loss_ema0.9999`, from a second forward pass over each batch.
        warmup: let d grow as min(decay, (1 + n)/(10 + n)).
        every_n_steps: optimizer steps between updates.
        start_step: optimizer steps before the first update; the shadow starts from the weights of that moment.
        parameters: pattern or patterns for the names of what is averaged (`encoder.*`).
        buffers: 'copy' evaluates with the live buffers; 'average' averages float buffers too (integers stay live).
        device: where the average is kept, e.g. 'cpu'; None for beside the weights.
        swap: 'pointers' gives the parameters other storage during an evaluation; 'copy' writes into the storage they
            have, which captured CUDA graphs need, and costs one copy of the weights each way.

    Attributes:
        updates: how many updates were made, of the optimizer with the most.

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters other than FSDP2's, for several
            decays under FSDP2, and for a pattern that matches nothing.
    """

    def __init__(
        self,
        decay: float | Sequence[float] = 0.999,
        warmup: bool = True,
        every_n_steps: int = 1,
        start_step: int = 0,
        parameters: str | Sequence[str] = "*",
        buffers: Literal["copy", "average"] = "copy",
        device: str | None = None,
        swap: Literal["pointers", "copy"] = "pointers",
    ) -> None:
        decays = [decay] if isinstance(decay, (int, float)) else list(decay)
        if not decays or len(set(decays)) < len(decays) or not all(0 <= d < 1 for d in decays):
            raise ValueError(f"decay={decay}: must be from 0 to below 1, or several different ones")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be 1 or more")
        if start_step < 0:
            raise ValueError(f"start_step={start_step}: must be 0 or more")
        if buffers not in ("copy", "average"):
            raise ValueError(f"buffers={buffers}: must be copy or average")
        if swap not in ("pointers", "copy"):
            raise ValueError(f"swap={swap}: must be pointers or copy")
        self.decays = decays
        self.warmup = warmup
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.parameters = as_patterns(parameters)
        self.buffers = buffers
        self.device = None if device is None else torch.device(device)
        self.swap = swap
        self._module: LightningModule | None = None  # whose weights are averaged
        self._live: dict[str, nn.Parameter] = {}
        self._shadows: list[dict[str, Tensor]] = []  # one for each decay, by name
        self._owner: dict[str, int] = {}  # name to index of the optimizer
        self._sizes: list[int] = []  # parameters of each optimizer
        self._steps: list[int] = []  # of each optimizer
        self._updates: list[int] = []
        self._buckets: list[list[_Bucket]] = []  # of each optimizer
        self._stash: list[tuple[Tensor, Tensor]] | None = None  # the live data while the average is in its place
        self._restored: dict[str, Any] | None = None
        self._hooks = StepHooks()
        self._loading: Any = None  # the handle of the hook that sees weights being loaded into the module
        self._others: list[SecondValidation] = []

    @property
    def updates(self) -> int:
        """How many updates were made, of the optimizer with the most."""
        return max(self._updates, default=0)

    # The start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work while it is cheap."""
        refuse_sharded(trainer, self, takes_pieces=True)
        if is_in_pieces(trainer) and len(self.decays) > 1:
            raise ValueError(f"decay={self.decays}: must be one where parameters are sharded")
        if stage == "fit" and is_built(pl_module):
            select(pl_module, self.parameters)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed fit needs; an evaluation has the file's weights, to which the average gives way."""
        if trainer.state.fn == "fit":
            self._restored = checkpoint["callbacks"].get(self.state_key)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the parameters; after a resume put average and live weights where they belong."""
        self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        chosen = select(pl_module, self.parameters)
        goes_on = trainer.global_step > 0 and pl_module is self._module and self._restored is None
        self._module = pl_module
        self._live = {name: p for name, p in chosen.items() if p.is_floating_point()}
        if not goes_on:  # as where fit is called again with the same trainer and a larger max_epochs
            self._shadows = [{} for _ in self.decays]
            self._steps = [0] * len(trainer.optimizers)
            self._updates = [0] * len(trainer.optimizers)
        self._assign(trainer)
        restored, self._restored = self._restored, None
        if restored is not None:
            self._restore(restored)
        self._follow_files(pl_module)

    def _follow_files(self, pl_module: LightningModule) -> None:
        """Put the average into what is saved, and give way to weights that are loaded later."""
        hook: Any = pl_module.on_save_checkpoint
        original = hook.original if isinstance(hook, SavesAverage) else hook  # of an earlier fit
        object.__setattr__(pl_module, "on_save_checkpoint", SavesAverage(original, self))
        if self._loading is not None:
            self._loading.remove()
        self._loading = pl_module.register_load_state_dict_post_hook(GivesWay(self))  # type: ignore[no-untyped-call]

    def give_way(self, module: nn.Module) -> None:
        """Weights were loaded into the module: unless it is in training, they take the place of the average."""
        if module is self._module and not self._hooks.attached:
            self._module = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow the optimizers; with sharded parameters a checkpoint was read only after `on_fit_start`."""
        if self._restored is not None:
            self._start(trainer, pl_module)
        self._hooks.attach(trainer, lambda index, optimizer: self._after_step(trainer, index, optimizer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers."""
        self._hooks.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the live weights back, whatever happened during an evaluation."""
        self._hooks.detach()
        self._swap_out()

    # The average

    def _after_step(self, trainer: Trainer, index: int, optimizer: Optimizer) -> None:
        if _size(optimizer) != self._sizes[index]:
            self._assign(trainer)  # parameters joined, as in progressive unfreezing
        self._steps[index] += 1
        step = self._steps[index] - self.start_step
        if step == 0:
            self._start_shadows([name for name, owner in self._owner.items() if owner == index])
        elif step > 0 and step % self.every_n_steps == 0:
            self._update(index)

    @torch.no_grad()
    def _update(self, index: int) -> None:
        decays = [ema_decay(decay, self._updates[index], self.warmup) for decay in self.decays]
        for bucket in self._buckets[index]:
            bucket.update(decays)
        for name, buffer in self._float_buffers().items():
            if self._owner.get(name) == index:
                _Bucket([buffer], [[shadow[name]] for shadow in self._shadows]).update(decays)
        self._updates[index] += 1

    def _assign(self, trainer: Trainer) -> None:
        """Find out which optimizer moves what, and begin to average what is new."""
        self._sizes = [_size(optimizer) for optimizer in trainer.optimizers]
        self._owner = owners(trainer.optimizers, self._live)
        of_parameters = dict(self._owner)
        self._owner |= {name: _nearest_owner(name, of_parameters) for name in self._float_buffers()}
        self._start_shadows([name for name in self._owner if name not in self._shadows[0]])

    def _float_buffers(self) -> dict[str, Tensor]:
        """The float buffers to average, as they are now: a module may put new tensors in their place."""
        if self.buffers == "copy" or self._module is None:
            return {}
        named = {plain_name(name): buffer for name, buffer in self._module.named_buffers()}
        return {name: b for name, b in named.items() if b.is_floating_point() and matches(name, self.parameters)}

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that is averaged, alive."""
        return {name: tensor for name, tensor in (self._live | self._float_buffers()).items() if name in self._owner}

    def _start_shadows(self, names: Sequence[str]) -> None:
        """Let the shadows of these begin at the weights of this moment."""
        live = self._tensors()
        for shadow in self._shadows:
            shadow.update({name: self._shadow_of(live[name]) for name in names})
        self._buckets = [self._bucketed(index) for index in range(len(self._sizes))]

    def _shadow_of(self, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
        return piece(tensor).to(self.device or tensor.device, dtype, copy=True)

    def _bucketed(self, index: int) -> list[_Bucket]:
        buckets: dict[Any, _Bucket] = {}
        for name, parameter in self._live.items():
            if self._owner.get(name) == index:
                kind = (parameter.device, parameter.dtype)
                bucket = buckets.setdefault(kind, _Bucket([], [[] for _ in self.decays]))
                bucket.live.append(parameter)
                for shadows, shadow in zip(bucket.shadows, self._shadows, strict=True):
                    shadows.append(shadow[name])
        return list(buckets.values())

    def _averaged(self) -> dict[str, Tensor]:
        """What has been averaged at least once, alive."""
        return {name: tensor for name, tensor in self._tensors().items() if self._updates[self._owner[name]]}

    def average(self, decay: float | None = None) -> dict[str, Tensor]:
        """The average by name.

        Args:
            decay: which one, where there are several; None for the first.

        Raises:
            ValueError: for a decay that was not averaged.
        """
        return dict(self._shadows[self._which(decay)])

    def _which(self, decay: float | None) -> int:
        if decay is not None and decay not in self.decays:
            raise ValueError(f"decay={decay}: is not averaged; averaged are {self.decays}")
        return 0 if decay is None else self.decays.index(decay)

    # Evaluation

    @contextmanager
    def applied(self, pl_module: LightningModule, decay: float | None = None) -> Iterator[None]:
        """Let the module have the average inside a `with` block, for an export say.

        Args:
            pl_module: the module that was trained.
            decay: which average, where there are several; None for the first.

        Raises:
            ValueError: for a decay that was not averaged.
        """
        self._swap_in(pl_module, self._which(decay))
        try:
            yield
        finally:
            self._swap_out()

    @torch.no_grad()
    def _swap_in(self, pl_module: LightningModule, which: int = 0) -> None:
        if pl_module is not self._module or self._stash is not None:
            return
        self._stash = []
        let_go(pl_module)
        for name, tensor in self._averaged().items():
            shadow = self._shadows[which][name]
            if self._copies(tensor):
                self._stash.append((tensor, piece(tensor).clone()))
                piece(tensor).copy_(shadow)
            else:
                self._stash.append((tensor, tensor.data))
                tensor.data = shadow.to(tensor.device, tensor.dtype)

    @torch.no_grad()
    def _swap_out(self) -> None:
        stash, self._stash = self._stash, None
        if stash and self._module is not None:
            let_go(self._module)
        for tensor, data in stash or ():
            if self._copies(tensor):
                piece(tensor).copy_(data)
            else:
                tensor.data = data

    def _copies(self, tensor: Tensor) -> bool:
        return self.swap == "copy" or is_piece(tensor)  # FSDP2 gathers from the memory that it laid out

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average; with several decays, the others on copies of the module."""
        self._swap_in(pl_module)
        if self._stash and len(self.decays) > 1 and trainer.state.fn == "fit" and not trainer.sanity_checking:
            live = self._averaged()
            for shadow in self._shadows[1:]:
                weights = {id(live[name]): shadow[name].to(tensor) for name, tensor in live.items()}
                self._others.append(SecondValidation(trainer, pl_module, weights))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the random state of the batch, so that the others see the same draws."""
        for other in self._others:
            other.before_batch()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate the other averages on the same batch."""
        for other in self._others:
            other.batch(batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the other averages; go on with the live weights."""
        others, self._others = self._others, []
        for decay, other in zip(self.decays[1:], others, strict=False):
            log_metrics(trainer, {f"{name}_ema{decay}": value for name, value in other.result().items()})
        self._swap_out()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self._swap_in(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the live weights back."""
        self._swap_out()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the average."""
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the live weights back."""
        self._swap_out()

    # The checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Counts, the live weights, and those averages that the checkpoint's `state_dict` does not hold exactly."""
        if self.updates == 0:
            return {"steps": list(self._steps)}
        tensors = self._averaged()
        swapped = {id(tensor): data for tensor, data in self._stash or ()}
        live = {name: swapped.get(id(tensor), piece(tensor)) for name, tensor in tensors.items()}
        averages = {str(decay): dict(shadow) for decay, shadow in zip(self.decays, self._shadows, strict=True)}
        first = averages[str(self.decays[0])]
        for name, tensor in live.items():
            if first[name].dtype == tensor.dtype:
                del first[name]
        if any(map(is_piece, tensors.values())):
            live = _whole(live, tensors)
            averages = {decay: _whole(shadow, tensors) for decay, shadow in averages.items()}
        return {"steps": list(self._steps), "updates": list(self._updates), "live": live, "averages": averages}

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["steps"]) == len(self._steps):  # else it is another program's run
            self._steps = list(state["steps"])
            self._updates = list(state.get("updates", self._updates))
        averages = state.get("averages", {})
        for decay, shadow in zip(self.decays, self._shadows, strict=True):
            # The module has the file's first average now, from which a newly given decay goes on.
            kept = averages.get(str(decay), next(iter(averages.values()), {}))
            for name, tensor in kept.items():
                if name in shadow:
                    shadow[name].copy_(piece_of(tensor, self._live.get(name, tensor)))
        assert self._module is not None
        module = named_parameters(self._module) | {plain_name(n): b for n, b in self._module.named_buffers()}
        with torch.no_grad():
            for name, tensor in state.get("live", {}).items():
                if name in module:
                    piece(module[name]).copy_(piece_of(tensor, module[name]))

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Put the average into a checkpoint's `state_dict`, under all names of tied weights."""
        if self._module is None or self.updates == 0:
            return
        tensors = self._averaged()
        by_name = {name: self._shadows[0][name].to(tensor.dtype) for name, tensor in tensors.items()}
        weights = checkpoint["state_dict"]
        if any(map(is_piece, tensors.values())):
            by_name = {name: assembled(shadow, tensors[name]) for name, shadow in by_name.items()}
            if not any(map(is_piece, weights.values())):  # a checkpoint of one file; empty on other processes
                by_name = gathered(by_name)
        by_tensor = {id(tensors[name]): shadow for name, shadow in by_name.items()}
        for named in (self._module.named_parameters, self._module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if name in weights and id(tensor) in by_tensor:
                    weights[name] = by_tensor[id(tensor)]


def _whole(pieces: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return gathered({name: assembled(tensor, like[name]) for name, tensor in pieces.items()})


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _nearest_owner(buffer: str, owner: dict[str, int]) -> int:
    """The optimizer of the parameters nearest to a buffer: in its module, else in the one around it, and so on."""
    prefix = buffer
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        for name, index in owner.items():
            if name.startswith(f"{prefix}."):
                return index
    return 0
