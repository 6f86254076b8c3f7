"""What a fault does to checkpoints: the rows of the table in docs/reliability.md."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.support import ROOT, ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CheckpointError, CrashSafeCheckpoint
from trainerkit.callbacks._checkpoint_files import CheckpointFolder
from trainerkit.callbacks._hashed_file import HashedFile

PAGE = 4096
latest = CrashSafeCheckpoint.latest


class Wide(ToyModule):
    """A checkpoint of a dozen pages."""

    def __init__(self):
        super().__init__(width=12_000)


def wide_loader():
    return toy_loader(rows=8, width=12_000)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints, at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    trainer = toy_trainer(folder, [CrashSafeCheckpoint(monitor=None)], max_epochs=2)
    trainer.fit(Wide(), wide_loader())
    return folder / "checkpoints"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the two, of which the newest is to be damaged; the older one must be found instead."""
    shutil.copytree(run, tmp_path / "checkpoints", symlinks=True)
    return tmp_path / "checkpoints"


def falls_back(folder, reason):
    with pytest.warns(UserWarning, match=reason):
        found = latest(folder)
    return found == str(folder / "step-00000001.ckpt") and torch.load(found, weights_only=True)["global_step"] == 1


def test_a_file_cut_at_any_page_is_passed_over(copy):
    newest = copy / "step-00000002.ckpt"
    content = newest.read_bytes()
    assert len(content) > 10 * PAGE
    for length in range(0, len(content), PAGE):
        newest.write_bytes(content[:length])
        assert falls_back(copy, f"has {length} bytes, must have {len(content)}")
    newest.write_bytes(content)
    assert latest(copy) == str(newest)


def test_a_flipped_bit_anywhere_is_found(copy):
    newest = copy / "step-00000002.ckpt"
    content = bytearray(newest.read_bytes())
    for place in range(0, len(content), 1013):
        content[place] ^= 1 << place % 8
        newest.write_bytes(content)
        assert falls_back(copy, r"has other content than was written \(SHA-256\)")
        content[place] ^= 1 << place % 8


def test_a_manifest_cut_at_any_byte_is_not_believed(copy):
    manifest = copy / "step-00000002.json"
    content = manifest.read_bytes().rstrip()
    for length in range(len(content)):
        manifest.write_bytes(content[:length])
        assert falls_back(copy, "its manifest step-00000002.json is damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"number": "2"},
        {"files": {}},
        {"files": {"../elsewhere": {"size": 1, "sha256": ""}}},
        {"files": {"step-00000002.ckpt": {"size": "x", "sha256": ""}}},
        {"files": ["step-00000002.ckpt"]},
    ],
)
def test_a_manifest_of_something_else_is_not_believed(copy, change):
    manifest = copy / "step-00000002.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    assert falls_back(copy, "its manifest step-00000002.json is damaged")


def test_what_is_missing_is_passed_over(copy):
    (copy / "step-00000002.ckpt").rename(copy / "elsewhere")
    assert falls_back(copy, "step-00000002.ckpt is not there")
    (copy / "elsewhere").rename(copy / "step-00000002.ckpt")
    (copy / "step-00000002.json").unlink()
    assert falls_back(copy, "step-00000002.ckpt: has no manifest")


def test_a_checkpoint_alone_is_taken_where_there_is_no_manifest_at_all(copy):
    """As where only the .ckpt files were copied; a file has its name only when it is complete."""
    for manifest in copy.glob("*.json"):
        manifest.unlink()
    with pytest.warns(UserWarning, match="has no manifest"):
        assert latest(copy) == str(copy / "step-00000002.ckpt")
    trainer = toy_trainer(copy.parent, [CrashSafeCheckpoint(monitor=None)], max_epochs=2, limit_train_batches=0)
    trainer.fit(Wide(), wide_loader())
    assert len(list(copy.glob("step*.ckpt"))) == 2


