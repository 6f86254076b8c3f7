"""The task as a whole: through a Trainer and the command line, on small libraries of real adapters."""

import json
import warnings
from contextlib import suppress
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from tests.support import Kill, Killed, small_library, toy_trainer, two_processes
from trainerkit.adapters import AdapterLayout, read_adapter
from trainerkit.callbacks import CrashSafeCheckpoint, ExactResume
from trainerkit.cli import main
from trainerkit.compose import compose_config, with_text_quoted
from trainerkit.data import LoraLibrary, RuleAdapters
from trainerkit.fsdp import FSDP2
from trainerkit.tasks.t2l import (
    AdapterReport,
    HyperNetwork,
    Progressive,
    ReconstructionLoss,
    TextToLoraTask,
    WriteAdapters,
)
from trainerkit.tasks.t2l.report import nearest, other_tasks
from trainerkit.tasks.t2l.written_adapters import slug
from trainerkit.testing._kill_runs import SMALL
from trainerkit.trainer import Trainer

RULES = {"rules": 100, "val_rules": 8, "test_rules": 12, "steps": 80, "objects": 32, "base_steps": 200, "examples": 32}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("rules"))


def rules(cache, **options):
    return RuleAdapters(cache_dir=cache, batch_size=16, **RULES, **options)


def library(tmp_path, batch_size=6, adapters=30, **options):
    folder = tmp_path / "adapters"
    if not folder.exists():
        small_library(folder, adapters)
    return LoraLibrary(str(folder), batch_size=batch_size, **options)


def make_task(data, lr=1e-3, dropout=0.0, latent_dim=16, head_dim=16, **options):
    data.prepare_data()
    torch.manual_seed(0)
    network = HyperNetwork(
        data.layers, data.rank, data.embedding_dim, latent_dim=latent_dim, head_dim=head_dim, dropout=dropout,
        scaling=data.scaling,
    )  # fmt: skip
    return TextToLoraTask(network, optimizer=partial(torch.optim.AdamW, lr=lr), **options)


def fit(folder, task, data, callbacks=(), resume=None, **options):
    trainer = toy_trainer(folder, callbacks, kind=Trainer, **{"max_epochs": 2, "gradient_clip_val": 1.0} | options)
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    return trainer


def weights(task):
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}


# What it learns


@pytest.mark.parametrize(("mode", "least"), [("reconstruction", 0.7), ("sft", 0.6)])
def test_adapters_for_tasks_never_seen_do_what_is_described(mode, least, cache, tmp_path):
    """80 training rules, where the default run has 265, and a tenth of its steps."""
    data = rules(cache, examples_per_task=32 if mode == "sft" else None)
    loss = partial(ReconstructionLoss, kind="l1", consistency=0.0, sparsity=0.0)
    task = make_task(data, latent_dim=64, head_dim=128, lr=2e-3, mode=mode, loss=loss)
    trainer = fit(tmp_path, task, data, [AdapterReport()], max_epochs=50, check_val_every_n_epoch=25)
    assert trainer.callback_metrics["val/accuracy"] > 0.55
    metrics = {key: float(value) for key, value in trainer.test(task, datamodule=data, verbose=False)[0].items()}
    accuracy = {key.removeprefix("test/accuracy/"): metrics[key] for key in metrics if "accuracy/" in key}
    assert set(accuracy) == {"trained", "known", "unseen", "wrong", "nearest", "mean", "base"}
    assert accuracy["trained"] > 0.95
    assert all(abs(accuracy[name] - 0.5) < 0.12 for name in ("mean", "base", "wrong")), accuracy
    assert min(accuracy["known"], accuracy["unseen"]) > least, accuracy
    assert mode == "sft" or min(accuracy["known"], accuracy["unseen"]) > accuracy["nearest"], accuracy
    # What learns through the base model need not find the library's own adapters.
    assert mode == "sft" or metrics["test/known/delta_w_cosine"] > metrics["test/known/mean_delta_w_cosine"]


