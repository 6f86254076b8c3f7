import pytest
import torch
from torch import nn

from tests.benchmarks.cross_entropy import PeakBytes
from trainerkit.adapter_layout import AdapterLayout
from trainerkit.optim import parameter_groups
from trainerkit.tasks.t2l.losses import ReconstructionLoss
from trainerkit.tasks.t2l.network import HyperNetwork

LAYERS = [(f"blocks.{i}.{name}", *shape) for i in range(3) for name, shape in {"up": (6, 10), "down": (10, 6)}.items()]
RANK, WIDTH = 4, 12
SIZES = ("L", "M", "S")


def make(size="L", layers=LAYERS, **options):
    torch.manual_seed(0)
    return HyperNetwork(layers, RANK, WIDTH, **{"size": size, "latent_dim": 16, "head_dim": 20} | options)


def some_statistics(network, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = network.layout.shapes.items()
    return {
        key: (torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)) for key, shape in shapes
    }


def one_by_one(network, task):
    """The formula for one task, one layer, one part at a time, in float64; {layer: (A, B)}."""

    def norm(x, layer):
        return (x - x.mean()) / (x.var(correction=0) + layer.eps).sqrt() * layer.weight + layer.bias

    def line(x, layer):
        return layer.weight @ x + layer.bias

    def silu(x):
        return x / (1 + (-x).exp())

    def linears(part):
        return [layer for layer in part.modules() if isinstance(layer, nn.Linear)]

    def block(x, part):
        first, second = linears(part)
        return x + silu(line(silu(line(norm(x, part.mlp[0]), first)), second))

    found, rank = {}, network.layout.rank
    for number, t in enumerate(network.layout.types):
        head = network.heads[f"to_{t.label}"]
        for place, (name, depth) in enumerate(zip(t.names, t.depths, strict=True)):
            coded = norm(line(task, network.task_encoder[0]), network.task_encoder[1])
            deep = norm(network.depth_encoder[0].weight[depth], network.depth_encoder[1])
            typed = norm(network.type_encoder[0].weight[number], network.type_encoder[1])
            x = torch.cat([coded, deep, typed])
            for layer in linears(network.mixer):
                x = silu(line(x, layer))
            x = block(x, network.first_block)

            def write(x, layer):
                x = block(x, network.second_block)
                x = norm(x, network.to_head[0])
                for inner in linears(network.to_head):
                    x = silu(line(x, inner))
                return line(x, layer)

            if network.size == "L":
                a, b = write(x, head.a).view(rank, t.in_features), write(x, head.b).view(t.out_features, rank)
            else:
                written = []
                for side in range(2):
                    own = network.parts.factor.weight[side]
                    if network.size == "M":
                        written.append(write(x + norm(own, network.parts.norm), head.either).view(rank, -1))
                    else:
                        ranks = [own + network.parts.rank.weight[r] for r in range(rank)]
                        written.append(
                            torch.stack([write(x + norm(p, network.parts.norm), head.either) for p in ranks])
                        )
                a, b = written[0][:, : t.in_features], written[1][:, : t.out_features].T
            found[name] = (
                head.mean_a[place] + head.std_a[place] * a,
                head.mean_b[place] + head.std_b[place] * b,
            )
    return found


