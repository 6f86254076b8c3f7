"""Losses, mixup, metrics, networks and augmentation of the classification task, each by itself."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support import two_processes
from trainerkit.errors import UserError
from trainerkit.tasks.classification import (
    Classifier,
    MacroAUROC,
    PictureAugment,
    PictureCNN,
    TableMLP,
    balanced_weights,
    classification_loss,
    classification_metrics,
    mixed,
)
from trainerkit.tasks.classification.losses import given_weights
from trainerkit.tasks.classification.metrics import of_each_class
from trainerkit.tasks.classification.pictures import draw_confusion

# Losses


def naive(logits, y, other=None, share=1.0, weights=None, smoothing=0.0, gamma=0.0):
    """Word for word, a row at a time, on float64."""
    logits = logits.double().numpy()
    total, k = 0.0, logits.shape[1]
    for row, z in enumerate(logits):
        p = np.exp(z) / np.exp(z).sum()
        for target, part in ((y[row], share), (other[row] if other is not None else y[row], 1 - share)):
            wanted = np.full(k, smoothing / k)
            wanted[target] += 1 - smoothing
            loss = (1 - p[target]) ** gamma * -(wanted * np.log(p)).sum()
            total += part * (1.0 if weights is None else float(weights[target])) * loss
    return total / len(logits)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(7, 4, generator=generator, dtype=torch.float64)
    return logits, torch.tensor([0, 1, 2, 3, 1, 1, 0]), torch.tensor([3, 1, 0, 2, 2, 1, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.5, 0.5]])
@pytest.mark.parametrize("share", [None, 0.3])
def test_losses_are_those_of_a_loop(rows, smoothing, gamma, weights, share):
    logits, y, other = rows
    mix = {} if share is None else {"other": other, "share": share}
    w = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    found = classification_loss(logits, y, class_weights=w, label_smoothing=smoothing, focal_gamma=gamma, **mix)
    expected = naive(logits, y, weights=weights, smoothing=smoothing, gamma=gamma, **mix)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_plain_weighted_and_smoothed_losses_are_torchs_with_another_divisor(rows):
    logits, y, _ = rows
    plain = classification_loss(logits, y, label_smoothing=0.2)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, y, label_smoothing=0.2))
    w = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    summed = nn.functional.cross_entropy(logits, y, weight=w, reduction="sum")
    torch.testing.assert_close(classification_loss(logits, y, class_weights=w), summed / len(y))


def test_a_mix_with_itself_and_a_share_of_one_change_nothing(rows):
    logits, y, other = rows
    plain = classification_loss(logits, y, focal_gamma=2.0)
    torch.testing.assert_close(classification_loss(logits, y, y, 0.3, focal_gamma=2.0), plain)
    torch.testing.assert_close(classification_loss(logits, y, other, 1.0, focal_gamma=2.0), plain)
    swapped = classification_loss(logits, other, y, 0.7)
    torch.testing.assert_close(classification_loss(logits, y, other, 0.3), swapped, rtol=1e-6, atol=0)


def test_the_mixed_loss_is_the_cross_entropy_with_mixed_targets_and_so_is_its_gradient(rows):
    logits, y, other = rows
    targets = 0.3 * nn.functional.one_hot(y, 4) + 0.7 * nn.functional.one_hot(other, 4)
    losses = []
    for make in (
        lambda z: classification_loss(z, y, other, 0.3),
        lambda z: -(targets * z.log_softmax(1)).sum(1).mean(),
    ):
        leaf = logits.clone().requires_grad_()
        loss = make(leaf)
        losses.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-8)


def test_a_share_for_each_row_is_that_rows(rows):
    logits, y, other = rows
    shares = torch.linspace(0, 1, 7)
    each = [
        classification_loss(logits[i : i + 1], y[i : i + 1], other[i : i + 1], float(s)) for i, s in enumerate(shares)
    ]
    torch.testing.assert_close(classification_loss(logits, y, other, shares), torch.stack(each).mean())


def test_the_order_of_rows_and_of_classes_changes_no_loss(rows):
    logits, y, other = rows
    order, classes = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.tensor([2, 0, 3, 1])
    w = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    options = {"share": 0.4, "label_smoothing": 0.1, "focal_gamma": 1.0}
    found = classification_loss(logits, y, other, class_weights=w, **options)
    torch.testing.assert_close(
        classification_loss(logits[order], y[order], other[order], class_weights=w, **options), found
    )
    place = classes.argsort()
    torch.testing.assert_close(
        classification_loss(logits[:, classes], place[y], place[other], class_weights=w[classes], **options), found
    )


def test_mixed_rows_are_means_of_two_and_keep_the_batchs_mean():
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.tensor([4, 2, 0, 1, 3])
    found = mixed(x, order, 0.25)
    for row, other in enumerate(order.tolist()):
        np.testing.assert_allclose(found[row].numpy(), 0.25 * x[row].numpy() + 0.75 * x[other].numpy())
    torch.testing.assert_close(found.mean(0), x.mean(0))
    assert torch.equal(mixed(x, order, 1.0), x)


def test_balanced_weights_give_each_class_the_same_sum_and_rows_a_mean_of_one():
    counts = torch.tensor([10, 30, 60])
    weights = balanced_weights(counts.tolist())
    torch.testing.assert_close(counts * weights, torch.full((3,), 100 / 3))
    assert float((counts * weights).sum()) == pytest.approx(100)
    torch.testing.assert_close(balanced_weights((7 * counts).tolist()), weights)
    from sklearn.utils.class_weight import compute_class_weight

    y = np.repeat([0, 1, 2], counts)
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(3), y=y), rtol=1e-6)
    for counts in ([], [3, 0]):
        with pytest.raises(ValueError, match="^class_counts=.*must be 1 or more each"):
            balanced_weights(counts)


def test_weights_by_name_and_by_place():
    assert given_weights({"b": 5}, ["a", "b"]).tolist() == [1.0, 5.0]
    assert given_weights({1: 5}, ["0", "1"]).tolist() == [1.0, 5.0]
    assert given_weights([2, 0], ["a", "b"]).tolist() == [2.0, 0.0]
    for weights, message in (
        ({"c": 1}, "c is no class; they are a, b"),
        ([1], "must be 2 numbers"),
        ([-1, 1], "0 or more"),
    ):
        with pytest.raises(ValueError, match=f"^class_weights=.*{message}"):
            given_weights(weights, ["a", "b"])


# Metrics


def answers(rows, classes=5, seed=0):
    """Probabilities and classes, uneven, of a classifier that is often right."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=generator) % torch.randint(
        1, classes + 1, (rows,), generator=generator
    )
    logits = torch.randn(rows, classes, generator=generator) + 1.5 * nn.functional.one_hot(y, classes)
    return logits.softmax(1), y


