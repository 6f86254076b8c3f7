import json
import math
import warnings

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, Subset

from tests.support import toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint, GradientFlow
from trainerkit.callbacks.gradient_flow import flow_of_layers, gradient_columns, judge
from trainerkit.errors import UserError
from trainerkit.testing.syncs import SyncCounter
from trainerkit.trainer import Trainer as FastTrainer

FACTORS = {"small": 1.0, "usual": 1.0, "large": 1.0}  # what each layer's gradient is multiplied by


def net_class(base):
    class Net(base):
        """Three layers side by side, whose gradients can be made small and large, and one that is frozen."""

        def __init__(self, compiled=False, **factors):
            super().__init__()
            self.factors = FACTORS | factors
            self.small, self.usual, self.large = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
            self.frozen = nn.Linear(4, 1).requires_grad_(False)
            if compiled:
                self.usual = torch.compile(self.usual, backend="eager")

        def training_step(self, batch, batch_idx):
            x, y = batch
            out = sum(self.scaled(name, getattr(self, name)(x).relu().sum(1)) for name in self.factors)
            return (out + self.frozen(x)[:, 0] - y).square().mean()

        def scaled(self, name, out):
            # The value stays, the gradient is multiplied.
            return out.detach() + self.factors[name] * (out - out.detach())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Net


Net = net_class(LightningModule)


class Observed(Callback):
    """Gradients in float64, before clipping."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {name.replace("_orig_mod.", ""): p.grad for name, p in pl_module.named_parameters()}
        self.steps.append({name: g.double().clone() for name, g in found.items() if g is not None})


class Metrics(Callback):
    """What stands in `callback_metrics` after each batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k})


def fit(tmp_path, flow, module=None, resume=None, ours=False, loader=None, extra=(), **options):
    torch.manual_seed(0)
    observed, metrics = Observed(), Metrics()
    callbacks = [flow, observed, metrics, *extra]
    module = Net() if module is None else module if isinstance(module, nn.Module) else module()
    options = {"max_epochs": 1, "gradient_clip_val": 0.1} | options
    trainer = toy_trainer(tmp_path, callbacks, **options)
    if ours:
        trainer = FastTrainer(
            default_root_dir=tmp_path, callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, **options,
        )  # fmt: skip
    trainer.fit(module, loader or toy_loader(), ckpt_path=resume)
    return observed, metrics


def naive(gradients):
    """The documented formulas, layer by layer."""
    result, layers = {}, {}
    for name, gradient in gradients.items():
        layers.setdefault(name.rpartition(".")[0], []).append(gradient.flatten())
    for layer, parts in layers.items():
        values = torch.cat(parts)
        result[f"gradients/mean_abs/{layer}"] = values.abs().mean()
        result[f"gradients/norm/{layer}"] = values.norm()
        result[f"gradients/zeros/{layer}"] = (values == 0).double().mean()
    return {key: float(value) for key, value in result.items()} | {
        "gradients/vanishing": 0.0,
        "gradients/exploding": 0.0,
    }


@pytest.mark.parametrize("ours", [False, True], ids=["lightnings_loop", "our_loop"])
def test_every_number_equals_a_per_tensor_loop_in_float64(tmp_path, ours):
    observed, metrics = fit(tmp_path, GradientFlow(1, picture=False), ours=ours)
    assert len(metrics.rows) == 4
    for gradients, row in zip(observed.steps, metrics.rows, strict=True):
        assert row == pytest.approx(naive(gradients), rel=1e-5, abs=1e-9)
    assert not any("frozen" in key for key in row)
    # A ReLU that is off for the whole batch leaves zeros, and the clipping comes after.
    assert math.hypot(*(row[f"gradients/norm/{name}"] for name in FACTORS)) > 1


def test_a_compiled_layer_has_the_same_names_and_numbers(tmp_path):
    _, plain = fit(tmp_path, GradientFlow(4, picture=False))
    _, compiled = fit(tmp_path, GradientFlow(4, "usual.*", picture=False), lambda: Net(compiled=True))
    assert set(compiled.rows[3]) < set(plain.rows[3])
    same = {key: plain.rows[3][key] for key in compiled.rows[3]}
    assert compiled.rows[3] == pytest.approx(same, rel=1e-5)


