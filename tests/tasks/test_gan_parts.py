"""Losses, penalties, networks, augmentation and figures of task=gan, each against a loop in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from trainerkit.tasks.gan import (
    DiffAugment,
    Discriminator,
    Generator,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    r1_penalty,
)
from trainerkit.tasks.gan.augment import shifted
from trainerkit.tasks.gan.grids import beside, grid, write_png
from trainerkit.tasks.gan.judge import train_judge
from trainerkit.tasks.gan.losses import KINDS
from trainerkit.tasks.gan.metrics import (
    class_shares,
    coverage,
    frechet_distance,
    nearest_distance,
    precision_and_recall,
    relative_entropy,
)

# Losses


def naive_losses(kind, real, fake):
    real, fake = [float(x) for x in real.double()], [float(x) for x in fake.double()]
    s = lambda x: math.log1p(math.exp(x))  # noqa: E731
    terms = {
        "non_saturating": (lambda r: s(-r), s, lambda f: s(-f)),
        "hinge": (lambda r: max(0, 1 - r), lambda f: max(0, 1 + f), lambda f: -f),
        "wasserstein": (lambda r: -r, lambda f: f, lambda f: -f),
    }[kind]
    mean = lambda term, scores: sum(map(term, scores)) / len(scores)  # noqa: E731
    return mean(terms[0], real) + mean(terms[1], fake), mean(terms[2], fake)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_a_float64_loop_in_any_precision(kind):
    real, fake = torch.randn(7) * 3, torch.randn(9) * 3
    of_discriminator, of_generator = naive_losses(kind, real, fake)
    assert discriminator_loss(kind, real, fake).item() == pytest.approx(of_discriminator, rel=1e-6)
    assert generator_loss(kind, fake).item() == pytest.approx(of_generator, rel=1e-6)
    assert discriminator_loss(kind, real.double(), fake.double()).item() == pytest.approx(of_discriminator, rel=1e-12)
    rounded = (real.bfloat16(), fake.bfloat16())
    assert discriminator_loss(kind, *rounded).dtype == torch.float32
    assert discriminator_loss(kind, *rounded).item() == pytest.approx(naive_losses(kind, *rounded)[0], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_the_order_and_fall_the_right_way(kind):
    real, fake = torch.linspace(-0.9, 0.8, 8), torch.linspace(-0.7, 0.9, 8)
    loss = discriminator_loss(kind, real, fake)
    torch.testing.assert_close(discriminator_loss(kind, real.flip(0), fake.flip(0)), loss)
    assert discriminator_loss(kind, real + 0.05, fake - 0.05) < loss
    assert generator_loss(kind, fake + 0.1) < generator_loss(kind, fake)


def test_large_scores_overflow_nothing():
    assert discriminator_loss("non_saturating", torch.tensor([-1e4]), torch.tensor([1e4])).item() == 2e4
    assert generator_loss("non_saturating", torch.tensor([1e4])).item() == 0


@pytest.mark.parametrize("loss", [lambda k, x: discriminator_loss(k, x, x), generator_loss])
def test_another_loss_is_refused(loss):
    with pytest.raises(ValueError, match="loss=ls: must be one of non_saturating, hinge, wasserstein"):
        loss("ls", torch.zeros(1))


# Penalties


class Cubic(nn.Module):
    """D(x) = Σ w·x³ of a picture, whose slope is 3w·x²."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return (self.weight * x.flatten(1) ** 3).sum(1)


