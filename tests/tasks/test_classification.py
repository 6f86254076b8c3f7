"""The task as a whole: through a Trainer and the command line."""

import csv
import json
import warnings
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torchmetrics.classification import MulticlassCohenKappa

from tests.support import Kill, Killed, small_pictures, toy_trainer, two_processes
from tests.tasks.test_classification_parts import by_scikit_learn
from trainerkit.callbacks import BestWeights, CrashSafeCheckpoint, ExactResume, ProgressiveUnfreezing, SavePredictions
from trainerkit.cli import main
from trainerkit.data import Digits, PictureFolder
from trainerkit.data.labelled import LabelledModule, array_sets, split_classes
from trainerkit.fsdp import FSDP2
from trainerkit.tasks.classification import (
    ClassificationReport,
    ClassificationTask,
    Classifier,
    PictureAugment,
    PictureCNN,
)
from trainerkit.tasks.classification.baselines import baselines
from trainerkit.trainer import Trainer

SHORT = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "callbacks.progress_bar=null"]


def make_task(lr=1e-2, **options):
    torch.manual_seed(0)
    network = Classifier(PictureCNN(1, widths=(8, 16)), 10, dropout=options.pop("dropout", 0.0))
    classes = [str(digit) for digit in range(10)]
    return ClassificationTask(network, classes, optimizer=partial(torch.optim.AdamW, lr=lr), **options)


def fit(folder, task, data, callbacks=(), resume=None, **options):
    trainer = toy_trainer(folder, callbacks, kind=Trainer, **{"max_epochs": 2, "gradient_clip_val": 1.0} | options)
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    return trainer


def weights(task):
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}


# What it measures


@pytest.mark.parametrize("processes", [1, 2])
def test_logged_metrics_are_scikit_learns_with_a_ragged_last_batch(processes, tmp_path):
    """899 rows in batches of 100, over one process and over two."""

    def run(folder, **options):
        warnings.simplefilter("ignore")  # Lightning's, of means that are over all processes already
        task, data = make_task(), Digits(batch_size=100)
        trainer = toy_trainer(folder, [ClassificationReport(baselines=False, picture=False)], kind=Trainer, **options)
        trainer.fit(task, datamodule=data)
        trainer.test(task, datamodule=data, verbose=False)
        with torch.no_grad():
            rows = data.rows("test")
            logits = task.eval()(rows["x"])
        expected = by_scikit_learn(logits.softmax(1), rows["y"])
        expected["loss"] = float(nn.functional.cross_entropy(logits.double(), rows["y"]))
        return expected, {name: float(value) for name, value in trainer.callback_metrics.items()}

    options = {"max_epochs": 1, "limit_train_batches": 4}
    if processes == 1:
        found = [run(tmp_path, **options)]
    else:
        outcomes = two_processes(lambda rank: run(tmp_path, devices=2, strategy="ddp", **options), tmp_path)
        assert all("error" not in outcome for outcome in outcomes), outcomes
        found = [outcome["result"] for outcome in outcomes]
    for expected, metrics in found:
        assert 0.2 < expected["accuracy"] < 0.99
        for name, value in expected.items():
            assert metrics[f"test/{name}"] == pytest.approx(value, abs=1e-6 if name != "loss" else 1e-5), name
        assert sum(metrics[f"test/{digit}/rows"] for digit in range(10)) == 899


def test_a_validation_and_the_next_one_do_not_mix(tmp_path):
    task, data = make_task(), Digits(batch_size=32)
    trainer = fit(tmp_path, task, data, max_epochs=3)
    first = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    again = trainer.validate(task, datamodule=data, verbose=False)[0]
    assert len(first) == 7
    assert {name: again[name] for name in first} == first


