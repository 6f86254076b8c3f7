"""The task as a whole: through a Trainer and the command line."""

import json
import warnings
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import softplus

from tests.support import Kill, Killed, toy_trainer, two_processes
from trainerkit.alternating import Turn
from trainerkit.callbacks import EMA, ExactResume
from trainerkit.cli import main
from trainerkit.data import ArrayDataset, BatchLoader, Digits, EpochBatches
from trainerkit.functional.row_draws import row_normals
from trainerkit.tasks.gan import DiffAugment, Discriminator, GanTask, Generator, SampleGrid, SampleReport
from trainerkit.testing._kill_runs import SMALL
from trainerkit.trainer import Trainer

ADAM = partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.999))
NAMES = ("discriminator", "generator")
CLASSES = 3


def make_task(norm="batch", classes=CLASSES, spectral_norm=False, turns=None, **options):
    torch.manual_seed(0)
    generator = Generator(1, 8, classes, noise_dim=6, width=8, norm=norm)
    discriminator = Discriminator(1, 8, classes, width=8, norm=norm, spectral_norm=spectral_norm)
    optimizers = {name: Turn(name, **(turns or {})) for name in NAMES}
    return GanTask(
        generator, discriminator, noise_dim=6, classes=classes, optimizers=optimizers, optimizer=ADAM, **options
    )


def loader(batch_size=8, rows=80, **world):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(rows, 1, 8, 8, generator=generator)
    arrays = {"x": x, "y": torch.arange(rows) % CLASSES}
    return BatchLoader(ArrayDataset(arrays), EpochBatches(rows, batch_size, shuffle=True, seed=3, **world))


def fit(folder, task, callbacks=(), batches=None, resume=None, **options):
    trainer = toy_trainer(folder, callbacks, kind=Trainer, **{"max_epochs": 5} | options)
    trainer.fit(task, loader() if batches is None else batches, ckpt_path=resume)
    return trainer


def weights(task):
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}


# The loop


def by_hand(epochs):
    """Fifty steps of the default loss, written without any of the task's own methods."""
    task = make_task()
    networks = {name: getattr(task, name) for name in NAMES}
    optimizers = {name: ADAM(networks[name].parameters(), fused=True) for name in NAMES}
    batches = loader()
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        for batch in batches:
            y, rows = batch["y"], batch["index"]
            noise = [row_normals(0, epoch, rows, 6, stream) for stream in (0, 1)]
            with torch.no_grad():
                fake = task.generator(noise[0], y)
            of_real, of_fake = task.discriminator(batch["x"] * 2 - 1, y), task.discriminator(fake, y)
            optimizers["discriminator"].zero_grad()
            (softplus(-of_real).mean() + softplus(of_fake).mean()).backward()
            optimizers["discriminator"].step()
            # As in the task, whose generator's turn asks for no gradient of the discriminator's weights.
            task.discriminator.requires_grad_(False)
            optimizers["generator"].zero_grad()
            softplus(-task.discriminator(task.generator(noise[1], y), y)).mean().backward()
            optimizers["generator"].step()
            task.discriminator.requires_grad_(True)
    return weights(task)


def test_fifty_steps_equal_a_loop_written_by_hand_bit_for_bit(tmp_path):
    task = make_task()
    fit(tmp_path, task)
    expected = by_hand(5)
    assert task.steps == dict.fromkeys(NAMES, 50)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(task).items())


def test_each_turn_leaves_the_other_networks_gradients_untouched(tmp_path):
    found = []

    class Watch(Callback):
        def on_after_backward(self, trainer, module):
            found.append({name.partition(".")[0] for name, p in module.named_parameters() if p.grad is not None})

    fit(tmp_path, make_task(r1=1.0, r1_every=2, augment=DiffAugment()), [Watch()], max_epochs=1)
    assert found == [{"discriminator"}, {"generator"}] * 10


@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "wasserstein"])
def test_four_accumulated_batches_are_one_of_four_times_the_size(loss, tmp_path):
    """Without batch norm, whose statistics are of a batch; noise and augmentation are drawn by row."""
    options = {
        "norm": "group",
        "loss": loss,
        "gradient_penalty": 1.0,
        "r1": 0.5,
        "r1_every": 1,
        "augment": DiffAugment(0.25, 0.25),
    }
    sgd = {"optimizer": partial(torch.optim.SGD, lr=0.05)}
    many = make_task(turns=sgd | {"accumulate_grad_batches": 4}, **options).double()
    fit(tmp_path, many, max_epochs=3, precision="64-true")  # windows of 4, 4 and 2 batches
    one = make_task(turns=sgd, **options).double()
    fit(tmp_path, one, batches=loader(32), max_epochs=3, precision="64-true")
    start, expected = weights(make_task(**options).double()), weights(one)
    assert many.steps == dict.fromkeys(NAMES, 9)
    for name, weight in weights(many).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-10)
        # A distance of means is the same whatever is added to all scores.
        assert torch.equal(weight, start[name]) == (loss == "wasserstein" and name == "discriminator.score.bias")


