import importlib
import re
import resource
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from tests.support import ROOT, ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import MemoryMonitor
from trainerkit.callbacks.memory_monitor import device_memory, grows, process_memory, reset_device_peaks
from trainerkit.testing.syncs import SyncCounter

MIB = 2**20


class Hoards(ToyModule):
    """Holds 200 MB more in the third step, and lets go in the sixth."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            self.held = torch.ones(50_000_000)
        if self.trainer.global_step == 5:
            del self.held
        return self.loss(batch)


class Kept(Callback):
    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, *_):
        self.seen[trainer.global_step] = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_an_allocation_moves_the_figures_by_its_size(tmp_path):
    kept = Kept()
    toy_trainer(tmp_path, [MemoryMonitor(every_n_steps=1), kept], max_epochs=2).fit(Hoards(), toy_loader())
    now = {step: seen["memory/process_mib"] for step, seen in kept.seen.items()}
    held = 200_000_000 / MIB
    assert now[3] - now[2] == pytest.approx(held, abs=10)
    assert now[6] - now[5] == pytest.approx(-held, abs=10)
    assert all(
        seen["memory/process_peak_mib"] >= max(now[3], now[step]) - 1 for step, seen in kept.seen.items() if step >= 3
    )


def test_the_peak_is_the_operating_systems():
    assert process_memory()["process_peak"] / 1024 == pytest.approx(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, rel=0.01
    )


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_without_proc_the_peak_alone_is_known(monkeypatch, platform, unit):
    monkeypatch.setattr("trainerkit.callbacks.memory_monitor.Path.exists", lambda self: False)
    monkeypatch.setattr("trainerkit.callbacks.memory_monitor.sys.platform", platform)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert process_memory() == {"process_peak": peak * unit}


def test_only_log_steps_log(tmp_path):
    kept = Kept()
    toy_trainer(tmp_path, [MemoryMonitor(every_n_steps=3), kept], max_epochs=1).fit(ToyModule(), toy_loader())
    assert [bool(kept.seen[step]) for step in (1, 2, 3)] == [False, False, True]
    assert set(kept.seen[3]) == {"memory/process_mib", "memory/process_peak_mib"}


class Allocator:
    """An accelerator's allocator as torch shows it."""

    def __init__(self):
        self.now, self.peak, self.resets = 10 * MIB, 30 * MIB, 0

    def memory_allocated(self, device):
        return self.now

    def max_memory_allocated(self, device):
        return self.peak

    def memory_reserved(self, device):
        return 64 * MIB

    def max_memory_reserved(self, device):
        return 128 * MIB

    def reset_peak_memory_stats(self, device):
        self.resets += 1
        self.peak = self.now


def test_a_devices_peak_is_that_of_its_window(monkeypatch):
    allocator = Allocator()
    monkeypatch.setattr(torch, "toy", allocator, raising=False)
    device = SimpleNamespace(type="toy")
    assert device_memory(device) == {
        "allocated": 10 * MIB, "reserved": 64 * MIB, "allocated_peak": 30 * MIB, "reserved_peak": 128 * MIB,
    }  # fmt: skip
    reset_device_peaks(device)
    assert device_memory(device)["allocated_peak"] == 10 * MIB
    assert device_memory(torch.device("cpu")) == {}
    reset_device_peaks(torch.device("cpu"))  # there is nothing to reset


