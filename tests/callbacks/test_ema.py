import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import EMA, BestWeights, CrashSafeCheckpoint
from trainerkit.callbacks.ema import ema_decay, ema_update_


class Recorder(ToyModule):
    """Keeps the live weights after every step."""

    def __init__(self):
        super().__init__()
        self.trail = [self.layer.weight.detach().double().clone()]

    def on_train_batch_end(self, *_):
        self.trail.append(self.layer.weight.detach().double().clone())


def naive_average(trail, decay, warmup):
    average = trail[0].clone()
    for n, weights in enumerate(trail[1:]):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = d * average + (1 - d) * weights
    return average


def fit(tmp_path, ema, module=None, **options):
    torch.manual_seed(0)  # of the initial weights
    module = module or Recorder()
    trainer = toy_trainer(tmp_path, [ema], **options)
    trainer.fit(module, toy_loader(), toy_loader())
    return module, trainer


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_equals_a_float64_loop(tmp_path, warmup):
    ema = EMA(decay=0.9, warmup=warmup)
    module, _ = fit(tmp_path, ema)
    assert ema.updates == 12
    expected = naive_average(module.trail, 0.9, warmup)
    torch.testing.assert_close(ema.average()["layer.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_the_average_equals_torchs_own(tmp_path):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    ema = EMA(decay=0.9, warmup=False)
    module = Recorder()
    reference = AveragedModel(module.layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(module.layer)  # its first update copies: the shadow starts at the initial weights
    module, _ = fit(tmp_path, ema, module)
    live = nn.Linear(4, 1)
    live.bias.data.zero_()
    for weights in module.trail[1:]:
        live.weight.data.copy_(weights)
        reference.update_parameters(live)
    torch.testing.assert_close(ema.average()["layer.weight"], reference.module.weight)


def test_the_decay_warms_up_exactly():
    assert [ema_decay(0.999, n) for n in range(3)] == [1 / 10, 2 / 11, 3 / 12]
    assert ema_decay(0.999, 10**6) == 0.999
    assert ema_decay(0.999, 0, warmup=False) == 0.999


def test_an_average_of_equal_weights_is_that_weight_and_decay_0_copies():
    weights = [torch.randn(3, 2), torch.randn(4)]
    shadow = [w.clone() for w in weights]
    ema_update_(shadow, weights, 0.7)
    assert all(torch.equal(s, w) for s, w in zip(shadow, weights, strict=True))
    other = [torch.randn_like(w) for w in weights]
    ema_update_(shadow, other, 0.0)
    assert all(torch.equal(s, w) for s, w in zip(shadow, other, strict=True))


def test_accumulated_batches_make_one_update_a_step(tmp_path):
    ema = EMA()
    fit(tmp_path, ema, accumulate_grad_batches=3)  # 4 batches an epoch: steps after batches 3 and 4
    assert ema.updates == 6


def test_every_n_steps_and_start_step(tmp_path):
    ema = EMA(every_n_steps=2, start_step=4, warmup=False, decay=0.5)
    module, _ = fit(tmp_path, ema)
    assert ema.updates == 4  # after steps 6, 8, 10, 12
    expected = naive_average([module.trail[i] for i in (4, 6, 8, 10, 12)], 0.5, warmup=False)
    torch.testing.assert_close(ema.average()["layer.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_validation_sees_the_average_and_training_goes_on_live(tmp_path):
    ema = EMA(decay=0.9)
    module, _ = fit(tmp_path, ema, max_epochs=1)
    expected = naive_average(module.trail, 0.9, warmup=True)
    torch.testing.assert_close(module.seen[0].double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(module.layer.weight.double(), module.trail[-1])


def test_swapping_copies_nothing(tmp_path):
    ema = EMA()
    pointers = []

    class Looks(ToyModule):
        def validation_step(self, batch, batch_idx):
            pointers.append(self.layer.weight.data_ptr())
            super().validation_step(batch, batch_idx)

    module = Looks()
    live = module.layer.weight.data_ptr()
    fit(tmp_path, ema, module, max_epochs=1)
    assert set(pointers) == {ema.average()["layer.weight"].data_ptr()}
    assert module.layer.weight.data_ptr() == live


def test_an_exception_in_validation_gives_the_live_weights_back(tmp_path):
    class Fails(Recorder):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    module = Fails()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, EMA(), module)
    assert torch.equal(module.layer.weight.double(), module.trail[-1])


def test_every_path_tells_the_same_number(tmp_path):
    """Validation, best.ckpt, the exported weights, test on the same Trainer and on a fresh one."""
    from safetensors.torch import load_file

    ema, best = EMA(decay=0.9), BestWeights()
    module = Recorder()
    trainer = toy_trainer(tmp_path, [best, ema, CrashSafeCheckpoint()])
    trainer.fit(module, toy_loader(), toy_loader())
    scored = float(trainer.callback_metrics["val/loss"])
    assert best.best == scored  # the last epoch is the best of this convex problem

    same = trainer.test(module, toy_loader(), verbose=False)[0]["test/loss"]
    path = tmp_path / "checkpoints" / "best.ckpt"
    same_from_file = trainer.test(module, toy_loader(), ckpt_path=path, verbose=False)[0]["test/loss"]
    others = [BestWeights(), EMA(decay=0.9), CrashSafeCheckpoint()]
    fresh = toy_trainer(tmp_path, others).test(ToyModule(), toy_loader(), ckpt_path=path, verbose=False)[0]["test/loss"]
    exported = ToyModule()
    exported.load_state_dict(load_file(tmp_path / "best_model.safetensors"))
    by_hand = toy_trainer(tmp_path).test(exported, toy_loader(), verbose=False)[0]["test/loss"]
    assert [same, same_from_file, fresh, by_hand] == pytest.approx([scored] * 4, rel=1e-6)
    live = toy_trainer(tmp_path)
    exported.layer.weight.data.copy_(module.trail[-1])
    assert abs(live.test(exported, toy_loader(), verbose=False)[0]["test/loss"] - scored) > 1e-4


def test_a_checkpoint_holds_the_average_and_the_live_weights_and_resumes_to_the_same(tmp_path):
    whole, _ = fit(tmp_path / "whole", EMA(decay=0.9), max_epochs=4)

    torch.manual_seed(0)
    first = Recorder()
    ema = EMA(decay=0.9)
    trainer = toy_trainer(tmp_path / "cut", [ema, CrashSafeCheckpoint()], max_epochs=2)
    trainer.fit(first, toy_loader(), toy_loader())
    path = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["state_dict"]["layer.weight"], ema.average()["layer.weight"])
    assert torch.equal(content["callbacks"]["EMA"]["live"]["layer.weight"], first.layer.weight)

    resumed, again = Recorder(), EMA(decay=0.9)
    toy_trainer(tmp_path / "cut", [again, CrashSafeCheckpoint()], max_epochs=4).fit(
        resumed, toy_loader(), toy_loader(), ckpt_path=path
    )
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert torch.equal(resumed.seen[-1], whole.seen[-1])


def test_before_the_first_update_the_live_weights_are_used(tmp_path):
    module, _ = fit(tmp_path, EMA(start_step=100), max_epochs=1)
    assert torch.equal(module.seen[0].double(), module.trail[-1])


def test_patterns_choose_parameters_and_a_wrong_one_lists_the_nearest(tmp_path):
    ema = EMA(parameters="layer.b*")
    fit(tmp_path, ema, max_epochs=1)
    assert set(ema.average()) == {"layer.bias"}
    with pytest.raises(
        ValueError, match=r"parameters=layr\.weigth: matches no parameter; the nearest are layer\.weight"
    ):
        fit(tmp_path, EMA(parameters="layr.weigth"))


def test_the_average_can_be_kept_elsewhere(tmp_path):
    plain, _ = fit(tmp_path, EMA(decay=0.9))
    elsewhere, _ = fit(tmp_path, EMA(decay=0.9, device="cpu"))
    assert torch.equal(plain.seen[-1], elsewhere.seen[-1])


class Gan(LightningModule):
    """Two networks, two optimizers; the generator steps twice a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.discriminator = nn.Linear(4, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.trail = {name: [p.detach().double().clone()] for name, p in self.named_parameters()}

    def training_step(self, batch, batch_idx):
        for index, network in ((0, self.generator), (0, self.generator), (1, self.discriminator)):
            optimizer = self.optimizers()[index]
            optimizer.zero_grad()
            self.manual_backward(self.discriminator(self.generator(batch[0])).square().mean())
            optimizer.step()
            for name, p in self.named_parameters():
                if any(p is q for q in network.parameters()):
                    self.trail[name].append(p.detach().double().clone())

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.discriminator(self.generator(batch[0])).mean())

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]


def test_with_two_optimizers_each_parameter_is_averaged_when_its_own_one_steps(tmp_path):
    ema = EMA(decay=0.9)
    module, _ = fit(tmp_path, ema, Gan(), max_epochs=1)
    assert ema._updates == [8, 4]
    for name, average in ema.average().items():
        expected = naive_average(module.trail[name], 0.9, warmup=True)
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)
    assert not any(name.startswith("frozen") for name in ema.average())


def test_a_generator_alone_can_have_an_average_buffers_too(tmp_path):
    ema = EMA(decay=0.9, parameters="generator.*", buffers="average")
    module, _ = fit(tmp_path, ema, Gan(), max_epochs=1)
    assert {name.split(".")[0] for name in ema.average()} == {"generator"}
    assert set(ema.average()) >= {"generator.1.running_mean", "generator.1.running_var"}
    assert "generator.1.num_batches_tracked" not in ema.average()
    live = module.generator[1].running_mean.clone()
    with ema.applied(module):
        assert torch.equal(module.generator[1].running_mean, ema.average()["generator.1.running_mean"])
        assert module.generator[1].num_batches_tracked == 12
    assert torch.equal(module.generator[1].running_mean, live)
    assert not torch.equal(live, ema.average()["generator.1.running_mean"])


def test_several_decays_are_averaged_at_once_and_each_is_reported(tmp_path):
    ema = EMA(decay=[0.5, 0.9])
    module, trainer = fit(tmp_path, ema)
    for decay in (0.5, 0.9):
        expected = naive_average(module.trail, decay, warmup=True)
        torch.testing.assert_close(ema.average(decay)["layer.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    alone = {}
    for decay in (0.5, 0.9):
        _, other = fit(tmp_path, EMA(decay=decay))
        alone[decay] = float(other.callback_metrics["val/loss"])
    metrics = trainer.callback_metrics
    assert float(metrics["val/loss"]) == alone[0.5]
    assert float(metrics["val/loss_ema0.9"]) == pytest.approx(alone[0.9], rel=1e-6)
    assert alone[0.5] != alone[0.9]
    with pytest.raises(ValueError, match=r"decay=0.7: is not averaged; averaged are \[0.5, 0.9\]"):
        ema.average(0.7)


@pytest.mark.parametrize("swap", ["pointers", "copy"])
def test_both_ways_of_swapping_show_the_same_weights_and_give_the_live_ones_back(tmp_path, swap):
    ema = EMA(decay=0.9, swap=swap)
    module, _ = fit(tmp_path, ema, max_epochs=1)
    live, storage = module.layer.weight.detach().clone(), module.layer.weight.data_ptr()
    with pytest.raises(RuntimeError, match="inside"), ema.applied(module):
        assert torch.equal(module.layer.weight, ema.average()["layer.weight"])
        assert (module.layer.weight.data_ptr() == storage) == (swap == "copy")
        raise RuntimeError("inside")
    assert torch.equal(module.layer.weight, live)
    assert not torch.equal(live, ema.average()["layer.weight"])


def test_half_precision_is_averaged_in_float32(tmp_path):
    """In bfloat16 a step of 0.001 of the distance would be lost: its resolution is 0.008."""
    ema = EMA(decay=0.999, warmup=False)
    module = Recorder().bfloat16()
    module.trail = [module.layer.weight.detach().double()]
    fit(tmp_path, ema, module, precision="bf16-true", max_epochs=2)
    assert module.layer.weight.dtype == torch.bfloat16
    expected = naive_average(module.trail, 0.999, warmup=False)
    torch.testing.assert_close(ema.average()["layer.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    assert module.seen[-1].dtype == torch.bfloat16


def test_a_step_that_the_scaler_skips_is_no_update(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    class Overflows(Recorder):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    ema = EMA(decay=0.9)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    _, trainer = fit(tmp_path, ema, Overflows(), plugins=[plugin], max_epochs=1)
    assert trainer.global_step == 4
    assert ema.updates == 3


def test_a_checkpoint_with_weights_only_holds_the_average_too(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    ema, saver = EMA(decay=0.9), ModelCheckpoint(tmp_path / "light", save_weights_only=True, monitor="val/loss")
    module = Recorder()
    trainer = toy_trainer(tmp_path, [ema, saver])
    trainer.fit(module, toy_loader(), toy_loader())
    scored = float(trainer.callback_metrics["val/loss"])
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    for path in (saver.best_model_path, tmp_path / "after.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert torch.equal(weights["layer.weight"], ema.average()["layer.weight"])
        tested = toy_trainer(tmp_path).test(ToyModule(), toy_loader(), ckpt_path=path, verbose=False)
        assert tested[0]["test/loss"] == pytest.approx(scored, rel=1e-6)
    assert torch.equal(module.layer.weight.double(), module.trail[-1])


def test_a_module_that_was_trained_can_be_copied_and_pickled(tmp_path):
    import copy
    import pickle

    module, _ = fit(tmp_path, EMA(), ToyModule(), max_epochs=1)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        checkpoint = {"state_dict": twin.state_dict()}
        twin.on_save_checkpoint(checkpoint)
        assert torch.equal(checkpoint["state_dict"]["layer.weight"], module.layer.weight)


def test_after_weights_came_from_a_file_those_are_tested(tmp_path):
    ema = EMA(decay=0.9)
    module = Recorder()
    trainer = toy_trainer(tmp_path, [ema, CrashSafeCheckpoint(every_n_epochs=1)], max_epochs=1)
    trainer.fit(module, toy_loader(), toy_loader())
    path = tmp_path / "checkpoints" / "last.ckpt"
    first = trainer.test(module, toy_loader(), ckpt_path=path, verbose=False)[0]["test/loss"]
    module.layer.weight.data.zero_()
    assert trainer.test(module, toy_loader(), verbose=False)[0]["test/loss"] != first


class Tied(ToyModule):
    def __init__(self):
        super().__init__()
        self.twin = nn.Linear(4, 1)
        self.twin.weight = self.layer.weight

    def loss(self, batch):
        return super().loss(batch) + self.twin(batch[0]).square().mean()


class Compiled(ToyModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.compile(self.layer, backend="eager")


class Late(ToyModule):
    def __init__(self):
        super().__init__()
        del self.layer

    def configure_model(self):
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(4, 1)


@pytest.mark.parametrize(("kind", "pattern"), [(Tied, "*"), (Compiled, "layer.weight"), (Late, "layer.*")])
def test_tied_compiled_and_late_layers(tmp_path, kind, pattern):
    ema = EMA(decay=0.9, parameters=pattern)
    module, trainer = fit(tmp_path, ema, kind(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    weights = torch.load(tmp_path / "all.ckpt", weights_only=True)["state_dict"]
    stored = [weight for name, weight in weights.items() if name.endswith("weight")]
    assert len(stored) == (2 if kind is Tied else 1)
    assert all(torch.equal(weight, ema.average()["layer.weight"]) for weight in stored)
    assert torch.equal(module.seen[-1], ema.average()["layer.weight"])


def test_parameters_that_join_an_optimizer_later_are_averaged_from_then_on(tmp_path):
    class Grows(ToyModule):
        def configure_optimizers(self):
            return torch.optim.SGD([self.layer.weight], lr=0.1)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": [self.layer.bias]})

    ema = EMA(decay=0.9)
    module, _ = fit(tmp_path, ema, Grows(), max_epochs=1)
    assert set(ema.average()) == {"layer.weight"}
    assert torch.equal(module.seen[-1], ema.average()["layer.weight"])
    fit(tmp_path, ema, Grows(), max_epochs=2)
    assert set(ema.average()) == {"layer.weight", "layer.bias"}


def test_a_resumed_run_takes_a_new_decay_and_keeps_the_average(tmp_path):
    ema = EMA(decay=0.9)
    toy_trainer(tmp_path, [ema, CrashSafeCheckpoint()], max_epochs=2).fit(ToyModule(), toy_loader(), toy_loader())
    before = ema.average()["layer.weight"]
    path = tmp_path / "checkpoints" / "last.ckpt"
    other = EMA(decay=[0.95, 0.9], every_n_steps=1000)  # no update after the resume
    toy_trainer(tmp_path, [other, CrashSafeCheckpoint()], max_epochs=3).fit(
        ToyModule(), toy_loader(), toy_loader(), ckpt_path=path
    )
    assert other.updates == 8
    assert torch.equal(other.average(0.95)["layer.weight"], before)
    assert torch.equal(other.average(0.9)["layer.weight"], before)


def test_sharded_parameters_other_than_fsdp2s_are_refused_in_one_sentence(tmp_path):
    trainer = toy_trainer(tmp_path, [])
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match="strategy=FSDPStrategy: EMA does not work on sharded parameters"):
        EMA().setup(trainer, ToyModule(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay=1.0: must be from 0 to below 1"),
        ({"every_n_steps": 0}, "every_n_steps=0: must be 1 or more"),
        ({"start_step": -1}, "start_step=-1: must be 0 or more"),
        ({"decay": [0.9, 0.9]}, r"decay=\[0.9, 0.9\]: must be from 0 to below 1, or several different ones"),
        ({"decay": []}, r"decay=\[\]: must be"),
        ({"buffers": "none"}, "buffers=none: must be copy or average"),
        ({"swap": "move"}, "swap=move: must be pointers or copy"),
        ({"parameters": []}, r"parameters=\[\]: must be a pattern"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)


def saved_weight(trainer, path):
    trainer.save_checkpoint(path, weights_only=True)
    return torch.load(path, weights_only=True)["state_dict"]["layer.weight"]


def test_a_later_fit_of_the_same_module_saves_its_own_average_or_none(tmp_path):
    module, first, second = ToyModule(), EMA(decay=0.9), EMA(decay=0.9)
    path = tmp_path / "weights.ckpt"
    _, trainer = fit(tmp_path, first, module)
    assert torch.equal(saved_weight(trainer, path), first.average()["layer.weight"])
    _, trainer = fit(tmp_path, second, module)
    assert torch.equal(saved_weight(trainer, path), second.average()["layer.weight"])
    assert not torch.equal(first.average()["layer.weight"], second.average()["layer.weight"])
    trainer = toy_trainer(tmp_path, [], max_epochs=1)
    trainer.fit(module, toy_loader())
    assert torch.equal(saved_weight(trainer, path), module.layer.weight)


def test_weights_that_are_loaded_after_fit_are_what_is_tested(tmp_path):
    """From a file with weights only, of which Lightning tells callbacks nothing, and by hand."""

    class Early(Recorder):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.trainer.save_checkpoint(tmp_path / "early.ckpt", weights_only=True)

    def test_loss(trainer, module, **options):
        return trainer.test(module, toy_loader(), verbose=False, **options)[0]["test/loss"]

    expected = None
    for by_hand in (False, True):
        module, trainer = fit(tmp_path, EMA(decay=0.9), Early())
        average = test_loss(trainer, module)
        expected = test_loss(toy_trainer(tmp_path), ToyModule(), ckpt_path=tmp_path / "early.ckpt")
        if by_hand:
            module.load_state_dict(torch.load(tmp_path / "early.ckpt", weights_only=True)["state_dict"])
            assert test_loss(trainer, module) == expected
        else:
            assert test_loss(trainer, module, ckpt_path=tmp_path / "early.ckpt") == expected
        assert abs(average - expected) > 1e-3


def test_fit_that_goes_on_with_the_same_trainer_keeps_the_average(tmp_path):
    ema = EMA(decay=0.9)
    module, trainer = fit(tmp_path, ema, max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, toy_loader(), toy_loader())
    assert ema.updates == 12
    expected = naive_average(module.trail, 0.9, warmup=True)
    torch.testing.assert_close(ema.average()["layer.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_the_other_averages_are_reported_as_the_module_logs(tmp_path):
    """Two loaders, all reductions, a step without an index, a loss that stays on the module: decays that hardly differ
    give numbers that hardly differ."""

    class Logs(ToyModule):
        def training_step(self, batch):
            self.last = self.loss(batch)
            return self.last

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            loss = self.loss(batch) * (1 + dataloader_idx)
            self.log("val/loss", loss, batch_size=len(batch[0]))
            for reduction in ("min", "max", "sum"):
                self.log(f"val/{reduction}", loss, reduce_fx=reduction, add_dataloader_idx=True)

    ema = EMA(decay=[0.9, 0.9 + 1e-9])
    trainer = toy_trainer(tmp_path, [ema], max_epochs=2)
    trainer.fit(Logs(), toy_loader(), [toy_loader(), toy_loader(24, 5)])
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    own = {name: value for name, value in metrics.items() if "_ema" not in name}
    assert len(own) == 8
    for name, value in own.items():
        assert metrics[f"{name}_ema{0.9 + 1e-9}"] == pytest.approx(value, rel=1e-5), name

    class Plain(ToyModule):
        def validation_step(self, batch):
            self.log("val/loss", self.loss(batch))

    trainer = toy_trainer(tmp_path, [EMA(decay=[0.9, 0.9 + 1e-9])], max_epochs=1)
    trainer.fit(Plain(), toy_loader(), toy_loader())
    assert f"val/loss_ema{0.9 + 1e-9}" in trainer.callback_metrics