def test_the_critic_may_have_several_steps_for_one_of_the_generator(tmp_path):
    task = make_task("none", loss="wasserstein", gradient_penalty=10.0)
    task.turns["generator"].every_n_batches = 5
    trainer = fit(tmp_path, task, max_epochs=1)
    assert task.steps == {"discriminator": 10, "generator": 2}
    assert trainer.callback_metrics["train/gradient_penalty"] > 0


def test_r1_is_counted_by_its_weight_in_the_batches_that_have_it(tmp_path):
    """Twice as seldom and then twice as much; in a batch of both the mean is the same."""
    batch = next(iter(loader(80)))
    losses = {}
    for every in (1, 4):
        task = make_task("none", r1=0.5, r1_every=every)
        task._trainer = toy_trainer(tmp_path)
        losses[every] = [task.turn_loss("discriminator", batch, k).item() for k in (0, 1)]
        assert task._meters["train/r1"] is not None
    plain = make_task("none")
    plain._trainer = toy_trainer(tmp_path)
    without = plain.turn_loss("discriminator", batch, 0).item()
    assert losses[4][1] == pytest.approx(without)
    assert losses[1][0] == pytest.approx(losses[1][1])
    assert losses[4][0] - without == pytest.approx(4 * (losses[1][0] - without), rel=1e-4)


def test_own_networks_and_no_classes(tmp_path):
    generator = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))
    task = GanTask(generator, discriminator, noise_dim=6)
    start = weights(task)
    fit(tmp_path, task, max_epochs=1)
    assert not any(torch.equal(weight, start[name]) for name, weight in weights(task).items())
    assert task(torch.arange(3)).shape == (3, 1, 8, 8)


def test_bfloat16_learns_what_float32_learns(tmp_path):
    options = {"norm": "none", "loss": "hinge", "r1": 0.1, "r1_every": 2}
    found = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = fit(tmp_path, make_task(**options), max_epochs=2, precision=precision)
        found.append([float(trainer.callback_metrics[f"train/{name}_loss"]) for name in NAMES])
    assert found[1] == pytest.approx(found[0], abs=0.02)