def by_scikit_learn(probability, y, bins=15):
    from sklearn import metrics

    p, y = probability.double().numpy(), y.numpy()
    p = p / p.sum(1, keepdims=True)
    predicted = p.argmax(1)
    error = 0.0
    for low in range(bins):
        inside = (p.max(1) > low / bins) & (p.max(1) <= (low + 1) / bins)
        if inside.any():
            error += inside.mean() * abs((predicted == y)[inside].mean() - p.max(1)[inside].mean())
    mean = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": metrics.accuracy_score(y, predicted),
        "f1": metrics.f1_score(y, predicted, **mean),
        "precision": metrics.precision_score(y, predicted, **mean),
        "recall": metrics.recall_score(y, predicted, **mean),
        "auroc": metrics.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "calibration_error": error,
    }


@pytest.mark.parametrize("rows", [43, 1000])
def test_metrics_over_batches_are_scikit_learns_of_all_rows(rows):
    probability, y = answers(rows)
    found = classification_metrics(5)
    for part in torch.arange(rows).split(16):  # the last one is smaller
        found.update(probability[part], y[part])
    expected = by_scikit_learn(probability, y)
    measured = {name: float(value) for name, value in found.compute().items()}
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, abs=1e-6), name


def test_metrics_do_not_know_the_order_of_rows():
    probability, y = answers(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    one, other = (classification_metrics(5) for _ in range(2))
    one.update(probability, y)
    other.update(probability[order], y[order])
    for name, value in one.compute().items():
        torch.testing.assert_close(other.compute()[name], value)


def test_metrics_over_two_processes_with_a_ragged_last_batch_are_scikit_learns(tmp_path):
    probability, y = answers(83)

    def work(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        found = classification_metrics(5)
        mine = torch.arange(83)[rank::2]
        for part in mine.split(16):
            found.update(probability[part], y[part])
        return {name: float(value) for name, value in found.compute().items()}

    outcomes = two_processes(lambda rank: _with_world(work, rank), tmp_path)
    expected = by_scikit_learn(probability, y)
    for outcome in outcomes:
        assert "error" not in outcome, json.dumps(outcome)
        for name, value in expected.items():
            assert outcome["result"][name] == pytest.approx(value, abs=1e-6), name


def _with_world(work, rank):
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    return work(rank)


def test_a_class_that_no_row_has_has_no_curve():
    from sklearn.metrics import roc_auc_score

    probability, y = answers(60)
    y = y.clamp_max(3)
    auroc = MacroAUROC(5)
    auroc.update(probability, y)
    expected = np.mean([roc_auc_score(y == k, probability[:, k]) for k in range(4)])
    assert float(auroc.compute()) == pytest.approx(expected, abs=1e-6)
    alone = MacroAUROC(5)
    alone.update(probability, torch.zeros(60, dtype=torch.int64))
    assert bool(alone.compute().isnan())


def test_figures_of_each_class_are_scikit_learns():
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    probability, y = answers(90)
    predicted = probability.argmax(1).clamp_max(3)  # the last class is never predicted
    confusion = torch.from_numpy(confusion_matrix(y, predicted, labels=range(5)))
    expected = precision_recall_fscore_support(y, predicted, labels=range(5), zero_division=0)
    found = of_each_class(confusion)
    for name, values in zip(("precision", "recall", "f1", "rows"), expected, strict=True):
        np.testing.assert_allclose(found[name].numpy(), values, err_msg=name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 12, 70])
def test_the_confusion_matrix_is_drawn_for_any_number_of_classes(tmp_path, classes):
    from PIL import Image

    confusion = torch.eye(classes, dtype=torch.int64) * 3
    confusion[0, 0], confusion[1, 1] = 0, 0  # a class without a row
    draw_confusion(tmp_path / "x.png", confusion, [f"$class {i} with a long name" for i in range(classes)])
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert (pixels < 60).any()  # the dark diagonal
    assert min(pixels.shape) > 200


# Networks


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 5, 5)])
def test_the_small_network_takes_pictures_of_these_sizes(shape):
    network = Classifier(PictureCNN(shape[0], widths=(8, 16)), 3)
    assert network(torch.rand(2, *shape)).shape == (2, 3)


