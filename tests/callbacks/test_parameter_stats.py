import json
import math

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from tests.support import toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint, ParameterNormClip, ParameterStats
from trainerkit.callbacks._layers import MOST_LAYERS, layers_of
from trainerkit.callbacks.parameter_stats import STATISTICS, Groups, summarize, weight_columns
from trainerkit.functional.rank import effective_rank
from trainerkit.functional.statistics import histogram, mean_and_squares, norms, pooled_moments
from trainerkit.testing.syncs import SyncCounter
from trainerkit.trainer import Trainer as FastTrainer


def net_class(base):
    class Net(base):
        """Two layers, a frozen one, a parameter that no gradient reaches."""

        def __init__(self, compiled=False, late=False, **options):
            super().__init__()
            self.options = {"fused": False} | options
            self.compiled = compiled
            if not late:
                self.build()

        def configure_model(self):
            if not hasattr(self, "head"):
                self.build()

        def build(self):
            body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
            self.body = torch.compile(body, backend="eager") if self.compiled else body
            self.head = nn.Linear(5, 1)
            self.frozen = nn.Linear(5, 5).requires_grad_(False)
            self.unused = nn.Parameter(torch.tensor([3.0, 0.0, 4.0]))
            with torch.no_grad():
                self.head.weight[0, :2] = 0

        def training_step(self, batch, batch_idx):
            x, y = batch
            hidden = self.body(x)
            return (self.head(hidden + self.frozen(hidden))[:, 0] - y).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02, **self.options)

    return Net


Net = net_class(LightningModule)


