"""Checkpoints in a folder: each has a manifest of sizes and SHA-256, and is found again by what verifies.

step-00000120.ckpt   a file, or a folder of shards
step-00000120.json   its manifest, written after it: a checkpoint without one is not finished
last.ckpt            a link to the newest; best.ckpt to the best

A name that begins with a dot is being written. Local files are staged beside their name, flushed to disk and renamed.
At a URL, where nothing can be flushed, renamed or linked, a file appears when it is complete, as object stores have it,
and `last.json`, `best.json` take the place of the links.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from trainerkit.callbacks._hashed_file import HashedFile, digest, is_ours_alone
from trainerkit.files import flush, replacing, write_json

FORMAT = 1
_NAME = re.compile(r"step-\d{8,}(-\d+)?\.ckpt")
_SPARE = ".spare.ckpt.tmp"


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: a folder or an fsspec URL; it is made when something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.fs, root = url_to_fs(str(path))
        self.path = Path(root) if isinstance(self.fs, LocalFileSystem) else None
        self._root = root if str(path).startswith("file:") else str(path).rstrip("/")
        self._own: dict[str, bool] = {}  # what this run wrote, oldest first, and whether it can be resumed from
        self._number: int | None = None  # of the newest manifest

    def __str__(self) -> str:
        return self._root

    def locate(self, name: str) -> str:
        """The path or URL of a file in the folder."""
        return f"{self._root}/{name}"

    # Writing

    def try_out(self) -> None:
        """Write something, so that what is wrong with the folder is known before the first checkpoint is due.

        Raises:
            OSError: if nothing can be written.
        """
        if self.path is not None:
            with replacing(self.path / ".try") as temporary:
                temporary.write_bytes(bytes(4096))
            (self.path / ".try").unlink()

    def begin(self, resumed: bool) -> bool:
        """Start to write for a run, which removes only what is its own: what it writes, and what it was resumed among.

        Returns:
            Whether another run's checkpoints are there.

        Raises:
            OSError: if the folder cannot be read.
        """
        manifests = self._newest_first(strictly=True)
        self._number = max((m["number"] for m in manifests if "number" in m), default=0)
        whole = [manifest for manifest in reversed(manifests) if "fault" not in manifest]
        self._own = {manifest["name"]: manifest.get("resumable", True) for manifest in whole} if resumed else {}
        return bool(whole) and not resumed

    def new_name(self, step: int) -> str:
        """A name that no file has."""
        taken: set[str] = set()
        with suppress(OSError):  # what is wrong with the folder is found out, and said, by writing
            taken.update(self._names())
        names = (f"step-{step:08d}{f'-{again}' if again else ''}.ckpt" for again in range(len(taken) + 1))
        return next(name for name in names if name not in taken)

    def staged(self, name: str) -> str:
        """Where a checkpoint is written first; at a URL it is its place."""
        return self.locate(name if self.path is None else f".{name}.tmp")

    def write(self, checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Write a checkpoint as one file, and give its part of the manifest.

        Raises:
            OSError, RuntimeError: if it cannot be written; what there was before is whole.
        """
        if self.path is None:
            buffer = io.BytesIO()
            torch.save(checkpoint, buffer)
            content = buffer.getvalue()
            self.fs.pipe_file(self._key(name), content)
            return {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with suppress(FileNotFoundError):
                os.replace(self.path / _SPARE, self.staged(name))  # its place on the disk is taken over
            with HashedFile(self.staged(name)) as file:
                torch.save(checkpoint, cast(IO[bytes], file))
                return {name: file.found()}
        except RuntimeError as error:  # torch's writer hides what the system said behind a sentence of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def measure(self, name: str, of_rank: int | None = None) -> dict[str, Any]:
        """Sizes and hashes of what was staged, and flush it.

        Args:
            name: of the checkpoint.
            of_rank: of a folder of shards only those that this rank wrote; the first has what belongs to all.
        """
        if self.path is None:
            return {name: digest(self.fs.open(self._key(name), "rb"))}
        place = Path(self.staged(name))
        files = {name: place}
        if place.is_dir():
            shards = [shard for shard in sorted(place.iterdir()) if of_rank in (None, _rank_of(shard.name))]
            files = {f"{name}/{shard.name}": shard for shard in shards}
        with ThreadPoolExecutor(1) as flusher:  # the disk and the processor work at once
            flushed = [flusher.submit(flush, file) for file in files.values()]
            found = {key: digest(file.open("rb")) for key, file in files.items()}
            for one in flushed:
                one.result()
        return found

    def commit(self, name: str, files: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Give a staged checkpoint its name and its manifest.

        Raises:
            OSError: if it cannot be.
        """
        if self._number is None:
            self.begin(resumed=False)
        assert self._number is not None
        content = {"format": FORMAT, "number": self._number + 1, **facts, "files": dict(files)}
        manifest = f"{name.removesuffix('.ckpt')}.json"
        if self.path is None:
            self.fs.pipe_file(self._key(manifest), json.dumps(content, indent=2).encode())
        else:
            if Path(self.staged(name)).is_dir():
                flush(Path(self.staged(name)))
            os.replace(self.staged(name), self.path / name)
            try:
                flush(self.path)
                write_json(self.path / manifest, content)
            except BaseException:
                self._remove(self.locate(name))  # without a manifest it would take its place for nothing
                raise
        self._number += 1
        self._own[name] = bool(facts.get("resumable", True))

    def discard(self, name: str) -> None:
        """Remove what is left of a checkpoint that could not be written."""
        with suppress(OSError):
            self._remove(self.staged(name))

    def point(self, link: str, name: str) -> None:
        """Have `last` or `best` mean this checkpoint; without symbolic links `last.json` says which it is."""
        pointer = {"checkpoint": name}
        if self.path is None:
            self.fs.pipe_file(self._key(f"{link}.json"), json.dumps(pointer).encode())
            return
        target, temporary = self.path / f"{link}.ckpt", self.path / f".{link}.ckpt.tmp"
        if target.is_dir() and not target.is_symlink():
            raise IsADirectoryError(f"{target} is a folder; it must be a link, or not be there")
        with suppress(FileNotFoundError):
            temporary.unlink()
        try:
            os.symlink(name, temporary)
        except OSError:  # where links need a privilege, or the file system has none
            write_json(self.path / f"{link}.json", pointer)
            if (self.path / name).is_dir():
                raise  # of a folder there is neither a hard link nor a cheap copy
            try:
                os.link(self.path / name, temporary)
            except OSError:
                shutil.copyfile(self.path / name, temporary)
        os.replace(temporary, target)
        flush(self.path)

    def place(self, link: str, name: str) -> str:
        """The path under which `point` makes a checkpoint known: a link's, or at a URL its own."""
        return self.locate(name if self.path is None else f"{link}.ckpt")

    def linked(self, link: str) -> str:
        """The path of what a link means, if there is anything; else ''."""
        name = self.target(link)
        if self.path is None:
            return self.locate(name) if name else ""
        return self.locate(f"{link}.ckpt") if os.path.exists(self.path / f"{link}.ckpt") else ""

    def prune(self, keep: int) -> None:
        """Of this run's checkpoints remove all but the newest and what a link means.

        Also older ones that were never finished. What another run wrote, or cannot be read now, stays.
        """
        kept = {*[name for name, resumable in self._own.items() if resumable][-keep:]}
        kept |= self._own.keys() & {self.target("last"), self.target("best")}
        oldest = min((step_of(name) for name in kept), default=0)
        for name in [name for name in self._own if name not in kept]:
            self._remove(self.locate(f"{name.removesuffix('.ckpt')}.json"))
            self._retire(name)
            del self._own[name]
        for name in self.unfinished():
            if step_of(name) < oldest:
                self._remove(self.locate(name))

    def _retire(self, name: str) -> None:
        """Remove a checkpoint; where nobody else reads it, have the next one written over it.

        New places on the disk, and removals, take longer than all the rest of a checkpoint.
        """
        if self.path is None or not (self.path / name).is_file():
            self._remove(self.locate(name))
            return
        spare = self.path / _SPARE
        os.replace(self.path / name, spare)  # whoever comes now does not find it any more
        if not is_ours_alone(spare):
            spare.unlink()

    def clear(self) -> None:
        """Remove what a process that was killed had begun to write, and the file that waits to be written over."""
        for name in () if self.path is None else self._names():
            if name.startswith(".") and name.endswith(".tmp"):
                self._remove(self.locate(name))

    # Finding

    def target(self, link: str) -> str | None:
        """The name of the checkpoint that `last` or `best` means, or None."""
        if self.path is not None:
            with suppress(OSError):
                return os.readlink(self.path / f"{link}.ckpt")
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(self.fs.cat_file(self._key(f"{link}.json")))["checkpoint"])
        return None

    def newest(self) -> tuple[str | None, list[str]]:
        """The newest checkpoint that verifies, and for each newer one why it does not.

        Without any, one that has no manifest, for which nothing vouches: `last.ckpt` if it is a file of its own, as
        copying a link makes it, else the one of the last step.
        """
        skipped: list[str] = []
        for manifest in self._newest_first():
            if not manifest.get("resumable", True):
                continue
            reason = self._fault(manifest)
            if reason is None:
                return self.locate(manifest["name"]), skipped
            skipped.append(f"{manifest['name']}: {reason}")
        last = None if self.path is None else self.path / "last.ckpt"
        if last is not None and last.is_file() and not last.is_symlink() and self.target("last") is None:
            return str(last), skipped
        unfinished = self.unfinished()
        return self.locate(max(unfinished, key=step_of)) if unfinished else None, skipped

    def unfinished(self, since: str | None = None) -> list[str]:
        """Checkpoints without a manifest: the process ended between the two; not those before one at a path."""
        known = (since or "").rpartition("/")[2]
        step = step_of(known) if _NAME.fullmatch(known) else -1
        names = set(self._names())
        alone = (n for n in names if _NAME.fullmatch(n) and f"{n.removesuffix('.ckpt')}.json" not in names)
        return sorted(name for name in alone if step_of(name) >= step)

    def fault(self, name: str) -> str | None:
        """What is wrong with a checkpoint, or None; also where there is no manifest that could tell."""
        name = self.target(name.removesuffix(".ckpt")) or name
        found = [manifest for manifest in self._manifests() if manifest["name"] == name]
        return self._fault(found[0]) if found else None

    def _fault(self, manifest: Mapping[str, Any]) -> str | None:
        if "fault" in manifest:
            return str(manifest["fault"])
        for name, expected in manifest["files"].items():
            try:
                with self.fs.open(self._key(name), "rb") as file:
                    found = digest(file)
            except FileNotFoundError:
                return f"{name} is not there"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror or error})"
            if found["size"] != expected["size"]:
                return f"{name} has {found['size']} bytes, must have {expected['size']}"
            if found["sha256"] != expected["sha256"]:
                return f"{name} has other content than was written (SHA-256)"
        return None

    def _newest_first(self, strictly: bool = False) -> list[dict[str, Any]]:
        """All manifests; where a damaged one belongs is not known: it comes first, to be spoken of."""
        found = self._manifests(strictly)
        return sorted(found, key=lambda manifest: manifest.get("number", math.inf), reverse=True)

    def _manifests(self, strictly: bool = False) -> Iterator[dict[str, Any]]:
        """Each manifest with the checkpoint's `name`; one that cannot be used has a `fault` instead of content.

        Raises:
            OSError: if `strictly`, and the disk does not give one.
        """
        for file in self._names():
            name = file.removesuffix(".json") + ".ckpt"
            if not file.endswith(".json") or not _NAME.fullmatch(name):
                continue
            try:
                yield _checked(json.loads(self.fs.cat_file(self._key(file))), name) | {"name": name}
            except OSError as error:
                if strictly:
                    raise
                yield {"name": name, "fault": f"its manifest {file} cannot be read ({error.strerror or error})"}
            except (ValueError, KeyError, TypeError, AttributeError):
                yield {"name": name, "fault": f"its manifest {file} is damaged"}

    def _names(self) -> list[str]:
        self.fs.invalidate_cache()  # object stores remember listings
        try:
            entries = os.listdir(self.path) if self.path is not None else self.fs.ls(self._key(""), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in entries)

    def _key(self, name: str) -> str:
        """The name under which the file system knows a file."""
        return str(url_to_fs(self.locate(name))[1])

    def _remove(self, place: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm(str(url_to_fs(place)[1]), recursive=True)


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removesuffix(".ckpt").split("-")[1])