def test_it_has_as_many_parameters_as_its_docstring_says():
    assert sum(p.numel() for p in PictureCNN(1).parameters()) == 65_184


def test_a_pictures_logits_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    network = Classifier(PictureCNN(1, widths=(8, 16)), 3)
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(network(x)[2:3], network(x[2:3]))


def test_pictures_are_brought_to_a_size_first():
    torch.manual_seed(0)
    backbone = PictureCNN(1, widths=(8, 16), image_size=28)
    small = torch.rand(2, 1, 8, 8)
    large = nn.functional.interpolate(small, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(backbone(small), backbone(large))


def test_the_table_network_and_tokens():
    assert Classifier(TableMLP(6, widths=(16, 8), dropout=0.1), 4)(torch.randn(3, 6)).shape == (3, 4)

    class Tokens(nn.Module):
        out_features = 2

        def forward(self, x):
            return x

    tokens = torch.randn(3, 5, 2)
    first, mean = (Classifier(Tokens(), 2, pooling=pooling) for pooling in ("first", "mean"))
    torch.testing.assert_close(first(tokens), first.head(tokens[:, 0]))
    torch.testing.assert_close(mean(tokens), mean.head(tokens.mean(1)))


@pytest.mark.parametrize("whole", [True, False])
def test_weights_fill_the_backbone_and_leave_the_head(tmp_path, whole):
    torch.manual_seed(0)
    first = Classifier(PictureCNN(1, widths=(8,)), 7)
    state = {f"network.{name}": tensor for name, tensor in first.state_dict().items()}
    save_file(state if whole else first.backbone.state_dict(), tmp_path / "w.safetensors")
    second = Classifier(PictureCNN(1, widths=(8,)), 3, weights=tmp_path / "w.safetensors")
    for name, tensor in first.backbone.state_dict().items():
        assert torch.equal(second.backbone.state_dict()[name], tensor)
    with pytest.raises(UserError, match="does not fit this network"):
        Classifier(PictureCNN(1, widths=(16,)), 3, weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classifier(TableMLP(2), 1), "n_classes=1: must be 2 or more"),
        (lambda: Classifier(TableMLP(2), 2, pooling="last"), "pooling=last: must be first or mean"),
        (lambda: Classifier(TableMLP(2), 2, dropout=1.0), "dropout=1.0: must be from 0"),
        (lambda: Classifier(nn.Flatten(), 2), "backbone=Flatten: must have an attribute out_features"),
        (lambda: PictureCNN(0), "channels=0: must be 1 or more"),
        (lambda: PictureCNN(1, widths=(12,)), r"widths=\[12\]: must be multiples of 8"),
        (lambda: PictureCNN(1, image_size=0), "image_size=0: must be 1 or more"),
        (lambda: TableMLP(0), "features=0: must be 1 or more"),
        (lambda: TableMLP(2, widths=()), r"widths=\[\]: must be 1 or more"),
        (lambda: PictureAugment(shift=1.0), "shift=1.0: must be from 0"),
        (lambda: PictureAugment(mirror=2.0), "mirror=2.0: must be from 0 to 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 3, 3)])
def test_what_is_no_picture_or_too_small_is_said_without_a_traceback(shape):
    with pytest.raises(UserError, match="^widths: 2 stages take pictures of 4 pixels or more.*network=mlp"):
        PictureCNN(1)(torch.rand(shape))


# Augmentation


def test_augmentation_follows_torchs_random_state_and_moves_each_picture_by_itself():
    x = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0)).repeat(6, 1, 1, 1)
    augment = PictureAugment()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(augment(x))
    assert torch.equal(*found)
    assert not torch.equal(augment(x), found[0])
    assert len({tuple(picture.flatten().tolist()) for picture in found[0]}) == 6
    assert 0 <= float(found[0].min()) <= float(found[0].max()) <= 1


def test_without_an_amount_pictures_stay_as_they_are_and_tables_always_do():
    x, table = torch.rand(4, 2, 8, 8), torch.rand(4, 8)
    torch.testing.assert_close(PictureAugment(0.0, 0.0, 0.0)(x), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(PictureAugment(0.0, 0.0, 0.0, mirror=1.0)(x), x.flip(-1), rtol=0, atol=1e-6)
    assert PictureAugment()(table) is table


def test_a_grey_picture_stays_grey():
    x = torch.full((5, 1, 8, 8), 0.3)
    torch.testing.assert_close(PictureAugment(0.3, 90.0, 0.5, 0.5)(x), x)
