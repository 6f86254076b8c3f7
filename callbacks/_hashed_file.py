"""Files that are hashed while they are written, and whether one may be written over."""

import errno
import hashlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none, and no leases either
    fcntl = None  # type: ignore[assignment]

_BLOCK = 2**22  # bytes


class HashedFile:
    """A new file that is hashed while it is written, by a thread that reads what has been written so far.

    So neither writing nor flushing waits for the hash, which takes as long as both.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # Not through a buffer, for the thread sees only what the system has; not emptied, for that takes time.
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        self._size, self._ended = 0, False
        self._grown = threading.Condition()
        self._thread = ThreadPoolExecutor(1)
        self._digest = self._thread.submit(self._follow)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(0, ended=True)
        self._thread.shutdown()
        self._file.close()

    def write(self, content: Any) -> int:
        """Append bytes."""
        view, written = memoryview(content), 0
        while written < len(view):
            written += self._file.write(view[written:])
        self._tell(written)
        return written

    def flush(self) -> None:
        """Nothing is held back."""

    def found(self) -> dict[str, Any]:
        """Flush it to the disk; size and hash, as a manifest has them."""
        self._tell(0, ended=True)
        self._file.truncate(self._size)
        os.fsync(self._file.fileno())
        return {"size": self._size, "sha256": self._digest.result()}

    def _tell(self, written: int, ended: bool = False) -> None:
        with self._grown:
            self._size += written
            self._ended |= ended
            self._grown.notify()

    def _follow(self) -> str:
        digest, hashed, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
        with open(self._path, "rb", buffering=0) as file:
            while not self._ended or hashed < self._size:
                with self._grown:
                    self._grown.wait_for(lambda: self._ended or self._size - hashed >= _BLOCK)  # noqa: B023
                    written = self._size
                while hashed < written:
                    # No further: behind it may stand what the file held before.
                    count = file.readinto(block[: written - hashed])
                    if not count:
                        raise OSError(errno.EIO, "what was written cannot be read", self._path)
                    digest.update(block[:count])
                    hashed += count
        return digest.hexdigest()


def is_ours_alone(path: Path) -> bool:
    """Whether a file has one name, and no process has it open or mapped; False where that cannot be known."""
    lease = getattr(fcntl, "F_SETLEASE", None)  # Linux: given only to the one who has the file open alone
    if lease is None or path.stat().st_nlink != 1:
        return False
    handle = os.open(path, os.O_RDWR)
    try:
        # Whoever opens it in this moment has a signal sent to us; the usual one would end the process.
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(handle, lease, fcntl.F_WRLCK)
        fcntl.fcntl(handle, lease, fcntl.F_UNLCK)
    except OSError:  # somebody reads it, or the file system has no leases
        return False
    finally:
        os.close(handle)
    return True


def digest(file: Any) -> dict[str, Any]:
    """Size and hash of an open file, which is closed, as a manifest has them."""
    found, size = hashlib.sha256(), 0
    with file:
        while block := file.read(_BLOCK):
            found.update(block)
            size += len(block)
    return {"size": size, "sha256": found.hexdigest()}
