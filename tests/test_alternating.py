"""Several optimizers that take turns, against loops written by hand."""

import csv
import warnings
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import OmegaConf
from torch import nn
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from tests.support import ROOT, Kill, Killed, toy_trainer, two_processes
from trainerkit.alternating import AlternatingTask, Turn
from trainerkit.build import build
from trainerkit.callbacks import EMA, CrashSafeCheckpoint, ExactResume, ParameterStats
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.errors import UserError
from trainerkit.fsdp import FSDP2
from trainerkit.optim import warmup_cosine
from trainerkit.plugins import AllowList
from trainerkit.trainer import Trainer

ADAM = partial(torch.optim.Adam, lr=1e-2, betas=(0.5, 0.9))


class GAN(AlternatingTask):
    """Points on a line; the noise comes with the batch, so that loops by hand see the same."""

    def __init__(self, optimizers=None, fails_in=None):
        if optimizers is None:
            optimizers = {"discriminator": Turn("discriminator", ADAM), "generator": Turn("generator", ADAM)}
        super().__init__(optimizers)
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        self.fails_in = fails_in

    def turn_loss(self, name, batch, batch_idx):
        if self.fails_in == (name, batch_idx):
            raise RuntimeError("broken")
        loss = losses(self.generator, self.discriminator, name, batch)
        self.track(f"train/{name}", loss, weight=len(batch["x"]))
        return loss


def losses(generator, discriminator, name, batch):
    fake = generator(batch["z"])
    if name == "generator":
        return softplus(-discriminator(fake)).mean()
    return (softplus(-discriminator(batch["x"])) + softplus(discriminator(fake.detach()))).mean()


def data(rows=80):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 1, generator=generator, dtype=torch.float64) @ torch.tensor([[1.0, 2.0, 3.0]]).double()
    return {"x": x, "z": torch.randn(rows, 2, generator=generator, dtype=torch.float64)}


def loader(batch_size=8, rows=80, **world):
    arrays = data(rows)
    return BatchLoader(ArrayDataset(arrays), EpochBatches(rows, batch_size, shuffle=True, seed=3, **world))


def fit(folder, task, callbacks=(), batches=None, resume=None, **options):
    trainer = toy_trainer(folder, callbacks, kind=Trainer, **{"max_epochs": 5, "precision": "64-true"} | options)
    trainer.fit(task, loader() if batches is None else batches, ckpt_path=resume)
    return trainer


def weights(task):
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}


def by_hand(epochs, clip=None, schedule=False, batch_size=8, rows=80):
    """The loop that a GAN has in every tutorial."""
    task = GAN().double()
    networks = {"discriminator": task.discriminator, "generator": task.generator}
    optimizers = {name: ADAM(network.parameters(), fused=True) for name, network in networks.items()}
    schedules = [StepLR(optimizer, 10, 0.5) for optimizer in optimizers.values()] if schedule else []
    batches = loader(batch_size, rows)
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        for batch in batches:
            for name, optimizer in optimizers.items():
                for network in networks.values():
                    network.zero_grad()
                losses(task.generator, task.discriminator, name, batch).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(networks[name].parameters(), clip)
                optimizer.step()
            for scheduler in schedules:
                scheduler.step()
    return weights(task)


@pytest.mark.parametrize(("clip", "schedule"), [(None, False), (0.05, True)])
def test_fifty_batches_equal_a_loop_written_by_hand_bit_for_bit(clip, schedule, tmp_path):
    options = {"gradient_clip_val": clip, "scheduler": partial(StepLR, step_size=10, gamma=0.5) if schedule else None}
    task = GAN({name: Turn(name, ADAM, **options) for name in ("discriminator", "generator")})
    fit(tmp_path, task)
    expected = by_hand(5, clip, schedule)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(task).items())
    assert task.batches == 50
    assert task.steps == {"discriminator": 50, "generator": 50}


def test_no_gradient_leaks_into_another_network(tmp_path):
    found = []

    class Watch(Callback):
        def on_after_backward(self, trainer, module):
            having = {name.partition(".")[0] for name, p in module.named_parameters() if p.grad is not None}
            needing = {name.partition(".")[0] for name, p in module.named_parameters() if p.requires_grad}
            found.append((having, needing))

    task = GAN()
    fit(tmp_path, task, [Watch()], max_epochs=1)
    each = [({"discriminator"}, {"discriminator"}), ({"generator"}, {"generator"})]
    assert found == each * 10
    assert all(parameter.requires_grad for parameter in task.parameters())


