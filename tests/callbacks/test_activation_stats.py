import json

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Subset

from tests.support import toy_loader, toy_trainer
from trainerkit.callbacks import ActivationStats
from trainerkit.callbacks.activation_stats import (
    activation_columns,
    activation_statistics,
    alive_units,
    first_tensor,
    observable,
    unit_dimension,
)
from trainerkit.testing.syncs import SyncCounter
from trainerkit.trainer import Trainer as FastTrainer


def net_class(base):
    class Net(base):
        """A ReLU with a dead unit, a Tanh that saturates, a layer that is called twice, a GRU that gives a tuple."""

        def __init__(self, compiled=False):
            super().__init__()
            body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
            with torch.no_grad():
                body[0].weight[0], body[0].bias[0] = 0, -1  # never positive
                body[2].weight.mul_(20)
            self.shared = nn.Linear(6, 6)
            self.gru = nn.GRU(6, 3, batch_first=True)
            self.criterion = nn.MSELoss()
            self.never = nn.Linear(2, 2).requires_grad_(False)
            self.body = torch.compile(body, backend="eager") if compiled else body
            self.outputs = []  # of each batch, by name

        def training_step(self, batch, batch_idx):
            x, y = batch
            found = {"body.0": self.parts[0](x)} if not hasattr(self.body, "_orig_mod") else {}
            hidden = self.body(x)
            if found:
                for i in range(1, 4):
                    found[f"body.{i}"] = self.parts[i](found[f"body.{i - 1}"])
            once = self.shared(hidden)
            twice = self.shared(once)
            states, _ = self.gru(twice[:, None])
            found |= {"body": hidden, "shared": torch.stack([once, twice]), "gru": states}
            self.outputs.append({name: value.detach().double() for name, value in found.items()})
            return self.criterion(states[:, 0].sum(1), y)

        @property
        def parts(self):
            # The same layers without their hooks.
            return [lambda x, layer=layer: layer.forward(x) for layer in self.body]

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    return Net


Net = net_class(LightningModule)
NAMES = ["body.0", "body.1", "body.2", "body.3", "shared", "gru"]


class Metrics(Callback):
    """What stands in `callback_metrics` after each batch, and how many hooks there are during it."""

    def __init__(self):
        self.rows = []
        self.hooks = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.hooks.append(sum(len(module._forward_hooks) for module in pl_module.modules()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k})


def fit(tmp_path, stats, make=Net, ours=False, loader=None, **options):
    torch.manual_seed(0)
    metrics, module = Metrics(), make()
    options = {"max_epochs": 1} | options
    trainer = toy_trainer(tmp_path, [stats, metrics], **options)
    if ours:
        trainer = FastTrainer(
            default_root_dir=tmp_path, callbacks=[stats, metrics], accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
        )  # fmt: skip
    trainer.fit(module, loader or toy_loader())
    assert not any(module._forward_hooks for module in module.modules())
    return module, metrics


def naive(windows, names=NAMES, prefix="activations"):
    """The documented definitions, of everything that a window's batches gave."""
    result = {}
    for name in names:
        values = [batch[name].flatten(0, -2) for batch in windows]  # (rows, units)
        values = torch.cat(values)
        result[f"mean/{name}"], result[f"std/{name}"] = values.mean(), values.std(correction=0)
        result[f"dead/{name}"] = (values == 0).all(0).double().mean()
        if name == "body.3":
            result[f"saturated/{name}"] = (values.abs() > 0.99).double().mean()
    return {f"{prefix}/{key}": float(value) for key, value in result.items()}


@pytest.mark.parametrize("ours", [False, True], ids=["lightnings_loop", "our_loop"])
def test_every_number_equals_its_definition_in_float64(tmp_path, ours):
    module, metrics = fit(tmp_path, ActivationStats(every_n_steps=1), ours=ours)
    for outputs, row in zip(module.outputs, metrics.rows, strict=True):
        assert row == pytest.approx(naive([outputs]), rel=1e-5, abs=1e-7)
    assert 1 / 6 - 1e-9 <= row["activations/dead/body.1"] < 1
    assert 0 < row["activations/saturated/body.3"] < 1


def test_hooks_exist_only_on_the_steps_that_measure(tmp_path):
    _, metrics = fit(tmp_path, ActivationStats(["body.*", "shared"], every_n_steps=3), max_epochs=2)
    assert metrics.hooks == [0, 0, 5, 0, 0, 5, 0, 0]
    assert [bool(row) for row in metrics.rows[:3]] == [False, False, True]
    assert metrics.rows[2] == metrics.rows[3] == metrics.rows[4] != metrics.rows[5] == metrics.rows[6]


