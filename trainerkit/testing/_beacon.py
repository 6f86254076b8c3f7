"""What a run is doing at any moment, seen from another process: by a callback, and by its files."""

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

FILENAME = "beacon"
# One letter each, the file's only byte. Without a file, or with a zero in it, the run has not begun to train.
PHASES = {"b": "between", "s": "step", "v": "validation", "e": "ending"}


class Beacon(Callback):
    """Keep one letter in a byte of memory that is mapped from `beacon` in the run's folder.

    A letter is set without a system call and is there for others at once, also after SIGKILL. 'step' is from a batch's
    start to its end, 'validation' from the first batch to the last, 'ending' all after training: the test and what is
    written about the run. 'between' is the rest: checkpoints, records, loaders.
    """

    def __init__(self) -> None:
        self._byte: mmap.mmap | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Map the file."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / FILENAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as file:
            file.write(b"\0")
            file.flush()
            self._byte = mmap.mmap(file.fileno(), 1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored."""
        self._show("b")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._show("s")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """It is over."""
        self._show("b")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation begins."""
        self._show("v")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It is over; what comes now are checkpoints."""
        self._show("b")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over."""
        self._show("e")

    def _show(self, letter: str) -> None:
        if self._byte is not None:
            self._byte[0] = ord(letter)


def read_phase(folder: Path) -> str:
    """What the run in this folder is doing; 'starting' before it trains."""
    try:
        letter = (folder / FILENAME).read_bytes()[:1].decode()
    except FileNotFoundError:
        letter = ""
    return PHASES.get(letter, "starting")


def staged(checkpoints: Path) -> set[tuple[str, int]]:
    """Files that are being written, or were when a run was killed: by name and time, for names may come again."""
    found = set()
    with suppress(FileNotFoundError), os.scandir(checkpoints) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                with suppress(FileNotFoundError):  # renamed just now
                    found.add((entry.name, entry.stat(follow_symlinks=False).st_mtime_ns))
    return found


def newest_stat(checkpoints: Path) -> tuple[int, int] | None:
    """Another one whenever `last.ckpt` is."""
    try:
        found = (checkpoints / "last.ckpt").stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