def test_vanishing_and_exploding_layers_are_named_counted_drawn_and_warned_of_once(tmp_path):
    flow = GradientFlow(1)
    module = Net(small=1e-5, large=1e5)
    with pytest.warns(UserWarning, match="GradientFlow") as caught:
        _, metrics = fit(tmp_path, flow, module)
    messages = [str(w.message) for w in caught if "GradientFlow" in str(w.message)]
    assert messages == [
        "GradientFlow: vanishing gradients at step 1, at most 0.001 times the median layer's: small.",
        "GradientFlow: exploding gradients at step 1, more than 1000 times the median layer's, or not finite: large.",
    ]
    assert flow.flagged == {"vanishing": ["small"], "exploding": ["large"]}
    assert all(row["gradients/vanishing"] == row["gradients/exploding"] == 1 for row in metrics.rows)
    picture = (tmp_path / "gradient_flow.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left
    # Wider bounds flag nothing.
    _, metrics = fit(tmp_path / "wide", GradientFlow(4, vanishing=1e-7, exploding=1e7, picture=False), module)
    assert metrics.rows[3]["gradients/vanishing"] == metrics.rows[3]["gradients/exploding"] == 0
    assert not (tmp_path / "wide" / "gradient_flow.png").exists()


def test_warnings_picture_and_rhythm_go_on_after_a_resume(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    make = lambda: Net(small=1e-5)  # noqa: E731
    whole = GradientFlow(2, picture=False)
    with pytest.warns(UserWarning, match="vanishing gradients at step 2"):
        _, metrics = fit(tmp_path, whole, make, extra=[Saves(), CrashSafeCheckpoint()], max_epochs=2)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)["callbacks"]["GradientFlow"]
    assert saved["last"] == [2]
    assert saved["warned"] == [["small", "vanishing"]]
    assert saved["layers"] == ["small", "usual", "large", "frozen"]
    resumed = GradientFlow(2, picture=False)
    with warnings.catch_warnings():  # no second warning: it would be an error
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch")
        extra = [CrashSafeCheckpoint()]
        _, later = fit(tmp_path, resumed, make, tmp_path / "3.ckpt", extra=extra, max_epochs=2)
    assert resumed.state_dict()["last"] == whole.state_dict()["last"] == [8]
    assert len(resumed._earlier) == len(whole._earlier) == 3
    assert resumed._earlier[0] == pytest.approx(whole._earlier[0], nan_ok=True)
    # A plain loader begins the epoch again after a resume, so only what the file held is the same.
    assert "gradients/norm/usual" in later.rows[0]
    assert len(metrics.rows) == 8


def test_a_second_fit_begins_anew(tmp_path):
    flow = GradientFlow(2, picture=False)
    for run in range(2):
        with pytest.warns(UserWarning, match="vanishing gradients at step 2"):
            _, metrics = fit(tmp_path / str(run), flow, Net(small=0.0))
        assert "gradients/norm/usual" not in metrics.rows[0]
        assert len(flow._earlier) == 1


def test_accumulated_batches_are_one_step(tmp_path):
    observed, metrics = fit(tmp_path, GradientFlow(1, picture=False), accumulate_grad_batches=2)
    assert len(observed.steps) == 2
    assert metrics.rows[0] == {}
    assert metrics.rows[1] == pytest.approx(naive(observed.steps[0]), rel=1e-5)
    assert metrics.rows[3] == pytest.approx(naive(observed.steps[1]), rel=1e-5)


def test_with_two_optimizers_layers_are_compared_with_those_of_their_own(tmp_path):
    class Pair(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.first = nn.ModuleList([nn.Linear(4, 1, bias=False) for _ in range(3)])
            self.second = nn.ModuleList([nn.Linear(4, 1, bias=False) for _ in range(3)])

        def training_step(self, batch, batch_idx):
            for optimizer, layers, scale in zip(self.optimizers(), (self.first, self.second), (1.0, 1e6), strict=True):
                optimizer.zero_grad()
                self.manual_backward(scale * sum(layer(batch[0]).mean() for layer in layers))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=1e-9) for part in (self.first, self.second)]

    flow = GradientFlow(1, picture=False)
    _, metrics = fit(tmp_path, flow, Pair(), gradient_clip_val=None)
    counts = {key: value for key, value in metrics.rows[3].items() if "vanishing" in key or "exploding" in key}
    assert counts == {f"gradients/{kind}_{i}": 0.0 for kind in ("vanishing", "exploding") for i in (0, 1)}
    ratio = metrics.rows[3]["gradients/norm/second.0"] / metrics.rows[3]["gradients/norm/first.0"]
    assert ratio == pytest.approx(1e6, rel=1e-4)


def test_scaled_gradients_of_a_fused_optimizer_are_unscaled(tmp_path):
    class Fused(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3, fused=True)

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    observed, metrics = fit(tmp_path, GradientFlow(1, picture=False), Fused(), plugins=[plugin], gradient_clip_val=None)
    unscaled = {name: gradient / 256 for name, gradient in observed.steps[0].items()}
    assert metrics.rows[0] == pytest.approx(naive(unscaled), rel=1e-4)


def test_sparse_gradients_count_what_is_not_stored_as_zeros(tmp_path):
    class Words(LightningModule):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 4, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.words(torch.tensor([1, 1, 7])).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    module = Words()
    observed, metrics = fit(tmp_path, GradientFlow(1, picture=False), module, gradient_clip_val=None)
    dense = {name: gradient.to_dense() for name, gradient in observed.steps[0].items()}
    assert metrics.rows[0] == pytest.approx(naive(dense), rel=1e-5)
    assert metrics.rows[0]["gradients/zeros/words"] == pytest.approx(0.8)