def test_accumulated_batches_count_as_one_and_a_validation_between_them_does_not(tmp_path):
    class Validates(Net):
        def validation_step(self, batch, batch_idx):
            self.shared(self.body(batch[0] * 100))

    torch.manual_seed(0)
    metrics, module = Metrics(), Validates()
    options = {"accumulate_grad_batches": 2, "val_check_interval": 1, "max_epochs": 1}
    trainer = toy_trainer(tmp_path, [ActivationStats(every_n_steps=2), metrics], **options)
    trainer.fit(module, toy_loader(), toy_loader())
    assert metrics.hooks == [0, 0, 8, 8]
    assert metrics.rows[2] == {}
    assert metrics.rows[3] == pytest.approx(naive(module.outputs[2:]), rel=1e-5, abs=1e-7)


def test_an_exception_leaves_no_hooks_and_the_next_fit_works(tmp_path):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("broken")

    stats, module = ActivationStats(every_n_steps=1), Fails()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, stats, lambda: module)
    assert not any(part._forward_hooks for part in module.modules())
    module, metrics = fit(tmp_path, stats)
    assert metrics.rows[0] == pytest.approx(naive(module.outputs[:1]), rel=1e-5, abs=1e-7)


def test_a_compiled_network_is_seen_as_a_whole(tmp_path):
    compiled = lambda: Net(compiled=True)  # noqa: E731
    module, metrics = fit(tmp_path, ActivationStats(every_n_steps=1), compiled)
    for outputs, row in zip(module.outputs, metrics.rows, strict=True):
        assert row == pytest.approx(naive([outputs], ["body", "shared", "gru"]), rel=1e-5, abs=1e-7)
    with pytest.raises(ValueError, match=r"modules=body\.1: matches no module; the nearest are body"):
        fit(tmp_path, ActivationStats("body.1"), compiled)
    in_place = Net()
    in_place.body.compile(backend="eager")
    assert [name for name, _ in observable(in_place)] == ["shared", "gru", "criterion", "never"]


def test_a_module_that_was_compiled_as_a_whole_is_refused(tmp_path):
    trainer = toy_trainer(tmp_path, [ActivationStats()], max_epochs=1)
    with pytest.raises(ValueError, match="compile its networks instead"):
        trainer.fit(torch.compile(Net(), backend="eager"), toy_loader())


def test_manual_optimization_with_two_optimizers_counts_a_batch_once(tmp_path):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.body, self.shared)]

    module, metrics = fit(tmp_path, ActivationStats(every_n_steps=2), Manual)
    assert metrics.hooks == [0, 8, 0, 8]
    assert metrics.rows[0] == {}
    assert metrics.rows[1] == pytest.approx(naive(module.outputs[1:2]), rel=1e-5, abs=1e-7)
    assert metrics.rows[3] == pytest.approx(naive(module.outputs[3:4]), rel=1e-5, abs=1e-7)


def test_bf16_activations_are_measured_in_float32(tmp_path):
    module, metrics = fit(tmp_path, ActivationStats("body.*", every_n_steps=1), precision="bf16-mixed")
    expected = naive(module.outputs[:1], NAMES[:4])
    for key in ("mean/body.0", "std/body.2", "dead/body.1"):
        assert metrics.rows[0][f"activations/{key}"] == pytest.approx(expected[f"activations/{key}"], rel=1e-5)


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
        trainer = toy_trainer(tmp_path, [First(), ActivationStats(every_n_steps=2), Last()], max_epochs=1)
        trainer.fit(Net(), toy_loader())
    assert waits == [0, 1, 0, 1]


def test_it_runs_in_the_other_namespace_too(tmp_path):
    torch.manual_seed(0)
    trainer = pytorch_lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[ActivationStats(every_n_steps=4)],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net_class(pytorch_lightning.LightningModule)(), toy_loader())
    theirs = {key: float(value) for key, value in trainer.callback_metrics.items()}
    _, metrics = fit(tmp_path, ActivationStats(every_n_steps=4))
    assert theirs == pytest.approx(metrics.rows[3], rel=1e-5)


