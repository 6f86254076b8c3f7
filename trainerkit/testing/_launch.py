"""Runs as processes in a group of their own, started plainly or forked from a process that has imported everything."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol


@dataclass(frozen=True)
class Order:
    """What to run: arguments of `trainerkit.cli.main`, folder, where the screen goes, how many processes train."""

    arguments: Sequence[str]
    folder: str
    log: str
    ranks: int = 1


class Running(Protocol):
    """A run that was started; `end` has to be called once it is over."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""

    def end(self) -> None:
        """Kill what is left of the group, and forget the process."""


def freeze(run: Running) -> None:
    """Stop the whole group where it is, and wait until the first process stands."""
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGSTOP)
    limit = time.monotonic() + 0.5
    while run.poll() is None and (state := _state(run.pid)) not in "TtZX":
        # One that starts another (vfork) stands in 'D' until that one, which is stopped as well, would go on.
        if state == "D" and time.monotonic() > limit:
            return
        time.sleep(0.0001)


def kill(run: Running) -> int:
    """SIGKILL to the whole group, workers and other ranks too; gives how the first process ended."""
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    while (code := run.poll()) is None:
        time.sleep(0.0002)
    return code


def status(pid: int) -> int | None:
    """How a child ended, without reaping it."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _state(pid: int) -> str:
    """The letter of a process' state; 'T' is stopped. Where there is no /proc a process stops at once, so to say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "T"


class Plain:
    """`python -m trainerkit`, as a user starts it; other ranks are started by Lightning."""

    def __init__(self, order: Order, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "trainerkit", *order.arguments]
        with open(order.log, "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=order.folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """See `Running`. The process is not reaped, so that its number stays its own."""
        return status(self.pid)

    def end(self) -> None:
        """See `Running`."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Zygote:
    """Forks runs, one at a time; a context that ends the process and what it has started."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainerkit.testing._zygote"],
            env=dict(environment), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._tell()  # that everything is imported

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *_: object) -> None:
        # At the end of its input it kills what it has started.
        self._pipe(self._process.stdin).close()
        self._process.wait()
        self._pipe(self._process.stdout).close()

    def start(self, order: Order) -> "Forked":
        """Fork a run; the one before has to be over and its `end` called."""
        return Forked(self, self._ask(json.dumps(asdict(order))))

    def _ask(self, line: str) -> int:
        pipe = self._pipe(self._process.stdin)
        pipe.write(f"{line}\n")
        pipe.flush()
        return self._tell()

    def _tell(self) -> int:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError("the process that forks runs has died; what it said is above")
        return int(line)

    def has_news(self) -> bool:
        """Whether the run that was started has ended."""
        return bool(select.select([self._pipe(self._process.stdout)], [], [], 0)[0])

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


class Forked:
    """A run that was forked from the zygote; of several ranks the first is the parent of the others."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._code: int | None = None

    def poll(self) -> int | None:
        """See `Running`."""
        if self._code is None and self._zygote.has_news():
            self._code = self._zygote._tell()
        return self._code

    def end(self) -> None:
        """See `Running`."""
        self._zygote._ask("end")
