"""What every optimizer step left, as hashes: a resumed run that is not the uninterrupted one is caught in the step.

    names and hashes of step t -> content_t;  chain_t = H(chain_{t-1}, content_t)

A run that was killed after its last checkpoint makes some steps twice. Made again, they are compared with what was
recorded the first time, and the first part that differs is named, causes before consequences.
"""

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer

from trainerkit.callbacks._digest import digest_of, flat
from trainerkit.callbacks._parameters import named_parameters, plain_name
from trainerkit.callbacks._step_records import (
    START,
    Record,
    describe,
    first_difference,
    make_record,
    read_records,
    whole_part,
)
from trainerkit.callbacks._trainer import is_stepping, of_every_rank


class StepsDiffer(RuntimeError):
    """A step that was made again is not what was recorded; the message names step and part, and where both are."""


class StepHashes(Callback):
    """Record hashes of every step, and compare steps that are made again after a resume.

    Each rank appends to `dirname/rank<N>.jsonl` a line a step: hashes of the batches, the random state, the settings of
    the optimizer (learning rates), what `training_step` gave, the parameters, the buffers and the optimizer's tensors
    as they are when `on_train_batch_end` is called. A run that begins at step 0 begins a new file, with the weights
    before the first step.

    Args:
        on_difference: 'raise' ends the run in the step that differs, 'warn' says so once and goes on; the records then
            are those of the history that goes on.
        every_n_steps: optimizer steps between two records. 1 is each one; what is drawn or read in the others is seen
            only by what it does to those that are recorded.
        dirname: folder, relative to `trainer.default_root_dir`.

    Raises:
        ValueError: for a value that is not possible; in fit, on every rank, if the records of one cannot be read.
        StepsDiffer: in fit, on every rank, if the step of one differs.
    """

    def __init__(
        self, on_difference: Literal["raise", "warn"] = "raise", every_n_steps: int = 1, dirname: str = "step_hashes"
    ) -> None:
        if on_difference not in ("raise", "warn"):
            raise ValueError(f"on_difference={on_difference}: must be raise or warn")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be 1 or more")
        self.on_difference = on_difference
        self.every_n_steps = every_n_steps
        self.dirname = dirname
        self._restored: list[dict[str, Any]] = []  # of each rank
        self._step = 0  # optimizer steps so far; Lightning's own count is not right yet when a resumed run starts
        self._chain = START
        self._window: dict[str, bytes] = {}  # hashes of the batches and outputs since the last step
        self._expected: dict[int, Record] = {}  # recorded before, to be made again
        self._compare_until = -1  # the last step that any rank has to compare
        self._names: tuple[str, ...] | None = None  # of the file's last lines
        self._path = Path()
        self._file: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what a fit that failed was to be resumed from; this one's checkpoint is read later."""
        self._restored = []

    # Through checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep where each rank's chain is, so that it goes on right where its file was cut or is not there."""
        own = {"step": self._step, "chain": self._chain, "window": {n: h.hex() for n, h in self._window.items()}}
        checkpoint["callbacks"][self.state_key] = {"ranks": of_every_rank(trainer, own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._restored = state_dict.get("ranks", [])

    # A step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a file, or read what was recorded after the step that is resumed from."""
        restored, self._restored = self._restored[trainer.global_rank :][:1], []
        if restored:
            self._step, self._chain = restored[0]["step"], restored[0]["chain"]
            self._window = {name: bytes.fromhex(found) for name, found in restored[0]["window"].items()}
        elif trainer.global_step == 0 or self._step == 0:
            self._step, self._chain, self._window = trainer.global_step, START, {}
        self._names = None
        self._path = Path(trainer.default_root_dir) / self.dirname / f"rank{trainer.global_rank}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fault = None
        try:
            self._expected = self._recorded()
        except ValueError as error:
            fault = str(error)
        found = of_every_rank(trainer, (fault, max(self._expected, default=-1)))
        # Every rank stops if the file of one is damaged, or the others would wait for it.
        if faults := [text for text, _ in found if text is not None]:
            raise ValueError("\n".join(faults))
        self._compare_until = max(last for _, last in found)
        self._open("a" if self._step else "w")
        if self._step == 0:
            self._keep(trainer, _digests(_state(trainer, pl_module)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hash the batch before the step may change it."""
        if self._is_due():
            self._add(flat(batch, "batch"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where a window of batches ends with a step, record it."""
        if self._is_due():
            self._add(flat({} if outputs is None else outputs, "output"))
        if not is_stepping(trainer, pl_module):
            return
        self._step += 1
        if self._step % self.every_n_steps == 0:
            window, self._window = self._window, {}
            batches = {name: found for name, found in window.items() if name.startswith("batch")}
            before = batches | _digests(_random()) | _digests(_settings(trainer))
            self._keep(trainer, before | window | _digests(_state(trainer, pl_module)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file."""
        self._close()

    def _is_due(self) -> bool:
        return (self._step + 1) % self.every_n_steps == 0

    def _add(self, values: Iterator[tuple[str, Any]]) -> None:
        """Hash values under their names, after those of the window's earlier batches."""
        for name, value in values:
            self._window[name] = hashlib.sha256(self._window.get(name, b"") + digest_of(value)).digest()

    def _keep(self, trainer: Trainer, digests: dict[str, bytes]) -> None:
        """Compare with the step as it was recorded; what was recorded already is not written again."""
        record = make_record(self._step, trainer.current_epoch, digests, self._chain)
        self._chain = record.chain
        expected = self._expected.pop(self._step, None)
        difference = None if expected is None else first_difference(expected, record)
        if self._step <= self._compare_until:
            text = None
            if expected is not None and difference is not None:
                place = f"{self._reference()}:{expected.line}"
                text = f"rank {trainer.global_rank}, {describe(self._step, difference, place, 'the step made again')}"
            # Every rank stops if the step of one differs, or the others would wait for it.
            self._compared(trainer, [text for text in of_every_rank(trainer, text) if text])
        if expected is None or difference is not None:
            self._write(record)

    def _compared(self, trainer: Trainer, differences: list[str]) -> None:
        """A step was compared; what differs on each rank."""
        if not differences:
            return
        text = "\n".join(["the resumed run is not the one that was recorded:", *differences])
        if self.on_difference == "raise":
            raise StepsDiffer(text)
        rank_zero_warn(f"StepHashes: {text}")
        self._expected, self._compare_until = {}, -1  # all that follows would differ too

    # The file

    def _reference(self) -> Path | None:
        """The file to compare with."""
        return self._path if self._step else None

    def _recorded(self) -> dict[int, Record]:
        """What there is after the step that is resumed from, if it is of the same history."""
        path = self._reference()
        if path is None or not path.exists():
            return {}
        records = read_records(path)
        if self._step and self._step in records and records[self._step].chain != self._chain:
            rank_zero_warn(
                f"StepHashes: what {path} has of step {self._step} is not what the checkpoint was saved after; "
                "what follows is not compared"
            )
            return {}
        return {step: record for step, record in records.items() if step > self._step or self._step == 0}

    def _open(self, mode: Literal["a", "w"]) -> None:
        self._close()
        if mode == "a" and self._path.exists():
            os.truncate(self._path, len(whole_part(self._path)))  # without half a line that a kill has left
        self._file = self._path.open(mode, encoding="utf-8")

    def _write(self, record: Record) -> None:
        """In one piece and to the system at once: SIGKILL cuts at most the last line."""
        assert self._file is not None
        names = record.names_line() if record.names != self._names else ""
        self._names = record.names
        self._file.write(names + record.as_line())
        self._file.flush()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _digests(values: Iterator[tuple[str, Any]]) -> dict[str, bytes]:
    return {name: digest_of(value) for name, value in values}


def _random() -> Iterator[tuple[str, Any]]:
    yield "random state of python", repr(random.getstate())
    kind, keys, *rest = np.random.get_state()
    yield "random state of numpy", f"{kind}{np.asarray(keys).tobytes().hex()}{rest}"
    yield "random state of torch", torch.get_rng_state()
    if torch.cuda.is_available():
        yield "random state of cuda", torch.cuda.get_rng_state()


def _settings(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """What stands beside the parameters in the optimizers' groups: learning rates, decay, betas."""
    for number, optimizer in enumerate(trainer.optimizers):
        for index, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key != "params":
                    yield f"optimizer {number} group {index} {key}", value


def _state(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, Any]]:
    """Parameters, buffers and the tensors of the optimizers."""
    parameters = named_parameters(pl_module)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        yield f"parameter {name}", parameter
    for name, buffer in pl_module.named_buffers():
        yield f"buffer {plain_name(name)}", buffer
    for number, optimizer in enumerate(trainer.optimizers):
        for position, (held, state) in enumerate(optimizer.state.items()):
            name = names.get(id(held), f"parameter {position}")
            for key, values in state.items():
                for leaf, value in flat(values, key):
                    yield f"optimizer {number} {leaf} of {name}", value
