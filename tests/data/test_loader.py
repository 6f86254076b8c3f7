import itertools

import numpy as np
import pytest
import torch

from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def positions(**options):
    batches = EpochBatches(**{"length": 23, "batch_size": 4, "shuffle": True, "seed": 1} | options)
    return [batch.tolist() for batch in batches]


def test_an_epoch_holds_every_row_once_in_another_order_each_time():
    batches = EpochBatches(23, 4, shuffle=True, seed=1)
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        found = [batch.tolist() for batch in batches]
        assert len(found) == len(batches) == 6
        assert sorted(flat(found)) == list(range(23))
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]
    assert positions() == orders[0]
    assert positions(seed=2) != orders[0]
    assert positions(shuffle=False) == [list(range(i, min(i + 4, 23))) for i in range(0, 23, 4)]


def test_the_order_reads_and_moves_no_global_random_state():
    state = torch.get_rng_state()
    data = ArrayDataset({"x": torch.arange(23)})
    list(BatchLoader(data, EpochBatches(23, 4, shuffle=True)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world", [2, 3])
def test_batch_k_of_all_ranks_is_batch_k_of_one_process(world):
    single = positions(length=24, batch_size=4 * world)
    ranks = [positions(length=24, num_replicas=world, rank=rank) for rank in range(world)]
    for k, batch in enumerate(single):
        assert sorted(flat(rank[k] for rank in ranks)) == sorted(batch)


def test_training_gives_every_rank_as_many_batches_and_evaluation_every_row_once():
    ranks = [positions(length=17, num_replicas=2, rank=rank) for rank in range(2)]
    assert [len(batch) for batch in ranks[0]] == [len(batch) for batch in ranks[1]]
    ranks = [positions(length=17, num_replicas=2, rank=rank, even=False) for rank in range(2)]
    assert sorted(flat(flat(ranks))) == list(range(17))
    assert len(EpochBatches(17, 4, shuffle=False, even=False, num_replicas=2, rank=1)) == len(ranks[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was(workers):
    data = ArrayDataset({"x": torch.arange(23)})

    def make():
        return BatchLoader(data, EpochBatches(23, 4, shuffle=True, seed=3), num_workers=workers)

    whole = [batch["index"].tolist() for batch in make()]
    loader = make()
    stream = iter(loader)
    first = [next(stream)["index"].tolist() for _ in range(2)]
    state = loader.state_dict()
    assert state == {"epoch": 0, "batches": 2, "batch_size": 4, "length": 23, "seed": 3}
    resumed = make()
    resumed.load_state_dict(state)
    assert first + [batch["index"].tolist() for batch in resumed] == whole
    assert resumed.state_dict()["batches"] == 0
    assert [batch["index"].tolist() for batch in resumed] == whole  # the next epoch begins at its beginning


@pytest.mark.parametrize(("name", "other"), [("batch_size", 4), ("length", 10), ("seed", 1)])
def test_resuming_in_mid_epoch_with_another_order_is_refused_by_name(name, other):
    def make(**options):
        options = {"length": 9, "batch_size": 3, "seed": 0} | options
        return BatchLoader(ArrayDataset({"x": torch.arange(10)}), EpochBatches(**options, shuffle=True))

    loader, before = make(), make(**{name: other})
    next(iter(before))
    message = (
        f"{name}={loader.sampler.settings[name]}: the checkpoint .* in the middle of an epoch with {name}={other};"
    )
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(before.state_dict())
    list(before)
    loader.load_state_dict(before.state_dict())  # at the end of an epoch all may change


def test_resuming_reads_nothing_of_what_was_given_before():
    class Counted(ArrayDataset):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    data = Counted({"x": torch.arange(40)})
    loader = BatchLoader(data, EpochBatches(40, 4, shuffle=True))
    loader.load_state_dict({"epoch": 0, "batches": 8, "batch_size": 4})
    assert len(list(loader)) == data.reads == 2


def test_the_position_in_one_epoch_is_not_taken_for_the_next_ones():
    """An epoch that was cut short by limit_train_batches is over although not all its batches were given."""
    loader = BatchLoader(ArrayDataset({"x": torch.arange(20)}), EpochBatches(20, 2, shuffle=False))
    loader.load_state_dict({"epoch": 3, "batches": 8, "batch_size": 2})
    loader.sampler.set_epoch(4)
    assert len(list(loader)) == 10


def test_a_batch_is_one_indexing_of_tensors_arrays_and_memory_maps(tmp_path):
    table = np.random.default_rng(0).normal(size=(9, 3))
    np.save(tmp_path / "a.npy", table)
    np.save(tmp_path / "b.npy", table.astype(">f8"))
    arrays = {"t": torch.from_numpy(table), "n": table, "m": np.load(tmp_path / "a.npy", mmap_mode="r")}
    arrays["swapped"] = np.load(tmp_path / "b.npy", mmap_mode="r")
    data = ArrayDataset(arrays, rows=torch.tensor([7, 2, 5]))
    batch = data[torch.tensor([2, 0])]
    assert batch["index"].tolist() == [5, 7]
    for name in arrays:
        np.testing.assert_array_equal(batch[name].numpy(), table[[5, 7]])


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match=r"arrays=\{'a': 3, 'b': 4\}: must all have the same number of rows"):
        ArrayDataset({"a": torch.zeros(3), "b": torch.zeros(4)})
    with pytest.raises(ValueError, match="rows=0: a data set needs at least one row"):
        ArrayDataset({"a": torch.zeros(3)}, rows=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch_size=0: must be 1 or more"):
        EpochBatches(3, 0, shuffle=False)


@pytest.mark.parametrize(("length", "batch_size"), [(33, 8), (34, 8), (32, 8), (5, 2), (9, 4), (13, 3)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_in_evaluation_all_processes_have_as_many_batches_and_each_sample_once(length, batch_size, ranks):
    shares = [
        EpochBatches(length, batch_size, shuffle=False, even=False, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]
    batches = [list(share) for share in shares]
    assert len({len(own) for own in batches}) == 1
    assert [len(own) for own in batches] == [len(share) for share in shares]
    assert all(0 < len(batch) <= batch_size for own in batches for batch in own)
    assert sorted(torch.cat([batch for own in batches for batch in own]).tolist()) == list(range(length))


@pytest.mark.parametrize(("length", "batch_size"), [(1, 64), (3, 1), (5, 1), (2, 3), (4, 3)])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("even", [True, False])
def test_tiny_sets_give_every_process_as_many_batches(length, batch_size, ranks, even):
    shares = [
        EpochBatches(length, batch_size, shuffle=even, even=even, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]
    batches = [[batch.tolist() for batch in share] for share in shares]
    assert {len(own) for own in batches} == {len(share) for share in shares} == {-(-length // (ranks * batch_size))}
    assert {len(batch) for own in batches for batch in own} <= set(range(1, batch_size + 1))
    rows = flat(flat(batches))
    assert set(rows) == set(range(length))
    assert len(rows) < length + ranks
