"""Every task over two processes, with activations that are computed again, and compiled: the numbers stay the same."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from torch import nn

from tests.support import ROOT, toy_trainer, two_processes
from trainerkit.build import build
from trainerkit.compose import compose_config
from trainerkit.fsdp import FSDP2
from trainerkit.networks import checkpoint_blocks
from trainerkit.plugins import AllowList
from trainerkit.tasks.mae import masking
from trainerkit.testing._kill_runs import SMALL
from trainerkit.trainer import Trainer

ALLOW = AllowList()
TASKS = sorted(path.stem for path in (ROOT / "configs" / "task").glob("*.yaml"))
# How those that do not work on pieces refuse.
WHOLE = {"gan": "strategy=FSDP2: optimizers cannot take turns with parameters in pieces"}
# What draws at random for a whole batch is left out.
STILL = {"classification": ["task.mixup=0.0", "task.augment=null"]}
STEPS = 4


class Curve(Callback):
    """What was logged in each epoch, which is one step here."""

    def __init__(self):
        self.records = []

    def on_train_epoch_end(self, trainer, pl_module):
        logged = trainer.callback_metrics.items()  # of which `…_step` is each rank's own
        self.records.append({n: float(v) for n, v in logged if n.startswith("train/") and not n.endswith("_step")})


def parts(task, folder, share=1):
    """Data and task; of a batch the half where two processes share it, and nothing dropped out."""
    small = SMALL[task](folder)
    size = int(next(word.partition("=")[2] for word in reversed(small) if word.startswith("data.batch_size=")))
    # Plain gradients, not their signs, which is what AdamW's first steps are.
    cfg = compose_config(
        [
            f"task={task}",
            *small,
            f"data.batch_size={size // share}",
            "optimizer=sgd",
            "optimizer.lr=0.05",
            *STILL.get(task, []),
        ]
    )
    data = build(cfg.data, "data", ALLOW)
    OmegaConf.register_new_resolver("data_module", lambda key: getattr(data, key), replace=True)
    torch.manual_seed(0)
    made = {name: build(cfg[name], name, ALLOW) for name in ("optimizer", "scheduler")}
    module = build(cfg.task, "task", ALLOW, **made)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
    return data, module


def fit(task, folder, share=1, **options):
    """A step an epoch; the curve and the whole weights."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    curve = Curve()
    data, module = parts(task, folder, share)
    options = {"max_epochs": STEPS, "limit_train_batches": 1, "limit_val_batches": 0, "log_every_n_steps": 1} | options
    trainer = toy_trainer(folder, [curve], kind=Trainer, **options)
    with masks_of(trainer.global_rank, share):
        trainer.fit(module, datamodule=data)
    state = module.named_parameters()
    weights = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state}
    return {"curve": curve.records, "weights": {name: tensor.tolist() for name, tensor in weights.items()}}


class masks_of:
    """MAE's masks: this process's rows of those that one process would draw."""

    def __init__(self, rank, share):
        self.rank, self.share = rank, share

    def __enter__(self):
        from trainerkit.tasks.mae import network, task

        self.context, generator = pytest.MonkeyPatch(), torch.Generator().manual_seed(3)

        def draw(batch, n_patches, n_visible, device, generator=generator):
            places = torch.rand(batch * self.share, n_patches, generator=generator)
            return places.argsort(1)[self.rank :: self.share, :n_visible]

        for module in (masking, network, task):
            if hasattr(module, "random_visible"):
                self.context.setattr(module, "random_visible", draw)

    def __exit__(self, *exception):
        self.context.undo()


def assert_near(ours, theirs, atol=1e-5):
    assert len(ours["curve"]) == len(theirs["curve"]) == STEPS
    for mine, others in zip(ours["curve"], theirs["curve"], strict=True):
        assert mine == pytest.approx(others, rel=1e-5, abs=atol)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(torch.tensor(ours["weights"][name]), torch.tensor(weight), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each task in one process, made once."""
    made = {}

    def of(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            made[task] = folder, fit(task, folder)
        return made[task]

    return of


def test_the_glob_finds_every_task():
    assert len(TASKS) >= 4
    assert set(TASKS) <= set(SMALL)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one_with_the_double_batch(task, strategy, alone):
    folder, single = alone(task)

    def work(rank):
        return fit(task, folder, 2, strategy=FSDP2() if strategy == "fsdp" else "ddp", devices=2)

    outcomes = two_processes(work, folder / strategy)
    if strategy == "fsdp" and task in WHOLE:
        assert all(outcome["error"].startswith(f"ValueError: {WHOLE[task]}") for outcome in outcomes)
        return
    assert "error" not in outcomes[0], outcomes[0]
    assert outcomes[0] == outcomes[1]
    assert_near(outcomes[0]["result"], single)
    losses = [record["train/loss"] for record in single["curve"] if "train/loss" in record]
    assert len(set(losses)) in (0, STEPS)


@pytest.mark.parametrize("task", TASKS)
def test_activations_that_are_computed_again_change_nothing(task, alone):
    folder, single = alone(task)
    _, module = parts(task, folder)
    if refusal := why_refused(module):  # a network without repeated blocks, or with BatchNorm in them
        with pytest.raises(ValueError, match=refusal):
            fit(task, folder, checkpoint_activations=True)
    else:
        assert_near(fit(task, folder, checkpoint_activations=True), single, atol=1e-6)


def why_refused(module):
    """What `checkpoint_blocks` says of a task's networks; None if it takes them."""
    try:
        checkpoint_blocks(module.networks())
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")  # torch warns while it reads code, of what it reads
@pytest.mark.parametrize("task", TASKS)
def test_networks_that_are_compiled_give_the_same(task, alone):
    folder, single = alone(task)
    torch._dynamo.reset()
    assert_near(fit(task, folder, compile={"backend": "eager"}), single, atol=1e-5)