@pytest.mark.filterwarnings("ignore")  # torch warns of what it reads while it compiles
def test_penalties_go_with_compiled_networks(tmp_path):
    losses = []
    for compiler in (False, {"backend": "aot_eager"}):
        task = make_task("none", loss="wasserstein", gradient_penalty=10.0)
        trainer = fit(tmp_path, task, max_epochs=1, compile=compiler)
        losses.append(float(trainer.callback_metrics["train/discriminator_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# Resuming, several processes


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_a_run_killed_in_mid_epoch_goes_on_to_the_bit(spectral_norm, tmp_path):
    def run(folder, more=(), resume=None):
        task = make_task(spectral_norm=spectral_norm, r1=0.1, r1_every=3, augment=DiffAugment())
        task.turns["generator"].accumulate_grad_batches = 3
        average = EMA(decay=0.9, parameters="generator.*", buffers="average")
        fit(folder, task, [average, ExactResume(), *more], resume=resume, max_epochs=2)
        return task.state_dict(), average.average()

    whole, averaged = run(tmp_path / "whole")
    for batches in (4, 10, 17):
        folder = tmp_path / str(batches)
        with suppress(Killed):
            run(folder, [Kill(batches)])
        resumed, again = run(folder, resume=folder / "killed.ckpt")
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items()), batches
        assert all(torch.equal(again[name], tensor) for name, tensor in averaged.items()), batches


def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    """Without batch norm; with penalties and augmentation, whose draws belong to rows."""

    def run(folder, batch_size, world=None, **options):
        warnings.simplefilter("ignore")  # Lightning's, of means that are over all processes already
        task = make_task("group", gradient_penalty=1.0, r1=0.5, augment=DiffAugment(0.25, 0.25)).double()
        trainer = fit(
            folder, task, batches=loader(batch_size, **(world or {})), max_epochs=2, precision="64-true", **options
        )
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {"weights": {name: tensor.tolist() for name, tensor in weights(task).items()}, "metrics": metrics}

    outcomes = two_processes(
        lambda rank: run(tmp_path / "two", 4, {"num_replicas": 2, "rank": rank}, devices=2, strategy="ddp"), tmp_path
    )
    assert all("error" not in outcome for outcome in outcomes), outcomes
    assert outcomes[0]["result"]["weights"] == outcomes[1]["result"]["weights"]
    single, double = run(tmp_path / "one", 8), outcomes[0]["result"]
    for name, weight in single["weights"].items():
        found = torch.tensor(double["weights"][name], dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(weight, dtype=torch.float64), rtol=0, atol=1e-9)
    for name in ("train/discriminator_loss", "train/generator_loss", "train/gradient_penalty"):
        assert double["metrics"][name] == pytest.approx(single["metrics"][name], rel=1e-9)


# Evaluation


class Memory(nn.Module):
    """A generator that gives out what it is told, by row."""

    def __init__(self, made):
        super().__init__()
        self.made = made
        self.unused = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, noise, y):
        self.calls += len(y)
        return self.made[self.calls - len(y) : self.calls] * 2 - 1


def reported(tmp_path, made, **options):
    """The table of a test where the generator gives out these pictures."""
    data = Digits()
    task = GanTask(Memory(made), Discriminator(1, 8, 10, width=8), noise_dim=6, classes=data.classes)
    return SampleReport(**options)._of_test(task.eval(), data)


def test_figures_tell_real_copied_collapsed_and_wrong_samples_apart(tmp_path):
    data = Digits()
    test, train = data.rows("test"), data.rows("train")
    real = reported(tmp_path, test["x"])
    assert {name.partition("/")[0] for name in real} == {"samples", "real"}
    for what in ("frechet_distance", "judge_accuracy", "precision", "recall", "nearest_training"):
        assert real[f"samples/{what}"] == pytest.approx(real[f"real/{what}"], rel=1e-4), what
    assert real["real/judge_accuracy"] > 0.9
    assert real["real/class_coverage"] == 1

    nearest = [int(torch.cdist(x.flatten()[None], train["x"].flatten(1)).argmin()) for x in test["x"]]
    copies = reported(tmp_path, train["x"][nearest])
    assert copies["samples/nearest_training"] < 0.01 < copies["real/nearest_training"]

    first = {int(k): test["x"][test["y"] == k][0] for k in range(10)}
    collapsed = reported(tmp_path, torch.stack([first[int(k)] for k in test["y"]]))
    assert collapsed["samples/recall"] < 0.1
    assert collapsed["samples/frechet_distance"] > 2 * collapsed["real/frechet_distance"]
    assert collapsed["samples/judge_accuracy"] > 0.8

    wrong = reported(tmp_path, test["x"].roll(90, 0))
    assert wrong["samples/judge_accuracy"] < 0.4
    one = reported(tmp_path, first[3].expand(len(test["x"]), -1, -1, -1))
    assert one["samples/class_coverage"] == pytest.approx(0.1)
    assert one["samples/class_entropy"] < 0.01
    assert one["real/class_entropy"] > 0.99


def test_a_validation_is_the_same_twice_and_moves_no_random_state(tmp_path):
    data = Digits(batch_size=32)
    torch.manual_seed(0)
    task = GanTask(Generator(1, 8, 10, 6, 8), Discriminator(1, 8, 10, 8), 6, data.classes)
    trainer = toy_trainer(tmp_path, [SampleReport(judge_steps=20)], kind=Trainer)
    state = torch.get_rng_state()
    found = [trainer.validate(task, datamodule=data, verbose=False)[0] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
    assert found[0]["val/frechet_distance"] > 0
    assert set(found[0]) == {
        f"val/{what}" for what in ("discriminator_loss", "generator_loss", "frechet_distance", "judge_accuracy")
    }


def test_samples_are_those_of_the_averaged_generator(tmp_path):
    data, seen = Digits(batch_size=64), []
    task = GanTask(Generator(1, 8, 10, 6, 8), Discriminator(1, 8, 10, 8), 6, data.classes, optimizer=ADAM)

    class Look(Callback):
        def on_validation_epoch_end(self, trainer, module):
            seen.append(module.generator.project[0].weight.detach().clone())

    average = EMA(decay=0.99, warmup=False, parameters="generator.*")
    trainer = toy_trainer(tmp_path, [average, SampleGrid(rows=1), Look()], kind=Trainer, max_epochs=2)
    trainer.fit(task, datamodule=data)
    assert torch.equal(seen[-1], average.average()["generator.project.0.weight"])
    assert not torch.equal(seen[-1], task.generator.project[0].weight)
    assert set(average.average()) == {name for name, _ in task.named_parameters() if name.startswith("generator")}
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["epoch-0001.png", "epoch-0002.png"]


def run(folder, *words):
    main(
        [
            "task=gan",
            *SMALL["gan"](folder),
            "trainer=cpu",
            f"out_dir={folder}/run",
            "callbacks.progress_bar=null",
            *words,
        ]
    )


def test_a_run_prints_its_table_and_predicts_what_is_wanted(tmp_path, capsys):
    run(tmp_path, "trainer.max_epochs=2")
    said = capsys.readouterr().out
    header = next(line for line in said.splitlines() if "frechet_distance" in line and "/" not in line)
    assert header.split() == [
        "class_coverage", "class_entropy", "frechet_distance", "judge_accuracy", "nearest_training", "precision", "recall",
    ]  # fmt: skip
    lines = said.splitlines()
    table = lines[lines.index(header) + 1 :][:2]
    assert [row.split()[0] for row in table] == ["test/real", "test/samples"]
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert all(record["val_loss"] > 0 for record in history)
    run(tmp_path, "stage=predict", "task.wanted=7")
    folder = tmp_path / "run" / "predictions"
    made = {name: np.load(folder / f"{name}.npy") for name in ("picture", "class", "index")}
    assert made["picture"].shape == (1797, 1, 8, 8)
    assert made["picture"].min() >= 0
    assert made["picture"].max() <= 1
    assert set(made["class"]) == {7}
    assert (folder / "samples.png").is_file()


@pytest.mark.parametrize("experiment", ["gan_wgan_gp", "gan_hinge"])
def test_experiments_train(experiment, tmp_path):
    run(tmp_path, f"experiment={experiment}", "trainer.max_epochs=1", "trainer.limit_train_batches=6")
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert np.isfinite(list(metrics.values())).all()
    assert ("train/gradient_penalty" in metrics) == (experiment == "gan_wgan_gp")


def test_a_generator_without_classes_is_judged_without_wanted_ones(tmp_path):
    run(tmp_path, "task.classes=null", "trainer.max_epochs=1")
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert "val/frechet_distance" in metrics
    assert "test/samples/judge_accuracy" not in metrics
    assert metrics["test/real/judge_accuracy"] > 0.1


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_task(loss="ls"), "loss=ls: must be one of non_saturating, hinge, wasserstein"),
        (lambda: make_task(r1=-1.0), "r1=-1.0: must be 0 or more"),
        (lambda: make_task(gradient_penalty=-1.0), "gradient_penalty=-1.0: must be 0 or more"),
        (lambda: make_task(r1_every=0), "r1_every=0: must be 1 or more"),
        (lambda: make_task(wanted=3), "wanted=3: must be one of 0, 1, 2"),
        (lambda: make_task(classes=None, wanted="a"), "wanted=a: must be null, for there are no classes"),
        (lambda: GanTask(nn.Identity(), nn.Identity(), optimizers={"generator": Turn("generator")}), "optimizers=.*must have a discriminator and a generator"),
        (lambda: SampleReport(judge_steps=1), "judge_steps=1: must be 2 or more"),
        (lambda: SampleReport(limit=8), "limit=8: must be 16 or more"),
        (lambda: SampleGrid(rows=0), "rows=0: must be 1 or more"),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(2, 1, 8, 8)}, "classes=3: the batches have no y; take classes=null"),
        (
            {"x": torch.zeros(2, 8), "y": torch.zeros(2).long()},
            r"batch: must be a mapping with pictures 'x' \(B, C, H, W\)",
        ),
        ([torch.zeros(2, 1, 8, 8)], "got list"),
    ],
)
def test_batches_without_pictures_or_classes_are_refused(batch, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make_task(), batches=torch.utils.data.DataLoader([batch], batch_size=None))


@pytest.mark.slow
def test_the_default_run_makes_digits(tmp_path):
    main(["task=gan", "trainer=cpu", f"out_dir={tmp_path}", "callbacks.progress_bar=null"])
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["test/samples/judge_accuracy"] > 0.93
    assert metrics["test/samples/frechet_distance"] < 2.5 * metrics["test/real/frechet_distance"]
    assert metrics["test/samples/recall"] > 0.6
    assert metrics["test/samples/class_coverage"] == 1