def test_two_processes_tell_what_one_process_does(tmp_path):
    class Writes(Callback):
        def on_train_end(self, trainer, pl_module):
            found = {key: float(value) for key, value in trainer.callback_metrics.items()}
            (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    class Shares(Net):
        def train_dataloader(self):
            data, ranks = toy_loader().dataset, self.trainer.world_size
            return DataLoader(Subset(data, range(self.trainer.global_rank, len(data), ranks)), batch_size=4 // ranks)

    def run(**options):
        torch.manual_seed(0)
        # Few rows in a batch: a unit may be dead in one process and alive in the other.
        callbacks = [ActivationStats(every_n_steps=1), Writes()]
        trainer = toy_trainer(tmp_path, callbacks, max_epochs=1, use_distributed_sampler=False, **options)
        trainer.fit(Shares())

    run(devices=2, strategy="ddp_fork")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    run()
    one = json.loads((tmp_path / "0.json").read_text())
    assert len(one) == 6 * 3 + 1
    assert ranks[0] == ranks[1] == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_images_have_channels_for_units_and_attention_is_seen_as_one(tmp_path):
    class Images(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU())
            with torch.no_grad():
                self.net[0].weight.fill_(1)
                self.net[0].bias.copy_(torch.tensor([100.0, -100.0, 100.0]))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def training_step(self, batch, batch_idx):
            image = self.net(batch[0].view(-1, 1, 2, 2))
            tokens = image.flatten(2)
            return self.attention(tokens, tokens, tokens)[0].square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    _, metrics = fit(tmp_path, ActivationStats(every_n_steps=1), Images)
    row = metrics.rows[0]
    assert row["activations/dead/net.1"] == pytest.approx(1 / 3)
    assert {key for key in row if "attention" in key} == {f"activations/{k}/attention" for k in ("mean", "std", "dead")}
    _, metrics = fit(tmp_path, ActivationStats("net", every_n_steps=1, leaves_only=False, prefix="whole"), Images)
    assert metrics.rows[0]["whole/dead/net"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: must be 1 or more"),
        ({"saturation": 1.0}, "saturation=1.0: must be above 0 and below 1"),
        ({"prefix": ""}, "prefix='': must be a name"),
        ({"modules": []}, r"modules=\[\]: must be a pattern"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationStats(**options)


def test_sharded_parameters_and_patterns_without_a_match_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"modules=shred: matches no module; the nearest are shared"):
        fit(tmp_path, ActivationStats("shred"))

    class FSDPStrategy:
        pass

    class Sharded:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="ActivationStats does not work on sharded parameters"):
        ActivationStats().setup(Sharded(), Net(), "fit")


# The functions


def measured(parts, limits=None):
    """What `activation_statistics` gets from one process that called a module with each part."""
    columns = [activation_columns(part, limits, 0.99).double().tolist() for part in parts]
    alive = {part.shape[-1]: np.any([alive_units(p, p.ndim - 1).tolist() for p in parts], axis=0) for part in parts}
    return [part.numel() for part in parts], columns, alive


def test_statistics_do_not_depend_on_how_calls_and_processes_divide_the_batch():
    whole = torch.randn(24, 8)
    whole[:, 2] = 0
    expected = {"mean": whole.mean(), "std": whole.std(correction=0), "dead": torch.tensor(1 / 8)}
    expected["saturated"] = (whole.abs() > 0.99).double().mean()
    expected = {key: float(value) for key, value in expected.items()}
    for processes in ([[whole]], [whole.split(5)], [whole[:7].split(3), whole[7:].split(4)], [[whole.flip(0)]]):
        parts = [measured(calls, (-1.0, 1.0)) for calls in processes]
        assert activation_statistics(parts, bounded=True) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert "saturated" not in activation_statistics([measured([whole])], bounded=False)


def test_a_sigmoid_saturates_where_the_tanh_of_half_its_argument_does():
    z = torch.linspace(-12, 12, 1001)
    tanh = activation_columns(torch.tanh(z / 2), (-1.0, 1.0), 0.99)[2]
    sigmoid = activation_columns(torch.sigmoid(z), (0.0, 1.0), 0.99)[2]
    assert tanh == sigmoid == int((torch.tanh(z.double() / 2).abs() > 0.99).sum())


def test_units_alive_are_those_that_are_anything_but_0_anywhere():
    output = torch.zeros(5, 3, 2, 2)
    output[4, 1, 0, 1] = -1e-30
    output[2, 2] = float("nan")
    assert alive_units(output, 1).tolist() == [False, True, True]
    assert alive_units(output.permute(0, 2, 3, 1), 3).tolist() == [False, True, True]
    assert alive_units(torch.tensor([0.0, 2.0]), 0).tolist() == [False, True]


def test_the_first_floating_point_tensor_of_an_output_counts():
    x = torch.ones(2)
    for output in (x, (x, None), [torch.ones(2, dtype=torch.long), {"a": None, "b": (x, torch.zeros(3))}]):
        assert first_tensor(output) is x
    for nothing in (None, 3.0, torch.tensor(1.0), torch.zeros(0), torch.ones(2, dtype=torch.long), "text", ()):
        assert first_tensor(nothing) is None


def test_units_are_features_or_channels():
    assert unit_dimension(nn.ReLU(), torch.zeros(2, 3)) == 1
    assert unit_dimension(nn.LayerNorm(4), torch.zeros(2, 3, 4)) == 2
    assert unit_dimension(nn.ReLU(), torch.zeros(2, 3, 4, 4)) == 1
    assert unit_dimension(nn.Conv1d(1, 3, 1), torch.zeros(2, 3, 4)) == 1