def pictures(rows=4, seed=1):
    return torch.randn(rows, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_penalties_equal_a_loop_over_slopes():
    score, real, fake, share = Cubic(), pictures(), pictures(seed=2), torch.tensor([0.0, 0.3, 0.9, 1.0]).double()
    squares, norms = [], []
    for i in range(4):
        between = share[i] * real[i].flatten() + (1 - share[i]) * fake[i].flatten()
        norms.append(
            math.sqrt(sum(float(3 * w * x**2) ** 2 for w, x in zip(score.weight.detach(), between, strict=True)))
        )
        squares.append(
            sum(float(3 * w * x**2) ** 2 for w, x in zip(score.weight.detach(), real[i].flatten(), strict=True))
        )
    expected = sum((norm - 1) ** 2 for norm in norms) / 4
    assert gradient_penalty(score, real, fake, share).item() == pytest.approx(expected, rel=1e-10)
    assert r1_penalty(score, real).item() == pytest.approx(sum(squares) / 8, rel=1e-10)


def test_gradients_of_penalties_are_those_of_finite_differences():
    score, real, fake, share = Cubic(), pictures(), pictures(seed=2), torch.rand(4, dtype=torch.float64)

    def penalties(weight):
        use = lambda x: torch.func.functional_call(score, {"weight": weight}, (x,))  # noqa: E731
        return gradient_penalty(use, real, fake, share), r1_penalty(use, real)

    assert torch.autograd.gradcheck(penalties, (score.weight.detach().clone().requires_grad_(),))


def test_penalties_know_slopes_of_one_and_of_none():
    direction = torch.ones(6).double() / math.sqrt(6)
    unit = lambda x: (x.flatten(1) * direction).sum(1)  # noqa: E731
    share = torch.rand(4, dtype=torch.float64)
    assert gradient_penalty(unit, pictures(), pictures(seed=2), share).item() == pytest.approx(0, abs=1e-12)
    assert r1_penalty(unit, pictures()).item() == pytest.approx(0.5)
    flat = nn.Linear(6, 1).double()
    nn.init.zeros_(flat.weight)
    penalty = gradient_penalty(lambda x: flat(x.flatten(1))[:, 0], pictures(), pictures(seed=2), share)
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-5)
    assert flat.weight.grad.isfinite().all()


