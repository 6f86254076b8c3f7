"""The process that has imported everything, and forks a run for each order that it reads.

`python -m trainerkit` imports for seconds, a small run takes about one. What is forked here is the process that the
command line is after its imports: no run has been there before, no thread has been started, nothing was computed, no
file is shared. It calls `trainerkit.cli.main` and ends as Python ends.

A line in, a line out: an order gives the number of the process; its end gives the exit code; any answer to that kills
what is left of its group, and gives 0.
"""

import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from trainerkit.testing._launch import Order, status


def serve() -> Order | None:
    """Follow orders until the input ends; in a forked process, give its order."""
    _say(0)
    while line := sys.stdin.readline():
        order = Order(**json.loads(line))
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            return order
        os.setpgid(pid, pid)  # the child does it too: it is done, whoever comes first
        _say(pid)
        _watch(pid)
    return None


def _watch(pid: int) -> None:
    """Tell how the process ended; kill what is left of its group when told to, or when nobody is there to tell."""
    handle = os.pidfd_open(pid)
    ready = select.select([handle, sys.stdin], [], [])[0]
    os.close(handle)
    if handle in ready:
        code = status(pid)
        assert code is not None
        _say(code)
        sys.stdin.readline()
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _say(0)


def _become(order: Order) -> None:
    """Make a forked process what the command line would have started."""
    os.setpgid(0, 0)
    for source, targets in ((os.open(os.devnull, os.O_RDONLY), [0]), (_open_log(order.log), [1, 2])):
        for target in targets:
            os.dup2(source, target)
        os.close(source)
    os.chdir(order.folder)
    sys.argv = [str(Path(__file__).resolve().parents[1] / "__main__.py"), *order.arguments]
    if order.ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # As torchrun and others do it: Lightning finds its place in the environment, and starts nobody.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        first = os.getpid()
        rank = next((rank for rank in range(1, order.ranks) if os.getpid() == first and os.fork() == 0), 0)
        os.environ["LOCAL_RANK"] = str(rank)


def _open_log(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


def _say(number: int) -> None:
    # A pipe whose reader is gone is found out at the next reading.
    with suppress(BrokenPipeError):
        print(number, flush=True)


def _import_everything() -> None:
    """What a run imports; it must leave this process with the one thread that a fork keeps."""
    for name in ("cli", "compose", "run", "data", "testing._beacon"):
        importlib.import_module(f"trainerkit.{name}")
    tasks = importlib.import_module("trainerkit.tasks")
    for module in pkgutil.iter_modules(tasks.__path__, "trainerkit.tasks."):
        importlib.import_module(module.name)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"imports have started {threads - 1} threads, which a fork would not have; use --fresh all")


if __name__ == "__main__":
    _import_everything()
    gc.freeze()  # what is imported is nobody's garbage: a fork need not copy it all to find that out
    found = serve()
    if found is not None:
        _become(found)
        from trainerkit.cli import main

        main(found.arguments)
