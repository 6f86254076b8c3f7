"""Signals that ask a run to save and stop: noted when they come, answered when a step is whole."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer

# SIGUSR1 is what schedulers are asked to send ahead of the end; Windows has none.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequested(SystemExit):
    """Training was stopped by a signal after a checkpoint was written; `code` is the process's exit code.

    Attributes:
        signal: the signal's name, e.g. 'SIGINT'.
        path: the checkpoint that was written.
    """

    def __init__(self, signum: int, path: str, code: int) -> None:
        super().__init__(code)
        self.signal = signal.Signals(signum).name
        self.path = path


class StopSignals:
    """Notes the first SIGINT, SIGTERM or SIGUSR1; the second one ends the process at once.

    Under SLURM with Lightning's requeueing the signal that asks for it is noted too: Lightning would save at once, in
    the middle of a step.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}  # those that were there before
        self._launcher: Any = None
        self._is_led = False  # whether another process started this one
        self._requeue: tuple[int, Any] | None = None  # SLURM's signal, and Lightning's answer to it

    def attach(self, trainer: Trainer) -> None:
        """Begin to listen; only the main thread can. What listened before is kept for `detach`."""
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        self.received = None
        self._launcher = trainer.strategy.launcher
        self._is_led = type(self._launcher).__name__ == "_SubprocessScriptLauncher" and not trainer.is_global_zero
        environment: Any = trainer._accelerator_connector.cluster_environment
        if type(environment).__name__ == "SLURMEnvironment" and environment.auto_requeue:
            self._requeue = environment.requeue_signal, trainer._signal_connector._slurm_sigusr_handler_fn
        numbers = {*_SIGNALS, *([self._requeue[0]] if self._requeue else [])}
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}

    def detach(self) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's
        self._handlers, self._requeue = {}, None

    def requeue(self, signum: int) -> bool:
        """Let Lightning save its own checkpoint and requeue the job, if this signal asks for that.

        Training then goes on until SLURM ends the job.
        """
        if self._requeue is None or signum != self._requeue[0]:
            return False
        self.received = None
        self._requeue[1](signum, None)
        return True

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # What a process group is sent, the first process passes on as well: to the others it comes twice.
            if not (self._is_led and signum == self.received and signum != signal.SIGINT):
                self._end(signum)
            return
        self.received = signum
        # Ctrl-C reaches every process of a terminal; another signal may reach only this one, so it is passed on.
        if signum != signal.SIGINT:
            self._pass_on(signum)
        text = f"\n{signal.Signals(signum).name}: finishing this step and saving; once more to stop at once.\n"
        with suppress(OSError):  # whoever read it may be gone by the same Ctrl-C
            os.write(2, text.encode())

    def _end(self, signum: int) -> None:
        """End this process and those it leads, at once."""
        self._pass_on(getattr(signal, "SIGKILL", signal.SIGTERM))
        self.detach()
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    def _pass_on(self, signum: int) -> None:
        if type(self._launcher).__name__ == "_SubprocessScriptLauncher":
            self._launcher.kill(signum)