def test_penalties_are_in_float32_under_mixed_precision():
    discriminator, x = Discriminator(1, 8, width=8, norm="none"), torch.rand(4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = r1_penalty(discriminator, x)
        also_mixed = r1_penalty(discriminator, x.bfloat16())
    assert mixed.item() == r1_penalty(discriminator, x).item()
    assert also_mixed.dtype == torch.float32


# Networks


@pytest.mark.parametrize(("side", "channels", "stages"), [(8, 1, 2), (28, 1, 2), (12, 3, 2), (32, 3, 3), (64, 3, 4)])
@pytest.mark.parametrize("classes", [None, 5, ["a", "b"]])
def test_networks_fit_every_side_and_halve_it_down_to_four(side, channels, stages, classes):
    y = None if classes is None else torch.tensor([0, 1, 1])
    generator = Generator(channels, side, classes, noise_dim=6, width=8)
    discriminator = Discriminator(channels, side, classes, width=8)
    made = generator(torch.randn(3, 6), y)
    assert made.shape == (3, channels, side, side)
    assert made.abs().max() <= 1
    assert discriminator(made, y).shape == (3,)
    convolutions = [part for part in discriminator.modules() if isinstance(part, nn.Conv2d)]
    assert [part.out_channels for part in convolutions] == [8 << stage for stage in range(stages)]
    assert sum(isinstance(part, nn.ConvTranspose2d) for part in generator.modules()) == stages


def test_scores_are_linear_in_a_class_of_its_own():
    """D(x, y) − D(x, y') = ⟨e_y − e_y', h⟩, and a class that is like another scores alike."""
    discriminator = Discriminator(1, 8, 3, width=8).double().eval()
    x = torch.rand(4, 1, 8, 8).double()
    scores = [discriminator(x, torch.full((4,), k)) for k in range(3)]
    features, table = discriminator.layers(x), discriminator.of_class.weight
    torch.testing.assert_close(scores[0] - scores[1], features @ (table[0] - table[1]))
    with torch.no_grad():
        table[2] = table[0]
    torch.testing.assert_close(discriminator(x, torch.full((4,), 2)), scores[0])


def test_a_generator_follows_noise_and_class():
    generator = Generator(1, 8, 3, noise_dim=5, width=8, norm="group").eval()
    noise = torch.randn(2, 5)
    one, other = generator(noise, torch.tensor([0, 0])), generator(noise, torch.tensor([1, 1]))
    assert (one - other).abs().max() > 0.01
    assert (one[0] - one[1]).abs().max() > 0.01
    torch.testing.assert_close(generator(noise[:1], torch.tensor([0])), one[:1])  # depends on no other picture


def test_spectral_norm_divides_by_the_largest_singular_value():
    discriminator = Discriminator(1, 8, 3, width=8, norm="none", spectral_norm=True)
    for _ in range(200):  # of the power iteration
        discriminator(torch.rand(1, 1, 8, 8), torch.tensor([0]))
    discriminator.eval()
    weighted = [part for part in discriminator.modules() if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(weighted) == 4
    for part in weighted:
        assert torch.linalg.matrix_norm(part.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generator(1, 30), "image_size=30: must be a multiple of 4"),
        (lambda: Discriminator(1, 0), "image_size=0: must be a multiple of 4"),
        (lambda: Generator(1, 8, noise_dim=0), "noise_dim=0: must be 1 or more"),
        (lambda: Discriminator(0, 8), "channels=0: must be 1 or more"),
        (lambda: Generator(1, 8, norm="layer"), "norm=layer: must be one of batch, group, none"),
        (lambda: Discriminator(1, 8, width=3, norm="group"), "norm=group: needs a width that is a multiple of 8"),
        (lambda: DiffAugment(translation=1.5), "translation=1.5: must be from 0 to 1"),
        (lambda: DiffAugment(cutout=-0.1), "cutout=-0.1: must be from 0 to 1"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Augmentation


def test_shifts_equal_a_loop_over_pixels():
    x, draws = (
        torch.rand(6, 2, 5, 4),
        torch.tensor([[0.0, 0.999], [0.5, 0.5], [0.1, 0.9], [0.7, 0.3], [0.25, 0], [0.6, 0.6]]),
    )
    found = shifted(x, draws, 2, fill=-3.0)
    for b in range(6):
        down, right = (int(5 * float(draw)) - 2 for draw in draws[b])
        for i in range(5):
            for j in range(4):
                inside = 0 <= i + down < 5 and 0 <= j + right < 4
                expected = x[b, :, i + down, j + right] if inside else torch.full((2,), -3.0)
                assert torch.equal(found[b, :, i, j], expected)


def test_a_shift_of_nothing_changes_nothing_and_gradients_go_where_pixels_went():
    x = torch.rand(3, 1, 8, 8, requires_grad=True)
    assert torch.equal(DiffAugment(0.0)(x, torch.rand(3, 4)), x)
    draws = torch.rand(3, 4)
    moved = DiffAugment(0.25)(x, draws)
    moved.sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}
    assert int(x.grad.sum()) == int((moved != -1).sum())


def test_the_cut_out_square_has_its_size_inside_and_is_grey():
    x = torch.ones(200, 1, 8, 8)
    draws = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    cut = DiffAugment(0.0, cutout=0.5)(x, draws)
    blank = (cut == 0).flatten(1).sum(1)
    assert blank.max() == 16
    assert blank.min() == 4  # half of both sides is outside in a corner
    assert ((cut == 0) | (cut == 1)).all()


# Figures


def naive_frechet(real, made):
    real, made = real.double().numpy(), made.double().numpy()
    root = sqrtm(np.cov(real, rowvar=False) @ np.cov(made, rowvar=False)).real
    gap = ((real.mean(0) - made.mean(0)) ** 2).sum()
    return gap + np.trace(np.cov(real, rowvar=False) + np.cov(made, rowvar=False) - 2 * root)


def features(rows, seed, dims=5):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)).relu()


def test_the_frechet_distance_equals_its_formula_and_is_a_distance():
    a, b = features(60, 0), features(50, 1) * 1.5 + 0.2
    assert frechet_distance(a, b) == pytest.approx(naive_frechet(a, b), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    # Moving everything moves nothing; moving one set by t adds |t|² where covariances are alike.
    assert frechet_distance(a + 3, b + 3) == pytest.approx(frechet_distance(a, b), rel=1e-5)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 5, rel=1e-5)