def test_after_an_exception_every_parameter_needs_its_gradient_again(tmp_path):
    task = GAN(fails_in=("generator", 3))
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, task)
    assert all(parameter.requires_grad for parameter in task.parameters())


def test_four_accumulated_batches_are_one_of_four_times_the_size_the_shorter_last_one_too(tmp_path):
    task = GAN({name: Turn(name, ADAM, accumulate_grad_batches=4) for name in ("discriminator", "generator")})
    fit(tmp_path, task, max_epochs=3)  # windows of 4, 4 and 2 batches
    for name, weight in by_hand(3, batch_size=32).items():
        torch.testing.assert_close(dict(task.named_parameters())[name].detach(), weight, rtol=1e-10, atol=1e-12)
    assert task.steps == {"discriminator": 9, "generator": 9}


def test_each_has_its_own_frequency_and_the_first_ones_steps_are_the_runs(tmp_path):
    turns = {
        "discriminator": Turn("discriminator", ADAM),
        "generator": Turn("generator", ADAM, every_n_batches=3, accumulate_grad_batches=2),
    }
    saving = CrashSafeCheckpoint(monitor=None, save_every=4, stop_on_signal=False)
    taken = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            taken.append((trainer.global_step, module.steps["generator"]))

    task = GAN(turns)
    trainer = fit(tmp_path, task, [Watch(), saving], max_epochs=2)
    # Batches 3, 6 and 9 of the first ten; the last window ends with the epoch. Then 12, 15 and 18.
    assert [generator for _, generator in taken] == [0] * 5 + [1] * 4 + [2] * 5 + [3] * 5 + [4]
    assert [step for step, _ in taken] == list(range(1, 21))
    assert trainer.global_step == 20
    names = {path.stem for path in (tmp_path / "checkpoints").glob("step-*.ckpt")}
    assert {"step-00000016", "step-00000020"} <= names


def test_a_turn_without_an_optimizer_or_a_schedule_takes_the_tasks(tmp_path):
    own = Turn("generator", partial(torch.optim.SGD, lr=0.5), partial(StepLR, step_size=5, gamma=0.5))

    class Common(AlternatingTask):
        turn_loss = GAN.turn_loss

        def __init__(self):
            turns = {"discriminator": Turn("discriminator"), "generator": own}
            super().__init__(turns, optimizer=ADAM, scheduler=partial(StepLR, step_size=10, gamma=0.1))
            self.generator, self.discriminator, self.fails_in = nn.Linear(2, 3), nn.Linear(3, 1), None

    trainer = fit(tmp_path, Common().double(), max_epochs=1)
    discriminator, generator = trainer.optimizers
    assert type(discriminator) is torch.optim.Adam
    assert type(generator) is torch.optim.SGD
    assert discriminator.param_groups[0]["lr"] == pytest.approx(1e-3)  # 1e-2, a tenth of it after ten steps
    assert generator.param_groups[0]["lr"] == pytest.approx(0.125)


def test_max_steps_counts_the_first_ones_steps(tmp_path):
    task = GAN()
    trainer = fit(tmp_path, task, max_steps=7, max_epochs=-1)
    assert (trainer.global_step, task.batches, task.steps["generator"]) == (7, 7, 7)


def test_counts_are_logged(tmp_path):
    task = GAN({"discriminator": Turn("discriminator"), "generator": Turn("generator", every_n_batches=2)})
    trainer = fit(tmp_path, task, max_epochs=1, log_every_n_steps=5, logger=CSVLogger(tmp_path))
    names = ("step", "train/batches", "train/discriminator_steps", "train/generator_steps")
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = [[float(row[name]) for name in names] for row in csv.DictReader(file) if row[names[1]]]
    assert rows == [[4, 5, 5, 2], [9, 10, 10, 5]]
    assert trainer.callback_metrics["train/generator"] > 0
    assert "train/batches" not in trainer.callback_metrics  # nor among the results


