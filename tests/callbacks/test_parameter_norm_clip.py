import importlib

import pytest
import torch
from torch import nn

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import EMA, ParameterNormClip
from trainerkit.callbacks.parameter_norm_clip import clip_norms_


def naive_clip(tensor, max_norm):
    tensor = tensor.double()
    norm = sum(float(x) ** 2 for x in tensor.flatten()) ** 0.5
    return tensor * (max_norm / norm) if norm > max_norm else tensor


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) * 3 for shape in ((3, 4), (5,), (2, 2, 2), (1, 1))]


def test_the_result_equals_a_float64_loop_for_every_type():
    tensors = [*some_tensors(), torch.zeros(3), torch.zeros(0), torch.tensor(7.0)]
    tensors += [t.double() for t in some_tensors()] + [t.bfloat16() for t in some_tensors()]
    expected = [naive_clip(t, 1.5) for t in tensors]
    clip_norms_(tensors, 1.5)
    for tensor, reference in zip(tensors, expected, strict=True):
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[tensor.dtype]
        torch.testing.assert_close(tensor.double(), reference, rtol=tolerance, atol=0)


def test_what_is_within_the_bound_keeps_its_bits():
    tensors = some_tensors()
    before = [t.clone() for t in tensors]
    clip_norms_(tensors, 1000.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    clip_norms_([], 1.0)  # nothing to do is fine


def test_any_larger_multiple_of_a_tensor_gives_the_same_and_directions_stay():
    once, doubled = some_tensors(), [2 * t for t in some_tensors()]
    clip_norms_(once, 1.0)
    clip_norms_(doubled, 1.0)
    torch.testing.assert_close(once, doubled, rtol=1e-6, atol=0)
    for clipped, original in zip(once, some_tensors(), strict=True):
        assert norm(clipped) == pytest.approx(1.0, rel=1e-6)
        cosine = torch.nn.functional.cosine_similarity(clipped.flatten(), original.flatten(), dim=0)
        assert float(cosine) == pytest.approx(1.0, rel=1e-6)


def norm(tensor):
    return float(tensor.detach().norm())


class Recorder(ToyModule):
    """Keeps the weights after each batch."""

    def __init__(self, lr=0.1):
        super().__init__(lr)
        self.trail = []

    def on_train_batch_end(self, *_):
        self.trail.append([p.detach().clone() for p in self.parameters()])


def fit(tmp_path, callbacks, module=None, **options):
    torch.manual_seed(0)
    module = module or Recorder()
    trainer = toy_trainer(tmp_path, callbacks, **{"max_epochs": 1} | options)
    trainer.fit(module, toy_loader())
    return module, trainer


def by_hand(max_norm, window=1):
    """The same training in a loop of one's own."""
    torch.manual_seed(0)
    module = Recorder()
    optimizer = module.configure_optimizers()
    trail = []
    batches = list(toy_loader())
    for start in range(0, len(batches), window):
        optimizer.zero_grad()
        for batch in batches[start : start + window]:
            (module.loss(batch) / window).backward()
            trail.append(None)
        optimizer.step()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(min(1.0, max_norm / norm(parameter)))
        trail[-1] = [p.detach().clone() for p in module.parameters()]
    return trail


@pytest.mark.parametrize("window", [1, 2])
def test_training_equals_a_loop_by_hand_with_accumulation_too(tmp_path, window):
    module, _ = fit(tmp_path, [ParameterNormClip(0.5)], accumulate_grad_batches=window)
    for weights, expected in zip(module.trail, by_hand(0.5, window), strict=True):
        if expected is not None:
            torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    assert norm(module.layer.weight) == pytest.approx(0.5)  # the bound is at work: without it, 2


def test_under_the_fast_loop_and_under_lightnings_the_weights_are_equal(tmp_path):
    from trainerkit.trainer import Trainer

    own, _ = fit(tmp_path, [ParameterNormClip(0.5)])
    torch.manual_seed(0)
    module = Recorder()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[ParameterNormClip(0.5)], **options).fit(module, toy_loader())
    assert torch.equal(module.layer.weight, own.layer.weight)


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_modules_and_trainers_of_both_namespaces(tmp_path, namespace):
    pl = importlib.import_module(namespace)

    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return (self.layer(batch[0])[:, 0] - batch[1]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Plain()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[ParameterNormClip(0.25)], enable_model_summary=False, **options
    )
    trainer.fit(module, toy_loader())
    assert norm(module.layer.weight) == pytest.approx(0.25)


class Odd(Recorder):
    """Tied, frozen, unused and late weights, two of the layers compiled."""

    def configure_model(self):
        if hasattr(self, "tied"):
            return
        self.tied = torch.compile(nn.Linear(1, 4), backend="eager")
        self.last = nn.Linear(4, 1, bias=False)
        self.last.weight.data.fill_(3.0)
        self.layer.weight.data.fill_(3.0)
        self.tied._orig_mod.weight = nn.Parameter(torch.full((4, 1), 2.0))
        self.again = nn.Linear(1, 4)
        self.again.weight = self.tied._orig_mod.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.frozen.weight.fill_(5.0)
        self.unused = nn.Parameter(torch.full((4,), 6.0))

    def loss(self, batch):
        hidden = self.tied(batch[0][:, :1])
        return self.last(self.again(self.layer(self.frozen(batch[0]))) + hidden).square().mean()