class Observed(Callback):
    """What a per-tensor loop in float64 finds: weights, gradients before clipping, updates, of each step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = dict(pl_module.named_parameters())
        self.steps.append({n: [p.detach().double().clone(), p.grad, None] for n, p in parameters.items()})
        for name, p in parameters.items():
            self.steps[-1][name][1] = None if p.grad is None else p.grad.double().clone()

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.steps and next(iter(self.steps[-1].values()))[2] is None:
            for name, p in pl_module.named_parameters():
                self.steps[-1][name][2] = p.detach().double() - self.steps[-1][name][0]


class Log(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    name = version = ""

    def log_metrics(self, metrics, step=None):
        if any("/" in key for key in metrics):
            self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_):
        pass


def naive(step, layer_of):
    """The documented formulas, tensor by tensor."""
    result = {}
    groups = {}
    for name in step:
        groups.setdefault(layer_of[name], []).append(name)
        groups.setdefault("total", []).append(name)
    for layer, names in groups.items():
        values = torch.cat([step[name][0].flatten() for name in names])
        with_gradient = [name for name in names if step[name][1] is not None]
        result[f"norm/{layer}"] = values.norm()
        result[f"mean/{layer}"], result[f"std/{layer}"] = values.mean(), values.std(correction=0)
        result[f"max_abs/{layer}"], result[f"zeros/{layer}"] = values.abs().max(), (values == 0).double().mean()
        if with_gradient:
            weight, gradient, update = (
                torch.cat([step[name][part].flatten() for name in with_gradient]).norm() for part in range(3)
            )
            result[f"gradient_norm/{layer}"], result[f"gradient_to_weight/{layer}"] = gradient, gradient / weight
            result[f"update_to_weight/{layer}"] = update / weight
    return {f"parameters/{key}": float(value) for key, value in result.items()}


QUIET = {
    "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip
LAYER_OF = {
    "body.0.weight": "body.0", "body.0.bias": "body.0", "body.2.weight": "body.2", "body.2.bias": "body.2",
    "head.weight": "head", "head.bias": "head", "frozen.weight": "frozen", "frozen.bias": "frozen", "unused": "unused",
}  # fmt: skip


def fit(tmp_path, stats, module=None, ours=False, resume=None, loader=(), **options):
    torch.manual_seed(0)
    observed, log = Observed(), Log()
    module = Net() if module is None else module if isinstance(module, nn.Module) else module()
    callbacks = [*([stats] if isinstance(stats, Callback) else stats), observed]
    options = {"max_epochs": 1, "logger": log, "gradient_clip_val": 0.1} | options
    trainer = toy_trainer(tmp_path, callbacks, **options)
    if ours:
        trainer = FastTrainer(default_root_dir=tmp_path, callbacks=callbacks, **QUIET, **options)
    trainer.fit(module, toy_loader() if loader == () else loader, ckpt_path=resume)
    return trainer, observed, log


def compare(row, expected, rel=1e-5):
    assert set(row) == set(expected)
    for key, value in row.items():
        assert value == pytest.approx(expected[key], rel=rel, abs=1e-9), key


@pytest.mark.parametrize("ours", [False, True], ids=["lightnings_loop", "our_loop"])
def test_every_statistic_equals_a_per_tensor_loop_in_float64(tmp_path, ours):
    _, observed, log = fit(tmp_path, ParameterStats(1, 1), ours=ours)
    assert list(log.rows) == [0, 1, 2, 3]
    for step, row in log.rows.items():
        compare(row, naive(observed.steps[step], LAYER_OF))
    assert "parameters/gradient_norm/frozen" not in row
    assert "parameters/update_to_weight/unused" not in row
    assert row["parameters/zeros/unused"] == pytest.approx(1 / 3)
    # Gradients are those before the clipping, which leaves 0.1 at most.
    assert row["parameters/gradient_norm/total"] > 0.15


def test_cheap_statistics_come_often_and_the_rest_at_their_own_pace(tmp_path):
    _, _, log = fit(tmp_path, ParameterStats(2, 5), max_epochs=3)
    cheap = {"norm", "gradient_norm", "gradient_to_weight"}
    kinds = {step + 1: {key.split("/")[1] for key in row} for step, row in log.rows.items()}
    full = set(STATISTICS)
    assert kinds == {2: cheap, 4: cheap, 6: full, 8: cheap, 10: full, 12: cheap}


def test_accumulated_batches_are_one_step(tmp_path):
    _, observed, log = fit(tmp_path, ParameterStats(1, 1), accumulate_grad_batches=2)
    assert list(log.rows) == [0, 1]
    compare(log.rows[1], naive(observed.steps[1], LAYER_OF))


def test_statistics_and_parameters_are_chosen_by_patterns_and_the_prefix_is_the_callbacks_own(tmp_path):
    two = [
        ParameterStats(1, 1, parameters="body.*", statistics=["*norm", "zeros"], depth=1),
        ParameterStats(1, 1, parameters=["head.*"], statistics="update*", prefix="last", effective_rank=True),
    ]
    _, observed, log = fit(tmp_path, two)
    expected = {
        f"parameters/{kind}/{layer}" for kind in ("norm", "gradient_norm", "zeros") for layer in ("body", "total")
    }
    expected |= {
        f"last/{kind}/{layer}" for kind in ("update_to_weight", "effective_rank") for layer in ("head", "total")
    }
    assert set(log.rows[3]) == expected
    of_body = [values[0].flatten() for name, values in observed.steps[3].items() if name.startswith("body")]
    assert log.rows[3]["parameters/norm/body"] == pytest.approx(float(torch.cat(of_body).norm()), rel=1e-5)
    assert log.rows[3]["last/effective_rank/head"] == pytest.approx(1.0)  # one row


def test_a_48_layer_model_logs_hundreds_of_series_not_thousands(tmp_path):
    class Deep(LightningModule):
        def __init__(self):
            super().__init__()
            parts = ("q", "k", "v", "out", "up", "down", "norm")
            self.blocks = nn.ModuleList()
            for _ in range(48):
                halves = [nn.ModuleDict({part: nn.Linear(2, 2) for part in parts}) for _ in range(2)]
                self.blocks.append(nn.ModuleDict({"attention": halves[0], "mlp": halves[1]}))

        def training_step(self, batch, batch_idx):
            return sum(p.square().sum() for p in self.parameters())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    _, _, log = fit(tmp_path, ParameterStats(1, 1), Deep(), limit_train_batches=1)
    assert len(list(Deep().parameters())) == 48 * 28
    # At depth 2 there are 48 layers, at depth 3 96, at depth 4 672, which is more than 150.
    assert len(log.rows[0]) == (96 + 1) * len(STATISTICS) < 1000
    names = [name for name, _ in Deep().named_parameters()]
    assert len(set(layers_of(names))) == 96 <= MOST_LAYERS
    assert len(set(layers_of(names, depth=2))) == 48
    assert set(layers_of(["a.b.weight", "a.b.bias", "a.weight", "scale"])) == {"a.b", "a", "scale"}


def size(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


class Pair(LightningModule):
    """Two networks with an optimizer each; the second steps only in some batches."""

    def __init__(self, steps=(0, 1, 2, 3)):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic, self.loose = nn.Linear(4, 3), nn.Linear(3, 1), nn.Linear(2, 2)
        self.steps = steps
        self.found = {}

    def training_step(self, batch, batch_idx):
        for index, network in enumerate((self.generator, self.critic)):
            if index == 1 and batch_idx not in self.steps:
                continue
            optimizer = self.optimizers()[index]
            for _ in range(2 - index):  # the generator steps twice
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.generator(batch[0])).square().mean())
                before = [p.detach().double().clone() for p in network.parameters()]
                optimizer.step()
                after = [p.detach().double() for p in network.parameters()]
                change = size([a - b for a, b in zip(after, before, strict=True)])
                found = size([p.grad for p in network.parameters()]), change / size(before)
                self.found.setdefault((batch_idx, index), found)  # of the first step in the batch

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.generator, self.critic)]


def test_with_manual_optimization_each_optimizers_first_step_of_a_batch_measures_its_own(tmp_path):
    module = Pair()
    _, _, log = fit(tmp_path, ParameterStats(1, 1), module, gradient_clip_val=None)
    for (batch, index), (gradient, update) in module.found.items():
        for layer in (("generator", "critic")[index], f"total_{index}"):
            assert log.rows[batch][f"parameters/gradient_norm/{layer}"] == pytest.approx(gradient, rel=1e-5)
            assert log.rows[batch][f"parameters/update_to_weight/{layer}"] == pytest.approx(update, rel=1e-4)
    assert "parameters/norm/loose" in log.rows[0]
    assert not {key for key in log.rows[0] if key.endswith("/total")}


def test_a_generator_alone_can_be_measured(tmp_path):
    module = Pair()
    _, _, log = fit(tmp_path, ParameterStats(1, 1, parameters="generator.*"), module, gradient_clip_val=None)
    assert {key.rpartition("/")[2] for key in log.rows[3]} == {"generator", "total_0"}
    assert log.rows[3]["parameters/gradient_norm/total_0"] == pytest.approx(module.found[3, 0][0], rel=1e-5)


def test_an_optimizer_that_does_not_step_when_it_is_due_is_measured_at_its_next_step(tmp_path):
    module = Pair(steps=(0, 2))
    _, _, log = fit(tmp_path, ParameterStats(2, 2), module, gradient_clip_val=None)
    generator = {step for step, row in log.rows.items() if "parameters/norm/generator" in row}
    critic = {step for step, row in log.rows.items() if "parameters/norm/critic" in row}
    assert (generator, critic) == ({1, 3}, {2})
    assert log.rows[2]["parameters/gradient_norm/total_1"] == pytest.approx(module.found[2, 1][0], rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_gradient_scaler_gradients_are_unscaled_and_a_skipped_step_updates_nothing(tmp_path, fused):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    _, observed, log = fit(
        tmp_path, ParameterStats(1, 1), Overflows(fused=fused), plugins=[plugin], gradient_clip_val=None
    )
    expected = naive(observed.steps[0], LAYER_OF)
    if fused:  # these are still scaled when the hooks see them
        expected |= {key: value / 1024 for key, value in expected.items() if "/gradient_" in key}
    compare(log.rows[0], expected, rel=1e-4)
    assert log.rows[0]["parameters/gradient_norm/total"] < 20
    skipped = log.rows[2]
    assert skipped["parameters/update_to_weight/total"] == 0
    assert not math.isfinite(skipped["parameters/gradient_norm/body.0"])
    assert skipped["parameters/norm/body.0"] == pytest.approx(
        naive(observed.steps[2], LAYER_OF)["parameters/norm/body.0"]
    )


def test_the_update_is_what_is_left_after_a_norm_clip_wherever_it_stands(tmp_path):
    stats, clip = ParameterStats(1, 1), ParameterNormClip(max_norm=0.5)
    _, observed, log = fit(tmp_path, [stats, clip])
    key = "parameters/update_to_weight/body.0"
    assert log.rows[0][key] == pytest.approx(naive(observed.steps[0], LAYER_OF)[key], rel=1e-5)
    assert log.rows[0][key] > 0.3  # most of it is the clip's


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_the_rhythm_goes_on_after_a_resume_in_the_middle_of_an_epoch(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    _, _, whole = fit(tmp_path, [ParameterStats(2, 2), Saves(), CrashSafeCheckpoint()], max_epochs=2)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)["callbacks"]["ParameterStats"]
    assert saved == {"often": [2], "fully": [2]}
    stats = ParameterStats(2, 2)
    _, _, log = fit(tmp_path, [stats, CrashSafeCheckpoint()], max_epochs=2, resume=tmp_path / "3.ckpt")
    assert set(log.rows) == {3, 5, 7} == {step for step in whole.rows if step > 2}
    assert stats.state_dict() == {"often": [8], "fully": [8]}


def test_a_second_fit_begins_anew_and_leaves_no_hooks(tmp_path):
    stats = ParameterStats(2, 2)
    optimizers = []
    for run in range(2):
        trainer, _, log = fit(tmp_path / str(run), stats)
        assert list(log.rows) == [1, 3]
        optimizers += trainer.optimizers
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in optimizers)

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, stats, module)
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("every", "log_every", "waiting"), [(2, 2, [0, 1, 0, 1]), (1, 2, [0, 1, 0, 1]), (1, 50, [0, 0, 0, 1])]
)
def test_the_host_waits_once_where_the_trainer_logs_or_the_epoch_ends_and_nowhere_else(
    tmp_path, every, log_every, waiting
):
    waits = []
    counter = SyncCounter()

    class Window(Callback):
        def on_train_batch_start(self, *_):
            counter.count = 0
            counter.switch(True)

        def on_train_batch_end(self, *_):
            counter.switch(False)
            waits.append(counter.count)

    class First(Window):
        on_train_batch_end = Callback.on_train_batch_end

    class Last(Window):
        on_train_batch_start = Callback.on_train_batch_start

    stats = ParameterStats(every, 2 * every, effective_rank=True, histograms=True)
    with counter:
        trainer = toy_trainer(tmp_path, [First(), stats, Last()], max_epochs=2, log_every_n_steps=log_every)
        trainer.fit(Net(foreach=True), toy_loader())
    # AdamW itself asks for its step count, which stands on the host.
    bare = min(waits)
    assert [w - bare for w in waits] == 2 * waiting


def test_what_waits_is_logged_under_its_own_step_with_its_own_numbers(tmp_path):
    given = []

    class Told(Log):
        def log_metrics(self, metrics, step=None):
            if "parameters/norm/total" in metrics:
                given.append((step, trainer.global_step))
            super().log_metrics(metrics, step)

    observed, log = Observed(), Told()
    trainer = toy_trainer(
        tmp_path, [ParameterStats(1, 2, histograms=True), observed], max_epochs=1, logger=log, log_every_n_steps=3
    )
    torch.manual_seed(0)
    trainer.fit(Net(), toy_loader())
    assert given == [(0, 3), (1, 3), (2, 3), (3, 4)]
    for step, row in log.rows.items():
        compare(row, {key: value for key, value in naive(observed.steps[step], LAYER_OF).items() if key in row})
    assert float(trainer.callback_metrics["parameters/norm/total"]) == log.rows[3]["parameters/norm/total"]


@pytest.mark.parametrize("why", ["checkpoint", "validation", "stop", "most", "ctrl_c", "broken_device"])
def test_nothing_that_waits_is_lost(tmp_path, why, monkeypatch):
    """What follows a checkpoint is measured again by the run that goes on; what validates may monitor a metric."""
    rows_then = []

    class Acts(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx != 1:
                return
            if why == "checkpoint":
                trainer.save_checkpoint(tmp_path / "1.ckpt")
                rows_then.extend(log.rows)
            elif why == "stop":
                trainer.should_stop = True
            elif why == "ctrl_c":
                raise KeyboardInterrupt
            elif why == "broken_device":
                monkeypatch.setattr(stats, "_to_host", broken)
                raise RuntimeError("the first error")

        def on_validation_start(self, trainer, pl_module):
            rows_then.extend(log.rows)

    def broken(parts):
        raise RuntimeError("the device is gone")

    class Validates(Net):
        def validation_step(self, batch, batch_idx):
            """Lightning wants one."""

    log, stats = Log(), ParameterStats(1, 100)
    if why == "most":
        monkeypatch.setattr("trainerkit.callbacks.parameter_stats._MOST_WAITING", 2)
        monkeypatch.setattr(Acts, "on_train_batch_end", lambda *_: rows_then.append(list(log.rows)))
    validation = {"val_check_interval": 2} if why == "validation" else {"limit_val_batches": 0}
    trainer = toy_trainer(tmp_path, [stats, Acts()], max_epochs=1, logger=log, **validation)
    loaders = [toy_loader(), toy_loader()]
    if why in ("ctrl_c", "broken_device"):
        with pytest.raises((SystemExit, KeyboardInterrupt, RuntimeError)) as raised:
            trainer.fit(Validates(), *loaders)
        assert list(log.rows) == ([0, 1] if why == "ctrl_c" else [])
        assert "the device is gone" not in str(raised.value)
        return
    trainer.fit(Validates(), *loaders)
    if why == "stop":
        assert list(log.rows) == [0, 1]
    elif why == "most":
        assert rows_then == [[], [0, 1], [0, 1], [0, 1, 2, 3]]
    else:
        assert rows_then[:2] == [0, 1]
        assert list(log.rows) == [0, 1, 2, 3]


def test_histograms_are_kept_and_go_to_the_loggers_that_take_them(tmp_path):
    given = {}

    class Board(Log):
        class experiment:
            @staticmethod
            def add_histogram_raw(tag, low, high, count, total, squares, limits, counts, step):
                given[tag] = low, high, count, total, squares, limits, counts, step

    board = Board()
    stats = ParameterStats(4, 4, histograms=True)
    _, observed, _ = fit(tmp_path, stats, logger=[board, CSVLogger(tmp_path)])
    weights, gradient, _ = observed.steps[3]["body.0.weight"]
    for name, values in (("weight/body.0.weight", weights), ("gradient/body.0.weight", gradient)):
        edges, counts = stats.histograms[name]
        expected, limits = np.histogram(values.float().numpy(), bins=64)
        assert counts.sum() == values.numel()
        assert np.abs(counts.numpy() - expected).sum() <= 2  # a value on an edge may round to either side
        assert edges.numpy() == pytest.approx(limits, rel=1e-5)
        low, high, count, total, squares, _, _, step = given[f"parameters/{name}"]
        assert (count, step) == (24, 3)
        assert (low, high, total) == pytest.approx(
            tuple(map(float, (values.min(), values.max(), values.sum()))), rel=1e-4
        )
        assert squares == pytest.approx(float(values.square().sum()), rel=1e-5)
    assert "gradient/frozen.weight" not in stats.histograms
    assert "weight/frozen.weight" in stats.histograms


def test_it_runs_in_the_other_namespace_too(tmp_path):
    torch.manual_seed(0)
    module = net_class(pytorch_lightning.LightningModule)()
    trainer = pytorch_lightning.Trainer(
        max_epochs=1, logger=False, callbacks=[ParameterStats(1, 1)], default_root_dir=tmp_path, gradient_clip_val=0.1,
        **QUIET,
    )  # fmt: skip
    trainer.fit(module, toy_loader())
    _, _, log = fit(tmp_path, ParameterStats(1, 1))
    theirs = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("parameters/")}
    assert theirs == pytest.approx(log.rows[3], rel=1e-5)


@pytest.mark.parametrize("kind", ["compiled", "late"])
def test_compiled_and_late_built_modules_have_the_same_names_and_numbers(tmp_path, kind):
    _, _, plain = fit(tmp_path, ParameterStats(1, 1))
    _, _, log = fit(tmp_path, ParameterStats(1, 1, parameters=["body.*", "*"]), lambda: Net(**{kind: True}))
    assert log.rows[3] == pytest.approx(plain.rows[3], rel=1e-5)


def test_a_second_fit_names_the_layers_of_its_own_module(tmp_path):
    class Renamed(Net):
        def build(self):
            super().build()
            self.trunk = self.body
            del self.body

        def training_step(self, batch, batch_idx):
            return (self.head(self.trunk(batch[0]))[:, 0] - batch[1]).square().mean()

    stats = ParameterStats(1, 1)
    fit(tmp_path, stats)
    _, _, log = fit(tmp_path, stats, Renamed)
    _, _, alone = fit(tmp_path, ParameterStats(1, 1), Renamed)
    assert "parameters/norm/trunk.0" in log.rows[0]
    assert log.rows[0] == alone.rows[0]


def test_tied_weights_count_once_and_bf16_is_measured_in_float32(tmp_path):
    class Tied(Net):
        def build(self):
            super().build()
            self.body[0] = nn.Linear(4, 4)
            self.body[2] = nn.Linear(4, 4)
            self.head, self.frozen = nn.Linear(4, 1), nn.Linear(4, 4)
            self.body[2].weight = self.body[0].weight
            self.bfloat16()

    _, observed, log = fit(tmp_path, ParameterStats(1, 1), Tied(), precision="bf16-true")
    assert "body.2.weight" not in observed.steps[0]
    compare(log.rows[0], naive(observed.steps[0], LAYER_OF), rel=1e-4)


def test_two_processes_tell_what_one_process_does(tmp_path):
    class Writes(Callback):
        def on_train_end(self, trainer, pl_module):
            found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("parameters/")}
            (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    class Shares(Net):
        def train_dataloader(self):
            data, ranks = toy_loader().dataset, self.trainer.world_size
            mine = torch.utils.data.Subset(data, range(self.trainer.global_rank, len(data), ranks))
            return DataLoader(mine, batch_size=16 // ranks)

    def run(**options):
        options |= {"logger": False, "use_distributed_sampler": False, "loader": None}
        return fit(tmp_path, [ParameterStats(1, 1), Writes()], Shares, **options)

    run(devices=2, strategy="ddp_fork_find_unused_parameters_true")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    run()
    one = json.loads((tmp_path / "0.json").read_text())
    assert len(one) > 30
    assert ranks[0] == ranks[1] == pytest.approx(one, rel=1e-4)


def test_sharded_parameters_and_patterns_without_a_match_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"parameters=bdy\.\*: matches no parameter; the nearest are body\.\d"):
        fit(tmp_path, ParameterStats(parameters="bdy.*"))

    class ModelParallelStrategy:
        pass

    class Sharded:
        strategy = ModelParallelStrategy()

    with pytest.raises(ValueError, match="ParameterStats does not work on sharded parameters"):
        ParameterStats().setup(Sharded(), Net(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: must be 1 or more"),
        ({"full_every_n_steps": -1}, "full_every_n_steps=-1: must be 1 or more"),
        ({"depth": 0}, "depth=0: must be 1 or more"),
        ({"statistics": "variance"}, "statistics=variance: matches no statistic; the nearest are"),
        ({"prefix": ""}, "prefix='': must be a name"),
        ({"parameters": []}, r"parameters=\[\]: must be a pattern"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ParameterStats(**options)


# The functions


def test_norms_equal_a_float64_loop_scale_with_the_tensors_and_permute_with_them():
    tensors = [torch.randn(shape) for shape in ((7,), (3, 5), (2, 3, 4), (1,))]
    tensors += [torch.randn(4, 4).double(), torch.randn(50).bfloat16(), torch.zeros(3)]
    for order in (1.0, 2.0):
        found = norms(tensors, order)
        expected = torch.tensor([float(t.double().flatten().norm(order)) for t in tensors], dtype=torch.double)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(norms([-2 * t for t in tensors], order), 2 * found)
        assert torch.equal(norms(tensors[::-1], order), found.flip(0))
    assert norms([]).shape == (0,)


def test_pooled_moments_equal_those_of_everything_together_and_do_not_depend_on_the_cut():
    values = torch.randn(1000, dtype=torch.double) + 1e4  # E[x²] − E[x]² in float32 would have no digit left
    for cuts in ([1000], [1, 999], [300, 300, 400], [10] * 100):
        parts = [mean_and_squares(part.float()) for part in values.split(cuts)]
        columns = torch.stack(parts).double().numpy()
        groups = np.zeros(len(cuts), dtype=int)
        mean, std = pooled_moments(np.array(cuts, float), columns[:, 0], columns[:, 1], groups, 2)
        assert mean[0] == pytest.approx(float(values.mean()), rel=1e-6)
        assert std[0] == pytest.approx(float(values.std(correction=0)), rel=1e-3)
        assert np.isnan(mean[1])
        assert np.isnan(std[1])


def test_the_effective_rank_equals_the_definition_and_is_blind_to_scale_and_rotation():
    matrix = torch.randn(6, 4)
    singular = torch.linalg.svdvals(matrix.double())
    p = singular / singular.sum()
    assert float(effective_rank(matrix)) == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    for same in (matrix * 1e-3, rotation @ matrix, matrix.T.contiguous(), matrix.view(6, 2, 2)):
        torch.testing.assert_close(effective_rank(same), effective_rank(matrix), rtol=1e-4, atol=0)
    for k in (1, 3):  # k equal singular values
        assert float(effective_rank(torch.diag(torch.tensor([2.0] * k + [0.0] * (5 - k))))) == pytest.approx(
            k, rel=1e-5
        )
    assert effective_rank(torch.zeros(3, 2)) == 0
    assert effective_rank(torch.full((3, 2), float("inf"))).isnan()


def test_a_histogram_holds_every_value_and_moves_with_them():
    values = torch.randn(500)
    found = histogram(values, bins=10)
    expected, _ = np.histogram(values.numpy(), bins=10)
    assert found[4:].sum() == 500
    assert np.abs(found[4:].numpy() - expected).sum() <= 2
    assert torch.equal(histogram(4 * values, bins=10)[4:], found[4:])
    assert torch.equal(histogram(values.flip(0), bins=10)[4:], found[4:])
    assert histogram(torch.ones(7), bins=3)[4:].sum() == 7


def test_a_summary_does_not_depend_on_how_parameters_are_cut_or_ordered():
    whole = torch.randn(12, 10)
    whole[0] = 0
    results = []
    for parts in ([whole], list(whole.split(5)), [whole[6:], whole[:6]]):
        columns = {"norm": norms(parts)} | weight_columns(parts, set(STATISTICS))
        rows = np.arange(len(parts))
        host = {name: (rows, column.double().numpy()) for name, column in columns.items()}
        counts = np.array([float(part.numel()) for part in parts])
        summary = summarize(host, counts, Groups(np.zeros(len(parts), dtype=int), 1))
        results.append({name: float(values[0]) for name, (_, values) in summary.items()})
    assert set(results[0]) == {"norm", "mean", "std", "max_abs", "zeros"}
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)
    assert results[0]["zeros"] == pytest.approx(1 / 12)


def test_nothing_out_of_nothing_is_a_ratio_of_0_and_something_out_of_nothing_is_infinite():
    rows = np.arange(2)
    columns = {"norm": (rows, np.zeros(2)), "gradient_norm": (rows, np.array([0.0, 2.0]))}
    _, ratio = summarize(columns, np.ones(2), Groups(rows, 2))["gradient_to_weight"]
    assert ratio.tolist() == [0.0, math.inf]
