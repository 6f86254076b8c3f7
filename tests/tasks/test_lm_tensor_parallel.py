"""`trainer=fsdp_tp`: heads and feed-forward layers shared out over real processes on gloo, beside one process."""

import json
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT, small_text, toy_trainer, trainerkit, two_processes
from tests.tasks.test_lm_scaling import CONTEXT, ROWS, VOCABULARY, Losses, windows
from trainerkit.callbacks import EMA, BestWeights, CrashSafeCheckpoint, ExactResume, Throughput
from trainerkit.fsdp import FSDP2
from trainerkit.muon import Muon
from trainerkit.optim import warmup_cosine
from trainerkit.task import Task
from trainerkit.tasks.lm import GPT, LanguageModelTask
from trainerkit.trainer import Trainer

# By what it has of its own: several matrices in one, gains of heads, rows cut unevenly, biases, tied output, positions.
KINDS = {
    "plain": {},
    "gqa_swiglu_qk": {"n_heads": 4, "n_kv_heads": 2, "activation": "swiglu", "qk_norm": True, "norm": "rmsnorm"},
    "learned": {"positions": "learned", "tie_embeddings": False, "bias": False, "activation": "relu2"},
    "again": {"checkpoint_activations": True, "logit_softcap": 20.0},
}


def make_task(kind, muon=False, **options):
    torch.manual_seed(1)
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2} | KINDS[kind] | options
    return LanguageModelTask(
        GPT(VOCABULARY, CONTEXT, **sizes),
        optimizer=partial(Muon if muon else torch.optim.AdamW, lr=0.01),
        scheduler=lambda optimizer, total_steps=None: warmup_cosine(optimizer, total_steps=total_steps, warmup_steps=2),
    )


def fit(folder, kind, batch_size=16, checkpoint=None, callbacks=(), muon=False, **options):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    losses = Losses()
    options = {"max_epochs": 2, "gradient_clip_val": 0.5} | options
    trainer = toy_trainer(
        folder, [*callbacks, losses], kind=Trainer, use_distributed_sampler=False, log_every_n_steps=1, **options
    )
    task, beside = make_task(kind, muon), 1
    if isinstance(trainer.strategy, FSDP2):
        beside = trainer.strategy._tensor_parallel_size
    share = {"rank": trainer.global_rank // beside, "ranks": trainer.world_size // beside}
    held_out = windows(24, True, batch_size, **share)
    trainer.fit(task, windows(ROWS, False, batch_size, **share), held_out, ckpt_path=checkpoint)
    curve = torch.stack(losses.values)
    if trainer.world_size > 1:
        curve = trainer.strategy.reduce(curve, reduce_op="mean")
    state = task.state_dict().items()
    weights = {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).tolist() for n, t in state}
    names = ("train/loss", "val/loss", "val/bits_per_byte", "val/bytes")
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    logged = {name: found[name] for name in (*names, "throughput/tokens") if name in found}
    return {"curve": curve.tolist(), "weights": weights, "logged": logged}


def shared_out(folder, kind="plain", processes=2, **options):
    def work(rank):
        return fit(folder, kind, strategy=FSDP2(tensor_parallel_size=2), devices=processes, **options)

    outcomes = two_processes(work, folder, processes)
    assert "error" not in outcomes[0], outcomes[0]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0]["result"]


def assert_near(ours, theirs, of_weights=1e-5):
    torch.testing.assert_close(torch.tensor(ours["curve"]), torch.tensor(theirs["curve"]), rtol=0, atol=1e-5)
    assert ours["logged"] == pytest.approx(theirs["logged"], abs=1e-5)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(torch.tensor(ours["weights"][name]), torch.tensor(weight), rtol=0, atol=of_weights)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_share_the_heads_equal_one(kind, tmp_path):
    """Losses, weights and held-out metrics; bytes, which are summed over processes, are counted once."""
    single = fit(tmp_path / "single", kind)
    assert single["curve"][-1] < single["curve"][0] - 0.1
    assert_near(shared_out(tmp_path / "two", kind), single)


def test_four_processes_in_a_grid_equal_one_with_the_double_batch(tmp_path):
    single = fit(tmp_path / "single", "gqa_swiglu_qk")
    # Of a gradient near 0 AdamW's first steps take little but the sign.
    assert_near(shared_out(tmp_path / "four", "gqa_swiglu_qk", processes=4, batch_size=8), single, of_weights=1e-4)


def test_muon_takes_the_step_of_the_whole_matrix(tmp_path):
    single = fit(tmp_path / "single", "plain", muon=True)
    two = shared_out(tmp_path / "two", muon=True)
    torch.testing.assert_close(torch.tensor(two["curve"]), torch.tensor(single["curve"]), rtol=0, atol=1e-3)


def test_it_is_saved_goes_on_to_the_bit_and_exports_whole_weights(tmp_path):
    def callbacks():
        return [EMA(decay=0.9), BestWeights(), ExactResume(), CrashSafeCheckpoint(save_every=3, keep_checkpoints=9)]

    whole = shared_out(tmp_path / "whole", callbacks=callbacks())
    path = tmp_path / "whole" / "checkpoints" / "step-00000006.ckpt"
    resumed = shared_out(tmp_path / "resumed", callbacks=callbacks(), checkpoint=str(path))
    assert resumed["weights"] == whole["weights"]
    assert resumed["curve"] == whole["curve"][6:]
    task = make_task("plain")
    exported = load_file(tmp_path / "whole" / "best_model.safetensors")
    assert {name: tensor.shape for name, tensor in exported.items()}.items() <= {
        name: tensor.shape for name, tensor in task.state_dict().items()
    }.items()
    task.load_state_dict(exported, strict=False)
    validated = toy_trainer(tmp_path, kind=Trainer).validate(task, windows(24, True, 24), verbose=False)[0]
    assert validated["val/bits_per_byte"] == pytest.approx(whole["logged"]["val/bits_per_byte"], abs=1e-5)


