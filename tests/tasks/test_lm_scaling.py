"""task=lm over processes and windows: what a step computes does not depend on how its batch is cut."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.support import toy_trainer, two_processes
from trainerkit.callbacks import EMA, BestWeights, CrashSafeCheckpoint, ExactResume, GradientAccumulation
from trainerkit.fsdp import FSDP2
from trainerkit.muon import Muon
from trainerkit.optim import warmup_cosine
from trainerkit.tasks.lm import GPT, LanguageModelTask
from trainerkit.tasks.lm.task import IGNORED
from trainerkit.trainer import Trainer

VOCABULARY, CONTEXT, ROWS = 19, 12, 64


class Losses(Callback):
    """Each batch's loss, over the number of batches in its window."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].detach().clone())


def windows(rows, uneven, batch_size, rank=0, ranks=1):
    """This rank's share of random text; `uneven` leaves from none to most targets of a row out."""
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(VOCABULARY, (rows, CONTEXT + 1), generator=generator)
    text[:, 1::2] = (text[:, :-1:2] + 1) % VOCABULARY  # something to learn
    targets = text[:, 1:].clone()
    if uneven:
        left_out = torch.arange(CONTEXT) < torch.randint(CONTEXT, (rows, 1), generator=generator)
        targets[left_out] = IGNORED
    n_bytes = (targets != IGNORED).sum(1)
    parts = [{"tokens": t, "targets": y, "n_bytes": n} for t, y, n in zip(text[:, :-1], targets, n_bytes, strict=True)]
    return DataLoader(parts[rank::ranks], batch_size=batch_size)


def make_task(muon=False):
    torch.manual_seed(1)
    kind = Muon if muon else torch.optim.AdamW
    return LanguageModelTask(
        GPT(VOCABULARY, CONTEXT, n_layers=2, d_model=16, n_heads=2),
        optimizer=partial(kind, lr=0.01),
        scheduler=lambda optimizer, total_steps=None: warmup_cosine(optimizer, total_steps=total_steps, warmup_steps=2),
    )