def test_what_cannot_be_read_for_the_moment_stays(copy, monkeypatch):
    """As where a network file system says ESTALE once: nothing is removed, and no number given twice."""
    folder = CheckpointFolder(copy)
    real, times = folder.fs.cat_file, 2

    def stale(path, **options):
        nonlocal times
        if path.endswith("step-00000002.json") and times:
            times -= 1
            raise OSError(116, "Stale file handle")
        return real(path, **options)

    monkeypatch.setattr(type(folder.fs), "cat_file", lambda self, path, **options: stale(path, **options))
    content = torch.load(copy / "step-00000001.ckpt", weights_only=True)
    with pytest.raises(OSError, match="Stale file handle"):
        folder.begin(resumed=True)
    files = folder.write(content, "step-00000003.ckpt")
    with pytest.raises(OSError, match="Stale file handle"):
        folder.commit("step-00000003.ckpt", files, {"resumable": True})
    folder.begin(resumed=True)
    folder.commit("step-00000003.ckpt", folder.write(content, "step-00000003.ckpt"), {"resumable": True})
    assert json.loads((copy / "step-00000003.json").read_text())["number"] == 3
    folder.prune(2)
    assert sorted(path.name for path in copy.glob("step*.ckpt")) == ["step-00000002.ckpt", "step-00000003.ckpt"]


def test_without_links_pointers_say_which_is_last_and_best(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(os, "link", refused)
    toy_trainer(tmp_path, [CrashSafeCheckpoint(monitor=None)], max_epochs=2).fit(Wide(), wide_loader())
    folder = tmp_path / "checkpoints"
    assert not (folder / "last.ckpt").is_symlink()
    assert (folder / "last.ckpt").read_bytes() == (folder / "step-00000002.ckpt").read_bytes()
    assert CheckpointFolder(folder).target("last") == "step-00000002.ckpt"
    (folder / "step-00000002.ckpt").write_bytes(b"damaged")
    assert falls_back(folder, "has 7 bytes")


def test_links_are_not_needed(copy):
    (copy / "last.ckpt").unlink()
    (copy / "best.ckpt").symlink_to("nowhere")
    assert latest(copy) == str(copy / "step-00000002.ckpt")


def test_a_copied_last_checkpoint_alone_is_taken(run, tmp_path):
    (tmp_path / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes())
    assert latest(tmp_path) == str(tmp_path / "last.ckpt")
    assert latest(tmp_path / "nothing") is None


def test_a_clock_that_goes_backwards_does_not_matter(copy):
    """Neither the files' times nor those in the manifests are looked at."""
    for age, name in enumerate(("step-00000001", "step-00000002")):
        for end in (".ckpt", ".json"):
            os.utime(copy / f"{name}{end}", (1e9 - 1e6 * age,) * 2)
    manifest = copy / "step-00000002.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"created": "1970-01-01T00:00:00+00:00"}))
    assert latest(copy) == str(copy / "step-00000002.ckpt")


def test_a_process_killed_at_any_page_of_writing_leaves_the_older_ones(run, tmp_path):
    """The kernel kills it in the write that passes the limit on a file's size."""
    content = torch.load(run / "step-00000002.ckpt", weights_only=True)
    size = (run / "step-00000002.ckpt").stat().st_size
    folder = CheckpointFolder(tmp_path)
    folder.commit("step-00000001.ckpt", folder.write(content, "step-00000001.ckpt"), {"resumable": True})
    killed = 0
    for limit in range(0, size + PAGE, PAGE):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            folder.commit("step-00000002.ckpt", folder.write(content, "step-00000002.ckpt"), {"resumable": True})
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        newest = latest(tmp_path)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGXFSZ
            assert newest == str(tmp_path / "step-00000001.ckpt")
            killed += 1
        else:
            assert newest == str(tmp_path / "step-00000002.ckpt")
    assert killed == -(-size // PAGE)
    folder.clear()
    assert sorted(os.listdir(tmp_path)) == [f"step-0000000{n}.{end}" for n in (1, 2) for end in ("ckpt", "json")]


# Faults of the disk while a run goes on, in a process of its own: it mounts file systems, and becomes another user.
SCRIPT = """
import json, os, shutil, subprocess, sys, tempfile, warnings
from pathlib import Path
from tests.callbacks.test_checkpoint_faults import Disturbed, Wide, wide_loader
from tests.support import toy_trainer
from trainerkit.callbacks import CheckpointError, CrashSafeCheckpoint

def run(fault, on_failure):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if fault in ("full", "read_only"):
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", name], check=True)
        callback = CrashSafeCheckpoint(monitor=None, on_failure=on_failure, keep_checkpoints=9)
        result = {"error": ""}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                toy_trainer(folder, [callback], max_epochs=6).fit(Disturbed(folder, fault), wide_loader())
            except CheckpointError as error:
                result["error"] = str(error)
        result["warned"] = sum("could not be written" in str(warning.message) for warning in caught)
        result["latest"] = Path(CrashSafeCheckpoint.latest(folder / "checkpoints")).name
        result["names"] = sorted(path.name for path in folder.glob("checkpoints/*") if not path.is_symlink())
        if fault == "denied":
            os.chmod(folder / "checkpoints", 0o755)
        return result

mounting = sys.argv[1] == "mounting"
results = {}
for fault, on_failure in (("full", "stop"), ("full", "continue"), ("read_only", "stop")) if mounting else ():
    results[f"{fault} {on_failure}"] = run(fault, on_failure)
if not mounting:
    if os.getuid() == 0:
        # Once as root, so that everything is imported: another user may not be able to read the environment.
        with tempfile.TemporaryDirectory() as name:
            toy_trainer(Path(name), [CrashSafeCheckpoint(monitor=None)], max_epochs=3).fit(Wide(), wide_loader())
            print(CrashSafeCheckpoint.latest(name))
        os.setuid(65534)  # the rights of files do not bind root
    results["denied stop"] = run("denied", "stop")
print(json.dumps(results))
"""


class Disturbed(Wide):
    """Before its third epoch something happens to the disk, before its fifth it is over."""

    def __init__(self, folder, fault):
        super().__init__()
        self.folder, self.fault = folder, fault

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            getattr(self, self.fault)()
        elif self.current_epoch == 4 and self.fault == "full":
            (self.folder / "ballast").unlink()

    def full(self):
        (self.folder / "ballast").write_bytes(bytes(shutil.disk_usage(self.folder).free - 40_000))

    def denied(self):
        os.chmod(self.folder / "checkpoints", 0o555)

    def read_only(self):
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)

    def vanished(self):
        (self.folder / "checkpoints").rename(self.folder / "elsewhere")


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """What became of each run; those that need a mount are left out where none can be made."""
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(SCRIPT)
    results = {}
    own = ["unshare", "--mount", "--map-root-user"]
    mounts = subprocess.run([*own, "true"], capture_output=True, check=False).returncode == 0
    for prefix, kind in ((own, "mounting"), ([], "denied")):
        if kind == "denied" or mounts:
            answer = subprocess.run(
                [*prefix, sys.executable, str(script), kind],
                cwd="/", capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            assert answer.returncode == 0, answer.stderr
            results |= json.loads(answer.stdout.splitlines()[-1])
    return results


def files_of(*steps):
    return [f"step-0000000{step}.{end}" for step in steps for end in ("ckpt", "json")]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("full", "No space left on device"),
        ("denied", "Permission denied"),
        ("read_only", "Read-only file system"),
    ],
)
def test_a_disk_that_fails_stops_the_run_and_what_was_written_stays(disturbed, fault, message):
    if f"{fault} stop" not in disturbed:
        pytest.skip("no file system can be mounted here")
    found = disturbed[f"{fault} stop"]
    assert re.search(f"step-00000003.ckpt could not be written: .*({message})", found["error"])
    assert "on_failure=continue trains on" in found["error"]
    assert found["latest"] == "step-00000002.ckpt"
    assert found["names"] == files_of(1, 2)