def test_the_host_waits_once_on_a_step_that_logs_and_never_on_others(tmp_path):
    waits, counter = [], SyncCounter()

    class First(Callback):
        def on_train_batch_start(self, *_):
            counter.count = 0
            counter.switch(True)

    class Last(Callback):
        def on_train_batch_end(self, *_):
            counter.switch(False)
            waits.append(counter.count)

    with counter:
        trainer = toy_trainer(tmp_path, [First(), GradientFlow(2, picture=False), Last()], max_epochs=1)
        trainer.fit(Net(), toy_loader())
    assert waits == [0, 1, 0, 1]


def test_it_runs_in_the_other_namespace_too(tmp_path):
    torch.manual_seed(0)
    trainer = pytorch_lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[GradientFlow(4, picture=False)],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=0.1,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net_class(pytorch_lightning.LightningModule)(), toy_loader())
    theirs = {key: float(value) for key, value in trainer.callback_metrics.items()}
    _, metrics = fit(tmp_path, GradientFlow(4, picture=False))
    assert theirs == pytest.approx(metrics.rows[3], rel=1e-5)


def test_two_processes_tell_what_one_process_does(tmp_path):
    class Writes(Callback):
        def on_train_end(self, trainer, pl_module):
            found = {key: float(value) for key, value in trainer.callback_metrics.items()}
            (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    class Shares(Net):
        def __init__(self):
            super().__init__()
            del self.frozen
            self.frozen = lambda x: x * 0

        def train_dataloader(self):
            data, ranks = toy_loader().dataset, self.trainer.world_size
            return DataLoader(Subset(data, range(self.trainer.global_rank, len(data), ranks)), batch_size=16 // ranks)

    def run(**options):
        torch.manual_seed(0)
        callbacks = [GradientFlow(1), Writes()]
        trainer = toy_trainer(tmp_path, callbacks, max_epochs=1, use_distributed_sampler=False, **options)
        trainer.fit(Shares())

    run(devices=2, strategy="ddp_fork")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert (tmp_path / "gradient_flow.png").exists()
    run()
    one = json.loads((tmp_path / "0.json").read_text())
    assert len(one) == 3 * 3 + 2
    assert ranks[0] == ranks[1] == pytest.approx(one, rel=1e-4)


def test_without_matplotlib_a_picture_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"GradientFlow's picture .* needs the package matplotlib"):
        fit(tmp_path, GradientFlow())
    _, metrics = fit(tmp_path, GradientFlow(4, picture=False))
    assert metrics.rows[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: must be 1 or more"),
        ({"depth": 0}, "depth=0: must be 1 or more"),
        ({"vanishing": 1.0}, "vanishing=1.0: must be from 0 to below 1"),
        ({"exploding": 1.0}, "exploding=1.0: must be above 1"),
        ({"prefix": ""}, "prefix='': must be a name"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradientFlow(**options)


def test_sharded_parameters_and_patterns_without_a_match_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"parameters=usul\.\*: matches no parameter; the nearest are usual"):
        fit(tmp_path, GradientFlow(parameters="usul.*", picture=False))

    class FSDPStrategy:
        pass

    class Sharded:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="GradientFlow does not work on sharded parameters"):
        GradientFlow().setup(Sharded(), Net(), "fit")


def test_the_flow_of_a_layer_does_not_depend_on_how_its_gradient_is_cut_and_scales_with_it():
    whole = torch.randn(12, 10)
    whole[3] = 0
    results = []
    for factor, parts in ((1, [whole]), (1, whole.split(5)), (-2, whole.flip(0).split(4))):
        columns = gradient_columns([factor * part for part in parts]).double().numpy()
        counts = np.array([float(part.numel()) for part in parts])
        flow = flow_of_layers(columns, counts, np.zeros(len(parts), dtype=int), 2)
        assert np.isnan(flow[:, 1]).all()
        results.append(flow[:, 0])
    values = whole.double()
    expected = [float(values.abs().mean()), float(values.norm()), 1 / 12]
    assert results[0] == pytest.approx(expected, rel=1e-6)
    assert results[1] == pytest.approx(expected, rel=1e-6)
    assert results[2] == pytest.approx([2 * expected[0], 2 * expected[1], expected[2]], rel=1e-6)


def test_judging_is_blind_to_scale_and_order_and_never_lets_nan_or_0_pass():
    means = np.array([1.0, 2.0, 1e-4, 3e3, 0.0, math.inf, math.nan, 0.5])
    gone, exploded = judge(means)
    assert gone.tolist() == [False, False, True, False, True, False, False, False]
    assert exploded.tolist() == [False, False, False, True, False, True, True, False]
    order = np.array([5, 3, 0, 7, 1, 6, 2, 4])
    for scaled in (means * 1e-9, means * 1e9):
        assert judge(scaled)[0].tolist() == gone.tolist()
        assert judge(scaled)[1].tolist() == exploded.tolist()
    assert judge(means[order])[0].tolist() == gone[order].tolist()
    assert judge(np.zeros(3))[0].all()
    assert not judge(np.zeros(3))[1].any()
    assert judge(np.full(2, math.nan))[1].all()