def fit(folder, batch_size, uneven=False, checkpoint=None, callbacks=(), muon=False, **options):
    """Train two epochs; the mean loss of each batch over the ranks, and the whole final weights."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    losses = Losses()
    options = {"max_epochs": 2, "gradient_clip_val": 0.5} | options
    trainer = toy_trainer(
        folder, [*callbacks, losses], kind=Trainer, use_distributed_sampler=False, log_every_n_steps=1, **options
    )
    task, share = make_task(muon), {"rank": trainer.global_rank, "ranks": trainer.world_size}
    trainer.fit(
        task, windows(ROWS, uneven, batch_size, **share), windows(24, True, batch_size, **share), ckpt_path=checkpoint
    )
    curve = torch.stack(losses.values)
    if trainer.world_size > 1:
        curve = trainer.strategy.reduce(curve, reduce_op="mean")
    weights = {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).tolist()
        for name, tensor in task.state_dict().items()
    }
    logged = {name: float(trainer.callback_metrics[name]) for name in ("train/loss", "val/loss", "val/bits_per_byte")}
    return {"curve": curve.tolist(), "weights": weights, "logged": logged}


def in_two_processes(folder, strategy, **options):
    def work(rank):
        return fit(folder, strategy=FSDP2() if strategy == "fsdp" else strategy, devices=2, **options)

    outcomes = two_processes(work, folder)
    assert "error" not in outcomes[0], outcomes[0]
    assert outcomes[0] == outcomes[1]
    return outcomes[0]["result"]


def assert_near(ours, theirs):
    assert len(ours["curve"]) == len(theirs["curve"])
    torch.testing.assert_close(torch.tensor(ours["curve"]), torch.tensor(theirs["curve"]), rtol=0, atol=1e-5)
    assert ours["logged"] == pytest.approx(theirs["logged"], abs=1e-5)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(torch.tensor(ours["weights"][name]), torch.tensor(weight), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    result = fit(tmp_path_factory.mktemp("single"), batch_size=16)
    assert result["curve"][-1] < result["curve"][0] - 0.1
    return result


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_double_batch(strategy, single, tmp_path):
    """Loss curve, weights, and the held-out loss and bits per byte, whose targets are left out unevenly."""
    assert_near(in_two_processes(tmp_path, strategy, batch_size=8), single)


@pytest.mark.parametrize("by", ["trainer", "callback"])
def test_four_accumulated_batches_equal_one_of_four_times_the_size(by, single, tmp_path):
    if by == "trainer":
        result = fit(tmp_path, batch_size=4, accumulate_grad_batches=4)
    else:
        result = fit(tmp_path, batch_size=4, callbacks=[GradientAccumulation(steps=4)])
    result["curve"] = torch.tensor(result["curve"]).view(-1, 4).sum(1).tolist()  # Lightning gives out a fourth
    assert_near(result, single)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_muon_takes_the_step_of_the_whole_matrix_in_two_processes(strategy, tmp_path):
    whole = fit(tmp_path / "whole", batch_size=16, muon=True)
    in_two = in_two_processes(tmp_path, strategy, batch_size=8, muon=True)
    torch.testing.assert_close(torch.tensor(in_two["curve"]), torch.tensor(whole["curve"]), rtol=0, atol=1e-3)


def counted(batch):
    return int((batch["targets"] != IGNORED).sum())


@pytest.mark.parametrize("strategy", ["one process", "ddp"])
def test_targets_left_out_unevenly_weigh_the_same_with_a_weighted_accumulation(strategy, tmp_path):
    """Each target counts once, whatever batch it is in; without a weight a mean of means would be another number."""
    callback = GradientAccumulation(steps=2, weight=counted)
    whole = fit(tmp_path / "whole", batch_size=16, uneven=True)
    if strategy == "ddp":
        cut = in_two_processes(tmp_path, "ddp", batch_size=4, uneven=True, callbacks=[callback])
    else:
        cut = fit(tmp_path, batch_size=8, uneven=True, callbacks=[callback])
    plain = fit(tmp_path / "plain", batch_size=8, uneven=True, accumulate_grad_batches=2)
    assert cut["logged"] == pytest.approx(whole["logged"], abs=1e-5)
    assert plain["logged"] != pytest.approx(whole["logged"], abs=1e-5)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(torch.tensor(cut["weights"][name]), torch.tensor(weight), rtol=0, atol=1e-5)


def test_sharded_it_is_saved_goes_on_to_the_bit_and_exports_whole_weights(tmp_path):
    def callbacks():
        return [EMA(decay=0.9), BestWeights(), ExactResume(), CrashSafeCheckpoint(save_every=3, keep_checkpoints=9)]

    whole = in_two_processes(tmp_path / "whole", "fsdp", batch_size=8, callbacks=callbacks())
    path = tmp_path / "whole" / "checkpoints" / "step-00000006.ckpt"
    resumed = in_two_processes(tmp_path / "resumed", "fsdp", batch_size=8, callbacks=callbacks(), checkpoint=str(path))
    assert resumed["weights"] == whole["weights"]
    assert resumed["curve"] == whole["curve"][6:]
    exported = [load_file(tmp_path / folder / "best_model.safetensors") for folder in ("whole", "resumed")]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    task = make_task()
    missing, unexpected = task.load_state_dict(exported[0], strict=False)
    assert set(missing) <= {"network.head.weight"}  # tied: written once
    assert not unexpected
    trainer = toy_trainer(tmp_path, kind=Trainer)
    validated = trainer.validate(task, windows(24, True, 24), verbose=False)[0]
    assert validated["val/bits_per_byte"] == pytest.approx(whole["logged"]["val/bits_per_byte"], abs=1e-5)