def test_frozen_unused_and_unmatched_weights_stay_and_tied_ones_are_scaled_once(tmp_path):
    clip = ParameterNormClip(0.5, ["tied.*", "frozen.*", "unused", "layer.weight"])
    module, trainer = fit(tmp_path, [clip], Odd(lr=0.0))
    norms = {name.replace("_orig_mod.", ""): norm(p) for name, p in module.named_parameters()}
    assert norms["tied.weight"] == norms["layer.weight"] == pytest.approx(0.5)
    assert module.again.weight is module.tied._orig_mod.weight
    assert norms["last.weight"] == pytest.approx(6.0, rel=1e-3)
    assert torch.equal(module.frozen.weight, torch.full((4, 4), 5.0))
    assert torch.equal(module.unused, torch.full((4,), 6.0))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


class Gan(ToyModule):
    """Two optimizers, of which the second steps in every other batch; no learning, so that only the bound acts."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.second = nn.Linear(4, 1)
        self.trail = []

    def training_step(self, batch, batch_idx):
        for index, part in enumerate((self.layer, self.second)):
            part.weight.data.fill_(3.0)  # a norm of 6
            optimizer = self.optimizers()[index]
            optimizer.zero_grad()
            self.manual_backward(part(batch[0]).mean())
            if index == 0 or batch_idx % 2:
                optimizer.step()
        self.trail.append((norm(self.layer.weight), norm(self.second.weight)))

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.layer, self.second)]


def test_with_several_optimizers_only_what_has_stepped_is_scaled(tmp_path):
    module, _ = fit(tmp_path, [ParameterNormClip(2.0)], Gan())
    assert module.trail == [pytest.approx((2.0, 6.0 if batch % 2 == 0 else 2.0)) for batch in range(4)]


def test_a_step_that_the_scaler_skips_scales_nothing_and_mixed_precision_works(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    class Overflows(Recorder):
        def training_step(self, batch, batch_idx):
            self.layer.weight.data.fill_(3.0)
            return self.loss(batch) * (float("inf") if batch_idx == 1 else 1e-9)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    module, _ = fit(tmp_path, [ParameterNormClip(2.0)], Overflows(), plugins=[plugin])
    assert [norm(weight) for weight, _ in module.trail] == pytest.approx([2.0, 6.0, 2.0, 2.0])
    module, _ = fit(tmp_path, [ParameterNormClip(0.5)], precision="bf16-mixed")
    assert norm(module.layer.weight) == pytest.approx(0.5)


def test_an_average_that_stands_before_it_sees_the_scaled_weights(tmp_path):
    ema = EMA(decay=0.0)
    module, _ = fit(tmp_path, [ema, ParameterNormClip(0.5)])
    assert torch.equal(ema.average()["layer.weight"], module.layer.weight)
    assert norm(ema.average()["layer.weight"]) == pytest.approx(0.5)


def test_a_second_fit_works_and_an_exception_takes_the_hooks_away(tmp_path):
    clip = ParameterNormClip(0.5)
    fit(tmp_path, [clip])
    module, _ = fit(tmp_path, [clip])
    assert norm(module.layer.weight) == pytest.approx(0.5)

    class Fails(Recorder):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken")
            return self.loss(batch)

    failing = Fails()
    trainer = toy_trainer(tmp_path, [clip])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(failing, toy_loader())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    """Each rank gets half of every batch, so that the mean gradient is that of the whole batch."""
    from torch.utils.data import DataLoader, DistributedSampler

    class Saves(Recorder):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def train_dataloader(self):
            rows = toy_loader().dataset
            return DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, shuffle=False))

        def on_train_end(self):
            torch.save(self.layer.weight.detach(), tmp_path / f"rank{self.global_rank}.pt")

    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    torch.manual_seed(0)
    toy_trainer(tmp_path, [ParameterNormClip(0.5)], max_epochs=1, **options).fit(Saves())
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one, two)
    module, _ = fit(tmp_path, [ParameterNormClip(0.5)])
    torch.testing.assert_close(one, module.layer.weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["setup", "on_fit_start"])
def test_a_pattern_that_matches_nothing_lists_the_nearest_names(tmp_path, where):
    module = Recorder() if where == "setup" else Odd()
    pattern = "layr.weigth" if where == "setup" else "frozn.weigth"
    nearest = "layer.weight" if where == "setup" else "frozen.weight"
    with pytest.raises(ValueError, match=rf"parameters={pattern}: matches no parameter; the nearest are {nearest}"):
        fit(tmp_path, [ParameterNormClip(parameters=pattern)], module)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_a_wrong_bound_says_what_is_allowed(value):
    with pytest.raises(ValueError, match=f"max_norm={value}: must be above 0 and finite"):
        ParameterNormClip(max_norm=value)
    with pytest.raises(ValueError, match="parameters=\\[\\]: must be a pattern"):
        ParameterNormClip(parameters=[])


def test_sharded_parameters_are_refused(tmp_path):
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = toy_trainer(tmp_path, strategy=strategy, devices=1)
    with pytest.raises(ValueError, match="strategy=ModelParallelStrategy: ParameterNormClip does not work on sharded"):
        ParameterNormClip().setup(trainer, Recorder(), "fit")