def test_files_and_table_say_the_same(tmp_path):
    task, data = make_task(), Digits()
    trainer = fit(tmp_path, task, data, [ClassificationReport()], max_epochs=2)
    metrics = trainer.test(task, datamodule=data, verbose=False)[0]
    header, *lines = csv.reader((tmp_path / "confusion_matrix.csv").read_text().splitlines())
    assert header == ["true", *task.classes]
    counts = np.array([[int(cell) for cell in line[1:]] for line in lines])
    assert counts.sum() == 899
    assert np.trace(counts) / 899 == pytest.approx(metrics["test/accuracy"])
    assert counts.sum(1).tolist() == data.rows("test")["y"].bincount().tolist()
    header, *lines = csv.reader((tmp_path / "classes.csv").read_text().splitlines())
    assert header == ["class", "precision", "recall", "f1", "rows"]
    for name, *cells in lines:
        for what, cell in zip(header[1:], cells, strict=True):
            assert float(cell) == pytest.approx(metrics[f"test/{name}/{what}"], rel=1e-5)
    assert float(np.mean([float(line[3]) for line in lines])) == pytest.approx(metrics["test/f1"], abs=1e-6)
    assert (tmp_path / "confusion_matrix.png").stat().st_size > 5000
    assert metrics["test/accuracy_nearest_neighbour"] == pytest.approx(0.961, abs=5e-4)
    assert metrics["test/accuracy_svm"] > 0.969


def test_baselines_see_large_pictures_small_and_know_two_easy_classes():
    y = torch.arange(20) % 2
    x = y[:, None, None, None] * torch.ones(20, 3, 64, 64)
    assert baselines({"x": x, "y": y}, {"x": x, "y": y}) == {"nearest_neighbour": 1.0, "svm": 1.0}


def test_a_metric_of_ones_own(tmp_path):
    from sklearn.metrics import cohen_kappa_score

    task, data = make_task(metrics={"kappa": MulticlassCohenKappa(10)}), Digits()
    trainer = fit(tmp_path, task, data, max_epochs=1)
    rows = data.rows("val")
    with torch.no_grad():
        predicted = task.eval()(rows["x"]).argmax(1)
    expected = cohen_kappa_score(rows["y"], predicted)
    assert float(trainer.callback_metrics["val/kappa"]) == pytest.approx(expected, abs=1e-6)


# How it trains