def test_a_run_may_go_on_over_a_full_disk(disturbed):
    if "full continue" not in disturbed:
        pytest.skip("no file system can be mounted here")
    found = disturbed["full continue"]
    assert found["error"] == ""
    assert found["warned"] == 2  # after the third and fourth epoch; then there was room again
    assert found["latest"] == "step-00000006.ckpt"
    assert found["names"] == files_of(1, 2, 5, 6)


def test_a_folder_that_vanished_is_made_again(tmp_path):
    toy_trainer(tmp_path, [CrashSafeCheckpoint(monitor=None)], max_epochs=4).fit(
        Disturbed(tmp_path, "vanished"), wide_loader()
    )
    assert sorted(path.name for path in tmp_path.glob("checkpoints/step*")) == files_of(3, 4)
    assert latest(tmp_path / "elsewhere") == str(tmp_path / "elsewhere" / "step-00000002.ckpt")


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")

    class Never(ToyModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError("it has begun to train")

    with pytest.raises(CheckpointError, match="checkpoints could not be written: File exists"):
        toy_trainer(tmp_path, [CrashSafeCheckpoint()]).fit(Never(), toy_loader())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_going_on_the_best_is_what_was_written(tmp_path, asynchronous, monkeypatch):
    class Scripted(ToyModule):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor((1.0, 0.5, 0.7, 2.0)[self.current_epoch]))

    real = CheckpointFolder.write

    def write(self, checkpoint, name):
        if checkpoint["epoch"] == 1:
            raise TypeError("cannot pickle it")
        return real(self, checkpoint, name)

    monkeypatch.setattr(CheckpointFolder, "write", write)
    callback = CrashSafeCheckpoint(on_failure="continue", asynchronous=asynchronous)
    with pytest.warns(UserWarning, match="step-00000008.ckpt could not be written: TypeError: cannot pickle it"):
        toy_trainer(tmp_path, [callback], max_epochs=4).fit(Scripted(), toy_loader(), toy_loader())
    # At once 0.7 is compared with what is there; behind the training the failure is known only after the comparison.
    assert callback.best_model_score == pytest.approx(1.0 if asynchronous else 0.7)
    best = torch.load(callback.best_model_path, weights_only=True)
    assert best["global_step"] == (4 if asynchronous else 12)


