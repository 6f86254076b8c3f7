"""Stop, skip or go back where the loss or a gradient is NaN or infinite, and say where it began.

Once per optimizer step the 2-norms of all gradients and the losses of the step's batches are looked at together, and
one number is copied to the host. A step that is not finite is never taken. To name what went bad first, the step's
batches run again on a copy of the module, with hooks on every module and parameter, from the random state they began
with.

    python -m trainerkit.callbacks._replay DUMP --module train.py:Module

runs the step again from the file that was written.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from trainerkit.callbacks._non_finite import (
    Finding,
    Replay,
    all_finite,
    describe_step,
    exactly_finite,
    spell_class,
    write_dump,
)
from trainerkit.callbacks._parameters import named_parameters
from trainerkit.callbacks._snapshot import Buffers, Snapshot, held, scaler_of
from trainerkit.callbacks._trainer import is_stepping, log_metrics, of_every_rank, refuse_sharded, step_number
from trainerkit.callbacks._twin import clone_batch, make_twin
from trainerkit.callbacks.exact_resume import random_state, set_random_state

_ADVICE = {
    "weights": "The weights went bad in an earlier step: check every step (check_every_n_steps=1).",
    "batch": "Look at the data set; action='skip' leaves such batches out.",
    "forward": "Look there for a division by, log or sqrt of 0, and for overflow (float16 ends at 65,504).",
    "loss": "Look in training_step for a division by, log or sqrt of 0: an empty mask, a probability of 0.",
    "backward": "Look behind that parameter for what is finite but has no finite slope: sqrt, norm or pow at 0.",
    "": "The sum over batches or ranks overflows, or the step draws on more than its batch and random state.",
}


class NonFiniteError(RuntimeError):
    """The loss or a gradient of a step is NaN or infinite."""


@dataclass
class _Seen:
    """A batch of the step that is being made, and the random state it began with."""

    batch: Any
    batch_idx: int
    random: dict[str, Any]


class NonFiniteGuard(Callback):
    """Do not take an optimizer step whose loss or gradient is not finite.

    - 'raise' ends the run with a `NonFiniteError` that names the first module and parameter that went bad.
    - 'skip' drops the step on every rank: weights, optimizer state and buffers stay what they were; schedules and
      counters go on.
    - 'rollback' also puts weights, buffers and optimizer state back to a snapshot in memory, and goes on with the next
      batch: the batches since the snapshot are not used again.

    With a gradient scaler (float16) overflow is its own business: it skips such steps and lowers its scale. The guard
    acts once the scale has fallen to 1, where scaling cannot be the cause. Under DDP all ranks do the same, and what is
    named is what happened on the rank where it did.

    Args:
        action: 'raise', 'skip' or 'rollback'.
        max_rollbacks: rollbacks after which 'rollback' raises.
        max_skips_in_a_row: skipped steps with no good one between them after which 'skip' raises; None for any number.
        snapshot_every_n_steps: optimizer steps between the snapshots of 'rollback'.
        check_every_n_steps: optimizer steps between checks; other than 1 with 'raise' only.
        max_reports: how many bad steps of a run are run again, named and dumped; further ones are only counted. The
            step that raises always is.
        dump: whether to write batch, random state and weights to a file.
        dirpath: folder of the dumps; None for `non_finite` in the trainer's `default_root_dir`.

    Attributes:
        skipped: steps that were dropped so far, rolled back ones included.
        rollbacks: how often it went back.
        finding: what went bad first in the last step that was reported.

    Raises:
        ValueError: for a value that is not possible; in `setup` for sharded parameters; at the start of fit for an
            optimizer that cannot be made to skip a step.
        NonFiniteError: during fit.
    """

    # The decision is needed before the step: one number is copied to the host per optimizer step that is checked.
    syncs_every_step: ClassVar[bool] = True

    def __init__(
        self,
        action: Literal["raise", "skip", "rollback"] = "raise",
        max_rollbacks: int = 3,
        max_skips_in_a_row: int | None = 10,
        snapshot_every_n_steps: int = 100,
        check_every_n_steps: int = 1,
        max_reports: int = 3,
        dump: bool = True,
        dirpath: str | None = None,
    ) -> None:
        if action not in ("raise", "skip", "rollback"):
            raise ValueError(f"action={action}: must be raise, skip or rollback")
        if max_rollbacks < 0:
            raise ValueError(f"max_rollbacks={max_rollbacks}: must be 0 or more")
        if max_skips_in_a_row is not None and max_skips_in_a_row < 1:
            raise ValueError(f"max_skips_in_a_row={max_skips_in_a_row}: must be 1 or more, or null for any number")
        if snapshot_every_n_steps < 1:
            raise ValueError(f"snapshot_every_n_steps={snapshot_every_n_steps}: must be 1 or more")
        if check_every_n_steps < 1 or (check_every_n_steps > 1 and action != "raise"):
            raise ValueError(f"check_every_n_steps={check_every_n_steps}: must be 1, or more with action='raise'")
        if max_reports < 0:
            raise ValueError(f"max_reports={max_reports}: must be 0 or more")
        self.action = action
        self.max_rollbacks = max_rollbacks
        self.max_skips_in_a_row = max_skips_in_a_row
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.check_every_n_steps = check_every_n_steps
        self.max_reports = max_reports
        self.dump = dump
        self.dirpath = dirpath
        self.skipped = 0
        self.rollbacks = 0
        self.finding: Finding | None = None
        self._in_a_row = 0
        self._reports = 0
        self._bad = False  # whether this batch's step was found bad
        self._stepped = False  # whether an optimizer was about to step since the last step
        self._losses: list[Tensor] = []
        self._window: list[_Seen] = []
        self._trainable: list[bool] = []
        self._buffers: Buffers | None = None
        self._snapshot: Snapshot | None = None

    @staticmethod
    def replay(path: str | Path, module: Any, batch: Any = None, device: str | None = None) -> Finding | None:
        """Run the step of a dump again, on a module that was made for it.

        Args:
            path: the file.
            module: a LightningModule of the class that was trained; gets the weights of the dump.
            batch: what to give it where the dump could not hold the batch.
            device: 'cpu' or 'cuda'; None for the kind that the step ran on, if there is one.

        Returns:
            What went bad first; None if everything is finite.

        Raises:
            ValueError: if the module does not have the weights of the dump, or there is no batch.
        """
        from trainerkit.callbacks._replay import replay  # which is a program as well, and must not be imported before

        return replay(path, module, batch, device)

    # The start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        refuse_sharded(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers that cannot be made to skip a step."""
        for optimizer in trainer.optimizers if self.action != "raise" else ():
            fused = scaler_of(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
            if fused or isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    f"action={self.action}: a step of {type(optimizer).__name__}{' (fused, with a scaler)' * fused} "
                    "cannot be skipped; use another optimizer, or action='raise'"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first snapshot; a run that is not resumed counts anew."""
        if trainer.global_step == 0:
            self.skipped = self.rollbacks = self._in_a_row = self._reports = 0
        self._forget()
        self._buffers = Buffers(pl_module)
        if self.action == "rollback":
            self._snapshot = Snapshot(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "rolled_back": self.rollbacks, "row": self._in_a_row, "reports": self._reports}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.rollbacks = state_dict["skipped"], state_dict["rolled_back"]
        self._in_a_row, self._reports = state_dict["row"], state_dict["reports"]

    # A step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what is needed to run the step again."""
        if not self._window and self._buffers is not None:
            self._buffers.save()
        self._window.append(_Seen(batch, batch_idx, random_state()))
        if not pl_module.automatic_optimization:
            self._trainable = [p.requires_grad for p in pl_module.parameters()]  # before any toggle_optimizer

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss."""
        self._losses.append(loss.detach().float().sum())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at losses and gradients, and do not let a bad step happen."""
        self._stepped = True
        if step_number(trainer) % self.check_every_n_steps or not self._is_bad(trainer, optimizer):
            return
        if self._buffers is not None:
            self._buffers.restore()
        if not self._bad:
            self._bad = True
            self._act(trainer, pl_module)
        for parameter in held(optimizer):
            parameter.grad = None  # which optimizers step over

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step: go back, or note that it was good."""
        by_hand = not pl_module.automatic_optimization  # and perhaps accumulated by hand
        if not (self._stepped if by_hand else is_stepping(trainer, pl_module)):
            return
        if self._snapshot is not None:
            if self._bad:
                self._snapshot.restore()
            elif step_number(trainer) % self.snapshot_every_n_steps == 0:
                self._snapshot = None  # before the new one is made: never two in memory
                self._snapshot = Snapshot(trainer, pl_module)
        self._in_a_row = self._in_a_row + 1 if self._bad else 0
        self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of batches and snapshots."""
        self._forget()
        self._buffers = self._snapshot = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of batches and snapshots."""
        self.teardown(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A resumed run begins with a snapshot of the checkpoint; this one goes back no further either."""
        if self._snapshot is not None and trainer.training:  # in a validation the weights may be an average's
            self._snapshot = None
            self._snapshot = Snapshot(trainer, pl_module)

    def _forget(self) -> None:
        self._bad = self._stepped = False
        self._losses, self._window, self._trainable = [], [], []

    # The check

    def _is_bad(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """Whether this step must not be taken; what the scaler is about to skip by itself is not bad."""
        looked_at = [*self._losses, *(p.grad for p in held(optimizer) if p.grad is not None)]
        bad = ~all_finite(looked_at).to(trainer.strategy.root_device)
        scaler = scaler_of(trainer)
        if scaler is not None and scaler._scale is not None:
            bad = bad & (scaler._scale.to(bad.device) <= 1)
        if not bool(trainer.strategy.reduce(bad.float(), reduce_op="max").item()):
            return False
        # Norms of very large elements overflow; now that the step is suspect there is time to look at each of them.
        exact = not all(exactly_finite(tensor) for tensor in looked_at)
        return bool(trainer.strategy.reduce_boolean_decision(exact, all=False))

    def _act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count, report, and raise if it is time to; the module's buffers are those before the step."""
        reason = self._reason_to_raise()
        message = None
        if reason or self._reports < self.max_reports:
            self._reports += 1
            message = self._report(trainer, pl_module)
        if reason:
            raise NonFiniteError(f"{message}\n{reason}")
        self.skipped += 1
        self.rollbacks += self.action == "rollback"
        if message:
            rank_zero_info(f"{message}\nThe step is left out{' and training goes back' * (self.action == 'rollback')}.")
        counts = {"non_finite/skipped": float(self.skipped), "non_finite/rollbacks": float(self.rollbacks)}
        log_metrics(trainer, counts)

    def _reason_to_raise(self) -> str:
        if self.action == "raise":
            return "NonFiniteGuard(action='skip') would leave such steps out, 'rollback' would go back as well."
        if self.action == "rollback" and self.rollbacks >= self.max_rollbacks:
            return f"Training has gone back {self.rollbacks} times (max_rollbacks={self.max_rollbacks})."
        if self.action == "skip" and self.max_skips_in_a_row is not None and self._in_a_row >= self.max_skips_in_a_row:
            return f"The {self._in_a_row} steps before were skipped too (max_skips_in_a_row={self.max_skips_in_a_row})."
        return ""

    # The report

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Run the step again, write the dump, and say what was found; every rank says the same."""
        finding, content, note = self._run_again(trainer, pl_module)
        answers = of_every_rank(trainer, (finding, note, self._what_is_bad(pl_module), content is not None))
        rank = next((rank for rank, answer in enumerate(answers) if answer[0]), 0)
        self.finding, note, bad, has_dump = answers[rank]
        first = self.finding.text if self.finding else note
        step = step_number(trainer)
        path = Path(self.dirpath or Path(trainer.default_root_dir, "non_finite")) / f"step{step:08d}_rank{rank}.pt"
        mine = content is not None and trainer.global_rank == rank
        failed = of_every_rank(trainer, _write(path, content | {"finding": first}) if mine and content else "")[rank]
        lines = [
            f"optimizer step {step} (epoch {trainer.current_epoch}, batch {self._window[-1].batch_idx}, both from 0) "
            "is not finite and was not taken.",
            f"  found:  {bad}",
            f"  first:  {f'on rank {rank}: ' * (trainer.world_size > 1)}{first}",
            *([f"  dump:   {failed or path}"] if has_dump else []),
            *([f"  replay: {_command(pl_module, path)}"] if has_dump and not failed else []),
            f"  look:   {_ADVICE[self.finding.where if self.finding else '']}",
        ]
        return "\n".join(lines)

    def _what_is_bad(self, pl_module: LightningModule) -> str:
        """Loss and gradients in one line."""
        gradients = {name: p.grad for name, p in named_parameters(pl_module).items() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not exactly_finite(gradient)]
        losses = ", ".join(f"{float(loss):.6g}" for loss in self._losses[:4])
        names = f": {', '.join(bad[:4])}{', …' * (len(bad) > 4)}" if bad else ""
        return f"loss {losses or 'none'}; {len(bad)} of {len(gradients)} gradients are not finite{names}"

    def _run_again(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[Finding | None, dict[str, Any] | None, str]:
        """What went bad first, the content of the dump, and what to say where nothing is found."""
        before = random_state()
        try:
            twin = make_twin(trainer, pl_module)
            for parameter, trainable in zip(twin.parameters(), self._trainable, strict=False):
                parameter.requires_grad_(trainable)
            scaler = scaler_of(trainer)
            replay = Replay(twin, trainer.precision_plugin.train_step_context, scaler.scale if scaler else _as_it_is)
            buffers = Buffers(twin)
            found, culprit = None, self._window[-1]
            for seen in self._window:
                if found is None:
                    buffers.save()
                    culprit = seen
                set_random_state(seen.random)
                # All batches, on every rank: layers that wait for other ranks need it.
                of_batch = replay.step(clone_batch(seen.batch), seen.batch_idx)
                found = found or of_batch
            buffers.restore()
            content = self._content(trainer, pl_module, twin, culprit) if self.dump else None
            return found, content, "not seen when the step was run again"
        except Exception as error:
            return None, None, f"the step could not be run again: {type(error).__name__}: {error}"
        finally:
            set_random_state(before)

    def _content(self, trainer: Trainer, pl_module: LightningModule, twin: Any, seen: _Seen) -> dict[str, Any]:
        return describe_step(twin, seen.batch, seen.batch_idx, seen.random) | {
            "step": step_number(trainer),
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "precision": str(trainer.precision),
            "module": spell_class(type(pl_module)),
        }


def _write(path: Path, content: dict[str, Any]) -> str:
    """Write a dump; what went wrong, if something did, for that must not hide what the dump is about."""
    try:
        write_dump(path, content)
    except OSError as error:
        return f"could not be written: {error}"
    return ""


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _command(pl_module: LightningModule, path: Path) -> str:
    spelled = spell_class(type(pl_module))
    if spelled is None:  # a class inside a function
        return f"in Python, NonFiniteGuard.replay({str(path)!r}, {type(pl_module).__name__}(…))"
    return f"python -m trainerkit.callbacks._replay {shlex.quote(str(path))} --module {shlex.quote(spelled)}"
