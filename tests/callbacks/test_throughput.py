import importlib
import re
from fractions import Fraction
from types import SimpleNamespace

import lightning.pytorch
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import trainerkit.trainer
from tests.support import ROOT, ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint, GradientCheck, Throughput
from trainerkit.callbacks._measure import FlopCounter, Stopwatch, leading_dimension
from trainerkit.callbacks._peak_flops import _TERA, dense_peak, matmul_kind
from trainerkit.callbacks.throughput import Window, throughput
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.testing.syncs import SyncCounter


class Clock:
    """Time that passes only where a test says so."""

    now = 1000.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


class Slow(ToyModule):
    """A step takes 2 seconds, a batch of validation 50."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.passes(2)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.clock.passes(50)
        self.log("val/loss", self.loss(batch))


class SlowData(Dataset):
    """8 samples a batch; each takes 1/16 second, so a batch 0.5."""

    def __init__(self, clock, rows=32):
        self.clock, self.rows = clock, rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.clock.passes(0.0625)
        return torch.full((4,), float(index)), torch.tensor(0.0)


class SlowToStart(DataLoader):
    """Takes 500 seconds to start its workers."""

    def __init__(self, clock):
        super().__init__(toy_loader().dataset, batch_size=8)
        self.clock = clock

    def __iter__(self):
        self.clock.passes(500)
        return super().__iter__()


class Kept(Callback):
    """Keeps what was logged, step by step."""

    def __init__(self, clock=None):
        self.seen = {}
        self.clock = clock

    def on_train_batch_end(self, trainer, *_):
        found = {
            n.partition("/")[2]: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("throughput")
        }
        if found and found not in self.seen.values():
            self.seen[trainer.global_step] = found

    def on_train_epoch_end(self, trainer, pl_module):
        if self.clock is not None:
            self.clock.passes(1000)

    on_validation_end = on_train_epoch_end


def timed(clock, **options):
    callback = Throughput(**{"every_n_steps": 2} | options)
    callback._clock = clock
    return callback


def plain(tmp_path, callbacks, module=None, **options):
    torch.manual_seed(0)
    module = module or ToyModule()
    trainer = toy_trainer(tmp_path, callbacks, **{"max_epochs": 1} | options)
    trainer.fit(module, toy_loader())
    return module, trainer


# The pure functions


def test_rates_equal_exact_fractions():
    window = Window(seconds=7.3, waited=1.7, steps=11, samples=352, tokens=90112, flops=3.3e12)
    found = throughput(window, processes=3, peak_flops=1e13)
    seconds, waited = Fraction(7.3) / 3, Fraction(1.7) / 3
    expected = {
        "steps_per_second": 11 / seconds,
        "samples_per_second": 352 / seconds,
        "tokens_per_second": 90112 / seconds,
        "data_wait_seconds": waited,
        "data_wait_fraction": waited / seconds,
        "flops_per_second": Fraction(3.3e12) / seconds,
        "mfu": Fraction(3.3e12) / seconds / (3 * Fraction(1e13)),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-14)


def test_a_window_of_twice_everything_has_the_same_rates_and_twice_the_time_half_of_them():
    once = throughput(Window(2.0, 0.5, 4, 32, 64, 1e9), 1, 1e10)
    both = throughput(Window(4.0, 1.0, 8, 64, 128, 2e9), 1, 1e10)
    assert both | {"data_wait_seconds": 0.5} == once
    slower = throughput(Window(4.0, 1.0, 4, 32, 64, 1e9), 1, 1e10)
    assert all(slower[name] == once[name] / 2 for name in once if name.endswith("per_second") or name == "mfu")


def test_equal_processes_have_the_mfu_of_one():
    one = throughput(Window(2.0, 0.5, 4, 32, None, 1e9), 1, 1e10)
    four = throughput(Window(8.0, 2.0, 4, 128, None, 4e9), 4, 1e10)
    assert four["mfu"] == one["mfu"]
    assert four["samples_per_second"] == 4 * one["samples_per_second"]
    assert "tokens_per_second" not in one


def test_a_stopwatch_counts_only_while_it_runs():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.passes(5)
    watch.start()
    clock.passes(1)
    watch.wait()
    clock.passes(2)
    watch.stop()  # ends the waiting too
    clock.passes(100)
    watch.start()
    watch.start()
    clock.passes(4)
    watch.read()
    assert (watch.seconds, watch.waited) == (7, 2)
    watch.reset()
    clock.passes(3)
    watch.read()
    assert (watch.seconds, watch.waited) == (3, 0)


def test_samples_are_the_first_tensors_leading_dimension():
    tensor = torch.zeros(5, 3)
    assert [leading_dimension(b) for b in (tensor, [tensor], {"a": "text", "b": (tensor, 1)})] == [5, 5, 5]
    assert leading_dimension({"scale": torch.tensor(1.0), "x": tensor}) == 5
    assert leading_dimension({"names": ["a", "b"]}) is None


# What is timed


def test_validation_checkpoints_and_epoch_ends_are_not_training_time(tmp_path):
    clock = Clock()
    callback, kept, module = timed(clock), Kept(clock), Slow(clock)
    saver = CrashSafeCheckpoint(monitor=None)
    module.on_save_checkpoint = lambda checkpoint: clock.passes(300)
    trainer = toy_trainer(tmp_path, [callback, kept, saver], max_epochs=3, val_check_interval=2)
    trainer.fit(module, DataLoader(SlowData(clock), batch_size=8), SlowToStart(clock))
    assert clock.now - 1000 >= 12 * 2.5 + 6 * (500 + 4 * 50) + 6 * 1000 + 3 * 300  # it did pass
    assert list(kept.seen) == [2, 4, 6, 8, 10, 12]
    # Windows of two steps: 2 + 0.5 seconds each; the first has one, the untimed step before it none.
    rates = {"steps_per_second": 1 / 2.5, "samples_per_second": 8 / 2.5, "data_wait_fraction": 0.2}
    rates |= {"flops_per_second": 8 * 16 / 2.5}
    for step in range(2, 13, 2):
        expected = rates | {"samples": 8 * step, "data_wait_seconds": 0.5 if step == 2 else 1.0}
        assert kept.seen[step] == pytest.approx(expected, rel=1e-6)


def test_what_others_do_between_two_steps_is_training_time_but_no_waiting_for_data(tmp_path):
    class Dawdles(Callback):
        def on_train_batch_end(self, *_):
            clock.passes(1)

    clock = Clock()
    callback, kept = timed(clock), Kept()
    trainer = toy_trainer(tmp_path, [callback, kept, Dawdles()], max_epochs=1)
    trainer.fit(Slow(clock), DataLoader(SlowData(clock), batch_size=8))
    assert kept.seen[4]["steps_per_second"] == pytest.approx(2 / 7)
    assert kept.seen[4]["data_wait_seconds"] == 1.0


@pytest.mark.parametrize("manual", [False, True])
def test_steps_are_optimizer_steps_and_samples_those_of_all_their_batches(tmp_path, manual):
    class Manual(Slow):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)]

    clock = Clock()
    callback, kept = timed(clock), Kept()
    options = {} if manual else {"accumulate_grad_batches": 2}
    trainer = toy_trainer(tmp_path, [callback, kept], max_epochs=2, **options)
    trainer.fit((Manual if manual else Slow)(clock), DataLoader(SlowData(clock), batch_size=8))
    last = list(kept.seen.values())[-1]
    a_step = 2 * 2 + 0.5 if manual else 2 * (2 + 0.5)
    assert last["steps_per_second"] == pytest.approx(1 / a_step)
    assert last["samples_per_second"] == pytest.approx((8 if manual else 16) / a_step)
    assert last["samples"] == 64


def test_tokens_by_key_by_function_and_as_a_tensor_on_the_device(tmp_path):
    class Dicts(Slow):
        def loss(self, batch):
            return super().loss((batch["x"], batch["x"].sum(1)))

    class Rows(SlowData):
        def __getitem__(self, index):
            return {"x": super().__getitem__(index)[0]}

    found = []
    for tokens in ("x", lambda batch: 4 * len(batch["x"]), lambda batch: torch.ones_like(batch["x"]).sum()):
        clock = Clock()
        kept = Kept()
        trainer = toy_trainer(
            tmp_path, [timed(clock, tokens=tokens, batch_size=lambda b: 2 * len(b["x"])), kept], max_epochs=1
        )
        trainer.fit(Dicts(clock), DataLoader(Rows(clock), batch_size=8))
        found.append(kept.seen[4])
    assert found[0] == found[1] == found[2]
    assert found[0]["tokens_per_second"] == pytest.approx(2 * 32 / 5)
    assert (found[0]["tokens"], found[0]["samples"]) == (128, 64)


# FLOPs


def test_the_operations_of_a_step_are_those_of_its_matrix_products(tmp_path):
    _, trainer = plain(tmp_path, [Throughput(every_n_steps=2)])
    callback = trainer.callbacks[0]
    # Forward 2·4 a sample; backward the same for the weight's gradient, and none for the input's.
    assert callback._flops_per_sample == 2 * 2 * 4


def test_counting_equals_torchs_own_and_the_step_is_an_ordinary_one(tmp_path):
    with_it, _ = plain(tmp_path, [Throughput(every_n_steps=1)], max_epochs=2)
    without, _ = plain(tmp_path, [], max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(with_it.parameters(), without.parameters(), strict=True))
    layers = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    x = torch.randn(5, 1, 8)
    with FlopCounterMode(display=False) as expected:
        layers(x).sum().backward()
    counter = FlopCounter()
    layers(x).sum().backward()
    assert counter.stop() == expected.get_total_flops() > 0


def test_compiled_modules_are_counted_and_compiled_all_the_same(tmp_path):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Own(torch.nn.Linear):
        def forward(self, x):  # a function of its own: other tests may have made compilation give up on Linear's
            return torch.nn.functional.linear(x, self.weight, self.bias)

    class Compiled(ToyModule):
        def __init__(self):
            super().__init__()
            own = Own(4, 1)
            own.load_state_dict(self.layer.state_dict())
            self.layer = torch.compile(own, backend=backend)

        def validation_step(self, batch, batch_idx): ...

    module, trainer = plain(tmp_path, [Throughput(every_n_steps=2)], Compiled())
    reference, _ = plain(tmp_path, [])
    assert trainer.callbacks[0]._flops_per_sample == 16
    assert len(compiled) >= 1  # under a bare counter it never would be
    weights = dict(module.layer.named_parameters())["_orig_mod.weight"]
    assert torch.equal(weights, reference.layer.weight)


@pytest.mark.parametrize("turn", [1, -1])
def test_what_another_callback_computes_is_not_counted(tmp_path, turn):
    callbacks = [Throughput(every_n_steps=2), GradientCheck(5)]
    plain(tmp_path, callbacks[::turn])
    assert callbacks[0]._flops_per_sample == 16


def test_a_module_may_tell_its_operations(tmp_path):
    clock, seen = Clock(), Kept()

    class Tells(Slow):
        def flops_per_sample(self):
            return 32.0

    trainer = toy_trainer(tmp_path, [timed(clock, flops="model"), seen], max_epochs=1)
    trainer.fit(Tells(clock), DataLoader(SlowData(clock), batch_size=8))
    assert seen.seen[4]["flops_per_second"] == pytest.approx(2 * 16 * 16 / 5)
    with pytest.raises(ValueError, match="flops=model: Slow has no flops_per_sample\\(\\); take 'count' or a number"):
        toy_trainer(tmp_path, [timed(clock, flops="model")]).fit(Slow(clock), DataLoader(SlowData(clock), batch_size=8))


def test_mfu_is_flops_over_the_peak_and_absent_where_the_peak_is_unknown(tmp_path):
    clock = Clock()
    kept = [Kept() for _ in range(3)]
    options = [{"peak_flops": 1000.0}, {"peak_flops": 1000.0, "flops": 32.0}, {"flops": None, "peak_flops": 1000.0}]
    for seen, chosen in zip(kept, options, strict=True):
        trainer = toy_trainer(tmp_path, [timed(clock, **chosen), seen], max_epochs=1)
        trainer.fit(Slow(clock), DataLoader(SlowData(clock), batch_size=8))
    counted, given, none = (seen.seen[4] for seen in kept)
    assert counted["flops_per_second"] == pytest.approx(16 * 16 / 5)
    assert counted["mfu"] == pytest.approx(16 * 16 / 5 / 1000)
    assert given["mfu"] == pytest.approx(2 * counted["mfu"])
    assert not {"mfu", "flops_per_second"} & set(none)
    _, trainer = plain(tmp_path, [Throughput(every_n_steps=2)])
    assert "throughput/flops_per_second" in trainer.callback_metrics
    assert "throughput/mfu" not in trainer.callback_metrics  # a CPU is not in the table


@pytest.mark.parametrize(
    ("name", "kind", "tera"),
    [
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA H200 NVL", "bfloat16", 835.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "float16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla V100S-PCIE-32GB", "float16", 130),
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "tf32", 8.1),
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L40", "bfloat16", 181),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA H100", "bfloat16", None),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
        ("NVIDIA H200", None, None),
    ],
)
def test_dense_peaks_by_name_and_none_for_what_only_looks_alike(name, kind, tera):
    assert dense_peak(name, kind) == (None if tera is None else tera * 1e12)


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "callbacks" / "throughput.md").read_text(encoding="utf-8")
    table = page.partition("## Peaks")[2].partition("## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    figures = [tuple(None if cell == "–" else float(cell) for cell in row[1:6]) for row in rows[2:]]
    assert figures == list(_TERA.values())


def test_precisions_are_known_by_lightnings_names():
    assert [matmul_kind(p) for p in ("bf16-mixed", "16-true", "64-true", "transformer-engine")] == [
        "bfloat16", "float16", "float64", None,
    ]  # fmt: skip
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert matmul_kind("32-true") == "float32"
        torch.set_float32_matmul_precision("high")
        assert matmul_kind("32-true") == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


# Everywhere


def test_what_was_seen_goes_through_a_resume_in_mid_epoch(tmp_path):
    class Dicts(ToyModule):
        def loss(self, batch):
            return super().loss((batch["x"], batch["x"].sum(1)))

    class Saves(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    def fit(callback, **options):
        data = BatchLoader(ArrayDataset({"x": torch.randn(32, 4)}), EpochBatches(32, 8, shuffle=False))
        trainer = toy_trainer(tmp_path, [callback, Saves()], max_epochs=2)
        trainer.fit(Dicts(), data, **options)
        return [int(trainer.callback_metrics[f"throughput/{name}"]) for name in ("samples", "tokens")]

    assert fit(Throughput(every_n_steps=2, tokens="x")) == [64, 256]
    assert torch.load(tmp_path / "3.ckpt", weights_only=True)["callbacks"]["Throughput"] == {
        "samples": 24,
        "tokens": 96,
    }
    resumed = Throughput(every_n_steps=1, tokens="x")
    assert fit(resumed, ckpt_path=tmp_path / "3.ckpt") == [64, 256]
    assert resumed.every_n_steps == 1
    assert fit(resumed) == [64, 256]  # another run with the same callback begins anew


def test_starting_the_loader_anew_is_waiting_for_data(tmp_path):
    clock = Clock()
    kept = Kept(clock)
    trainer = toy_trainer(tmp_path, [timed(clock, every_n_steps=4), kept], max_epochs=2)
    trainer.fit(Slow(clock), SlowToStart(clock))
    assert kept.seen[4]["data_wait_seconds"] == 0  # the first start is before the first step, which is not timed
    assert kept.seen[8]["data_wait_seconds"] == 500
    assert kept.seen[8]["steps_per_second"] == pytest.approx(4 / 508)


@pytest.mark.parametrize("kind", [lightning.pytorch.Trainer, trainerkit.trainer.Trainer])
def test_data_are_waited_for_alike_in_lightnings_loop_and_in_ours(tmp_path, kind):
    clock = Clock()
    kept = Kept(clock)
    trainer = kind(
        default_root_dir=tmp_path, callbacks=[timed(clock), kept], max_epochs=2, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Slow(clock), DataLoader(SlowData(clock), batch_size=8))
    assert type(trainer.fit_loop.epoch_loop).__name__ == (
        "_TrainingEpochLoop" if kind is lightning.pytorch.Trainer else "FastTrainingEpochLoop"
    )
    assert kept.seen[8]["data_wait_seconds"] == 1.0
    assert kept.seen[8]["steps_per_second"] == pytest.approx(2 / 5)


def test_an_exception_leaves_loop_and_torch_as_they_were(tmp_path):
    class Fails(ToyModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("in the first step")

    trainer = toy_trainer(tmp_path, [Throughput()])
    with pytest.raises(RuntimeError, match="in the first step"):
        trainer.fit(Fails(), toy_loader())
    assert torch._C._len_torch_dispatch_stack() == 0
    _, other = plain(tmp_path, [Throughput(every_n_steps=2)])
    for loop in (trainer.fit_loop.epoch_loop, other.fit_loop.epoch_loop):
        assert not {"_on_before_fetch", "_on_after_fetch"} & set(loop.__dict__)
        assert "run" not in loop.val_loop.__dict__


def test_a_module_that_skips_its_first_epoch_does_not_leave_the_counter_on(tmp_path):
    class Skips(ToyModule):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 else None

    _, trainer = plain(tmp_path, [Throughput(every_n_steps=2)], Skips(), max_epochs=2)
    assert trainer.callbacks[0]._flops_per_sample == 16
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_runs_in_both_namespaces_without_waiting_between_log_steps(tmp_path, name):
    namespace = importlib.import_module(name)

    class Other(namespace.LightningModule):
        loss, training_step, configure_optimizers = (
            ToyModule.loss, ToyModule.training_step, ToyModule.configure_optimizers
        )  # fmt: skip

        def __init__(self):
            super().__init__()
            self.layer, self.lr = nn.Linear(4, 1), 0.1

    counter = SyncCounter()

    class Opens(namespace.Callback):
        def on_train_batch_start(self, trainer, *_):
            counter.switch((trainer.global_step + 1) % 4 != 0)

    class Closes(namespace.Callback):
        def on_train_batch_end(self, *_):
            counter.switch(False)

    callbacks = [Opens(), Throughput(every_n_steps=4, tokens=lambda batch: (batch[0] > 0).sum()), Closes()]
    trainer = namespace.Trainer(
        default_root_dir=tmp_path, callbacks=callbacks, max_epochs=2, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with counter:
        trainer.fit(Other(), toy_loader())
    assert counter.count == 0
    assert float(trainer.callback_metrics["throughput/samples"]) == 64
    assert float(trainer.callback_metrics["throughput/steps_per_second"]) > 0


def test_two_ranks_log_the_sums_of_both(tmp_path):
    clock = Clock()

    class Writes(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(
                {k: float(v) for k, v in trainer.callback_metrics.items()}, tmp_path / f"{trainer.global_rank}.pt"
            )

    callbacks = [timed(clock, tokens=lambda batch: 3 * len(batch[0])), Writes()]
    trainer = toy_trainer(tmp_path, callbacks, max_epochs=1, devices=2, strategy="ddp_fork")
    trainer.fit(Slow(clock), DataLoader(SlowData(clock), batch_size=4))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert ranks[0] == ranks[1]
    # Four steps of 2 ranks · 4 samples, each 2 seconds and 4/16 of data.
    expected = {"steps_per_second": 1 / 2.25, "samples_per_second": 8 / 2.25, "tokens_per_second": 24 / 2.25}
    expected |= {"samples": 32, "tokens": 96, "data_wait_seconds": 0.5, "flops_per_second": 8 * 16 / 2.25}
    assert {name: ranks[0][f"throughput/{name}"] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_operations_are_not_counted_under_tensor_parallelism():
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    trainer = SimpleNamespace(strategy=SimpleNamespace(_device_mesh=mesh))
    with pytest.raises(ValueError, match="flops=count: must be 'model' or a number"):
        Throughput().setup(trainer, ToyModule(), "fit")
    Throughput(flops=1e6).setup(trainer, ToyModule(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: must be 1 or more"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
        ({"batch_size": "x"}, "batch_size=x: must be 1 or more"),
        ({"tokens": ""}, "tokens='': must be a key"),
        ({"tokens": 3}, "tokens=3: must be a key"),
        ({"flops": "sparse"}, "flops=sparse: must be 'count'"),
        ({"flops": 0}, "flops=0: must be 'count'"),
        ({"peak_flops": -1.0}, "peak_flops=-1.0: must be above 0"),
    ],
)
def test_a_wrong_argument_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Throughput(**options)


def test_what_cannot_be_counted_is_said_at_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match="tokens=ids: must be the key of a tensor in the batch, which has: a list"):
        plain(tmp_path, [Throughput(tokens="ids")])

    class Text(ToyModule):
        def training_step(self, batch, batch_idx):
            return self.layer(torch.ones(1, 4)).sum()

    trainer = toy_trainer(tmp_path, [Throughput()], max_epochs=1)
    with pytest.raises(ValueError, match="batch_size=None: there is no tensor with a leading dimension"):
        trainer.fit(Text(), DataLoader(["a", "b"], batch_size=1))


def test_the_pages_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "callbacks" / "throughput.md").read_text(encoding="utf-8")
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "throughput.md", "exec"), namespace)
    assert namespace