def test_weights_smoothing_focal_and_mixup_change_only_what_is_minimized(tmp_path):
    """The network stays as it is, for its rate is 0; so the evaluation does."""

    def run(**options):
        trainer = fit(tmp_path, make_task(lr=0.0, **options), Digits(), max_epochs=1)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    plain = run()
    counts = Digits().class_counts
    for options in (
        {"label_smoothing": 0.2},
        {"focal_gamma": 2.0},
        {"class_weights": [3.0] * 10},
        {"class_weights": {"3": 9.0}},
        {"class_weights": "balanced", "class_counts": [*counts[:9], 5]},
        {"mixup": 1.0},
        {"augment": PictureAugment()},
    ):
        changed = run(**options)
        assert changed["val/loss"] == plain["val/loss"], options
        assert changed["val/auroc"] == plain["val/auroc"], options
        assert abs(changed["train/loss"] - plain["train/loss"]) > 1e-4, options
    assert run(class_weights=[3.0] * 10)["train/loss"] == pytest.approx(3 * plain["train/loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one_with_the_double_batch(strategy, tmp_path):
    def run(folder, batch_size, **options):
        warnings.simplefilter("ignore")  # Lightning's, of means that are over all processes already
        data = Digits(batch_size=batch_size)
        task = make_task(label_smoothing=0.1, class_weights="balanced", class_counts=data.class_counts)
        trainer = fit(folder, task, data, limit_train_batches=6, **options)
        state = trainer.strategy.lightning_module_state_dict()
        found = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in state.items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {"weights": {name: tensor.tolist() for name, tensor in found.items()}, "metrics": metrics}

    options = {"devices": 2, "strategy": strategy if strategy == "ddp" else strategy()}
    outcomes = two_processes(lambda rank: run(tmp_path / "two", 32, **options), tmp_path)
    assert all("error" not in outcome for outcome in outcomes), outcomes
    single = run(tmp_path / "one", 64)
    for name, weight in single["weights"].items():
        found = torch.tensor(outcomes[0]["result"]["weights"][name])
        torch.testing.assert_close(found, torch.tensor(weight), rtol=0, atol=1e-5)
    for name, value in single["metrics"].items():
        assert outcomes[1]["result"]["metrics"][name] == pytest.approx(value, abs=1e-5), name


def test_a_run_killed_anywhere_goes_on_to_the_bit(tmp_path):
    """Thirteen steps an epoch, with everything that draws at random: augmentation, mixup, dropout."""

    def run(folder, more=(), resume=None):
        task = make_task(dropout=0.2, mixup=0.4, augment=PictureAugment(mirror=0.5))
        saving = [ExactResume(), CrashSafeCheckpoint(monitor=None, stop_on_signal=False)]
        trainer = fit(folder, task, Digits(), [*saving, *more], resume=resume, max_epochs=3)
        return weights(task), float(trainer.callback_metrics["train/loss"])

    whole, loss = run(tmp_path / "whole")
    for step in (1, 12, 13, 14, 31):
        folder = tmp_path / f"cut{step}"
        with suppress(Killed):
            run(folder, [Kill(step)])
        torch.manual_seed(99)
        resumed, again = run(folder, resume=folder / "killed.ckpt")
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items()), step
        assert again == loss


def test_class_weights_find_the_rare_class(tmp_path):
    """Two overlapping clouds, 1 row of one to 19 of the other."""

    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(800) % 20 == 0).long()
    x = torch.randn(800, 2, generator=generator) + y[:, None]
    roles = np.repeat([0, 1], 400)
    sets = array_sets({"x": x, "y": y}, roles, ["often", "rare"])

    class Clouds(LabelledModule):
        def make_sets(self):
            return sets

    def recall(class_weights):
        torch.manual_seed(0)
        task = ClassificationTask(
            nn.Linear(2, 2), sets.classes, sets.counts, class_weights, optimizer=partial(torch.optim.Adam, lr=0.1)
        )
        trainer = fit(tmp_path, task, Clouds(batch_size=100, num_workers=0, seed=0), max_epochs=10)
        return float(trainer.callback_metrics["val/recall"])

    assert recall(None) < 0.6
    assert recall("balanced") > 0.7


def test_any_network_that_gives_logits_does(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    task = ClassificationTask(network, [str(i) for i in range(10)], optimizer=partial(torch.optim.Adam, lr=0.01))
    trainer = fit(tmp_path, task, Digits(), max_epochs=10)
    assert trainer.callback_metrics["val/accuracy"] > 0.9


def test_it_trains_and_predicts_in_bfloat16(tmp_path):
    task = make_task(mixup=0.2, augment=PictureAugment())
    trainer = fit(tmp_path, task, Digits(), max_epochs=8, precision="bf16-mixed")
    assert trainer.callback_metrics["val/accuracy"] > 0.8
    assert trainer.callback_metrics["val/loss"].isfinite()


# Fine-tuning


class FirstFive(Digits):
    """The digits 0 to 4 alone."""

    def make_sets(self):
        table = super().make_sets().predicted
        rows = table[torch.arange(898)]
        keep = rows["y"] < 5
        names = [str(digit) for digit in range(5)]
        roles = split_classes(rows["y"][keep].numpy(), (0.1, 0.0), self.seed, names)
        return array_sets({"x": rows["x"][keep], "y": rows["y"][keep]}, roles, names)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A network that knows the digits 0 to 4, as a run of this task leaves it."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    task = ClassificationTask(
        Classifier(PictureCNN(1), 5),
        list("01234"),
        augment=PictureAugment(),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
    )
    trainer = fit(folder, task, FirstFive(), [BestWeights()], max_epochs=8)
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    return folder / "best_model.safetensors"


