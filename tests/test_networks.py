"""What is done to networks in place: activations computed again, and compiled code where there is a compiler."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import SMALL_MAE, smooth_spectra, trainerkit
from trainerkit import networks
from trainerkit.networks import checkpoint_blocks, compile_networks


class Block(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.inner, self.dropout, self.outer = nn.Linear(6, 24), nn.Dropout(0.5), nn.Linear(24, 6)
        self.norm = norm(6) if norm else nn.Identity()

    def forward(self, x, scale=1.0):
        return x + scale * self.norm(self.outer(self.dropout(torch.tanh(self.inner(x)))))


class Net(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


def gradients(net, x):
    """Of a training step in float64 whose dropout draws the same, and how many numbers it kept for them."""
    kept, weights = [], {id(parameter) for parameter in net.parameters()}

    def keep(tensor):
        if id(tensor) not in weights and tensor.is_floating_point():
            kept.append(tensor.numel())
        return tensor

    torch.manual_seed(4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(x).square().sum()
    numbers = sum(kept)
    loss.backward()
    return [parameter.grad.clone() for parameter in net.parameters()], numbers


def test_gradients_are_the_same_to_the_bit_and_less_is_kept():
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, whole = gradients(Net().double(), x)
    net = Net().double()
    checkpoint_blocks([net])
    found, kept = gradients(net, x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert kept < 0.5 * whole


def test_names_kinds_and_copies_stay_what_they_are():
    net, plain = Net(), Net()
    checkpoint_blocks([net])
    checkpoint_blocks([net])
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert all(isinstance(block, Block) for block in net.blocks)
    assert [base.__name__ for base in type(net.blocks[0]).__mro__[:3]] == ["Block", "Block", "Module"]  # once
    other = copy.deepcopy(net).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    x = torch.ones(2, 6)
    assert torch.equal(other(x), plain.eval()(x))
    assert torch.equal(net.eval()(x), x)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Sequential(nn.Linear(2, 2)),
            "checkpoint_activations=True: must be false for these networks, which have no",
        ),
        (Net(nn.BatchNorm1d), "checkpoint_activations=True: must be false with BatchNorm1d, which would count"),
    ],
)
def test_networks_that_cannot_are_refused(net, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_blocks([net])


def test_without_a_compiler_networks_stay_as_they_are_and_one_line_says_so(monkeypatch):
    monkeypatch.setattr(networks, "why_not", lambda device: "no g++")
    networks._says_why_not.cache_clear()
    net = Net()
    with pytest.warns(UserWarning, match=r"trainer.compile: no compiler works here \(no g\+\+\); training goes on"):
        compile_networks([net], {}, torch.device("cpu"))
    assert net._compiled_call_impl is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_networks([net], {}, torch.device("cpu"))  # said once
        assert net._compiled_call_impl is None
        compile_networks([net], {"backend": "eager"}, torch.device("cpu"))  # needs none
    assert net._compiled_call_impl is not None
    networks._says_why_not.cache_clear()


@pytest.mark.slow
def test_a_run_on_a_machine_without_a_compiler_trains(tmp_path):
    np.save(tmp_path / "spectra.npy", smooth_spectra())
    nowhere = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = [*SMALL_MAE, "data.path=spectra.npy", "trainer.max_epochs=1", "callbacks.reconstruction_report=null"]
    answer = trainerkit(*words, "trainer.compile=true", "out_dir=run", cwd=tmp_path, env=nowhere)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count("trainer.compile: no compiler works here") == 1
    assert (tmp_path / "run" / "results.json").exists()
