"""`trainer=fsdp`: parameters in pieces, in two real processes on gloo, beside one process with the double batch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support import SMALL_MAE, toy_trainer, trainerkit, two_processes
from trainerkit.callbacks import (
    EMA,
    BestWeights,
    CrashSafeCheckpoint,
    EarlyStopping,
    ExactResume,
    GradientFlow,
    History,
    RankConsensus,
    Throughput,
)
from trainerkit.fsdp import FSDP2, blocks, policy
from trainerkit.optim import warmup_cosine
from trainerkit.task import Task
from trainerkit.trainer import Trainer

WIDTH = 6


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    """Two blocks between a matrix and its transpose, which are tied; an uneven number of rows, a scalar, a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(Residual() for _ in range(2))
        self.outer = nn.Linear(WIDTH, 5, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))
        self.tied = nn.Linear(5, WIDTH, bias=False)
        self.tied.weight = self.inner.weight

    def forward(self, x):
        hidden = self.inner(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.scale * (self.outer(hidden) + self.tied(x).tanh() @ self.outer.weight.T)


class Copies(Task):
    """Learns to give back what it is given."""

    def __init__(self):
        super().__init__(
            optimizer=lambda groups, **options: torch.optim.AdamW(groups, lr=0.02, **options),
            scheduler=lambda optimizer, total_steps=None: warmup_cosine(
                optimizer, total_steps=total_steps, warmup_steps=2
            ),
        )
        torch.manual_seed(1)
        self.network = Net()
        self.curve = []

    def loss(self, batch):
        return (self.network(batch[0]) - batch[0]).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.track("train/loss", loss, len(batch[0]))
        self.curve.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.track("val/loss", self.loss(batch), len(batch[0]))

    def test_step(self, batch, batch_idx):
        self.track("test/loss", self.loss(batch), len(batch[0]))


def rows(number, batch_size, rank=0, ranks=1):
    """This rank's share of the rows: batch k of all ranks together is batch k of one process with the double batch."""
    x = torch.randn(number, 5, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x[rank::ranks]), batch_size=batch_size)


def callbacks():
    return [
        EMA(decay=0.9),
        EarlyStopping(patience=50),
        History(),
        BestWeights(),
        RankConsensus(),
        ExactResume(),
        CrashSafeCheckpoint(save_every=3, keep_checkpoints=20),
    ]


