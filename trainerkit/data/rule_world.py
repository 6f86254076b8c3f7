"""A world of objects, a network that knows them, and an adapter of it for each rule, all trained on the spot.

An object's five values, one-hot (20), are turned by a matrix with orthonormal columns into 48 numbers, plus noise: no
number tells a value by itself. The base network learns to tell all values; its yes/no readout stays as it was drawn, so
that its answers are worth nothing. Then one low-rank adapter for each rule is trained, all at once: tensors have a
dimension of tasks, and nothing loops over these.

Letters in comments on shapes: T tasks, S objects, W width, n layers of a type, r rank.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from trainerkit.adapters import AdapterLayout, Factors
from trainerkit.data.rules import N_ATTRIBUTES, N_VALUES, Rule, all_objects, truth
from trainerkit.functional.random import RandomStream
from trainerkit.nn.residual import ResidualBlock, ResidualNetwork

WIDTH, HIDDEN, BLOCKS = 48, 96, 3


@dataclass(frozen=True)
class Recipe:
    """What the world and the adapters depend on.

    Args:
        rank: of the adapters.
        steps: of their training.
        objects: a step and task, half of them yes.
        noise: standard deviation of what is added to each of an object's numbers.
        base_steps: of the base network's training.
        learning_rate: at the top of the one-cycle schedule.
        seed: of everything.

    Raises:
        ValueError: for an impossible value.
    """

    rank: int = 4
    steps: int = 160
    objects: int = 64
    noise: float = 0.2
    base_steps: int = 400
    learning_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"rank": 1, "steps": 1, "objects": 2, "base_steps": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more")
        if self.objects % 2:
            raise ValueError(f"objects={self.objects}: must be even, half yes and half no")
        if self.noise < 0:
            raise ValueError(f"noise={self.noise}: must be 0 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0")


def base_layout(rank: int) -> AdapterLayout:
    """The layers that adapters change: up and down of each block, sorted as `read_adapter` does."""
    layers: list[list[object]] = []
    for block in range(BLOCKS):
        layers += [[f"blocks.{block}.down", HIDDEN, WIDTH], [f"blocks.{block}.up", WIDTH, HIDDEN]]
    return AdapterLayout(layers, rank)


class World:
    """Draws objects.

    Args:
        noise: see `Recipe`.
        seed: of the turning.
    """

    def __init__(self, noise: float, seed: int) -> None:
        self.noise = noise
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        turning = torch.linalg.qr(square).Q[: N_ATTRIBUTES * N_VALUES].float()
        places = all_objects() + N_VALUES * torch.arange(N_ATTRIBUTES)
        self.clean = turning[places].sum(1)  # (1024, W)

    def draw(self, numbers: Tensor, generator: torch.Generator, same_noise: bool = False) -> Tensor:
        """The objects with these numbers (…, S), each with fresh noise: (…, S, W).

        Args:
            numbers: places in `all_objects`.
            generator: of the noise.
            same_noise: one noise for each place in the last dimension, whatever stands before it.
        """
        clean: Tensor = self.clean[numbers]
        noise = torch.randn(clean.shape[-2:] if same_noise else clean.shape, generator=generator)
        return clean + self.noise * noise


class BalancedObjects:
    """Draws, for each rule, as many objects to which it says yes as no.

    Args:
        rules: (T,).
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        held = truth(rules)
        self.n_no = (~held).sum(1)
        self.n_yes = held.sum(1)
        self.order = held.int().argsort(dim=1, stable=True)  # (T, 1024): first those with no

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers of objects and answers, (T, count) int64: the first half no (0), the second yes (1).

        Each half is drawn with the same uniform numbers for all rules.
        """
        half = count // 2
        uniform = torch.rand(2, half, generator=generator)
        no = (uniform[0] * self.n_no[:, None]).long()
        yes = self.n_no[:, None] + (uniform[1] * self.n_yes[:, None]).long()
        answers = torch.arange(2).repeat_interleave(half).expand(len(self.order), count)
        return self.order.gather(1, torch.cat([no, yes], 1)), answers


def answers(network: ResidualNetwork, layout: AdapterLayout, factors: Factors, inputs: Tensor) -> Tensor:
    """What the network says with an adapter for each task.

    Args:
        network: the base.
        layout: of `base_layout`.
        factors: (T, n, r, in) and (T, n, out, r).
        inputs: (T, S, W).

    Returns:
        Logits of no and yes, (T, S, 2).
    """

    def adapted(layer: torch.nn.Linear, label: str, depth: int, x: Tensor) -> Tensor:
        a, b = factors[f"A/{label}"][:, depth], factors[f"B/{label}"][:, depth]
        return layer(x) + layout.scaling * (x @ a.mT) @ b.mT  # type: ignore[no-any-return]

    x = inputs
    for depth, block in enumerate(network.blocks):
        assert isinstance(block, ResidualBlock)
        hidden = gelu(adapted(block.up, "up", depth, block.norm(x)))
        x = x + adapted(block.down, "down", depth, hidden)
    logits: Tensor = network.answer(network.norm(x))
    return logits


def balanced_accuracy(said: Tensor, expected: Tensor) -> Tensor:
    """Mean of the share of right answers among those that are yes and among those that are no.

    Args:
        said: logits of no and yes, (T, S, 2).
        expected: 0 for no, 1 for yes, (T, S), both in each row.

    Returns:
        (T,).
    """
    right = (said.argmax(2) == expected).float()
    yes = expected.float()
    return ((right * yes).sum(1) / yes.sum(1) + (right * (1 - yes)).sum(1) / (1 - yes).sum(1)) / 2


def train_base(recipe: Recipe, world: World) -> ResidualNetwork:
    """The base network, trained to tell the attributes of objects, and frozen."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    with RandomStream(recipe.seed), torch.enable_grad():
        network = ResidualNetwork(WIDTH, HIDDEN, BLOCKS, attributes=N_ATTRIBUTES, values=N_VALUES)
        values = all_objects()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=recipe.base_steps)
        for _ in range(recipe.base_steps):
            numbers = torch.randint(len(values), (256,), generator=generator)
            told = network.tell(world.draw(numbers, generator))
            optimizer.zero_grad()
            cross_entropy(told.flatten(0, 1), values[numbers].flatten()).backward()
            optimizer.step()
            schedule.step()
    return network.requires_grad_(False).eval()


