"""task.eval_shift: embeddings of pictures are means over moved copies in evaluation, and only there."""

from itertools import product

import pytest
import torch
from torch import nn

from trainerkit.tasks.retrieval import RetrievalTask
from trainerkit.tasks.retrieval.task import shifted


class Corner(nn.Module):
    """An encoder: the four pixels in the upper left corner; of texts their mean."""

    def forward(self, inputs):
        if "image" not in inputs:
            return inputs["text"].double().mean(1, keepdim=True) + torch.arange(4)
        return inputs["image"][:, 0, :2, :2].flatten(1)


def batch():
    draw = torch.Generator().manual_seed(0)
    sides = {f"{side}_image": torch.rand(3, 1, 5, 6, generator=draw) for side in ("query", "positive")}
    texts = torch.randint(9, (3, 2), generator=draw)
    return {**sides, "query_text": texts, "query_text_mask": texts >= 0, "index": torch.arange(3)}


def naive(picture, by):
    """The mean of all copies' unit vectors, pixel by pixel."""
    height, width = picture.shape
    found = []
    for down, right in product(range(-by, by + 1), repeat=2):
        values = torch.tensor(
            [
                float(picture[min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1)])
                for row in (0, 1)
                for column in (0, 1)
            ],
            dtype=torch.float64,
        )
        found.append(values / values.square().sum().sqrt())
    return sum(found) / len(found)


@pytest.mark.parametrize("by", [1, 3])
def test_embeddings_are_those_of_the_naive_loop_in_evaluation_and_of_one_picture_in_training(by):
    task = RetrievalTask(Corner(), queries="separate", eval_shift=by).eval()
    given = batch()
    for side in ("query", "positive"):
        expected = torch.stack([naive(picture, by) for picture in given[f"{side}_image"][:, 0]])
        torch.testing.assert_close(task.embed(given, side).double(), expected, rtol=1e-6, atol=1e-6)
    plain = RetrievalTask(Corner(), queries="separate").eval().embed(given, "query")
    torch.testing.assert_close(task.train().embed(given, "query"), plain)


def test_texts_are_embedded_once_and_a_uniform_picture_is_blind_to_it():
    task, plain = (RetrievalTask(Corner(), eval_shift=by).eval() for by in (2, 0))
    texts = {name: part for name, part in batch().items() if name != "query_image"}
    torch.testing.assert_close(task.embed(texts, "query"), plain.embed(texts, "query"))
    grey = batch() | {"positive_image": torch.full((3, 1, 5, 6), 0.5)}
    torch.testing.assert_close(task.embed(grey, "positive"), torch.full((3, 4), 0.5))


def test_copies_are_moved_and_keep_their_size():
    picture = torch.zeros(1, 1, 5, 5)
    picture[0, 0, 2, 2] = 1
    places = [tuple(copy[0, 0].nonzero()[0].tolist()) for copy in shifted(picture, 1)]
    assert sorted(places) == list(product((1, 2, 3), repeat=2))
    assert [copy.shape for copy in shifted(picture, 2)] == [picture.shape] * 25
    assert torch.equal(torch.stack(shifted(picture, 0)), picture[None])


def test_a_shift_below_zero_is_refused():
    with pytest.raises(ValueError, match="eval_shift=-1: must be 0 or more pixels"):
        RetrievalTask(Corner(), eval_shift=-1)
