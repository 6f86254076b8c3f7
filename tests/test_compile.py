"""`trainer.compile`: torch.compile in place, so that nothing else sees a difference."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.support import toy_trainer, two_processes
from tests.tasks.test_lm_scaling import make_task, windows
from trainerkit.callbacks import CrashSafeCheckpoint
from trainerkit.fsdp import FSDP2
from trainerkit.trainer import Trainer

# torch warns while it reads code, of what it reads; as errors these would end the reading.
pytestmark = pytest.mark.filterwarnings("ignore")


def fit(folder, callbacks=(), max_steps=4, checkpoint=None, **options):
    torch._dynamo.reset()
    options = {"gradient_clip_val": 0.5, "use_distributed_sampler": False} | options
    trainer = toy_trainer(folder, callbacks, kind=Trainer, max_epochs=-1, max_steps=max_steps, **options)
    task = make_task()
    task._scheduler_factory = None
    trainer.fit(task, windows(64, False, 8, trainer.global_rank, trainer.world_size), ckpt_path=checkpoint)
    return task


def weights(task):
    state = task.state_dict()
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in state.items()}


def assert_near(ours, theirs, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.set_num_threads(1)
    return weights(fit(tmp_path_factory.mktemp("plain")))


def test_names_and_weights_are_those_of_a_run_without(plain, tmp_path):
    counter = CompileCounter()
    task = fit(tmp_path, compile={"backend": counter})
    assert counter.frame_count >= 1
    assert counter.op_count > 20
    assert_near(weights(task), plain)


def test_no_step_compiles_anew(tmp_path):
    """Not for the loss either, which a new function hands to the network at each step."""
    counts = []
    for steps in (2, 6):
        counter = CompileCounter()
        fit(tmp_path, max_steps=steps, compile={"backend": counter})
        counts.append((counter.frame_count, counter.op_count))
    assert counts[0] == counts[1]


def test_a_checkpoint_of_a_compiled_run_goes_on_uncompiled(plain, tmp_path):
    fit(tmp_path, [CrashSafeCheckpoint(monitor=None, save_every=2)], max_steps=2, compile={"backend": "eager"})
    path = tmp_path / "checkpoints" / "step-00000002.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved.keys() == plain.keys()
    task = fit(tmp_path, checkpoint=path)
    assert task.network._compiled_call_impl is None
    assert task.trainer.global_step == 4


def test_with_parameters_in_pieces_each_block_is_compiled(tmp_path):
    def work(rank):
        counter = CompileCounter()
        compiled = fit(tmp_path, strategy=FSDP2(), devices=2, compile={"backend": counter})
        whole = {name: tensor.tolist() for name, tensor in weights(compiled).items()}
        parts = [name for name, module in compiled.named_modules() if module._compiled_call_impl is not None]
        return {"weights": whole, "parts": parts, "frames": counter.frame_count}

    def without(rank):
        return {name: tensor.tolist() for name, tensor in weights(fit(tmp_path, strategy=FSDP2(), devices=2)).items()}

    outcome, other = two_processes(work, tmp_path)[0], two_processes(without, tmp_path)[0]
    assert "result" in outcome, outcome
    found = outcome["result"]
    assert len(found["parts"]) == 2  # of two blocks
    assert found["frames"] >= 1
    assert_near(
        {name: torch.tensor(tensor) for name, tensor in found["weights"].items()},
        {name: torch.tensor(tensor) for name, tensor in other["result"].items()},
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductors_code_trains_as_without(plain, tmp_path):
    assert_near(weights(fit(tmp_path, compile=True)), plain, atol=1e-4)


@pytest.mark.parametrize("value", ["fast", 3])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=f"compile={value}: must be true, false, one of default, reduce-overhead"):
        Trainer(compile=value)