@pytest.mark.parametrize("size", SIZES)
def test_every_factor_equals_the_formula_for_one_task_and_layer_at_a_time(size):
    network = make(size).double()
    network.set_statistics(some_statistics(network))
    tasks = torch.randn(3, WIDTH, dtype=torch.float64)
    factors = network.layout.unpack(network(tasks))
    for row, task in enumerate(tasks):
        for name, (a, b) in one_by_one(network, task).items():
            torch.testing.assert_close(factors[name][0][row], a, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(factors[name][1][row], b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_and_contiguous_memory(size):
    network = make(size)
    factors = network(torch.randn(5, WIDTH))
    assert {key: tuple(value.shape) for key, value in factors.items()} == {
        "A/up": (5, 3, RANK, 6),
        "B/up": (5, 3, 10, RANK),
        "A/down": (5, 3, RANK, 10),
        "B/down": (5, 3, 6, RANK),
    }
    assert all(value.is_contiguous() for value in factors.values())


@pytest.mark.parametrize("size", SIZES)
def test_tasks_do_not_see_each_other_and_their_order_is_kept(size):
    network = make(size).double()
    tasks = torch.randn(5, WIDTH, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    together, moved, alone = network(tasks), network(tasks[order]), network(tasks[2:3])
    for key, value in together.items():
        torch.testing.assert_close(moved[key], value[order])
        torch.testing.assert_close(alone[key], value[2:3])


@pytest.mark.parametrize("size", SIZES)
def test_the_order_in_which_layers_are_given_within_a_type_changes_nothing(size):
    one, other = make(size), make(size, [LAYERS[place] for place in (4, 1, 2, 3, 0, 5)])
    other.load_state_dict(one.state_dict())
    task = torch.randn(2, WIDTH)
    for (name, mine), theirs in zip(
        one.layout.unpack(one(task)).items(), other.layout.unpack(other(task)).values(), strict=True
    ):
        assert name in other.layout.names
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", SIZES)
def test_it_begins_at_the_mean_adapter_and_differs_between_tasks_and_layers(size):
    network = make(size, latent_dim=128, head_dim=256)
    statistics = some_statistics(network)
    network.set_statistics(statistics)
    factors = network(torch.randn(6, WIDTH))
    for key, (mean, std) in statistics.items():
        written = (factors[key] - mean) / std.clamp_min(1e-3)
        assert written.abs().mean() < 0.1
        assert written.std(0).mean() > 1e-5
        assert written.std(1).mean() > 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", ["delta_w", "factors"])
@pytest.mark.parametrize("known", [True, False])
def test_a_gradient_reaches_every_parameter_in_the_first_step(size, target, known):
    network = make(size)
    if known:
        network.set_statistics(some_statistics(network))
    generator = torch.Generator().manual_seed(2)
    wanted = {key: torch.randn(3, *shape, generator=generator) for key, shape in network.layout.shapes.items()}
    loss = ReconstructionLoss(network.layout, target)
    loss(network(torch.randn(3, WIDTH)), wanted, torch.ones(6)).total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", SIZES)
def test_two_adapters_are_learnt_by_heart(size):
    network = make(size)
    generator = torch.Generator().manual_seed(2)
    wanted = {key: torch.randn(2, *shape, generator=generator) for key, shape in network.layout.shapes.items()}
    task, loss = torch.randn(2, WIDTH), ReconstructionLoss(network.layout, consistency=0, sparsity=0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    values = []
    for _ in range(400):
        optimizer.zero_grad()
        parts = loss(network(task), wanted, torch.ones(6))
        parts.total.backward()
        optimizer.step()
        values.append(parts.total.item())
    assert values[-1] < 0.05 * values[0]


@pytest.mark.parametrize("size", SIZES)
def test_factors_are_float32_under_autocast_and_near_those_of_float32(size):
    network = make(size)
    network.set_statistics(some_statistics(network))
    task = torch.randn(4, WIDTH)
    exact = network(task)
    with torch.autocast("cpu", torch.bfloat16):
        factors = network(task)
    for key, value in factors.items():
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        torch.testing.assert_close(value, exact[key], rtol=0, atol=0.02)
    sum(value.sum() for value in factors.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_heads_are_of_the_widths_of_their_size():
    widths = {size: {n: m.out_features for n, m in make(size).heads.to_up.named_children()} for size in SIZES}
    assert widths == {"L": {"a": RANK * 6, "b": RANK * 10}, "M": {"either": RANK * 10}, "S": {"either": 10}}
    counts = [sum(p.numel() for p in make(size, latent_dim=8, head_dim=64).heads.parameters()) for size in SIZES]
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("size", SIZES)
def test_the_number_of_layers_adds_no_weights_beyond_an_embedding_of_the_depth(size):
    few, many = (
        make(size),
        make(
            size,
            [
                (f"blocks.{i}.{name}", *shape)
                for i in range(9)
                for name, shape in {"up": (6, 10), "down": (10, 6)}.items()
            ],
        ),
    )
    assert sum(p.numel() for p in many.parameters()) - sum(p.numel() for p in few.parameters()) == 6 * 4


def test_dropout_is_random_in_training_and_absent_in_evaluation():
    network = make(dropout=0.5)
    task = torch.randn(2, WIDTH)
    first, second = network(task), network(task)
    assert not torch.equal(first["A/up"], second["A/up"])
    network.eval()
    assert torch.equal(network(task)["A/up"], network(task)["A/up"])
    plain = make().eval()
    plain.load_state_dict(network.state_dict(), strict=False)
    state = torch.get_rng_state()
    make(dropout=0.0)(task)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plain.train()(task)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


def test_statistics_are_saved_with_the_weights_and_given_back():
    network, other = make(), make()
    statistics = some_statistics(network)
    network.set_statistics(statistics)
    other.load_state_dict(network.state_dict())
    task = torch.randn(2, WIDTH)
    for key, value in network(task).items():
        assert torch.equal(other(task)[key], value)
        assert torch.equal(other.mean_adapter()[key], statistics[key][0])
        assert torch.equal(other.statistics()[key][1], statistics[key][1])


def test_where_the_library_does_not_vary_its_value_is_written():
    network = make()
    statistics = some_statistics(network)
    statistics["A/up"] = (statistics["A/up"][0], torch.zeros(3, RANK, 6))
    network.set_statistics(statistics)
    factors = network(torch.randn(2, WIDTH))
    assert torch.equal(factors["A/up"], statistics["A/up"][0].expand(2, -1, -1, -1))


def test_labels_that_are_methods_of_a_dict_of_modules_are_possible():
    network = make(layers=[("a.0.keys", 4, 4), ("a.0.values", 4, 4), ("a.0.type", 4, 4), ("a.0.train", 4, 4)])
    assert network(torch.randn(1, WIDTH))["A/keys"].shape == (1, 1, RANK, 4)


def test_weight_decay_spares_embeddings_and_norms():
    network = make("S")
    decaying = {id(parameter) for parameter in parameter_groups(network, 0.1)[0]["params"]}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in decaying}
    assert "heads.to_up.either.weight" in names
    assert not any("encoder.0.weight" in name and "task" not in name for name in names)
    assert not any(name.startswith("parts") or "norm" in name for name in names)


def test_forward_and_backward_hold_few_copies_of_the_factors():
    """Factors are larger than all else: what heads write, the factors and their gradients are alive together, no more."""
    layers = [(f"blocks.{i}.q", 512, 512) for i in range(8)]
    network = HyperNetwork(layers, 8, WIDTH, "L", latent_dim=16, head_dim=8)
    task = torch.randn(16, WIDTH)
    wanted = {key: torch.randn(16, *shape) for key, shape in network.layout.shapes.items()}
    factors = 4 * sum(value.numel() for value in wanted.values())
    loss = ReconstructionLoss(network.layout, consistency=0, sparsity=0)
    with PeakBytes() as memory:
        loss(network(task), wanted, torch.ones(8)).total.backward()
    assert memory.peak < 3.5 * factors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "XL"}, r"size=XL: must be L, M or S"),
        ({"latent_dim": 10}, r"latent_dim=10: must be a multiple of 4"),
        ({"latent_dim": 0}, r"latent_dim=0: must be a multiple of 4"),
        ({"head_dim": 0}, r"head_dim=0: must be 1 or more"),
        ({"dropout": 1.0}, r"dropout=1.0: must be from 0 to below 1"),
        ({"layers": []}, r"layers=\[\]"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_embedding_widths_and_ranks_are_refused():
    with pytest.raises(ValueError, match=r"embedding_dim=0: must be 1 or more"):
        HyperNetwork(LAYERS, RANK, 0)
    with pytest.raises(ValueError, match=r"rank=0: must be 1 or more"):
        HyperNetwork(LAYERS, 0, WIDTH)
    for shape in ((WIDTH,), (2, WIDTH + 1), (2, 1, WIDTH)):
        with pytest.raises(ValueError, match=rf"task: shape .*; must be \(B, {WIDTH}\)"):
            make()(torch.zeros(shape))


def test_statistics_that_do_not_fit_are_refused_and_change_nothing():
    network = make()
    good = some_statistics(network)
    mean, std = good["B/up"]
    cases = [
        ({key: pair for key, pair in good.items() if key != "A/up"}, r"the keys must be \['A/down', 'A/up'"),
        (good | {"B/up": (mean, std[:1])}, r"std of B/up has shape \(1, 10, 4\); must be \(3, 10, 4\)"),
        (good | {"B/up": (mean * torch.nan, std)}, r"mean of B/up must be finite$"),
        (good | {"B/up": (mean, -std)}, r"std of B/up must be finite, 0 or more"),
    ]
    for statistics, message in cases:
        with pytest.raises(ValueError, match=message):
            network.set_statistics(statistics)
    assert all((part == 0).all() for part in network.mean_adapter().values())


def test_the_layout_is_all_that_is_known_of_the_base_model():
    network = make(scaling=2.0)
    assert isinstance(network.layout, AdapterLayout)
    assert network.layout.scaling == 2.0
    again = HyperNetwork(network.layout.layers, RANK, WIDTH, latent_dim=16, head_dim=20)
    again.load_state_dict(network.state_dict())