def fit(folder, batch_size=8, checkpoint=None, test=False, **options):
    """Train, and give every step's loss, the whole final weights, and what was logged."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # before a fork: the threads of the first process are not in the second
    options = {"max_epochs": 3, "gradient_clip_val": 0.05, "log_every_n_steps": 1, "callbacks": callbacks()} | options
    task, trainer = Copies(), toy_trainer(folder, kind=Trainer, use_distributed_sampler=False, **options)
    share = {"rank": trainer.global_rank, "ranks": trainer.world_size}
    validation = rows(24, batch_size, **share)
    trainer.fit(task, rows(64, batch_size, **share), validation, ckpt_path=checkpoint)
    weights = {name: whole(tensor) for name, tensor in task.state_dict().items()}
    curve = torch.stack(task.curve)
    if trainer.world_size > 1:
        curve = trainer.strategy.reduce(curve, reduce_op="mean")
    metrics = dict(trainer.callback_metrics)
    if test:
        trainer.test(task, validation, ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)
        metrics |= trainer.callback_metrics
    logged = {name: float(value) for name, value in metrics.items() if not name.endswith("_step")}  # that of one rank
    return {"curve": curve.tolist(), "weights": {k: v.tolist() for k, v in weights.items()}, "logged": logged}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def in_pieces(folder, one_file=False, **options):
    """The same in two processes that hold half of each parameter; both have to end alike."""

    def work(rank):
        strategy = FSDP2(save_distributed_checkpoint=not one_file)
        return fit(folder, batch_size=4, strategy=strategy, devices=2, **options)

    outcomes = two_processes(work, folder)
    assert outcomes[0] == outcomes[1]
    assert "error" not in outcomes[0], outcomes[0]
    return outcomes[0]["result"]


def furthest(ours, theirs):
    return max(
        (torch.tensor(ours[name]) - torch.tensor(theirs[name])).abs().max().item() for name in {**ours, **theirs}
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("single"), test=True)


@pytest.fixture(scope="module", params=["folder", pytest.param("one_file", marks=pytest.mark.slow)])
def sharded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, request.param == "one_file", in_pieces(folder, request.param == "one_file", test=True)


def test_losses_weights_and_metrics_equal_one_process_with_the_double_batch(single, sharded):
    """Clipping, warm-up, fused AdamW, the average's validation and the best checkpoint's test included."""
    _, _, result = sharded
    assert len(result["curve"]) == 24
    torch.testing.assert_close(torch.tensor(result["curve"]), torch.tensor(single["curve"]), rtol=0, atol=1e-5)
    assert furthest(result["weights"], single["weights"]) < 1e-5
    assert result["logged"].keys() == single["logged"].keys()
    assert result["logged"] == pytest.approx(single["logged"], abs=1e-5)
    assert single["curve"][-1] < 0.6 * single["curve"][0]


def test_the_exported_weights_are_whole_and_give_the_same_loss_in_one_process(sharded):
    folder, _, result = sharded
    exported = load_file(folder / "best_model.safetensors")
    task = Copies()
    task.load_state_dict(exported | {"network.tied.weight": exported["network.inner.weight"]})
    x = torch.cat([batch[0] for batch in rows(24, 24)])
    with torch.no_grad():
        assert float(task.loss([x])) == pytest.approx(result["logged"]["test/loss"], abs=1e-6)


@pytest.mark.parametrize("step", [9, pytest.param(15, marks=pytest.mark.slow)])
def test_a_run_resumed_within_an_epoch_ends_with_the_bits_of_the_uninterrupted_one(sharded, step, tmp_path):
    folder, one_file, result = sharded
    name = f"step-{step:08d}.ckpt"
    copied = shutil.copytree if (folder / "checkpoints" / name).is_dir() else shutil.copy
    (tmp_path / "checkpoints").mkdir()
    for file in (name, Path(name).with_suffix(".json").name):
        (copied if file == name else shutil.copy)(folder / "checkpoints" / file, tmp_path / "checkpoints" / file)
    resumed = in_pieces(tmp_path, one_file, checkpoint=str(tmp_path / "checkpoints" / name), test=True)
    assert resumed["weights"] == result["weights"]
    assert resumed["curve"] == result["curve"][step:]
    assert resumed["logged"] == result["logged"]


def test_a_checkpoint_in_one_file_goes_on_in_one_process(single, sharded, tmp_path):
    folder, one_file, _ = sharded
    if not one_file:
        pytest.skip("a folder is read by FSDP2 alone")
    path = folder / "checkpoints" / "step-00000008.ckpt"
    task, trainer = Copies(), toy_trainer(tmp_path, callbacks(), kind=Trainer, max_epochs=3, gradient_clip_val=0.05)
    with pytest.warns(UserWarning, match="of 2 processes and this run has 1"):
        trainer.fit(task, rows(64, 8), rows(24, 8), ckpt_path=path)
    final = {name: tensor.tolist() for name, tensor in task.state_dict().items()}
    assert furthest(final, single["weights"]) < 1e-5


def test_accumulated_gradients_equal_the_larger_batch(single, tmp_path):
    def work(rank):
        return fit(tmp_path, batch_size=2, strategy=FSDP2(), devices=2, accumulate_grad_batches=2)

    outcome = two_processes(work, tmp_path)[0]
    assert furthest(outcome["result"]["weights"], single["weights"]) < 1e-5


@pytest.mark.parametrize(
    ("precision", "kept"),
    [
        ("bf16-mixed", torch.float32),
        pytest.param("bf16-true", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_near_float32_and_weights_keep_their_type(precision, kept, single, tmp_path):
    result = in_pieces(tmp_path, precision=precision)
    near = pytest.approx(single["curve"], rel=0.1)
    assert result["curve"] == near
    assert result["curve"] != pytest.approx(single["curve"], rel=1e-4)
    assert {tensor.dtype for tensor in load_file(tmp_path / "best_model.safetensors").values()} == {kept}


def test_a_validation_before_the_first_step_changes_nothing(single, tmp_path):
    """The memory into which it gathers is training's as well."""

    def work(rank):
        warnings.simplefilter("ignore")
        trainer = toy_trainer(tmp_path, kind=Trainer, strategy=FSDP2(), devices=2, use_distributed_sampler=False)
        task, share = Copies(), {"rank": rank, "ranks": 2}
        trainer.validate(task, rows(24, 4, **share), verbose=False)
        trainer.fit(task, rows(64, 4, **share), rows(24, 4, **share))
        return {"mode": trainer.validate_loop.inference_mode, "loss": float(task.curve[0])}

    outcomes = [outcome["result"] for outcome in two_processes(work, tmp_path)]
    assert not any(outcome["mode"] for outcome in outcomes)
    assert sum(outcome["loss"] for outcome in outcomes) / 2 == pytest.approx(single["curve"][0], abs=1e-6)