def _checked(content: Any, name: str) -> dict[str, Any]:
    """The content of a manifest.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it is that of something else.
    """
    files = {str(key): (int(entry["size"]), str(entry["sha256"])) for key, entry in content["files"].items()}
    own = all(key == name or (key.startswith(f"{name}/") and key.count("/") == 1) for key in files)
    if content["format"] != FORMAT or not isinstance(content["number"], int) or not files or not own:
        raise ValueError(name)
    return dict(content)


def checkpoint_folder(root: str | Path, dirname: str) -> CheckpointFolder:
    """The folder of this name in a folder or at a URL; a name that is a URL or absolute stands for itself."""
    if "://" in dirname:
        return CheckpointFolder(dirname)
    return CheckpointFolder(f"{str(root).rstrip('/')}/{dirname}" if "://" in str(root) else Path(root) / dirname)


def fault_of(path: str) -> str | None:
    """What is wrong with the checkpoint at a path or URL, or None; nothing is known of one without a manifest."""
    folder, _, name = path.replace(os.sep, "/").rpartition("/")
    return CheckpointFolder(folder or ".").fault(name)


def _rank_of(shard: str) -> int:
    """Which rank wrote a file of torch.distributed.checkpoint (`__3_0.distcp`)."""
    found = re.match(r"__(\d+)_", shard)
    return int(found[1]) if found else 0
