import pytest
import torch
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
    torch.testing.assert_close(ema._shadow["layer.weight"].double(), expected, rtol=1e-6, atol=1e-7)


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
    torch.testing.assert_close(ema._shadow["layer.weight"], reference.module.weight)


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
    torch.testing.assert_close(ema._shadow["layer.weight"].double(), expected, rtol=1e-6, atol=1e-7)


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
    assert set(pointers) == {ema._shadow["layer.weight"].data_ptr()}
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
    assert torch.equal(content["state_dict"]["layer.weight"], ema._shadow["layer.weight"])
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
    assert set(ema._shadow) == {"layer.bias"}
    with pytest.raises(
        ValueError, match=r"parameters=layr\.weigth: matches no parameter; the nearest are layer\.weight"
    ):
        fit(tmp_path, EMA(parameters="layr.weigth"))


def test_the_average_can_be_kept_elsewhere(tmp_path):
    plain, _ = fit(tmp_path, EMA(decay=0.9))
    elsewhere, _ = fit(tmp_path, EMA(decay=0.9, device="cpu"))
    assert torch.equal(plain.seen[-1], elsewhere.seen[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay=1.0: must be from 0 to below 1"),
        ({"every_n_steps": 0}, "every_n_steps=0: must be 1 or more"),
        ({"start_step": -1}, "start_step=-1: must be 0 or more"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)