def test_throughput_counts_a_batch_once_for_the_devices_that_share_it(tmp_path):
    def counter():
        return [Throughput(every_n_steps=2, tokens="tokens", flops="model", peak_flops=1e9)]

    single = fit(tmp_path / "single", "plain", callbacks=counter())["logged"]
    assert single["throughput/tokens"] == 2 * ROWS * CONTEXT
    assert shared_out(tmp_path / "two", callbacks=counter())["logged"] == pytest.approx(single, abs=1e-5)


def test_each_process_holds_its_part_of_each_matrix(tmp_path):
    def work(rank):
        warnings.simplefilter("ignore")
        task = make_task("gqa_swiglu_qk")
        options = {"strategy": FSDP2(tensor_parallel_size=2), "devices": 2, "max_steps": 1}
        toy_trainer(tmp_path, kind=Trainer, use_distributed_sampler=False, **options).fit(task, windows(8, False, 8))
        held = {name: tensor.to_local().numel() for name, tensor in task.network.blocks[0].named_parameters()}
        return {"held": held, "heads": [task.network.blocks[0].attention.n_heads]}

    outcomes = [outcome["result"] for outcome in two_processes(work, tmp_path)]
    for name, parameter in make_task("gqa_swiglu_qk").network.blocks[0].named_parameters():
        cut = name.endswith(("qkv.weight", "qkv.bias", "up.weight", "up.bias", "out.weight", "down.weight"))
        assert [outcome["held"][name] for outcome in outcomes] == [parameter.numel() // (1 + cut)] * 2, name
    assert outcomes[0]["heads"] == [2]


class Line(Task):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(CONTEXT, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["tokens"].float()).mean()


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (Line, 2, "tensor_parallel_size=2: must be 1 for Line, whose network has no plan for tensor parallelism"),
        (lambda: make_task("plain", n_heads=1), 2, "must divide task.network.n_heads, which is 1"),
        (lambda: make_task("plain", n_kv_heads=1), 2, "must divide task.network.n_kv_heads, which is 1"),
        (lambda: make_task("plain", d_ff=33), 2, "must divide task.network.d_ff, which is 33"),
        (lambda: make_task("plain"), 3, "tensor_parallel_size=3: must divide the number of devices, 2"),
        (lambda: make_task("plain"), 0, "tensor_parallel_size=0: must be 1 or more"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_one_sentence(make, size, message, tmp_path):
    def work(rank):
        warnings.simplefilter("ignore")
        options = {"strategy": FSDP2(tensor_parallel_size=size), "devices": 2, "max_steps": 1}
        toy_trainer(tmp_path, kind=Trainer, use_distributed_sampler=False, **options).fit(make(), windows(8, False, 8))

    for outcome in two_processes(work, tmp_path):
        assert outcome["error"].startswith("ValueError: ")
        assert message in outcome["error"]


def test_data_that_give_the_group_different_batches_are_refused(tmp_path):
    def work(rank):
        warnings.simplefilter("ignore")
        options = {"strategy": FSDP2(tensor_parallel_size=2), "devices": 2, "max_steps": 1}
        trainer = toy_trainer(tmp_path, kind=Trainer, use_distributed_sampler=False, **options)
        trainer.fit(make_task("plain"), windows(16, False, 8, rank, 2))

    for outcome in two_processes(work, tmp_path):
        assert "must be 1 with these data, which give the devices of a group different batches" in outcome["error"]


@pytest.mark.slow
def test_the_command_line_trains_and_leaves_whole_weights(tmp_path):
    small_text(tmp_path / "text.txt")
    network = ["task.network.n_layers=1", "task.network.d_model=16", "task.network.n_heads=2"]
    data = ["data=text", "data.path=text.txt", "data.context_length=16", "data.batch_size=8", "data.cache_dir=cache"]
    short = [
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "task.max_new_tokens=4",
        "callbacks.progress_bar=null",
    ]
    devices = ["trainer=fsdp_tp", "trainer.accelerator=cpu", "trainer.devices=2", "callbacks.text_samples=null"]
    answer = trainerkit("task=lm", *data, *network, *short, *devices, "out_dir=run", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    alone = trainerkit("task=lm", *data, *network, *short, "trainer=cpu", "out_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    metrics = [json.loads((tmp_path / name / "results.json").read_text())["metrics"] for name in ("run", "alone")]
    shared = {name for name in metrics[0] if name.startswith(("val/", "test/"))}
    assert len(shared) >= 6
    for name in shared:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-3), name
    weights = [load_file(tmp_path / name / "best_model.safetensors") for name in ("run", "alone")]
    assert {n: t.shape for n, t in weights[0].items()} == {n: t.shape for n, t in weights[1].items()}
    refused = trainerkit("task=mae", *devices[:3], "out_dir=mae", cwd=ROOT / "tests")
    assert "has no plan for tensor parallelism; take trainer=fsdp" in refused.stderr
