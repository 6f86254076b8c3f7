"""Tokenise a text: what is missing of it, in this process or in several, one run at a time.

Processes are started anew, with jobs on their standard input: a script without `if __name__ == "__main__"` can use
them, and they end when the one that started them does, however that ends.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout  # comes with torch
from tqdm import tqdm

from trainerkit.data.shards import Job, counts, write_part
from trainerkit.data.tokenizers import Tokenizer, from_content
from trainerkit.errors import UserError

# A process takes seconds to start; below this much text one is faster.
_SMALL_BYTES = 1 << 25
# A Ctrl-C is for the process that started these, which ends them; from the first line on, imports take seconds.
_SERVE = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    "from trainerkit.data.shard_workers import serve; serve()"
)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one process of the machine write to a folder; others wait here, and find it written."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"another process is tokenising into {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cannot_write(error: OSError, folder: Path) -> UserError:
    """What to say when the cache `folder` has no room, or may not be written."""
    return UserError(f"{error.filename or folder}: {error.strerror or error}; choose where by cache_dir=…")


def tell(line: str) -> None:
    """Say it where it does not mix with results."""
    print(f"trainerkit: {line}", file=sys.stderr, flush=True)


def write_parts(job: Job, tokenizer: Tokenizer, workers: int | None) -> None:
    """Tokenise the parts that are not there; the caller holds the lock.

    Args:
        job: what to tokenise.
        tokenizer: by what.
        workers: processes; None for as many as cores, or this one alone if the text is small.

    Raises:
        UserError: for text that cannot be read, as this process or another found it.
    """
    missing = [part for part in range(len(job.parts)) if counts(job.folder, part, tokenizer) is None]
    if not missing:
        return
    for torn in job.folder.glob(".*.tmp"):
        torn.unlink(missing_ok=True)
    job.save()
    total = sum(size for size, _ in job.states)
    done = len(job.parts) - len(missing)
    files = f"{len(job.sources)} files" if len(job.sources) > 1 else str(job.sources[0].path)
    going_on = f", of which {done / len(job.parts):.0%} is done" if done else ""
    tell(f"tokenising {files} ({total / 1e6:.1f} MB{going_on}) into {job.folder}")
    if workers is None:
        workers = 1 if total < _SMALL_BYTES else _cores()
    workers = min(workers, len(missing))
    finished = _in_processes(job, tokenizer, missing, workers) if workers > 1 else _here(job, tokenizer, missing)
    # disable=None: only where somebody watches.
    for _ in tqdm(finished, desc="tokenising", total=len(job.parts), initial=done, unit="part", disable=None):
        pass


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _here(job: Job, tokenizer: Tokenizer, parts: Sequence[int]) -> Iterator[int]:
    for part in parts:
        write_part(job, part, tokenizer)
        yield part


def _in_processes(job: Job, tokenizer: Tokenizer, parts: Sequence[int], workers: int) -> Iterator[int]:
    """One thread waits for each process."""
    idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
    processes = [_start(job.folder, tokenizer) for _ in range(workers)]
    for process in processes:
        idle.put(process)

    def ask(part: int) -> int:
        process = idle.get()
        try:
            return _ask(process, part)
        finally:
            idle.put(process)

    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(ask, part) for part in parts]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.communicate()


def _start(folder: Path, tokenizer: Tokenizer) -> "subprocess.Popen[str]":
    # Its library would start a thread for each core in each process.
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
    )


def _ask(process: "subprocess.Popen[str]", part: int) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{part}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except (OSError, ValueError):
        answer = ""
    if not answer:
        raise UserError(
            f"A process that was tokenising has ended (exit code {process.wait()}), perhaps for lack of memory. What "
            "was finished is kept: run the same command again, with a smaller tokenize_workers."
        )
    error = json.loads(answer)["error"]
    if error is not None:
        raise UserError(error)
    return part


def serve() -> None:
    """The other process: reads numbers of parts, answers with a line of JSON each."""
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    folder = Path(sys.argv[1])
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(numbers,), daemon=True).start()
    job = Job.load(folder)
    content = folder / "tokenizer.json"
    tokenizer: Any = None
    while True:
        part, error = numbers.get(), None
        try:
            if tokenizer is None:
                text = content.read_text(encoding="utf-8") if content.exists() else "bytes"
                tokenizer = from_content(text, str(content), job.end_of_text)
            write_part(job, part, tokenizer)
        except UserError as problem:
            error = str(problem)
        except OSError as problem:
            error = str(cannot_write(problem, folder))
        print(json.dumps({"error": error}), file=answers, flush=True)


def _listen(numbers: "queue.SimpleQueue[int]") -> None:
    for line in sys.stdin:
        numbers.put(int(line))
    os._exit(0)  # the one that started this has ended, or has nothing more