def test_each_process_holds_half_and_each_block_is_gathered_by_itself(tmp_path):
    def work(rank):
        warnings.simplefilter("ignore")
        task, held = Copies(), {}
        trainer = toy_trainer(tmp_path, kind=Trainer, strategy=FSDP2(), devices=2, max_steps=1)
        trainer.fit(task, rows(64, 4))
        state = trainer.optimizers[0].state
        for name, parameter in task.named_parameters():
            held[name] = [parameter._local_tensor.numel(), state[parameter]["exp_avg"]._local_tensor.numel()]
        cut = [name for name, module in task.named_modules() if type(module).__name__.startswith("FSDP")]
        return {"held": held, "cut": cut}

    first, second = (outcome["result"] for outcome in two_processes(work, tmp_path))
    assert first["cut"] == ["network", "network.layers.0", "network.layers.1"]
    for name, parameter in Copies().named_parameters():
        assert first["held"][name][0] + second["held"][name][0] == parameter.numel()
        assert first["held"][name][0] == first["held"][name][1] <= -(-parameter.shape[0] // 2) * parameter[0].numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 1}, "trainer.devices=1: trainer=fsdp .* needs 2 or more; take trainer=auto"),
        ({"devices": 2, "precision": "16-mixed"}, "precision=16-mixed: must be one of 32-true, bf16-mixed, bf16-true"),
    ],
)
def test_what_cannot_be_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, kind=Trainer, strategy=FSDP2(), **options).fit(Copies(), rows(8, 4))


def test_callbacks_that_need_whole_parameters_refuse_by_one_sentence(tmp_path):
    refused = {
        "GradientFlow": GradientFlow,
        "must be one where parameters are sharded": lambda: EMA(decay=[0.9, 0.99]),
    }
    for words, make in refused.items():

        def work(rank, make=make):
            return fit(tmp_path, callbacks=[make()], strategy=FSDP2(), devices=2)

        for outcome in two_processes(work, tmp_path):
            assert outcome["error"].startswith("ValueError: ")
            assert words in outcome["error"]


def test_parameters_of_the_task_itself_are_refused(tmp_path):
    class Bare(Copies):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

    def work(rank):
        toy_trainer(tmp_path, kind=Trainer, strategy=FSDP2(), devices=2).fit(Bare(), rows(8, 4))

    for outcome in two_processes(work, tmp_path):
        assert "Bare.temperature must be in a module of its own" in outcome["error"]


def test_throughput_counts_the_tokens_and_operations_of_one_process_with_the_double_batch(tmp_path):
    def options():
        counter = Throughput(every_n_steps=2, tokens=lambda batch: batch[0].numel(), peak_flops=1e9)
        return {"callbacks": [counter], "max_epochs": 1}

    outcome = two_processes(
        lambda rank: fit(tmp_path, batch_size=4, strategy=FSDP2(), devices=2, **options()), tmp_path
    )[0]["result"]["logged"]
    alone = fit(tmp_path, **options())["logged"]
    assert outcome["throughput/tokens"] == alone["throughput/tokens"] == 64 * 5
    ratios = [log["throughput/flops_per_second"] / log["throughput/tokens_per_second"] for log in (outcome, alone)]
    assert ratios[0] == pytest.approx(ratios[1])


def test_blocks_are_the_outermost_lists_entries_with_parameters_of_their_own():
    module = nn.Module()
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Tanh()])
    tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    module.nested, module.tied, module.head = nested, tied, nn.Linear(2, 2)
    module.head.weight = tied[0].weight
    inner = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))])
    module.inner = inner
    assert list(blocks(module)) == [nested[0][0], tied[1], inner[0]]


