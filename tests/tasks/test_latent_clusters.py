import math

import numpy as np
import pytest
import torch

from trainerkit.tasks.mae import LatentClusters
from trainerkit.tasks.mae.clusters import cosine_kmeans, elbow, fit_vmf_mixture, vmf_log_normalizer


def three_groups(rows=300, dim=6, noise=0.15):
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(3, dim, generator=generator, dtype=torch.float64), dim=1)
    truth = torch.arange(rows) % 3
    x = centres[truth] + noise * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1), truth, centres


def same_partition(a, b):
    return len({(int(x), int(y)) for x, y in zip(a, b, strict=True)}) == len(set(map(int, a))) == len(set(map(int, b)))


def test_the_normalizer_integrates_the_density_to_one():
    """In three dimensions C(κ) = κ/(4π·sinh κ); in two, by numerical integration over the circle."""
    kappa = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    expected = (kappa / (4 * math.pi * kappa.sinh())).log()
    torch.testing.assert_close(vmf_log_normalizer(kappa, 3), expected)
    angle = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    for value in kappa:
        density = (vmf_log_normalizer(value[None], 2) + value * angle.cos()).exp()
        assert torch.trapezoid(density, angle).item() == pytest.approx(1, rel=1e-6)


def test_a_mixture_finds_groups_and_their_shares():
    x, truth, centres = three_groups()
    mixture = fit_vmf_mixture(x, 3)
    assert same_partition(mixture.predict(x), truth)
    torch.testing.assert_close(mixture.weights, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.01, rtol=0)
    assert ((mixture.means @ centres.T).max(1).values > 0.99).all()


def test_the_likelihood_equals_a_loop_and_bic_prefers_the_right_number():
    x, _, _ = three_groups(rows=90)
    mixture = fit_vmf_mixture(x, 3)
    log_c = vmf_log_normalizer(mixture.kappas, 6)
    total = 0.0
    for row in x:
        terms = [math.exp(float(log_c[k] + mixture.kappas[k] * (mixture.means[k] @ row))) for k in range(3)]
        total += math.log(sum(float(w) * t for w, t in zip(mixture.weights, terms, strict=True)))
    assert float(mixture.log_joint(x).logsumexp(1).mean()) == pytest.approx(total / 90)
    bics = {k: fit_vmf_mixture(x, k).bic for k in (1, 2, 3, 4, 5)}
    assert min(bics, key=bics.get) == 3


def test_fits_do_not_depend_on_the_order_of_rows_or_a_rotation():
    x, _, _ = three_groups()
    order = torch.randperm(len(x))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    expected = fit_vmf_mixture(x, 3).log_likelihood
    assert fit_vmf_mixture(x[order], 3).log_likelihood == pytest.approx(expected, abs=1e-4)
    assert fit_vmf_mixture(x @ rotation, 3).log_likelihood == pytest.approx(expected, abs=1e-4)


def test_cosine_kmeans_ignores_lengths():
    x, truth, _ = three_groups()
    labels, inertia = cosine_kmeans(x, 3)
    assert same_partition(labels, truth)
    scaled = x * torch.rand(len(x), 1, dtype=torch.float64).add(0.5)
    again, same = cosine_kmeans(scaled, 3)
    assert same_partition(again, labels)
    assert same == pytest.approx(inertia)
    centres = torch.stack([torch.nn.functional.normalize(x[labels == k].mean(0), dim=0) for k in range(3)])
    assert inertia == pytest.approx(float((1 - (x * centres[labels]).sum(1)).sum()))


def test_the_elbow_is_where_the_curve_bends():
    assert elbow([2, 3, 4, 5, 6], [100, 50, 10, 8, 6]) == 4
    assert elbow([2, 3], [5, 4]) == 2
    assert elbow([2, 3, 4], [5, 5, 5]) == 2


def test_the_callback_writes_labels_measures_and_a_figure(tmp_path):
    x, truth, _ = three_groups()
    LatentClusters(max_clusters=6)._write(tmp_path, x.float())
    assert same_partition(np.load(tmp_path / "predictions" / "clusters.npy"), truth)
    assert same_partition(np.load(tmp_path / "predictions" / "vmf_clusters.npy"), truth)
    assert (tmp_path / "clusters.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_clusters": 1}, "min_clusters=1: must be 2 or more"),
        ({"max_clusters": 1}, "max_clusters=1: must be min_clusters=2 or more"),
        ({"max_rows": 5}, "max_rows=5: must be more than max_clusters=12"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        LatentClusters(**options)