def test_a_run_killed_at_any_batch_goes_on_to_the_bit(tmp_path):
    """In the middle of windows too, with schedules, clipping and an average of the generator alone."""

    def run(folder, more=(), resume=None):
        schedule = partial(warmup_cosine, total_steps=None, steps_per_epoch=None, warmup_epochs=1.0)
        task = GAN(
            {
                "discriminator": Turn("discriminator", ADAM, schedule, gradient_clip_val=0.1),
                "generator": Turn("generator", ADAM, schedule, accumulate_grad_batches=3),
            }
        ).double()  # Lightning would load the checkpoint into float32 first
        average = EMA(decay=0.9, parameters="generator.*")
        fit(folder, task, [average, ExactResume(), *more], resume=resume, max_epochs=2)
        return weights(task), task.steps, average.state_dict()

    whole, steps, average = run(tmp_path / "whole")
    assert steps == {"discriminator": 20, "generator": 8}
    for batches in (2, 3, 7, 10, 14, 19):
        folder = tmp_path / str(batches)
        with suppress(Killed):
            run(folder, [Kill(batches)])
        torch.load(folder / "killed.ckpt", weights_only=True)
        resumed, again, averaged = run(folder, resume=folder / "killed.ckpt")
        assert again == steps
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items()), batches
        assert str(averaged) == str(average)


@pytest.mark.parametrize(
    ("first", "other", "length"),
    [
        ((1, 1), (2, 2), {"max_epochs": 4}),
        ((1, 1), (4, 1), {"max_epochs": 6}),
        ((1, 1), (25, 1), {"max_epochs": 10}),
        ((1, 1), (3, 2), {"max_steps": 1000, "max_epochs": 3}),
        ((1, 4), (1, 1), {"max_steps": 9, "max_epochs": -1}),
        ((2, 3), (3, 1), {"max_steps": 5, "max_epochs": 9}),
    ],
)
def test_schedules_end_with_the_run(first, other, length, tmp_path):
    schedule = partial(warmup_cosine, total_steps=None, steps_per_epoch=None, warmup_epochs=0.1)
    turns = {
        name: Turn(name, ADAM, schedule, every_n_batches=every, accumulate_grad_batches=accumulate)
        for name, (every, accumulate) in {"discriminator": first, "generator": other}.items()
    }
    task = GAN(turns)
    trainer = fit(tmp_path, task, **length)
    for name, optimizer in zip(turns, trainer.optimizers, strict=True):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9), name
        assert task.steps[name] == turns[name].steps_after(task.batches, 10)


@pytest.mark.parametrize("per_epoch", [1, 7, 10, None])
@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (3, 1), (1, 4), (3, 2), (12, 1)])
def test_steps_are_counted_as_a_loop_over_batches_makes_them(per_epoch, every, accumulate):
    turn = Turn("x", every_n_batches=every, accumulate_grad_batches=accumulate)
    steps, waiting = 0, 0
    for batch in range(1, 60):
        waiting += batch % every == 0
        if waiting and (waiting == accumulate or (per_epoch and batch % per_epoch == 0)):
            steps, waiting = steps + 1, 0
        assert turn.steps_after(batch, per_epoch) == steps, batch


def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    def run(folder, batch_size, world=None, more=(), **options):
        warnings.simplefilter("ignore")  # Lightning's, of means that are over all processes already
        turns = {
            "discriminator": Turn("discriminator", ADAM, gradient_clip_val=0.1),
            "generator": Turn("generator", ADAM, every_n_batches=2, accumulate_grad_batches=2),
        }
        task = GAN(turns).double()
        batches = loader(batch_size, 96, **(world or {}))
        fit(folder, task, [ExactResume(), *more], batches, max_epochs=3, **options)
        return {name: weight.tolist() for name, weight in weights(task).items()}

    def of_rank(rank, **options):
        return run(tmp_path / "two", 4, {"num_replicas": 2, "rank": rank}, devices=2, strategy="ddp", **options)

    def killed_and_resumed(rank):
        with suppress(Killed):
            of_rank(rank, more=[Kill(14)])  # a batch waits for the generator's step
        return of_rank(rank, resume=tmp_path / "two" / "killed.ckpt")

    outcomes = two_processes(of_rank, tmp_path)
    assert all("error" not in outcome for outcome in outcomes), outcomes
    assert outcomes[0]["result"] == outcomes[1]["result"]
    for name, weight in run(tmp_path / "one", 8).items():
        found = torch.tensor(outcomes[0]["result"][name], dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(weight, dtype=torch.float64), rtol=0, atol=1e-10)
    again = two_processes(killed_and_resumed, tmp_path)
    assert again == outcomes


class Overflowing(GAN):
    """The generator's gradient is infinite in the third batch."""

    def turn_loss(self, name, batch, batch_idx):
        loss = super().turn_loss(name, {key: value.float() for key, value in batch.items()}, batch_idx)
        return loss * float("inf") if (name, self.batches) == ("generator", 2) else loss


