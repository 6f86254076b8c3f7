import pytest
import torch
from torch.nn.functional import layer_norm

from trainerkit.nn.residual import ResidualBlock, ResidualNetwork


def naive_block(block, x):
    """One object at a time, its hidden numbers one at a time."""
    rows = []
    for row in x:
        normed = layer_norm(row, row.shape, block.norm.weight, block.norm.bias)
        out = row + block.down.bias
        for weight, bias, column in zip(block.up.weight, block.up.bias, block.down.weight.T, strict=True):
            hidden = sum(weight[i] * normed[i] for i in range(len(row))) + bias
            out = out + column * hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        rows.append(out)
    return torch.stack(rows)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ResidualNetwork(width=6, hidden=10, blocks=2, attributes=3, values=2).double()


def test_a_block_is_what_its_formula_says():
    torch.manual_seed(0)
    block = ResidualBlock(5, 7).double()
    torch.nn.init.normal_(block.norm.weight)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x), naive_block(block, x))


def test_the_network_is_its_blocks_in_turn_and_a_readout_of_their_norm(network):
    x = torch.randn(4, 6, dtype=torch.float64)
    features = x
    for block in network.blocks:
        features = naive_block(block, features)
    features = layer_norm(features, (6,), network.norm.weight, network.norm.bias)
    torch.testing.assert_close(network(x), features @ network.answer.weight.T + network.answer.bias)
    told = features @ network.attributes.weight.T + network.attributes.bias
    torch.testing.assert_close(network.tell(x), told.reshape(4, 3, 2))


def test_objects_do_not_see_each_other_and_any_dimensions_may_stand_in_front(network):
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert network(x).shape == (2, 3, 2)
    assert network.tell(x).shape == (2, 3, 3, 2)
    torch.testing.assert_close(network(x)[1, 2], network(x[1, 2]))
    torch.testing.assert_close(network(x.flip(0)), network(x).flip(0))


def test_a_block_of_zeros_below_changes_nothing(network):
    x = torch.randn(4, 6, dtype=torch.float64)
    one = ResidualNetwork(width=6, hidden=10, blocks=1).double()
    for parameter in one.blocks[0].down.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(one.blocks[0](x), x)


def test_the_default_has_the_layers_that_adapters_change():
    layers = {
        name: (module.in_features, module.out_features)
        for name, module in ResidualNetwork().named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks")
    }
    expected = {}
    for number in range(3):
        expected |= {f"blocks.{number}.up": (48, 96), f"blocks.{number}.down": (96, 48)}
    assert layers == expected
    assert sum(4 * (inputs + outputs) for inputs, outputs in layers.values()) == 3456


@pytest.mark.parametrize("name", ["width", "hidden", "blocks", "attributes", "values"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0: must be 1 or more"):
        ResidualNetwork(**{name: 0})
