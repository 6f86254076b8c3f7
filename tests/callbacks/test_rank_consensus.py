import contextlib
import io
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import OmegaConf
from torch import nn

from tests.support import SMALL_MAE, ToyModule, smooth_spectra, toy_loader, toy_trainer, trainerkit, two_processes
from trainerkit.callbacks import EMA, RankConsensus
from trainerkit.callbacks._digest import shown
from trainerkit.callbacks.rank_consensus import about_to_train, describe
from trainerkit.cli import main
from trainerkit.testing.bench import Bench, module_class


class Module(ToyModule):
    """Keeps hyperparameters; has a buffer."""

    def __init__(self, lr: float = 0.1, width: int = 4) -> None:
        super().__init__(lr, width)
        self.save_hyperparameters()
        self.register_buffer("scale", torch.ones(2))


class Late(Module):
    """Its layers are made in configure_model, one rank's wider."""

    def __init__(self, late: int) -> None:
        super().__init__()
        self.outputs = late

    def configure_model(self) -> None:
        self.late = nn.Linear(4, self.outputs)


class Data(LightningDataModule):
    def __init__(self, rows: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return toy_loader(32)


def fit(rank, folder, module=Module, data=None, callbacks=(), seed=0, consensus=RankConsensus, **options):
    seed_everything(seed, verbose=False)
    trainer = toy_trainer(
        folder, [consensus(), *callbacks], max_epochs=1, devices=2, strategy=options.pop("strategy", "ddp"),
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    if data is None:
        trainer.fit(module(), toy_loader())
    else:
        trainer.fit(module(), datamodule=data)
    return trainer.global_step


def one_value_a_rank(kind):
    """The keyword arguments of `fit` that differ, by rank."""
    return {
        "seed": lambda rank: {"seed": rank},
        "weights": lambda rank: {"module": lambda: shifted(rank)},
        "buffer": lambda rank: {"module": lambda: shifted(rank, "scale")},
        "hyperparameter": lambda rank: {"module": lambda: Module(lr=[0.1, 0.2][rank])},
        "frozen": lambda rank: {"module": lambda: frozen(rank)},
        "shape": lambda rank: {"module": lambda: Module(width=4 + rank)},
        "built late": lambda rank: {"module": lambda: Late(late=3 + rank)},
        "callback": lambda rank: {"callbacks": [EMA(decay=[0.9, 0.99][rank])]},
        "one more callback": lambda rank: {"callbacks": [EMA()] * rank},
        "trainer": lambda rank: {"gradient_clip_val": [None, 1.0][rank]},
        "data": lambda rank: {"data": Data(rows=[32, 64][rank])},
        "facts": lambda rank: {"consensus": lambda: RankConsensus(facts={"optimizer": {"lr": [1e-3, 1e-2][rank]}})},
        "version": lambda rank: {"callbacks": [pretend_version(["1.0", "2.0"][rank])]},
    }[kind]


def shifted(rank, name="layer.weight"):
    module = Module()
    with torch.no_grad():
        module.state_dict()[name].add_(rank)
    return module


def frozen(rank):
    module = Module()
    module.layer.bias.requires_grad_(rank == 0)
    return module


def pretend_version(version):
    """The other machine, whose installed torch cannot exist here: what the metadata says is replaced in this process."""
    from trainerkit.callbacks import rank_consensus

    rank_consensus.metadata.version = lambda package: version if package == "torch" else "3.0"
    return EMA()


DIFFERENCES = [
    ("seed", "seed: '0' on rank 0, '1' on rank 1"),
    ("weights", "weights.layer.weight: "),
    ("buffer", "weights.scale: "),
    ("hyperparameter", "module.lr: 0.1 on rank 0, 0.2 on rank 1"),
    ("frozen", "parameters.layer.bias: 'torch.float32 (1,) trained' on rank 0, 'torch.float32 (1,) frozen' on rank 1"),
    ("shape", "module.width: 4 on rank 0, 5 on rank 1"),
    (
        "built late",
        "parameters.late.weight: 'torch.float32 (3, 4) trained' on rank 0, 'torch.float32 (4, 4) trained' on",
    ),
    ("callback", "callbacks.1.decay.0: 0.9 on rank 0, 0.99 on rank 1"),
    ("one more callback", "callbacks.1: not there on rank 0, 'EMA' on rank 1"),
    ("trainer", "trainer.gradient_clip_val: None on rank 0, 1.0 on rank 1"),
    ("data", "data.rows: 32 on rank 0, 64 on rank 1"),
    ("facts", "config.optimizer.lr: 0.001 on rank 0, 0.01 on rank 1"),
    ("version", "version.torch: '1.0' on rank 0, '2.0' on rank 1"),
]


@pytest.mark.parametrize(("kind", "line"), DIFFERENCES, ids=[kind for kind, _ in DIFFERENCES])
def test_a_difference_stops_every_rank_with_one_error_that_names_key_rank_and_values(tmp_path, kind, line):
    outcomes = two_processes(lambda rank: fit(rank, tmp_path, **one_value_a_rank(kind)(rank)), tmp_path)
    assert outcomes[0] == outcomes[1]
    error = outcomes[0]["error"]
    assert error.startswith("RanksDiffer: the ranks are not about to train the same thing:\n")
    assert line in error
    assert "RankConsensus(ignore=['" in error
    assert len(error.splitlines()) <= 11


def test_more_keys_than_fit_a_screen_are_counted():
    ranks = [{f"k{i}": str(i) for i in range(20)}, {f"k{i}": str(i + 1) for i in range(20)}]
    text = describe([*ranks, *[ranks[0]] * 8])
    assert "  k0: 0 on ranks 0, 2, 3, 4 and 5 more, 1 on rank 1\n" in text
    assert "  and 12 more\n" in text
    assert len(text.splitlines()) == 11


def test_of_a_long_value_the_place_where_it_differs_is_shown():
    text = describe([{"k": "a" * 500 + letter + "c" * 500} for letter in "xy"])
    assert "  k: …" + "a" * 30 + "x" + "c" * 59 + "… on rank 0, …" + "a" * 30 + "y" in text


def test_loaders_of_other_lengths_are_found_before_the_first_batch(tmp_path):
    class Uneven(LightningDataModule):
        def train_dataloader(self):
            return toy_loader(rows=[32, 40][self.trainer.global_rank])

    class NeverSteps(Module):
        def training_step(self, batch, batch_idx):
            raise AssertionError("a batch was reached")

    outcomes = two_processes(lambda rank: fit(rank, tmp_path, module=NeverSteps, data=Uneven()), tmp_path)
    assert outcomes[0] == outcomes[1]
    assert "batches.train: 4 on rank 0, 5 on rank 1" in outcomes[0]["error"]


@pytest.mark.filterwarnings("ignore:.*sync_dist.*")
def test_what_is_ignored_may_differ(tmp_path):
    outcomes = two_processes(
        lambda rank: fit(rank, tmp_path, seed=rank, consensus=lambda: RankConsensus(["seed", "weights.*"])), tmp_path
    )
    assert outcomes == [{"result": 4}] * 2


def state(module):
    return [random.random(), float(np.random.rand()), float(torch.rand(())), module.layer.weight.tolist()]


@pytest.mark.filterwarnings("ignore:.*sync_dist.*")
def test_equal_ranks_train_as_without_it_and_draw_the_same_random_numbers(tmp_path):
    def train(rank, callbacks):
        seed_everything(3, verbose=False)
        module = Module()
        trainer = toy_trainer(tmp_path, callbacks, max_epochs=1, devices=2, strategy="ddp")
        trainer.fit(module, toy_loader())
        return state(module), "setup" in vars(trainer.strategy)

    with_it = two_processes(lambda rank: train(rank, [RankConsensus()]), tmp_path / "a")
    without = two_processes(lambda rank: train(rank, []), tmp_path / "b")
    assert with_it == without
    assert with_it[0]["result"][1] is False  # nothing is left on the strategy


def test_under_the_other_namespace_too(tmp_path):
    bench = Bench([], tmp_path)

    def train(rank, **options):
        trainer = bench.trainer([RankConsensus()], "pytorch_lightning", devices=2, strategy="ddp", **options)
        trainer.fit(module_class("pytorch_lightning")())
        return trainer.global_step

    assert two_processes(lambda rank: train(rank, max_epochs=1), tmp_path) == [{"result": 4}] * 2
    outcomes = two_processes(lambda rank: train(rank, max_epochs=1 + rank), tmp_path)
    assert outcomes[0] == outcomes[1]
    assert "trainer.max_epochs: 1 on rank 0, 2 on rank 1" in outcomes[0]["error"]


class Sharded(ToyModule):
    """FSDP2: its parameters are pieces; one rank's last layer may be wider."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.more = more

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        self.last = nn.Linear(4, 4 + self.more)
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.layer, mesh=mesh)
        fully_shard(self.last, mesh=mesh)


@pytest.mark.filterwarnings("ignore:.*sync_dist.*")
@pytest.mark.parametrize("differ", [False, True])
def test_sharded_parameters_are_compared_by_their_whole_shape(tmp_path, differ):
    def train(rank):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return fit(rank, tmp_path, module=lambda: Sharded(more=2 * rank * differ), strategy=strategy, callbacks=[])

    outcomes = two_processes(train, tmp_path)
    assert outcomes[0] == outcomes[1]
    if differ:
        assert "parameters.last.weight: 'torch.float32 (4, 4) trained' on rank 0" in outcomes[0]["error"]
    else:
        assert outcomes[0] == {"result": 4}


def test_one_process_compares_nothing(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("compared")

    monkeypatch.setattr(RankConsensus, "compare", never)
    trainer = toy_trainer(tmp_path, [RankConsensus()], max_epochs=1)
    trainer.fit(Module(), toy_loader())
    assert trainer.global_step == 4


def test_keys_of_values_that_have_no_plain_form_do_not_hold_addresses(tmp_path):
    """Or equal ranks would differ."""
    module = Module()
    trainer = toy_trainer(tmp_path, [RankConsensus(), EMA()])
    found = dict(about_to_train(trainer, module, {"thing": object(), "none": None, "list": [1, {"a": 2}]}))
    assert found["config.list.1.a"] == 2
    assert found["callbacks.1"] == "EMA"
    code = [key for key in found if key.startswith("code.")]
    assert code == ["code.trainerkit", f"code.{__name__}", "code.tests.support"]
    assert shown(found["config.thing"]) == "builtins.object"
    values = [Path("a/b"), torch.float16, np.float32(0.5), ToyModule, state, partial(state)]
    names = ["a/b", "torch.float16", "0.5", "tests.support.ToyModule", f"{__name__}.state", "functools.partial"]
    assert [shown(value) for value in values] == names


def test_an_empty_pattern_is_refused():
    with pytest.raises(ValueError, match="ignore=''"):
        RankConsensus(ignore="")


TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1", "data.batch_size=16"]


def test_a_sweep_over_two_processes_trains_one_config_in_both_and_job_after_job(tmp_path):
    """Of a time that each process would resolve anew; RankConsensus compares the whole config of both."""
    np.save(tmp_path / "spectra.npy", smooth_spectra())
    swept = ["-m", "seed=0,1", "+moment=${now:%H-%M-%S-%f}", "out_dir=sweep", "callbacks.reconstruction_report=null"]
    answer = trainerkit(*SMALL_MAE, "data.path=spectra.npy", *TWO, *swept, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("Trained for 1 epochs") == 2
    for number in range(2):
        cfg = OmegaConf.load(tmp_path / "sweep" / str(number) / "config.yaml")
        assert cfg.seed == number
        assert re.fullmatch(r"\d\d-\d\d-\d\d-\d{6}", cfg.moment)
        assert "rank_consensus" in cfg.callbacks


def test_two_processes_with_other_command_lines_are_stopped(tmp_path, monkeypatch):
    """As another launcher starts them, so that each composes its own config."""
    monkeypatch.chdir(tmp_path)
    np.save("spectra.npy", smooth_spectra())

    def command_line(rank):
        chosen = [f"optimizer.lr={[0.001, 0.01][rank]}", f"seed={rank}", "out_dir=run"]
        screen = io.StringIO()
        with contextlib.redirect_stderr(screen), pytest.raises(SystemExit) as stop:
            main([*SMALL_MAE, "data.path=spectra.npy", *TWO, *chosen])
        return stop.value.code, screen.getvalue()

    for outcome in two_processes(command_line, tmp_path):
        code, screen = outcome["result"]
        assert code == 2
        assert (
            "trainerkit: the ranks are not about to train the same thing:\n  seed: '0' on rank 0, '1' on rank 1\n"
            in screen
        )
        assert "  config.optimizer.lr: 0.001 on rank 0, 0.01 on rank 1\n" in screen
        assert "Traceback" not in screen
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
