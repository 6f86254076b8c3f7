import random
from types import SimpleNamespace

import numpy as np
import torch

from trainerkit.functional.random import (
    RandomStream,
    generator_state,
    host_state,
    owned_generators,
    set_generator_state,
    set_host_state,
)


def draw():
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()


def test_the_state_of_the_cpu_comes_back_through_a_safe_file(tmp_path):
    draw()  # the second half of a pair of normal numbers waits now
    torch.save(host_state(), tmp_path / "state")
    first = draw()
    set_host_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first


def test_a_stream_goes_on_where_it_was_and_the_outside_does_not_notice():
    before = host_state()
    outside = [draw(), draw()]
    with (stream := RandomStream(7)):
        inside = [draw(), draw()]
    set_host_state(before)
    again, mixed = RandomStream(7), []
    for _ in range(2):
        with again:
            mixed.append(draw())
        assert draw() == outside.pop(0)
    assert mixed == inside
    with stream, RandomStream(8):
        assert draw() != inside[0]


def generators():
    return [
        torch.Generator().manual_seed(1),
        random.Random(2),
        np.random.RandomState(3),
        *(np.random.Generator(kind(4)) for kind in (np.random.PCG64, np.random.MT19937, np.random.SFC64)),
    ]


def number(generator):
    return torch.rand(3, generator=generator).tolist() if isinstance(generator, torch.Generator) else generator.random()


def test_generators_that_objects_hold_are_found_wherever_they_are_and_come_back(tmp_path):
    held = generators()
    data = SimpleNamespace(transforms=[SimpleNamespace(rng=held[0]), {"a": held[1]}], inner=SimpleNamespace(g=held[2:]))
    data.itself, data.again = data, held[0]
    data.samples = [random.Random(number) for number in range(100)]  # of long lists nothing is taken
    found = owned_generators([data])
    assert {id(generator) for generator in found.values()} == {id(generator) for generator in held}
    torch.save({name: generator_state(generator) for name, generator in found.items()}, tmp_path / "state")
    first = [number(generator) for generator in held]
    for name, state in torch.load(tmp_path / "state", weights_only=True).items():
        set_generator_state(found[name], state)
    assert [number(generator) for generator in held] == first


def test_the_names_of_generators_are_the_same_for_an_object_made_anew():
    one, other = (SimpleNamespace(a=generators(), b=SimpleNamespace(c=generators())) for _ in range(2))
    assert list(owned_generators([one])) == list(owned_generators([other]))