def test_the_base_model_stays_as_it_is_and_in_no_checkpoint(cache, tmp_path):
    data = rules(cache, examples_per_task=8)
    task = make_task(data, mode="sft")
    trainer = fit(tmp_path, task, data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert all(name.startswith("network.") for name in saved["state_dict"])
    for name, weight in data.base_network().named_parameters():
        assert torch.equal(task._base._model.get_parameter(name), weight)


def test_the_first_adapters_are_the_librarys_mean_and_come_back_with_a_checkpoint(tmp_path):
    data = library(tmp_path)
    task = make_task(data)
    trainer = fit(tmp_path, task, data, max_epochs=1)
    train = data.factors(data.described("train", "known")["index"].unique())
    for key, factor in task.network.mean_adapter().items():
        torch.testing.assert_close(factor, train[key].double().mean(0).float())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = make_task(data)
    again.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(2, data.embedding_dim)
    assert all(torch.equal(a, b) for a, b in zip(task(x).values(), again(x).values(), strict=True))


# Several processes, resuming


@pytest.mark.parametrize("strategy", ["ddp", FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one_with_the_double_batch(strategy, tmp_path):
    library(tmp_path)

    def run(folder, batch_size, **options):
        warnings.simplefilter("ignore")  # Lightning's, of means that are over all processes already
        data = library(tmp_path, batch_size, val_fraction=0.2, test_fraction=0.2)
        task = make_task(data, loss=partial(ReconstructionLoss, kind="l1"))
        trainer = fit(folder, task, data, [AdapterReport()], max_epochs=3, limit_train_batches=2, **options)
        state = trainer.strategy.lightning_module_state_dict()
        found = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in state.items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {"weights": {name: tensor.tolist() for name, tensor in found.items()}, "metrics": metrics}

    options = {"devices": 2, "strategy": strategy if strategy == "ddp" else strategy()}
    outcomes = two_processes(lambda rank: run(tmp_path / "two", 4, **options), tmp_path)
    assert all("error" not in outcome for outcome in outcomes), outcomes
    single = run(tmp_path / "one", 8)
    for name, weight in single["weights"].items():
        found = torch.tensor(outcomes[0]["result"]["weights"][name])
        torch.testing.assert_close(found, torch.tensor(weight), rtol=0, atol=1e-5)
    for name, value in single["metrics"].items():
        assert outcomes[0]["result"]["metrics"][name] == pytest.approx(value, abs=1e-5), name


def test_a_run_killed_at_any_step_of_a_progressive_ramp_goes_on_to_the_bit(tmp_path):
    """Five steps an epoch; a ramp of six begins with the second one."""

    def run(folder, more=(), resume=None):
        data = library(tmp_path)
        progressive = Progressive(["up"], layer_addition_interval=1, layer_warmup_steps=6)
        task = make_task(data, dropout=0.2, progressive=progressive)
        saving = [ExactResume(), CrashSafeCheckpoint(monitor=None, stop_on_signal=False)]
        fit(folder, task, data, [*saving, *more], resume=resume, max_epochs=3)
        return weights(task), progressive

    whole, progressive = run(tmp_path / "whole")
    assert progressive.state_dict() == {"starts": [5]}
    for step in range(3, 14, 2):
        folder = tmp_path / f"cut{step}"
        with suppress(Killed):
            run(folder, [Kill(step)])
        resumed, _ = run(folder, resume=folder / "killed.ckpt")
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items()), step


def test_layers_that_are_not_there_yet_get_no_gradient(tmp_path):
    data = library(tmp_path)
    loss = partial(ReconstructionLoss, consistency=0.1, sparsity=0.01)
    progressive = Progressive(["blocks.*.up"], layer_addition_interval=1, layer_warmup_steps=4)
    task = make_task(data, progressive=progressive, loss=loss)
    reached = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            gradients = [p.grad for n, p in module.named_parameters() if ".to_down." in n]
            reached.append(any(bool(gradient.any()) for gradient in gradients if gradient is not None))

    fit(tmp_path, task, data, [Watch()], max_epochs=2, limit_train_batches=3)
    # In the step that adds them their share is still 0.
    assert reached == [False, False, False, False, True, True]


@pytest.mark.parametrize("mode", ["reconstruction", "sft"])
def test_in_bfloat16_it_trains_and_is_judged(mode, cache, tmp_path):
    data = rules(cache, examples_per_task=8 if mode == "sft" else None)
    trainer = fit(tmp_path, make_task(data, mode=mode), data, [AdapterReport()], max_epochs=1, precision="bf16-true")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(value == value for value in metrics.values()), metrics
    assert 0.3 < metrics["val/accuracy"] < 0.8


# What is predicted


def test_adapters_are_written_as_folders_that_hold_what_the_network_says(tmp_path):
    data = library(tmp_path, description="say yes to red and round ones")
    task = make_task(data)
    data.setup("predict")
    trainer = toy_trainer(tmp_path, [WriteAdapters(base_model_name_or_path="base", task_type="CAUSAL_LM")])
    trainer.predict(task, datamodule=data, return_predictions=False)
    folder = tmp_path / "adapters" / "0000-say-yes-to-red-and-round-ones"
    read = read_adapter(folder, "folder")
    assert (read.rank, read.scaling) == (data.rank, data.scaling)
    batch = next(iter(data.predict_dataloader()))
    expected = {key: factor[0] for key, factor in task.eval()(batch["task"]).items()}
    for name, pair in AdapterLayout(data.layers, data.rank).unpack(expected).items():
        for found, factor in zip(read.factors[name], pair, strict=True):
            torch.testing.assert_close(found, factor.detach(), rtol=1e-6, atol=1e-7)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("base", "CAUSAL_LM")


@pytest.mark.parametrize("processes", [1, 2])
def test_every_description_of_a_file_gets_its_folder(processes, tmp_path):
    texts = [f"say yes to {thing}" for thing in ("red ones", "blue ones", "round, or so!", "ümläut ones", "red ones")]
    (tmp_path / "wanted.txt").write_text("\n".join(texts) + "\n")
    library(tmp_path)

    def run():
        data = library(tmp_path, batch_size=2, description_file=str(tmp_path / "wanted.txt"))
        task = make_task(data)
        options = {} if processes == 1 else {"devices": 2, "strategy": "ddp"}
        toy_trainer(tmp_path, [WriteAdapters("found")], **options).predict(
            task, datamodule=data, return_predictions=False
        )

    if processes == 1:
        run()
    else:
        outcomes = two_processes(lambda rank: run(), tmp_path)
        assert all("error" not in outcome for outcome in outcomes), outcomes
    names = sorted(path.name for path in (tmp_path / "found").iterdir())
    assert names == [f"{i:04}-{slug(text)}" for i, text in enumerate(texts)]
    assert names[2:4] == ["0002-say-yes-to-round-or-so", "0003-say-yes-to-ümläut-ones"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("Is it RED?", "is-it-red"), ("a_b  c", "a-b-c"), ("../../etc", "etc"), ("…", ""), ("x" * 60, "x" * 48)],
)
def test_a_folders_name_holds_letters_digits_and_dashes(text, name):
    assert slug(text) == name


def test_what_was_trained_is_written_in_its_own_scaling_and_not_compared_in_another(tmp_path):
    data = library(tmp_path)
    task = make_task(data)
    fit(tmp_path, task, data, max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    weights = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    torch.manual_seed(0)
    now = HyperNetwork(data.layers, data.rank, data.embedding_dim, latent_dim=16, head_dim=16, scaling=2.0)
    again = TextToLoraTask(now)
    again.load_state_dict(weights)
    asked = library(tmp_path, description="say yes to red and round ones")
    toy_trainer(tmp_path, [WriteAdapters()]).predict(again, datamodule=asked, return_predictions=False)
    assert read_adapter(tmp_path / "adapters" / "0000-say-yes-to-red-and-round-ones", "x").scaling == data.scaling
    again = TextToLoraTask(
        HyperNetwork(data.layers, data.rank, data.embedding_dim, latent_dim=16, head_dim=16, scaling=2.0)
    )
    again.load_state_dict(weights)
    with pytest.raises(ValueError, match=r"scaling=2.0: .* the network was trained with 0.5"):
        toy_trainer(tmp_path, kind=Trainer).test(again, datamodule=data)


def test_it_is_loaded_without_a_trainer(tmp_path):
    data = library(tmp_path)
    task = make_task(data)
    fit(tmp_path, task, data, max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    network = make_task(data).network
    loaded = TextToLoraTask.load_from_checkpoint(tmp_path / "x.ckpt", network=network, weights_only=True)
    assert all(torch.equal(weights(loaded)[name], weight) for name, weight in weights(task).items())


# What is judged


def test_every_row_gets_another_task_and_equal_rows_the_same_one():
    index = torch.tensor([4, 4, 9, 2, 9, 7])
    found = other_tasks(index)
    assert (index[found] != index).all()
    assert index[found[0]] == index[found[1]]
    assert sorted(index[found].unique().tolist()) == [2, 4, 7, 9]
    assert other_tasks(torch.tensor([3, 3])) is None


def test_the_nearest_has_the_largest_cosine_whatever_the_lengths_and_the_order():
    torch.manual_seed(0)
    queries, candidates = torch.randn(5, 7), torch.randn(9, 7)
    naive = [
        max(range(9), key=lambda j: float(q.double() @ candidates[j].double() / candidates[j].double().norm()))
        for q in queries
    ]
    assert nearest(queries, candidates).tolist() == naive
    assert nearest(3 * queries, candidates * torch.rand(9, 1)).tolist() == naive
    assert nearest(queries, candidates.flip(0)).tolist() == [8 - j for j in naive]


def test_data_without_a_judge_are_trained_on_all_the_same(tmp_path):
    data = library(tmp_path)
    trainer = fit(tmp_path, make_task(data), data, [AdapterReport()])
    assert "val/loss" in trainer.callback_metrics
    assert "val/accuracy" not in trainer.callback_metrics


class InAnotherGauge(nn.Module):
    """Writes the library's first adapter as (RA, BR⁻¹), whatever is asked."""

    def __init__(self, network, factors, sign):
        super().__init__()
        self.network, self.sign = network, sign
        self.factors = {key: factor[0] for key, factor in factors.items()}

    def forward(self, task):
        return {key: self.sign * factor.expand(len(task), *factor.shape) for key, factor in self.factors.items()}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


def test_products_that_agree_while_factors_do_not_are_told_apart(tmp_path, capsys):
    data = library(tmp_path, adapters=1, val_fraction=0.0, test_fraction=0.0)
    data.setup("test")
    task = make_task(data)
    for sign, alignment in ((1.0, 1.0), (-1.0, -1.0)):
        task.network = InAnotherGauge(make_task(data).network, data.factors(torch.tensor([0])), sign)
        trainer = toy_trainer(tmp_path, [AdapterReport()], kind=Trainer)
        metrics = trainer.test(task, data.train_dataloader(), verbose=False)[0]
        assert metrics["test/alignment"] == pytest.approx(alignment, abs=1e-5)
        assert metrics["test/delta_w_cosine"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["test/magnitude_ratio"] == pytest.approx(1.0, abs=1e-5)
        assert ("another gauge" in capsys.readouterr().out) == (sign < 0)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode=both: must be reconstruction or sft"),
        ({"mode": "sft", "progressive": Progressive(["up"])}, "progressive: belongs to mode=reconstruction"),
        ({"loss": partial(ReconstructionLoss, kind="l3")}, "loss.kind=l3: must be one of mse, l1, huber, cosine"),
        ({"progressive": Progressive(["upp"])}, "progressive.initial_layers=upp: matches none .* Did you mean"),
        (
            {"mode": "sft", "base": nn.Sequential(nn.Linear(2, 2))},
            "base=Sequential: .* is not there; the nearest are 0",
        ),
        ({"base": nn.Linear(2, 2)}, "base: belongs to mode=sft, and mode=reconstruction"),
        ({"base_loss": nn.MSELoss()}, "base_loss: belongs to mode=sft"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_task(library(tmp_path), **options)


def test_learning_through_a_base_model_needs_one_and_examples(tmp_path, cache):
    data = library(tmp_path)
    with pytest.raises(ValueError, match="base=null: mode=sft needs a base model, and these data bring none"):
        fit(tmp_path, make_task(data, mode="sft"), data)
    data = rules(cache)
    with pytest.raises(ValueError, match="give data.examples_per_task"):
        fit(tmp_path, make_task(data, mode="sft"), data)


def test_layers_that_would_never_be_added_are_warned_of(tmp_path):
    data = library(tmp_path)
    task = make_task(data, progressive=Progressive(["up"], layer_addition_interval=2))
    with pytest.warns(UserWarning, match="the last layers are added in epoch 3, and there are 2"):
        fit(tmp_path, task, data, max_epochs=2)


@pytest.mark.parametrize("target", ["delta_w", "factors", "factors_zscore"])
def test_factors_of_many_gauges_are_warned_of_where_factors_are_compared(target, tmp_path, monkeypatch):
    data = library(tmp_path)
    monkeypatch.setattr(data, "shares_initial_a", lambda: False)
    task = make_task(data, loss=partial(ReconstructionLoss, target=target))
    if target == "delta_w":
        fit(tmp_path, task, data, max_epochs=1)  # a warning is an error here
    else:
        with pytest.warns(UserWarning, match="different initial A.*Take task.loss.target=delta_w"):
            fit(tmp_path, task, data, max_epochs=1)


# The command line


@pytest.mark.slow
def test_the_default_run_reaches_what_it_promises(tmp_path, monkeypatch, capsys):
    """Two minutes on two cores, the library included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main(["task=t2l", "trainer=cpu", "callbacks.progress_bar=null", "out_dir=run"])
    found = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    accuracy = {name.rpartition("/")[2]: value for name, value in found.items() if name.startswith("test/accuracy/")}
    assert accuracy["trained"] >= 0.97
    assert 0.45 <= accuracy["base"] <= 0.55
    assert accuracy["unseen"] >= 0.85
    assert accuracy["wrong"] <= 0.56
    assert accuracy["mean"] <= 0.56
    assert found["test/known/mean_alignment"] > 0
    assert "test/accuracy" in capsys.readouterr().out


def test_the_documented_values_are_composed():
    cfg = compose_config(["task=t2l", "experiment=t2l_document", "out_dir=runs/a"])
    task, callbacks = cfg.task, cfg.callbacks
    assert (task.loss.target, task.loss.kind, task.layer_weighting.kind) == ("factors", "mse", "uniform")
    assert (task.loss.consistency, task.loss.sparsity) == (0.1, 0.01)
    assert task.progressive is None
    assert (callbacks.gradient_accumulation.mode, callbacks.gradient_accumulation.steps) == ("fixed", 4)
    assert callbacks.parameter_norm_clip.max_norm == 1.0
    assert callbacks.parameter_stats.every_n_steps == 100  # track_param_magnitudes, log_param_stats_interval
    assert "gradient_flow" not in callbacks  # analyze_gradient_flow
    flow = compose_config(["task=t2l", "callbacks=[default,gradient_flow]"]).callbacks.gradient_flow
    assert flow.every_n_steps == 500  # log_gradient_flow_interval
    assert (task.compute_alignment, task.compute_effective_rank, task.track_layer_accuracy) == (True, False, True)
    assert callbacks.crash_safe_checkpoint.monitor == callbacks.best_weights.monitor == "val/loss"
    assert "memory_monitor" in callbacks
    assert cfg.trainer.profiler is None


@pytest.mark.parametrize("more", [[], ["experiment=t2l_document"], ["task.network.size=M"], ["task.network.size=S"]])
def test_the_command_line_trains_and_writes_what_is_described(more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["task=t2l", *more, *SMALL["t2l"](tmp_path), "trainer=cpu", "callbacks.progress_bar=null", "out_dir=run"]
    main([*small, "trainer.max_epochs=2"])
    screen = capsys.readouterr().out
    assert all(f"test/{name}" in screen for name in ("accuracy", "known", "unseen"))
    main([*small, "trainer.max_epochs=2", "stage=predict", with_text_quoted("description=is it red, or blue?")])
    assert "adapters/0000-is-it-red-or-blue" in capsys.readouterr().out
    assert read_adapter(tmp_path / "run" / "adapters" / "0000-is-it-red-or-blue", "path").rank == 4


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("task.network.size=XL", "task.network.size=XL: must be one of"),
        ("task.loss.kind=l3", "task.loss.kind=l3: must be one of"),
        ("task.loss.knd=l1", "task.loss.knd: there is no such key. Did you mean task.loss.kind"),
        ("task.layer_weighting.decay=2", "task.layer_weighting.decay=2: must be above 0"),
        ("task.network.latent_dim=30", "task.network.latent_dim=30: must be a multiple of 4"),
    ],
)
def test_a_wrong_value_is_answered_by_its_key(override, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["task=t2l", *SMALL["t2l"](tmp_path), "trainer=cpu", "out_dir=run", override])
    assert answer in capsys.readouterr().err