def naive_precision(real, made, k):
    real, made = real.double().numpy(), made.double().numpy()
    distance = lambda a, b: math.sqrt(((a - b) ** 2).sum())  # noqa: E731
    radii = [sorted(distance(r, other) for other in real)[k] for r in real]
    inside = [any(distance(m, r) <= radius for r, radius in zip(real, radii, strict=True)) for m in made]
    return sum(inside) / len(inside)


def test_precision_and_recall_equal_a_loop_and_change_places():
    a, b = features(30, 0, dims=2), features(25, 1, dims=2) * 1.3 + 0.1
    precision, recall = precision_and_recall(a, b, k=2)
    assert precision == pytest.approx(naive_precision(a, b, 2))
    assert recall == pytest.approx(naive_precision(b, a, 2))
    assert precision_and_recall(b, a, k=2) == pytest.approx((recall, precision))
    assert precision_and_recall(a * 7 + 1, b * 7 + 1, k=2) == pytest.approx((precision, recall))
    assert precision_and_recall(a, a, k=1) == (1, 1)
    # One mode of two: all that is made is real, half of what is real is not made.
    two = torch.cat([a, a + 100])
    assert precision_and_recall(two, a, k=2) == (1, 0.5)
    with pytest.raises(ValueError, match="k=25: must be from 1 to 24"):
        precision_and_recall(a, b, k=25)


def test_distance_to_the_nearest_equals_a_loop():
    a, b = features(20, 0), features(30, 1)
    expected = sum(min(math.dist(x.tolist(), y.tolist()) for y in b) for x in a) / 20
    assert nearest_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert nearest_distance(a, torch.cat([b, a])) == pytest.approx(0, abs=1e-3)


def test_classes_are_counted():
    shares = class_shares(torch.tensor([0, 0, 1, 3, 3, 3, 3, 3]), 5)
    assert shares.tolist() == [0.25, 0.125, 0, 0.625, 0]
    real = torch.tensor([0.25, 0.25, 0.25, 0.25, 0]).double()
    assert coverage(shares, real) == 0.75  # class 2 is missing, class 1 is just there
    assert coverage(real, real) == 1
    expected = -sum(p * math.log(p) for p in (0.25, 0.125, 0.625)) / math.log(5)
    assert relative_entropy(shares) == pytest.approx(expected)
    assert relative_entropy(torch.full((4,), 0.25).double()) == pytest.approx(1)
    assert relative_entropy(torch.tensor([1.0, 0.0]).double()) == 0


def stripes(rows=200, seed=0):
    """Pictures whose class is the direction of their stripes."""
    y = torch.arange(rows) % 2
    lines = torch.arange(8) % 2
    x = torch.where(y[:, None, None].bool(), lines[:, None].expand(8, 8), lines.expand(8, 8)).float()[:, None]
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)), y


def test_a_judge_learns_and_moves_no_random_state_in_inference_mode_too():
    x, y = stripes()
    state = torch.get_rng_state()
    with torch.inference_mode():
        judge = train_judge(x, y, 2, steps=40)
        again = train_judge(x.clone(), y, 2, steps=40)
    assert torch.equal(torch.get_rng_state(), state)
    unseen, truth = stripes(seed=1)
    found, logits = judge.look_at(unseen)
    assert found.shape == (200, 64)
    assert (logits.argmax(1) == truth).float().mean() > 0.95
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))


# Grids


def test_a_grid_has_each_picture_in_its_place(tmp_path):
    from PIL import Image

    shades = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 1, 28, 28)
    one = grid(shades, columns=3)
    assert one.shape == (1, 2 * 28 + 2, 3 * 28 + 4)
    assert one[0, 10, 40] == round(255 * 0.25)
    assert one[0, 40, 10] == round(255 * 0.75)
    assert one[0, 29, 10] == 128
    both = beside([one, one])
    assert both.shape == (1, 58, 2 * 88 + 16)
    assert torch.equal(both[:, :, -88:], one)
    write_png(tmp_path / "new" / "x.png", both)
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert torch.equal(torch.from_numpy(np.array(picture)), both[0])
    write_png(tmp_path / "rgb.png", grid(torch.rand(2, 3, 8, 8), 2))
    with Image.open(tmp_path / "rgb.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (2 * 32 + 2, 32))  # four times the size