def test_a_network_that_knows_five_digits_learns_ten_from_few_block_by_block(pretrained, tmp_path):
    """Ninety digits; what joined at which epoch, and more accuracy than from nothing."""

    def run(folder, weights, callbacks=()):
        torch.manual_seed(1)
        network = Classifier(PictureCNN(1), 10, weights=weights)
        task = ClassificationTask(network, list("0123456789"), optimizer=partial(torch.optim.AdamW, lr=3e-3))
        data = Digits(val_fraction=0.9, batch_size=32)
        trainer = fit(folder, task, data, callbacks, max_epochs=12)
        return float(trainer.test(task, datamodule=data, verbose=False)[0]["test/accuracy"])

    changed = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, module):
            self.before = {name: p.detach().clone() for name, p in module.network.named_parameters()}

        def on_train_epoch_end(self, trainer, module):
            now = module.network.named_parameters()
            moved = {".".join(name.split(".")[:3]) for name, p in now if not torch.equal(p, self.before[name])}
            changed.append(moved)

    unfreezing = ProgressiveUnfreezing(initial="network.head.*", every_n_epochs=3, warmup_steps=5)
    tuned = run(tmp_path / "tuned", pretrained, [Watch(), unfreezing])
    head, last, first = {"head.weight", "head.bias"}, {"backbone.stages.1"}, {"backbone.stages.0"}
    assert changed == [head] * 3 + [head | last] * 3 + [head | last | first] * 6
    assert tuned > run(tmp_path / "scratch", None) + 0.02
    assert tuned > 0.85


def test_a_vision_transformer_of_transformers_is_fine_tuned_from_a_folder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    network = transformers.ViTModel(config)
    network.save_pretrained("vit")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    chosen = ["network=transformers", "experiment=fine_tune", "task.network.backbone.name_or_path=vit"]
    stages = ["callbacks.progressive_unfreezing.every_n_epochs=1", "trainer.max_epochs=6", "callbacks.ema=null"]
    main(["task=classification", *chosen, *stages, "out_dir=run", "trainer=cpu", "callbacks.progress_bar=null"])
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert metrics["test/accuracy"] > 0.2
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert saved["network.head.weight"].shape == (10, 16)
    for name, weight in network.named_parameters():
        if "pooler" not in name:
            assert not torch.equal(saved[f"network.backbone.network.{name}"], weight), name


# Predictions, the command line


def test_predictions_are_probabilities_in_the_order_of_the_rows(tmp_path):
    task, data = make_task(), Digits(batch_size=100)
    trainer = fit(tmp_path, task, data, [SavePredictions()], max_epochs=2)
    trainer.predict(task, datamodule=data, return_predictions=False)
    found = {path.stem: np.load(path) for path in (tmp_path / "predictions").iterdir()}
    assert found["index"].tolist() == list(range(1797))
    np.testing.assert_allclose(found["probability"].sum(1), 1, rtol=1e-5)
    assert (found["class"] == found["probability"].argmax(1)).all()
    rows = data.rows("test")["index"].numpy()
    expected = float(trainer.test(task, datamodule=data, verbose=False)[0]["test/accuracy"])
    assert (found["class"] == data.sets.predicted[torch.arange(1797)]["y"].numpy())[rows].mean() == pytest.approx(
        expected
    )


def test_pictures_in_folders_from_the_command_line_and_new_ones_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_pictures(tmp_path / "mine", classes=3)
    small_pictures(tmp_path / "new", classes=1, each=4)
    run = ["task=classification", "data=picture_folder", "data.path=mine", "data.image_size=8", "out_dir=run"]
    main([*run, *SHORT[:1], "trainer.max_epochs=12", "callbacks.progress_bar=null", "data.batch_size=8"])
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert metrics["test/accuracy"] > 0.9
    assert {"test/class2/f1", "test/accuracy_svm"} <= metrics.keys()
    main(["stage=predict", "out_dir=run", "data.predict_path=new"])
    assert np.load("run/predictions/class.npy").tolist() == [0, 0, 0, 0]  # as dark as class0