def test_with_a_scaler_one_networks_infinite_gradient_is_nothing_to_the_other(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    turns = {name: Turn(name, partial(torch.optim.SGD, lr=0.1)) for name in ("discriminator", "generator")}
    task = Overflowing(turns)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append({name: own.get_scale() for name, own in module._scalers.items()})

    fit(
        tmp_path, task, [Watch()], max_epochs=1, precision=None,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )  # fmt: skip
    assert [found["discriminator"] for found in seen] == [1024.0] * 10
    assert [found["generator"] for found in seen] == [1024.0] * 2 + [512.0] * 8
    assert all(bool(parameter.isfinite().all()) for parameter in task.parameters())


def test_a_checkpoint_with_scalers_goes_on_without_and_is_validated(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    options = {"precision": None, "plugins": [plugin]}
    sgd = {name: Turn(name, partial(torch.optim.SGD, lr=0.1)) for name in ("discriminator", "generator")}
    fit(tmp_path, Overflowing(sgd), max_epochs=1, **options).save_checkpoint(tmp_path / "x.ckpt")
    trainer = fit(tmp_path, Overflowing(sgd), resume=tmp_path / "x.ckpt", max_epochs=2, precision="32-true")
    assert trainer.global_step == 20


def test_a_second_fit_begins_anew(tmp_path):
    turns = {"discriminator": Turn("discriminator", ADAM), "generator": Turn("generator", accumulate_grad_batches=4)}
    task = GAN(turns)
    fit(tmp_path, task, max_steps=6, max_epochs=-1)
    assert len(task._waiting["generator"]) == 2
    fit(tmp_path, task, max_epochs=1)
    assert (task.batches, task.steps) == (10, {"discriminator": 10, "generator": 3})


def test_weights_alone_hold_no_data(tmp_path):
    task = GAN(
        {"discriminator": Turn("discriminator", ADAM), "generator": Turn("generator", accumulate_grad_batches=4)}
    )
    trainer = fit(tmp_path, task, max_steps=6, max_epochs=-1)
    for weights_only, waiting in ((True, 0), (False, 2)):
        trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
        saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert len(saved["turns"]["waiting"][0]["generator"]) == waiting


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_no_checkpoint_holds_may_not_wait(accumulate, tmp_path):
    class Odd(GAN):
        def turn_loss(self, name, batch, batch_idx):
            return super().turn_loss(name, batch["rows"], batch_idx)

    batches = [{"rows": batch, "names": np.array(["a"])} for batch in loader()]
    task = Odd({name: Turn(name, accumulate_grad_batches=accumulate) for name in ("discriminator", "generator")})
    run = partial(fit, tmp_path, task, batches=DataLoader(batches, batch_size=None), max_epochs=1)
    if accumulate == 1:
        run()
        return
    with pytest.raises(ValueError, match="optimizers.discriminator.accumulate_grad_batches=2: .* have a numpy.ndarray"):
        run()


def test_a_turn_that_did_not_happen_logs_nothing(tmp_path):
    task = GAN({"discriminator": Turn("discriminator"), "generator": Turn("generator", every_n_batches=3)})
    trainer = fit(tmp_path, task, max_epochs=1, log_every_n_steps=1, logger=CSVLogger(tmp_path))
    trainer.logger.save()
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        found = [row["train/generator_step"] for row in csv.DictReader(file) if row["train/discriminator_step"]]
    assert found[:2] == ["", ""]
    assert "nan" not in found
    assert found[2]


def test_parameters_in_pieces_are_refused(tmp_path):
    outcomes = two_processes(lambda rank: fit(tmp_path, GAN(), devices=2, strategy=FSDP2(), precision=None), tmp_path)
    assert all("strategy=FSDP2: optimizers cannot take turns" in outcome["error"] for outcome in outcomes), outcomes


def test_a_module_may_have_two_names(tmp_path):
    class Alias(GAN):
        def __init__(self):
            super().__init__({"discriminator": Turn("discriminator"), "generator": Turn("same")})
            self.same = self.generator

    task = Alias()
    fit(tmp_path, task, max_epochs=1)
    assert task.steps == {"discriminator": 10, "generator": 10}


def test_statistics_are_told_apart_by_optimizer(tmp_path):
    task = GAN()
    trainer = fit(tmp_path, task, [ParameterStats(1, 1)], max_epochs=1)
    found = {name for name in trainer.callback_metrics if name.startswith("parameters/norm/total")}
    assert found == {"parameters/norm/total_0", "parameters/norm/total_1"}


class WithMore(GAN):
    def __init__(self, optimizers):
        super().__init__(optimizers)
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Turn([]), r"modules=\[\]: must name at least one"),
        (lambda: Turn("generator", gradient_clip_val=0.0), "gradient_clip_val=0.0: must be above 0, or null"),
        (lambda: Turn("generator", every_n_batches=0), "every_n_batches=0: must be 1 or more"),
        (lambda: Turn("generator", accumulate_grad_batches=0), "accumulate_grad_batches=0: must be 1 or more"),
        (lambda: GAN({}), "optimizers={}: must hold at least one Turn"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: GAN({"g": Turn("generatr"), "d": Turn("discriminator")}), "optimizers.g.modules=generatr: there is no such module; the nearest are generator"),
        (lambda: GAN({"g": Turn("generator")}), "none of them trains discriminator.0.weight, .* and 1 more; name their module"),
        (lambda: WithMore({"all": Turn(["generator", "discriminator"])}), "none of them trains extra.weight, extra.bias; name"),
    ],
)  # fmt: skip
def test_modules_that_are_not_there_or_not_trained_are_told_before_training(task, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, task())


