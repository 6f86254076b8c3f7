from copy import deepcopy

import pytest
import torch
from torch import nn

from trainerkit.adapter_layout import AdapterLayout
from trainerkit.nn.residual import ResidualNetwork
from trainerkit.tasks.t2l import FrozenBase
from trainerkit.tasks.t2l.metrics import change_gauge

LAYERS = [["blocks.0.up", 6, 10], ["blocks.0.down", 10, 6], ["blocks.1.up", 6, 10], ["blocks.1.down", 10, 6]]
LAYOUT = AdapterLayout(LAYERS, rank=2, scaling=1.5)


def base():
    torch.manual_seed(0)
    return ResidualNetwork(6, 10, 2, attributes=2, values=2).double()


def drawn(tasks=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tasks, *shape, generator=generator, dtype=torch.float64)
        for key, shape in LAYOUT.shapes.items()
    }


def inputs(tasks=3, examples=5):
    return torch.randn(tasks, examples, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def naive(network, factors, x):
    """Task by task, layer by layer: a copy of the network whose weights are W + scaling·B·A."""
    answers = []
    for task in range(len(x)):
        changed = deepcopy(network)
        own = {key: factor[task] for key, factor in factors.items()}
        for name, (a, b) in LAYOUT.unpack(own).items():
            layer = changed.get_submodule(name)
            weight = layer.weight.detach() + 1.5 * (b @ a)
            del layer.weight
            layer.weight = weight
        answers.append(changed(x[task]))
    return torch.stack(answers)


def test_answers_and_gradients_are_those_of_a_copy_for_each_task():
    factors, x = drawn(), inputs()
    for factor in factors.values():
        factor.requires_grad_()
    found, expected = FrozenBase(base(), LAYOUT)(factors, x), naive(base(), factors, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(3, 5, 2, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((answers * weights).sum(), list(factors.values())) for answers in (found, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_an_adapter_of_zeros_changes_nothing_and_a_batch_leaves_the_model_as_it_was():
    network = base()
    before = deepcopy(network.state_dict())
    frozen = FrozenBase(network, LAYOUT)
    nothing = {key: torch.zeros_like(factor) for key, factor in drawn().items()}
    torch.testing.assert_close(frozen(nothing, inputs()), network(inputs()), rtol=1e-12, atol=1e-12)
    frozen(drawn(), inputs())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


def test_the_order_of_the_tasks_and_the_gauge_change_no_answer():
    frozen, factors, x = FrozenBase(base(), LAYOUT), drawn(), inputs()
    found, order = frozen(factors, x), torch.tensor([2, 0, 1])
    torch.testing.assert_close(frozen({key: factor[order] for key, factor in factors.items()}, x[order]), found[order])
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(frozen(change_gauge(LAYOUT, factors, rotation), x), found, rtol=1e-10, atol=1e-12)


def test_other_keys_of_a_batch_are_left_alone():
    frozen, factors = FrozenBase(base(), LAYOUT), drawn()
    assert torch.equal(frozen(factors | {"index": torch.arange(3)}, inputs()), frozen(factors, inputs()))


class Tied(nn.Module):
    """Reads out by the weights that it was embedded by."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_of_tied_weights_the_adapted_layer_changes_alone():
    torch.manual_seed(0)
    model, layout, ids = Tied(), AdapterLayout([["head", 4, 7]], rank=2), torch.arange(7).expand(2, 7)
    factors = {key: torch.randn(2, *shape) for key, shape in layout.shapes.items()}
    found = FrozenBase(model, layout)(factors, ids)
    for task in range(2):
        weight = model.embedding.weight + factors["B/head"][task, 0] @ factors["A/head"][task, 0]
        torch.testing.assert_close(found[task], model.embedding.weight @ weight.T)


def test_inputs_and_adapters_take_the_models_precision():
    factors, x = drawn(), inputs()
    half = {key: factor.bfloat16() for key, factor in factors.items()}
    found = FrozenBase(base().float(), LAYOUT)(half, x.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, FrozenBase(base().float(), LAYOUT)({k: f.float() for k, f in half.items()}, x.bfloat16().float())
    )


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.LayerNorm(6)})])


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (base(), [["blocks.2.up", 6, 10]], "blocks.2.up is not there; the nearest are blocks.1.up, blocks.0.up or"),
        (base(), [["blocks.0", 6, 10]], "blocks.0 is no linear layer"),
        (base(), [["blocks.0.up", 6, 11]], "blocks.0.up goes from 6 to 10, the adapters' from 6 to 11"),
        (Norms(), [["blocks.0.up", 6, 10]], "blocks.0.up is no linear layer; it has none"),
    ],
)
def test_a_model_without_the_adapted_layers_is_refused(model, layers, message):
    with pytest.raises(ValueError, match=f"base={type(model).__name__}: .*{message}"):
        FrozenBase(model, AdapterLayout(layers, rank=2))
