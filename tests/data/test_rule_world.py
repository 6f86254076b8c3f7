from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from trainerkit.data.rule_world import (
    BalancedObjects,
    Recipe,
    World,
    answers,
    balanced_accuracy,
    base_layout,
    train_adapters,
    train_base,
)
from trainerkit.data.rules import all_objects, all_rules, some_rules, truth
from trainerkit.nn.residual import ResidualNetwork

# Few rules and few steps: seconds, and yet adapters that have learnt their rules.
RECIPE = Recipe(steps=80, objects=32, base_steps=200)
RULES = some_rules(40)


@pytest.fixture(scope="module")
def world():
    return World(RECIPE.noise, RECIPE.seed)


@pytest.fixture(scope="module")
def network(world):
    return train_base(RECIPE, world)


@pytest.fixture(scope="module")
def factors(world, network):
    return train_adapters(RECIPE, world, network, RULES)


def score(network, factors, world, rules=RULES):
    generator = torch.Generator().manual_seed(1234)
    numbers, expected = BalancedObjects(rules).draw(200, generator)
    return balanced_accuracy(answers(network, base_layout(4), factors, world.draw(numbers, generator)), expected)


def test_the_layout_is_that_of_the_networks_layers():
    layout = base_layout(4)
    modules = dict(ResidualNetwork().named_modules())
    assert [one.label for one in layout.types] == ["down", "up"]
    for name, inputs, outputs in layout.layers:
        assert (modules[name].in_features, modules[name].out_features) == (inputs, outputs)
    assert len(layout.names) == 6
    assert layout.numel == 3456


def test_objects_are_as_far_apart_as_their_values_differ(world):
    differ = (all_objects()[:50, None] != all_objects()[None]).sum(2)
    torch.testing.assert_close(torch.cdist(world.clean[:50], world.clean), (2.0 * differ).sqrt(), atol=2e-3, rtol=1e-4)


def test_noise_has_its_standard_deviation_and_no_direction(world):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1024, (3, 4000), generator=generator)
    noise = world.draw(numbers, generator) - world.clean[numbers]
    assert float(noise.std()) == pytest.approx(RECIPE.noise, rel=0.01)
    covariance = torch.cov(noise.flatten(0, 1).T)
    torch.testing.assert_close(covariance, RECIPE.noise**2 * torch.eye(48), atol=0.005, rtol=0)


def test_half_of_the_objects_of_each_rule_are_yes_and_all_of_them_come():
    objects = BalancedObjects(RULES)
    numbers, expected = objects.draw(40000, torch.Generator().manual_seed(0))
    held = truth(RULES)
    assert torch.equal(held.gather(1, numbers), expected.bool())
    assert expected.sum(1).tolist() == [20000] * len(RULES)
    yes = torch.zeros_like(held).scatter(1, numbers, True) & held
    assert torch.equal(yes, held)


def test_answers_are_those_of_the_network_with_the_products_added_to_its_weights(network):
    layout = base_layout(4)
    layout.scaling = 0.5
    generator = torch.Generator().manual_seed(3)
    double = train_free_copy(network)
    factors = {
        key: torch.randn(3, *shape, generator=generator, dtype=torch.float64) for key, shape in layout.shapes.items()
    }
    inputs = torch.randn(3, 7, 48, generator=generator, dtype=torch.float64)
    expected = []
    for task in range(3):
        weights = dict(double.state_dict())
        for name, (a, b) in layout.unpack(factors).items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + 0.5 * b[task] @ a[task]
        expected.append(functional_call(double, weights, (inputs[task],)))
    torch.testing.assert_close(answers(double, layout, factors, inputs), torch.stack(expected))


def train_free_copy(network):
    copy = ResidualNetwork().double()
    copy.load_state_dict(network.state_dict())
    return copy


def test_balanced_accuracy_is_the_mean_over_yes_and_no():
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(5, 40, 2, generator=generator)
    expected = (torch.rand(5, 40, generator=generator) < 0.3).long()
    naive = []
    for row, truths in zip(said.tolist(), expected.tolist(), strict=True):
        yes = [logits[1] > logits[0] for logits, true in zip(row, truths, strict=True) if true]
        no = [logits[1] <= logits[0] for logits, true in zip(row, truths, strict=True) if not true]
        naive.append((sum(yes) / len(yes) + sum(no) / len(no)) / 2)
    torch.testing.assert_close(balanced_accuracy(said, expected), torch.tensor(naive))
    torch.testing.assert_close(balanced_accuracy(said * 7, expected), torch.tensor(naive))  # no matter how sure
    torch.testing.assert_close(balanced_accuracy(-said, expected), 1 - torch.tensor(naive))
    torch.testing.assert_close(balanced_accuracy(said, 1 - expected), 1 - torch.tensor(naive))


def test_the_base_network_knows_the_attributes_and_no_rule(network, world):
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randint(1024, (2000,), generator=generator)
    told = network.tell(world.draw(numbers, generator)).argmax(-1)
    assert float((told == all_objects()[numbers]).double().mean()) > 0.95
    rules = all_rules()
    nothing = {key: torch.zeros(340, *shape) for key, shape in base_layout(4).shapes.items()}
    assert 0.45 <= float(score(network, nothing, world, rules).mean()) <= 0.55
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


def test_adapters_know_their_own_rule_and_no_other(network, world, factors):
    assert float(score(network, factors, world).mean()) >= 0.93
    order = torch.randperm(len(RULES), generator=torch.Generator().manual_seed(1))
    others = {key: value[order] for key, value in factors.items()}
    assert 0.4 <= float(score(network, others, world).mean()) <= 0.6
    mean = {key: value.mean(0, keepdim=True).expand_as(value) for key, value in factors.items()}
    assert float(score(network, mean, world).mean()) <= 0.56


def test_adapters_begin_alike_and_do_not_see_each_other(network, world):
    few = replace(RECIPE, steps=2)
    together = train_adapters(few, world, network, RULES)
    alone = train_adapters(few, world, network, RULES[7:8])
    for key in together:
        torch.testing.assert_close(together[key][7:8], alone[key], atol=1e-5, rtol=1e-4)
    first = train_adapters(replace(few, steps=1, learning_rate=1e-9), world, network, RULES)
    for key, value in first.items():
        spread = (value - value[:1]).abs().max()
        assert float(spread) < 1e-6, key
        assert bool((value.abs().max() > 0.1) == key.startswith("A/")), key


def test_the_seed_decides_everything_and_nothing_outside_is_moved():
    recipe = Recipe(steps=3, objects=8, base_steps=3)
    states = []
    made = []
    for seed, outside in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        world = World(recipe.noise, seed)
        network = train_base(replace(recipe, seed=seed), world)
        made.append(train_adapters(replace(recipe, seed=seed), world, network, RULES[:5]))
        states.append(torch.equal(torch.get_rng_state(), before))
    assert states == [True] * 3
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert not any(torch.equal(made[0][key], made[2][key]) for key in made[0])


def test_the_steps_are_told(network, world):
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    train_adapters(replace(RECIPE, steps=3), world, network, RULES[:2], progress)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: must be 1 or more"),
        ({"steps": 0}, "steps=0: must be 1 or more"),
        ({"objects": 1}, "objects=1: must be 2 or more"),
        ({"objects": 7}, "objects=7: must be even"),
        ({"base_steps": 0}, "base_steps=0: must be 1 or more"),
        ({"noise": -0.1}, "noise=-0.1: must be 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be above 0"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
    ],
)
def test_impossible_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
