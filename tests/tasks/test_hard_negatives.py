"""Mined negatives: what ranks high and is not relevant, given to the data before an epoch, and exactly resumed."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn

from tests.support import toy_trainer, two_processes
from trainerkit.callbacks import CrashSafeCheckpoint, ExactResume
from trainerkit.data.loader import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.tasks.retrieval import hard_negatives
from trainerkit.tasks.retrieval.hard_negatives import HardNegatives, mine
from trainerkit.tasks.retrieval.search import top_k
from trainerkit.tasks.retrieval.similarity import similarity
from trainerkit.trainer import Trainer

ROWS, WIDTH = 48, 6


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_mine(queries, candidates, k, own, labels, start, stop, margin):
    scores = similarity(queries, candidates).tolist()
    found = []
    for i, row in enumerate(scores):
        wrong = [j for j in range(len(row)) if j != own[i] and (labels is None or labels[j] != labels[own[i]])]
        wrong.sort(key=lambda j: (-row[j], j))
        eligible = [j for j in wrong[start:stop] if margin is None or row[j] <= row[own[i]] - margin]
        found.append((eligible + [-1] * k)[:k])
    return found


@pytest.mark.parametrize("margin", [None, 0.0, 0.3, -0.2])
@pytest.mark.parametrize("labels", [None, 4])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (2, 6), (3, 50)])
def test_what_is_mined_equals_a_loop(margin, labels, start, stop):
    queries, candidates = drawn(9, 5), drawn(21, 5, seed=1)
    own = torch.tensor([3, 0, 20, 7, 7, 1, 12, 13, 2])
    of_label = None if labels is None else torch.arange(21) % labels
    found = mine(queries, candidates, 3, own_rows=own, labels=of_label, rank_start=start, rank_stop=stop, margin=margin)
    assert found.tolist() == naive_mine(queries, candidates, 3, own.tolist(), of_label, start, stop, margin)


def test_late_interaction_is_mined_by_its_own_similarity():
    queries, candidates, own = drawn(7, 2, 4), drawn(15, 3, 4, seed=1), torch.arange(7)
    found = mine(queries, candidates, 3, own_rows=own, margin=0.1)
    assert found.tolist() == naive_mine(queries, candidates, 3, own.tolist(), None, 0, 100, 0.1)


def test_the_candidates_are_searched_once_and_what_is_found_is_compared_in_parts(monkeypatch):
    calls = []

    def counted(queries, *arguments, **options):
        calls.append(len(queries))
        return top_k(queries, *arguments, **options)

    queries, candidates, own = drawn(30, 5), drawn(40, 5, seed=1), torch.arange(30)
    labels = torch.arange(40) % 11
    expected = mine(queries, candidates, 3, own_rows=own, labels=labels, rank_stop=8, margin=0.1, sample="random")
    monkeypatch.setattr(hard_negatives, "top_k", counted)
    monkeypatch.setattr(hard_negatives, "_NUMBERS", 7 * 8 * 5)
    found = mine(queries, candidates, 3, own_rows=own, labels=labels, rank_stop=8, margin=0.1, sample="random")
    assert torch.equal(found, expected)
    assert calls == [30]


def test_a_candidate_that_equals_the_positive_is_no_negative():
    queries, candidates = drawn(4, 5), drawn(12, 5, seed=1)
    candidates[9] = 3 * candidates[0]
    candidates[5] = 2 * candidates[1] + 1e-8
    found = mine(queries, candidates, 11, own_rows=torch.arange(4), margin=None, rank_stop=11)
    assert 9 not in found[0]
    assert 5 not in found[1]
    assert (found >= 0).sum(1).tolist() == [10, 10, 11, 11]


def test_random_ones_are_of_the_range_without_repeats_and_do_not_depend_on_the_other_queries():
    queries, candidates, own = drawn(60, 5), drawn(60, 5, seed=1), torch.arange(60)
    options = {"rank_start": 5, "rank_stop": 25, "margin": None}
    allowed = mine(queries, candidates, 20, own_rows=own, **options)
    found = mine(queries, candidates, 4, own_rows=own, sample="random", seed=3, **options)
    for row, eligible in zip(found.tolist(), allowed.tolist(), strict=True):
        assert set(row) <= set(eligible)
        assert len(set(row)) == 4
    part = mine(queries[11:17], candidates, 4, own_rows=own[11:17], sample="random", seed=3, **options)
    assert torch.equal(part, found[11:17])
    other = mine(queries, candidates, 4, own_rows=own, sample="random", seed=4, **options)
    assert (other != found).float().mean() > 0.5


def test_random_ones_are_of_every_rank_alike():
    """Sixty queries times a hundred seeds: each of the ten ranks 600 times, give or take five deviations."""
    queries, candidates, own = drawn(60, 5), drawn(60, 5, seed=1), torch.arange(60)
    options = {"own_rows": own, "rank_stop": 10, "margin": None}
    allowed = mine(queries, candidates, 10, **options)
    drawn_ranks = [
        (mine(queries, candidates, 1, sample="random", seed=seed, **options) == allowed).long().argmax(1)
        for seed in range(100)
    ]
    counts = torch.cat(drawn_ranks).bincount(minlength=10)
    assert (counts - 600).abs().max() < 5 * (6000 * 0.1 * 0.9) ** 0.5


class Mined(ArrayDataset):
    """Pairs with the numbers of their mined negatives."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.mined = torch.full((len(self), 2), -1).share_memory_()

    def set_mined(self, rows):
        self.mined.copy_(rows)

    def __getitem__(self, index):
        batch = super().__getitem__(index)
        mined = self.mined[index]
        negatives = self.arrays["positive"][mined.clamp(min=0)]
        return batch | {"negatives": negatives, "negatives_mask": mined >= 0}


