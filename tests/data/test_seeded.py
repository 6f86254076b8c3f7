import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainerkit.data import SeededSamples
from trainerkit.functional.random import host_state


class Drawing(Dataset):
    """Three random numbers, one of each global generator, and the index."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor([float(index), random.random(), np.random.rand(), torch.rand(()).item()])


def epoch_of(data, epoch, **options):
    data.set_epoch(epoch)
    return torch.cat(list(DataLoader(data, batch_size=2, **options)))


def test_a_sample_is_the_same_whoever_reads_it_and_after_whatever():
    data = SeededSamples(Drawing(), seed=3)
    alone = torch.stack([data[index] for index in range(6)])
    torch.rand(5), np.random.rand(5), random.random()
    assert torch.equal(epoch_of(data, 0), alone)
    assert torch.equal(epoch_of(data, 0, num_workers=2), alone)
    shuffled = epoch_of(data, 0, shuffle=True)
    assert torch.equal(shuffled[shuffled[:, 0].argsort()], alone)
    assert torch.equal(data[torch.tensor(5)], data[-1] + torch.tensor([6.0, 0, 0, 0]))  # the data set sees -1 itself


def test_epochs_reach_workers_that_live_on():
    data = SeededSamples(Drawing(), seed=3)
    loader = DataLoader(data, batch_size=2, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(torch.cat(list(loader)))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.isclose(epochs[0][:, 1:], epochs[1][:, 1:]).any()
    assert torch.equal(epochs[1], epoch_of(data, 1))


def test_seed_epoch_and_index_each_give_other_numbers():
    drawn = torch.cat([epoch_of(SeededSamples(Drawing(), seed), epoch) for seed in (0, 1) for epoch in (0, 1)])
    assert drawn[:, 1:].unique().numel() == 4 * 6 * 3


def test_the_main_process_goes_on_as_if_nothing_had_been_drawn():
    before = host_state()
    SeededSamples(Drawing())[2]
    after = host_state()
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert torch.equal(before["torch"], after["torch"])


def test_what_has_no_index_and_a_negative_seed_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="^dataset=Stream: must be map-style"):
        SeededSamples(Stream())
    with pytest.raises(ValueError, match="^seed=-1: must be 0 or more"):
        SeededSamples(Drawing(), seed=-1)