def train_adapters(
    recipe: Recipe,
    world: World,
    network: ResidualNetwork,
    rules: Sequence[Rule],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Factors:
    """An adapter for each rule.

    A is the same for all at first, B zero, objects and noise are the same for all as far as their answers allow: what
    differs between two adapters then is due to their rules.

    Args:
        recipe: of the training.
        world: draws objects.
        network: the frozen base.
        rules: (T,).
        progress: goes round the steps, to show how far it is.

    Returns:
        (T, n, r, in) and (T, n, out, r) for each type of `base_layout`.
    """
    layout = base_layout(recipe.rank)
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    factors: Factors = {}
    for kind in layout.types:
        n, width = len(kind.names), kind.in_features
        first = torch.randn(n, recipe.rank, width, generator=generator) / width**0.5
        factors[f"A/{kind.label}"] = first.repeat(len(rules), 1, 1, 1).requires_grad_()
        factors[f"B/{kind.label}"] = torch.zeros(len(rules), n, kind.out_features, recipe.rank).requires_grad_()
    objects = BalancedObjects(rules)
    optimizer = torch.optim.AdamW(factors.values(), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    with torch.enable_grad():
        for _ in progress(range(recipe.steps)):
            numbers, expected = objects.draw(recipe.objects, generator)
            said = answers(network, layout, factors, world.draw(numbers, generator, same_noise=True))
            # The sum over tasks: each adapter's gradient is that of its own mean loss.
            loss = cross_entropy(said.flatten(0, 1), expected.flatten()) * len(rules)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {name: tensor.detach() for name, tensor in factors.items()}
