"""CosFace against a naive float64 loop, what must not change it, what it adds to a task's loss, what is refused."""

import math

import pytest
import torch
from torch import nn

from tests.support import toy_trainer
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.tasks.retrieval import RetrievalTask
from trainerkit.tasks.retrieval.losses import CosFace, InfoNCE
from trainerkit.tasks.retrieval.losses.cosface import cosface

N, D, K = 6, 5, 9
LABELS = torch.tensor([3, 0, 8, 3, 1, 7])


def rows(seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def made(**options):
    torch.manual_seed(0)
    return CosFace(**{"classes": K, "dim": D} | options).double()


def naive(embeddings, labels, vectors, temperature, margin):
    terms = []
    for row, label in zip(embeddings, labels.tolist(), strict=True):
        cosines = [row @ vector / (row.norm() * vector.norm()) for vector in vectors]
        own = torch.exp((cosines[label] - margin) / temperature)
        others = sum(torch.exp(cosine / temperature) for place, cosine in enumerate(cosines) if place != label)
        terms.append(-torch.log(own / (own + others)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.2, "margin": 0.0, "weight": 2.5}], ids=str)
def test_value_and_gradients_are_those_of_the_naive_loop(options):
    loss, embeddings = made(**options), rows()
    settings = {"temperature": 0.05, "margin": 0.2, "weight": 1.0} | options
    vectors = loss.vectors.weight
    expected = settings["weight"] * naive(embeddings, LABELS, vectors, settings["temperature"], settings["margin"])
    found = loss(embeddings, LABELS)
    torch.testing.assert_close(found, expected)
    inputs = (embeddings, vectors)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_turning_everything_all_lengths_and_the_order_of_rows_and_labels_change_nothing():
    loss, embeddings = made(), rows()
    before = loss(embeddings, LABELS)
    turn, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    order, names = torch.randperm(N), torch.randperm(K)
    with torch.no_grad():  # label k is called names[k] now
        loss.vectors.weight[names] = 3 * loss.vectors.weight.clone() @ turn
    again = loss(embeddings[order] @ turn * 0.1, names[LABELS[order]])
    torch.testing.assert_close(again, before)


def test_a_margin_is_what_it_would_cost_to_be_that_much_less_alike():
    cosines = torch.eye(3, dtype=torch.float64) * 0.8
    lower = cosines - 0.3 * torch.eye(3, dtype=torch.float64)
    labels = torch.arange(3)
    assert float(cosface(cosines, labels, 0.1, 0.3)) == pytest.approx(float(cosface(lower, labels, 0.1, 0.0)))
    # Where all are alike it is the logarithm of the number of labels.
    assert float(cosface(torch.ones(4, 7), torch.arange(4), 0.05, 0.0)) == pytest.approx(math.log(7))
    assert cosface(torch.ones(0, 7), torch.arange(0), 0.05, 0.0) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(dtype):
    loss, embeddings = made().float(), rows().detach().to(dtype)
    expected = loss(embeddings.float(), LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(embeddings, LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_without_classes_it_is_nothing_and_has_no_parameters():
    loss = CosFace(D)
    assert loss(rows(), None) == 0
    assert not list(loss.parameters())


class Linear(nn.Module):
    """An encoder of pictures of 2 × 2."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, D)

    def forward(self, inputs):
        return self.layer(inputs["image"].flatten(1))


def loader():
    draw = torch.Generator().manual_seed(1)
    pictures = {name: torch.rand(8, 1, 2, 2, generator=draw) for name in ("query_image", "positive_image")}
    data = ArrayDataset({**pictures, "label": torch.arange(8)})
    return BatchLoader(data, EpochBatches(8, 8, shuffle=False))


def test_a_task_adds_it_in_training_for_queries_and_positives_and_not_in_evaluation(tmp_path):
    torch.manual_seed(0)
    task = RetrievalTask(
        Linear(), loss=InfoNCE(0.1), class_loss=CosFace(D, 8), gradient_cache=False, optimizer=torch.optim.SGD
    )
    batch = next(iter(loader()))
    before = {name: value.clone() for name, value in task.state_dict().items()}
    queries, positives = (task.encoder({"image": batch[f"{side}_image"]}) for side in ("query", "positive"))
    pairs = InfoNCE(0.1)(queries, positives)
    both = naive(torch.cat([queries, positives]), batch["label"].repeat(2), task.class_loss.vectors.weight, 0.05, 0.2)
    trainer = toy_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, loader(), loader())
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float((pairs + both).detach()), rel=1e-5)
    assert all(not torch.equal(before[name], value) for name, value in task.state_dict().items())
    task.load_state_dict(before)
    assert trainer.validate(task, loader(), verbose=False)[0]["val/loss"] == pytest.approx(
        float(pairs.detach()), rel=1e-5
    )


ONES = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosFace(0), "dim=0: must be 1 or more"),
        (lambda: CosFace(3, 0), "classes=0: must be 1 or more, or null for data without labels"),
        (lambda: CosFace(3, 3, temperature=0.0), "temperature=0.0: must be above 0"),
        (lambda: CosFace(3, 3, weight=-1.0), "weight=-1.0: must be above 0"),
        (lambda: CosFace(3, 3, margin=1.0), "margin=1.0: must be from 0 to below 1"),
        (lambda: CosFace(4, 3)(ONES, torch.zeros(4).long()), r"embeddings: shape \(4, 3\); must be \(4, 4\)"),
        (lambda: CosFace(3, 3)(ONES[:, None], torch.zeros(4).long()), r"embeddings: shape \(4, 1, 3\); must be"),
        (lambda: CosFace(3, 3)(ONES, None), "classes=3: the batch has no labels; set null for data without"),
        (
            lambda: CosFace(3, 3)(ONES, torch.tensor([0, 1, 2, 3])),
            "labels: from 0 to 3; must be from 0 to 2, as classes=3 says",
        ),
    ],
)
def test_what_cannot_be_says_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