def test_the_oldest_one_is_written_over_by_the_next_which_may_be_shorter(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step, numbers in enumerate((9000, 100, 5000, 100), 1):
        name = folder.new_name(step)
        files = folder.write({"weight": torch.full((numbers,), float(step))}, name)
        folder.commit(name, files, {"resumable": True})
        folder.point("last", name)
        folder.prune(1)
        assert latest(tmp_path) == str(tmp_path / name)
        assert torch.load(tmp_path / name, weights_only=True)["weight"].sum() == step * numbers
        assert len(list(tmp_path.glob("step*.ckpt"))) == 1
    assert (tmp_path / ".spare.ckpt.tmp").exists()
    folder.clear()
    assert not (tmp_path / ".spare.ckpt.tmp").exists()


def test_what_a_file_held_before_is_not_hashed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(12_000_000))
    parts = [os.urandom(length) for length in (5_000_000, 1_000_000, 10)]
    with HashedFile(str(path)) as file:
        for part in parts:
            file.write(part)
            time.sleep(0.05)  # in which what is there is hashed
        facts = file.found()
    content = b"".join(parts)
    assert path.read_bytes() == content
    assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("hold", ["open", "map", "link"])
def test_one_that_somebody_reads_or_has_linked_is_not_written_over(tmp_path, hold):
    folder = CheckpointFolder(tmp_path)
    held = None
    for step in range(1, 6):
        name = folder.new_name(step)
        files = folder.write({"weight": torch.full((5000,), float(step))}, name)
        folder.commit(name, files, {"resumable": True})
        folder.point("last", name)
        if step == 2 and hold == "open":
            held = open(tmp_path / name, "rb")  # noqa: SIM115 -- open while others are written is the case
        elif step == 2 and hold == "map":
            mapped = torch.load(tmp_path / name, mmap=True, weights_only=True)["weight"]
        elif step == 2:
            os.link(tmp_path / name, tmp_path / "mine")
        folder.prune(1)
    if hold == "map":
        assert mapped.sum() == 10_000
        return
    with held or open(tmp_path / "mine", "rb") as file:
        assert torch.load(file, weights_only=True)["weight"].sum() == 10_000


def test_an_old_one_that_cannot_be_removed_does_not_cost_the_new_one(tmp_path, monkeypatch):
    def refused(self, place):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(CheckpointFolder, "_retire", refused)
    for dirname in ("checkpoints", f"memory://{tmp_path.name}"):
        callback = CrashSafeCheckpoint(monitor=None, dirname=dirname, keep_checkpoints=1)
        with pytest.warns(UserWarning, match="an old checkpoint could not be removed: .*Device or resource busy"):
            toy_trainer(tmp_path, [callback], max_epochs=2).fit(Wide(), wide_loader())
        found = latest(dirname if "://" in dirname else tmp_path / dirname)
        assert found is not None
        assert found.endswith("step-00000002.ckpt")


def test_what_fails_behind_the_training_is_said_at_the_next_checkpoint(tmp_path):
    callback = CrashSafeCheckpoint(monitor=None, asynchronous=True)

    class InTheWay(Wide):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                callback._behind.finish()
                (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
                (tmp_path / "checkpoints").write_text("a file is in the way")

    trainer = toy_trainer(tmp_path, [callback], max_epochs=6)
    with pytest.raises(CheckpointError, match=r"step-00000003.ckpt could not be written: File exists"):
        trainer.fit(InTheWay(), wide_loader())
    assert trainer.global_step == 4
    assert latest(tmp_path / "elsewhere") == str(tmp_path / "elsewhere" / "step-00000002.ckpt")