def test_other_optimizers_than_those_of_the_checkpoint_are_refused(tmp_path):
    fit(tmp_path, GAN(), max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    other = GAN({"one": Turn("generator"), "two": Turn("discriminator")})
    with pytest.raises(ValueError, match="the checkpoint was written with .*'discriminator', 'generator'"):
        fit(tmp_path, other, resume=tmp_path / "x.ckpt", max_epochs=2)


def test_a_task_without_a_loss_says_what_it_needs(tmp_path):
    class Nothing(AlternatingTask):
        def __init__(self):
            super().__init__({"all": Turn("layer")})
            self.layer = nn.Linear(1, 1)

    with pytest.raises(NotImplementedError, match="Nothing needs a method turn_loss"):
        fit(tmp_path, Nothing())


FILES = [path for path in (ROOT / "configs" / "callbacks").glob("*.yaml") if "trainerkit.callbacks" in path.read_text()]


@pytest.mark.filterwarnings("ignore")  # GradientCheck's and others' advice about so small a network
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_callback_goes_with_it(path, tmp_path):
    node = OmegaConf.load(path)[path.stem]
    if "monitor" in node:
        node.monitor = "train/generator"
    if path.stem == "progressive_unfreezing":
        node.every_n_epochs = 1
    callback = build(node, path.stem, AllowList())
    if path.stem == "gradient_accumulation":
        with pytest.raises(ValueError, match="automatic optimization only"):
            fit(tmp_path, GAN().double(), [callback], max_epochs=2)
        return
    schedule = partial(StepLR, step_size=10, gamma=0.5)
    task = GAN({name: Turn(name, ADAM, schedule) for name in ("discriminator", "generator")}).double()
    before = weights(task)
    fit(tmp_path, task, [callback], max_epochs=2)
    # It begins with the last layer, which is the discriminator's, and adds one in the second epoch.
    generators = 0 if path.stem == "progressive_unfreezing" else 20
    assert task.steps == {"discriminator": 20, "generator": generators}
    changed = {
        name.partition(".")[0] for name, weight in weights(task).items() if not torch.equal(weight, before[name])
    }
    assert changed == ({"discriminator", "generator"} if generators else {"discriminator"})
    assert len(FILES) >= 18


def test_a_config_says_what_takes_turns(tmp_path):
    node = OmegaConf.create(
        {
            "critic": {
                "_target_": "trainerkit.alternating.Turn",
                "modules": ["discriminator"],
                "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 2e-4, "betas": [0.5, 0.999]},
            },
            "generator": {
                "_target_": "trainerkit.alternating.Turn",
                "modules": "generator",
                "every_n_batches": 5,
                "gradient_clip_val": 1.0,
            },
        }
    )
    task = GAN({name: build(turn, f"task.optimizers.{name}", AllowList()) for name, turn in node.items()})
    trainer = fit(tmp_path, task, max_epochs=1)
    assert task.steps == {"critic": 10, "generator": 2}
    assert trainer.optimizers[0].defaults["lr"] == 2e-4
    node.generator.every_n_batches = 0
    with pytest.raises(UserError, match="task.optimizers.generator.every_n_batches=0: must be 1 or more"):
        build(node.generator, "task.optimizers.generator", AllowList())