def test_gradients_are_added_up_in_float32_and_bf16_mixed_gathers_half_the_bytes():
    assert {policy(name).reduce_dtype for name in ("32-true", "bf16-mixed", "bf16-true")} == {torch.float32}
    assert policy("bf16-mixed").param_dtype == torch.bfloat16
    assert policy("32-true").param_dtype is None


def test_it_is_the_strategy_that_lightning_knows():
    assert issubclass(FSDP2, ModelParallelStrategy)


ON_THE_CPU = [
    "data.path=spectra.npy",
    "trainer=fsdp",
    "trainer.accelerator=cpu",
    "callbacks.reconstruction_report=null",
]
COMMAND = [*(word for word in SMALL_MAE if word != "trainer=cpu"), *ON_THE_CPU]


@pytest.mark.slow
def test_the_command_line_trains_with_every_default_callback_and_leaves_whole_weights(spectra_file):
    folder = spectra_file.parent
    answer = trainerkit(*COMMAND, "trainer.devices=2", "trainer.max_epochs=1", "out_dir=run", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["finished"]
    assert set(results["metrics"]) == {"train/loss", "val/loss", "test/loss", "test/mse"}
    assert len(json.loads((folder / "run" / "training_history.json").read_text())) == 1
    assert {path.name[:4] for path in (folder / "run/checkpoints/step-00000005.ckpt").iterdir()} >= {"__0_", "__1_"}
    tested = trainerkit(
        *SMALL_MAE, "data.path=spectra.npy", "callbacks.reconstruction_report=null", "stage=test",
        "resume=run/best_model.safetensors", "out_dir=tested", cwd=folder,
    )  # fmt: skip
    assert f"test/loss  {results['metrics']['test/loss']:.5g}" in tested.stdout, tested.stderr


def killed_at(step, folder, *command):
    """Run, and SIGKILL every process once the checkpoint of this step is whole."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainerkit", *command], cwd=folder, start_new_session=True, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    whole = folder / "run" / "checkpoints" / f"step-{step:08d}.json"
    while process.poll() is None and not whole.exists():
        time.sleep(0.01)
    assert process.poll() is None, "it ended first"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_killed_it_goes_on_with_as_many_processes_to_the_bit_and_with_more_to_its_end(devices, spectra_file):
    folder = spectra_file.parent
    command = [*COMMAND, "callbacks.crash_safe_checkpoint.save_every=3", "trainer.gradient_clip_val=0.5"]
    killed_at(6, folder, *command, "trainer.devices=2", "out_dir=run")
    answer = trainerkit(*command, f"trainer.devices={devices}", "out_dir=run", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    assert json.loads((folder / "run" / "results.json").read_text())["finished"]
    if devices == 3:
        assert "the checkpoint is of 2 processes and this run has 3" in answer.stderr
        return
    assert trainerkit(*command, "trainer.devices=2", "out_dir=whole", cwd=folder).returncode == 0
    ended, expected = (load_file(folder / name / "best_model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ended[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_what_cannot_be_is_answered_in_one_sentence(spectra_file):
    folder = spectra_file.parent
    refused = {
        "trainer.devices=1": "trainerkit: trainer.devices=1: trainer=fsdp shares parameters out over devices",
        "trainer.precision=16-mixed": "precision=16-mixed: must be one of 32-true, bf16-mixed, bf16-true",
        "callbacks=[default,parameter_norm_clip]": "ParameterNormClip does not work on sharded parameters; use DDP",
    }
    for option, sentence in refused.items():
        answer = trainerkit(*COMMAND, "trainer.devices=2", option, "out_dir=run", cwd=folder)
        assert answer.returncode != 0
        assert sentence in answer.stderr
        assert "Traceback" not in answer.stderr
    assert trainerkit(*COMMAND, "trainer.devices=2", "trainer.max_epochs=1", "out_dir=run", cwd=folder).returncode == 0
    alone = trainerkit(*SMALL_MAE, "data.path=spectra.npy", "trainer.max_epochs=2", "out_dir=run", cwd=folder)
    assert "is a checkpoint in pieces, which needs trainer=fsdp" in alone.stderr
