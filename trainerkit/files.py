"""Files that are either the old one or the new one, never half of one."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success flush it to disk and rename it to `path`.

    The rename is atomic because both names are on one file system. On an exception the temporary file is removed
    and `path` stays what it was.

    Args:
        path: the file to replace; its folder is made if it is not there.

    Raises:
        OSError: if the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; the result gets the rights that open() would have given it.
        os.chmod(temporary, 0o666 & ~_umask())
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON through `replacing`; NaN and infinity become null, since JSON has neither."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def flush(path: Path) -> None:
    """Have the system write a file's content, or a folder's names, to the disk.

    Raises:
        OSError: if it cannot be.
    """
    # Windows cannot open folders, and needs no flush of them.
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # there only what may be written is flushed
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