class Pairs(LightningDataModule):
    def __init__(self, workers=0):
        super().__init__()
        self.workers = workers

    def setup(self, stage):
        positive = drawn(ROWS, WIDTH).float()
        query = positive + 0.8 * drawn(ROWS, WIDTH, seed=1).float()
        self.train_dataset = Mined({"query": query, "positive": positive, "label": torch.arange(ROWS) // 2})

    def _loader(self, shuffle, batch_size):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        batches = EpochBatches(
            ROWS, batch_size // world, shuffle=shuffle, seed=3, even=shuffle, num_replicas=world, rank=rank
        )
        return BatchLoader(self.train_dataset, batches, num_workers=self.workers if shuffle else 0)

    def train_dataloader(self):
        return self._loader(True, 12)

    def mining_dataloader(self):
        return self._loader(False, 10)


class Encoder(LightningModule):
    """Pulls rows to their positives and away from their negatives; drops at random; some parts stay in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.network = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4))
        self.frozen = nn.Dropout(0.5)
        self.modes, self.batches = [], []

    def on_train_start(self):
        self.frozen.eval()

    def embed(self, batch, side):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.network(batch[side])

    def training_step(self, batch, batch_idx):
        query, positive = self.network(batch["query"]), self.network(batch["positive"])
        negatives = self.network(batch["negatives"].flatten(0, 1)).unflatten(0, (-1, 2))
        wrong = (query[:, None] * negatives).sum(-1) * batch["negatives_mask"]
        self.batches.append(batch["negatives_mask"].float().mean().item())
        return (wrong - (query * positive).sum(-1, keepdim=True)).exp().mean() + query.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Notes(Callback):
    """What is mined at each epoch's first batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.rows.append(trainer.datamodule.train_dataset.mined.clone())


class Killed(Exception):
    pass


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
            raise Killed


def fit(folder, callbacks, module=None, data=None, resume=None, **options):
    options = {"max_epochs": 3, "use_distributed_sampler": False} | options
    trainer = toy_trainer(folder, callbacks, kind=Trainer, **options)
    module = module or Encoder()
    trainer.fit(module, datamodule=data or Pairs(), ckpt_path=resume)
    return module, trainer


def test_the_epochs_that_are_asked_for_read_what_the_current_model_finds(tmp_path):
    notes, hard = Notes(), HardNegatives(k=2, every_n_epochs=2, start_epoch=1, rank_stop=20, margin=None)
    module, trainer = fit(tmp_path, [hard, notes], max_epochs=5)
    first, second, third, fourth, fifth = notes.rows
    assert (first == -1).all()
    assert (second >= 0).all()
    assert torch.equal(second, third)
    assert not torch.equal(third, fourth)
    assert torch.equal(fourth, fifth)
    assert module.modes == [(False, False)] * 4 * 5  # two epochs, two sides, five batches
    assert module.batches == [0.0] * 4 + [1.0] * 16
    assert torch.equal(hard.rows, fifth)
    assert float(trainer.callback_metrics["train/mined_negatives"]) == 2


def test_what_is_mined_before_the_first_epoch_is_that_of_the_initial_weights(tmp_path):
    notes = Notes()
    fit(tmp_path, [HardNegatives(k=2, start_epoch=0, rank_stop=20, margin=None), notes], max_epochs=1)
    module, data = Encoder().eval(), Pairs()
    data.setup("fit")
    arrays = data.train_dataset.arrays
    with torch.no_grad():
        query, positive = module.network(arrays["query"]), module.network(arrays["positive"])
    expected = mine(query, positive, 2, own_rows=torch.arange(ROWS), labels=arrays["label"], rank_stop=20, margin=None)
    assert torch.equal(notes.rows[0], expected)
    assert (expected // 2 != torch.arange(ROWS)[:, None] // 2).all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_mining_embeds_in_the_precision_of_the_run(precision, tmp_path):
    notes = Notes()
    hard = HardNegatives(k=2, start_epoch=0, rank_stop=20, margin=None)
    module, _ = fit(tmp_path, [hard, notes], max_epochs=1, precision=precision)
    assert (notes.rows[0] >= 0).all()
    assert module.batches == [1.0] * 4


def test_mining_leaves_modes_statistics_and_random_states_as_they_were(tmp_path):
    """A margin that leaves nothing: the run is the one without mining, bit for bit."""
    plain, _ = fit(tmp_path, [])
    mined, _ = fit(tmp_path, [HardNegatives(k=2, start_epoch=0, margin=2.0, sample="random")])
    assert mined.modes
    assert not mined.frozen.training
    assert mined.network.training
    for (name, a), b in zip(plain.state_dict().items(), mined.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("step", [6, 7, 8])  # epochs of 4 batches: in the middle of the second, and at its end
def test_a_run_killed_after_mining_goes_on_to_the_bit(step, workers, tmp_path):
    def callbacks():
        hard = HardNegatives(k=2, every_n_epochs=2, start_epoch=1, rank_stop=20, margin=None, sample="random")
        return [ExactResume(), hard, CrashSafeCheckpoint(monitor=None, stop_on_signal=False)]

    whole, _ = fit(tmp_path / "whole", callbacks(), data=Pairs(workers), max_epochs=4)
    with suppress(Killed):
        fit(tmp_path / "cut", [*callbacks(), Kill(step)], data=Pairs(workers), max_epochs=4)
    path = tmp_path / "cut" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert [state["rows"].shape for name, state in saved.items() if name.startswith("HardNegatives")] == [(ROWS, 2)]
    resumed, _ = fit(tmp_path / "cut", callbacks(), data=Pairs(workers), max_epochs=4, resume=path)
    assert resumed.batches == whole.batches[step:]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_two_processes_mine_what_one_mines(tmp_path):
    def work(rank):
        notes = Notes()
        hard = HardNegatives(k=2, start_epoch=0, rank_stop=20, margin=None, sample="random")
        fit(tmp_path / "two", [hard, notes], max_epochs=1, devices=2, strategy="ddp")
        return notes.rows[0].tolist()

    outcomes = two_processes(work, tmp_path)
    assert "error" not in outcomes[0], outcomes
    assert outcomes[0] == outcomes[1]
    notes = Notes()
    fit(tmp_path / "one", [HardNegatives(k=2, start_epoch=0, rank_stop=20, margin=None, sample="random"), notes])
    assert outcomes[0]["result"] == notes.rows[0].tolist()


def test_rows_that_are_not_embedded_are_an_error(tmp_path):
    data = Pairs()
    data.mining_dataloader = lambda: list(data._loader(False, 10))[:2]
    with pytest.raises(ValueError, match="mining_dataloader: gave 20 different rows of 48"):
        fit(tmp_path, [HardNegatives(k=2, start_epoch=0)], data=data)


def test_what_is_missing_is_named_before_training(tmp_path):
    class Silent(Encoder):
        embed = None

    with pytest.raises(ValueError, match=r"task=Silent: HardNegatives needs a method embed\(batch, side\)"):
        fit(tmp_path, [HardNegatives()], module=Silent())
    without = Pairs()
    without.mining_dataloader = None
    with pytest.raises(ValueError, match=r"data=Pairs: HardNegatives needs a method mining_dataloader\(\)"):
        fit(tmp_path, [HardNegatives()], data=without)

    class Plain(Pairs):
        def setup(self, stage):
            self.train_dataset = ArrayDataset({"query": torch.ones(3, WIDTH)})

    with pytest.raises(ValueError, match=r"data=Plain: HardNegatives needs a train_dataset with set_mined\(rows\)"):
        fit(tmp_path, [HardNegatives()], data=Plain())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0: must be 1 or more"),
        ({"every_n_epochs": 0}, "every_n_epochs=0: must be 1 or more"),
        ({"start_epoch": -1}, "start_epoch=-1: must be 0 or more"),
        ({"rank_start": -1}, "rank_start=-1: must be 0 or more"),
        ({"rank_start": 97}, "rank_stop=100: must be rank_start=97 plus k=4, or more"),
        ({"margin": 3.0}, "margin=3.0: must be a difference of cosines"),
        ({"sample": "worst"}, "sample=worst: must be top or random"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        HardNegatives(**options)
    shared = {name: value for name, value in options.items() if name in ("k", "rank_start", "margin", "sample")}
    if shared:
        with pytest.raises(ValueError, match=message):
            mine(drawn(2, 3), drawn(2, 3), **({"k": 4} | shared), own_rows=torch.arange(2))


def test_own_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"own_rows: shape \(3,\); must be \(2,\)"):
        mine(drawn(2, 3), drawn(5, 3), 1, own_rows=torch.arange(3))