def test_a_table_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(200, 3))
    kinds = np.where(x[:, 0] * x[:, 1] > 0, "same", "other")
    lines = [",".join([*map(str, row), kind]) for row, kind in zip(x, kinds, strict=True)]
    (tmp_path / "mine.csv").write_text("\n".join(["a,b,c,kind", *lines]))
    run = ["task=classification", "network=mlp", "data=table", "data.path=mine.csv", "data.label=kind", "out_dir=run"]
    main([*run, *SHORT[:1], "callbacks.progress_bar=null"])
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["test/accuracy"] > 0.85


def test_a_metric_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kappa = "task.metrics={kappa: {_target_: torchmetrics.classification.MulticlassCohenKappa, num_classes: 10}}"
    main(["task=classification", kappa, "out_dir=run", *SHORT, "callbacks.classification_report.baselines=false"])
    assert "test/kappa" in json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]


def test_what_does_not_fit_is_said_with_its_key(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_pictures(tmp_path / "flat", classes=1)
    (tmp_path / "t.csv").write_text("a,kind\n" + "1,x\n2,y\n" * 10)
    for overrides, message in (
        (["task.label_smoothing=1.0"], "task.label_smoothing=1.0: must be from 0 to below 1"),
        (["task.class_weights={11: 2}"], "task.class_weights={'11': 2}: 11 is no class"),
        (["data=picture_folder", "data.path=flat/class0"], "n_classes=0: must be 2 or more"),
        (["data=table", "data.path=t.csv", "data.label=kind"], "TableData has no channels"),
        (["network=mlp"], "Digits has no features"),
        (["task.network.backbone.widths=[8,8,8,8]"], "4 stages take pictures of 16 pixels or more, not (1, 8, 8)"),
    ):
        with pytest.raises(SystemExit):
            main(["task=classification", "out_dir=run", *SHORT, *overrides])
        assert message in capsys.readouterr().err, overrides


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: must be from 0 to below 1"),
        ({"focal_gamma": -1.0}, "focal_gamma=-1.0: must be 0 or more"),
        ({"mixup": -0.1}, "mixup=-0.1: must be 0 or more"),
        ({"calibration_bins": 0}, "calibration_bins=0: must be 1 or more"),
        ({"class_weights": "even"}, "class_weights=even: must be balanced"),
        ({"class_weights": [1.0]}, r"class_weights=\[1.0\]: must be 10 numbers"),
        ({"class_weights": "balanced"}, r"class_counts=\[\]: must be 1 or more each"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_task(**options)
    with pytest.raises(ValueError, match=r"^classes=\['one'\]: must be two or more"):
        ClassificationTask(nn.Flatten(), ["one"])


def test_a_folder_without_classes_is_refused(tmp_path):
    data = PictureFolder(str(small_pictures(tmp_path, classes=1) / "class0"))
    with pytest.raises(ValueError, match=r"^classes=\[\]: must be two or more"):
        ClassificationTask(nn.Flatten(), data.classes)


# What the default runs reach


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_run_beats_a_support_vector_machine(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    main(["task=classification", f"seed={seed}", "out_dir=run", "trainer=cpu", "callbacks.progress_bar=null"])
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert metrics["test/accuracy"] >= 0.98
    assert metrics["test/accuracy"] > metrics["test/accuracy_svm"] >= 0.969


@pytest.mark.slow
def test_mnist_5k_with_augmentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["task=classification", "data=mnist_5k", "out_dir=run", "trainer=cpu", "callbacks.progress_bar=null"])
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert metrics["test/accuracy"] >= 0.98
    assert metrics["test/accuracy_nearest_neighbour"] == pytest.approx(0.934)