@pytest.mark.gpu
def test_on_cuda_the_peak_is_what_the_step_took(tmp_path):
    class Takes(ToyModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 1:
                torch.empty(100 * MIB, dtype=torch.uint8, device=self.device)
            return self.loss(batch)

    kept = Kept()
    toy_trainer(tmp_path, [MemoryMonitor(every_n_steps=1), kept], max_epochs=1, accelerator="cuda").fit(
        Takes(), toy_loader()
    )
    peaks = [kept.seen[step]["memory/allocated_peak_mib"] for step in (1, 2, 3)]
    assert peaks[1] - peaks[0] == pytest.approx(100, abs=5)
    assert peaks[2] == pytest.approx(peaks[0], abs=5)


def test_growth_is_every_one_of_the_last_values_above_the_one_before():
    def naive(values, times):
        return len(values) > times and all(values[-i] > values[-i - 1] for i in range(1, times + 1))

    for values in ([1, 2, 3, 4], [4, 1, 2, 3], [1, 2, 2, 3], [1, 2], [], [3, 2, 1, 0]):
        for times in (2, 3):
            assert grows(values, times) == naive(values, times)
            assert grows([v + 100 for v in values], times) == grows(values, times)
            assert grows([9, *values], times) == (grows(values, times) or naive([9, *values], times))


def test_memory_that_grows_at_every_measurement_is_warned_of_once(tmp_path, monkeypatch):
    sizes = iter([9, 5, 6, 7, 8, 9, 10, 11, 12])
    monkeypatch.setattr("trainerkit.callbacks.memory_monitor.process_memory", lambda: {"process": next(sizes) * MIB})
    monitor = MemoryMonitor(every_n_steps=1, warn_after=3)
    with pytest.warns(UserWarning, match=r"process memory has grown 3 times in a row, by 3.0 MiB") as caught:
        toy_trainer(tmp_path, [monitor], max_epochs=2).fit(ToyModule(), toy_loader())
    assert len([w for w in caught if "MemoryMonitor" in str(w.message)]) == 1


def test_memory_that_sometimes_falls_is_not_warned_of(tmp_path, monkeypatch):
    sizes = iter([1, 2, 3, 2, 4, 5, 4, 6])
    monkeypatch.setattr("trainerkit.callbacks.memory_monitor.process_memory", lambda: {"process": next(sizes) * MIB})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MemoryMonitor")
        toy_trainer(tmp_path, [MemoryMonitor(1, warn_after=3)], max_epochs=2).fit(ToyModule(), toy_loader())
    assert next(sizes, None) is None


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_runs_in_both_namespaces_with_manual_optimization_without_waiting(tmp_path, name):
    lightning = importlib.import_module(name)

    class Manual(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(ToyModule.loss(self, batch))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)]

    counter = SyncCounter()

    class Opens(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            counter.switch(True)

    class Closes(lightning.Callback):
        def on_train_batch_end(self, *_):
            counter.switch(False)

    trainer = lightning.Trainer(
        default_root_dir=tmp_path, callbacks=[Opens(), MemoryMonitor(every_n_steps=3), Closes()], max_epochs=1,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with counter:
        trainer.fit(Manual(), toy_loader())
    assert counter.count == 0
    assert float(trainer.callback_metrics["memory/process_mib"]) > 1


def test_ranks_give_the_largest_and_the_sum(tmp_path):
    class Uneven(ToyModule):
        def on_train_start(self):
            if self.trainer.global_rank == 1:
                self.held = torch.ones(25_000_000)

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    class Writes(Callback):
        def on_train_end(self, trainer, pl_module):
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
            torch.save(found | {"own": process_memory()["process"] / MIB}, tmp_path / f"{trainer.global_rank}.pt")

    trainer = toy_trainer(
        tmp_path, [MemoryMonitor(every_n_steps=2), Writes()], max_epochs=1, devices=2, strategy="ddp_fork"
    )
    trainer.fit(Uneven(), toy_loader())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["memory/process_mib"] == second["memory/process_mib"] == pytest.approx(second["own"], abs=10)
    assert second["own"] - first["own"] == pytest.approx(100_000_000 / MIB, abs=20)
    assert first["memory/process_mib_sum"] == pytest.approx(first["own"] + second["own"], abs=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: must be 1 or more"),
        ({"warn_after": 1}, "warn_after=1: must be 2 or more"),
    ],
)
def test_a_wrong_argument_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryMonitor(**options)


def test_the_pages_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "callbacks" / "memory_monitor.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "memory_monitor.md", "exec"), {})
