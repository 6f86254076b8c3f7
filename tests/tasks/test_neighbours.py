"""What is shown of a search: pictures and texts after an evaluation, answers to a query, an index file."""

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from tests.support import toy_trainer, two_processes
from trainerkit.tasks.retrieval.faiss_index import FaissIndex, search_faiss_index, write_faiss_index
from trainerkit.tasks.retrieval.metrics import EvaluationSet
from trainerkit.tasks.retrieval.neighbours import Neighbours
from trainerkit.tasks.retrieval.search import top_k

ROWS = 20


def shapes():
    """Bars of twenty slopes, 12x12; queries are paler."""
    place = torch.linspace(-1, 1, 12)
    angles = torch.arange(ROWS) * torch.pi / ROWS
    lines = angles.cos()[:, None, None] * place[:, None] - angles.sin()[:, None, None] * place
    return (-8 * lines.square()).exp()[:, None]


class Shapes(LightningDataModule):
    evaluation_names = ("shapes",)
    predict_names = ("query", "corpus")

    def __init__(self, pictures=True):
        super().__init__()
        self.modalities = ["image"] if pictures else ["text"]

    def describe(self, index, side):
        return f"{side} of bar {index} at {index * 180 // ROWS} degrees, $5 {'each ' * 30}"

    def _loader(self, rows):
        pictures = shapes()
        names = ("query_image", "positive_image") if self.modalities == ["image"] else ("query_text", "positive_text")
        world, rank = self.trainer.world_size, self.trainer.global_rank
        data = [{"index": i, names[0]: 0.6 * pictures[i], names[1]: pictures[i]} for i in rows]
        return DataLoader(data[rank::world], batch_size=6)

    def val_dataloader(self):
        return self._loader(range(ROWS))

    test_dataloader = val_dataloader

    def predict_dataloader(self):
        return [self._loader([7]), self._loader(range(ROWS))]


class Searcher(LightningModule):
    """Pixels are the embedding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.evaluation_sets = [EvaluationSet()]

    def test_step(self, batch, batch_idx):
        positives, queries = (batch[name].flatten(1) for name in sorted(batch) if name != "index")
        self.evaluation_sets[0].add(batch["index"], queries, positives)

    validation_step = test_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        side = "query" if dataloader_idx == 0 else "positive"
        return {"index": batch["index"], "embedding": batch[f"{side}_image"].flatten(1)}


def evaluated(folder, callback, data=None, **options):
    trainer = toy_trainer(folder, [callback], use_distributed_sampler=False, **options)
    trainer.test(Searcher(), datamodule=data or Shapes(), verbose=False)


def test_a_test_draws_queries_and_neighbours(tmp_path):
    pixels = pytest.importorskip("matplotlib.image").imread
    evaluated(tmp_path, Neighbours(k=5, n_queries=4))
    picture = pixels(tmp_path / "neighbours" / "shapes.png")[..., :3]
    green = torch.tensor([44, 160, 44]) / 255
    framed = (torch.from_numpy(picture) - green).abs().amax(-1) < 0.02
    # Four frames: of each query the first neighbour is its own row.
    assert framed.sum() > 500
    assert picture.shape[0] > 400
    evaluated(tmp_path / "more", Neighbours(k=5, n_queries=1))
    fewer = pixels(tmp_path / "more" / "neighbours" / "shapes.png")
    assert fewer.shape[0] < picture.shape[0] / 2


def test_texts_are_written_out_and_the_right_ones_marked(tmp_path):
    evaluated(tmp_path, Neighbours(k=3, n_queries=2), Shapes(pictures=False))
    lines = (tmp_path / "neighbours" / "shapes.txt").read_text().splitlines()
    assert not (tmp_path / "neighbours" / "shapes.png").exists()
    assert lines[0].startswith("query of bar 0 at 0 degrees")
    assert all(len(line) < 130 for line in lines)
    last = lines[5:]
    assert last[0].startswith("query of bar 19 at 171 degrees")
    assert last[1].startswith("  *   1   1.000  row 19: positive of bar 19")
    assert [line[2] for line in last[1:4]] == ["*", " ", " "]


@pytest.mark.parametrize("asked", [False, True])
def test_a_validation_draws_only_where_that_is_asked_for(asked, tmp_path):
    callback = Neighbours(k=2, n_queries=1, pictures=False, validation=asked)
    trainer = toy_trainer(tmp_path, [callback], use_distributed_sampler=False)
    trainer.validate(Searcher(), datamodule=Shapes(), verbose=False)
    assert (tmp_path / "neighbours" / "shapes.txt").exists() == asked


def test_pictures_are_texts_where_that_is_asked_for(tmp_path):
    evaluated(tmp_path, Neighbours(k=30, n_queries=1, pictures=False))
    lines = (tmp_path / "neighbours" / "shapes.txt").read_text().splitlines()
    assert len(lines) == 1 + ROWS


def test_two_processes_show_neighbours_among_the_rows_of_both(tmp_path):
    def work(rank):
        evaluated(tmp_path, Neighbours(k=4, n_queries=2), devices=2, strategy="ddp")
        evaluated(tmp_path, Neighbours(k=4, n_queries=2, pictures=False), devices=2, strategy="ddp")

    outcomes = two_processes(work, tmp_path)
    assert all("error" not in outcome for outcome in outcomes), outcomes
    assert (tmp_path / "neighbours" / "shapes.png").stat().st_size > 5000
    text = (tmp_path / "neighbours" / "shapes.txt").read_text()
    shown = {int(line.split("row ")[1].split(":")[0]) % 2 for line in text.splitlines() if "row " in line}
    assert shown == {0, 1}


def test_a_query_is_answered_on_the_screen_and_in_a_file(tmp_path, capsys):
    trainer = toy_trainer(tmp_path, [Neighbours(k=3)])
    trainer.predict(Searcher(), datamodule=Shapes())
    pictures = shapes().flatten(1)
    scores, rows = top_k(pictures[7:8], pictures, 3)
    answers = json.loads((tmp_path / "predictions" / "neighbours.json").read_text())
    assert [found["row"] for found in answers[0]["neighbours"]] == rows[0].tolist()
    assert [found["score"] for found in answers[0]["neighbours"]] == pytest.approx(scores[0].tolist())
    assert answers[0]["neighbours"][0]["text"].startswith("positive of bar 7")
    screen = capsys.readouterr().out
    assert "  1   1.000  row 7: positive of bar 7 at 63 degrees" in screen
    assert "20 rows searched" in screen


@pytest.mark.filterwarnings("ignore:builtin type .*wig.* has no __module__ attribute:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero:UserWarning")
@pytest.mark.parametrize("corpus", [ROWS, 1])
def test_two_processes_of_which_one_has_no_row_of_a_loader_answer_a_query(corpus, tmp_path):
    pytest.importorskip("faiss")

    class Few(Shapes):
        def predict_dataloader(self):
            # One process has the query's row, and of a corpus of one row the other has that.
            query = self._loader([7]) if self.trainer.global_rank == 0 else DataLoader([])
            if corpus > 1:
                return [query, self._loader(range(corpus))]
            return [query, self._loader([3, 3]) if self.trainer.global_rank else DataLoader([])]

    def work(rank):
        data = Few()
        data.allow_zero_length_dataloader_with_multiple_devices = True
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        trainer = toy_trainer(tmp_path, [Neighbours(k=3), FaissIndex()], **options)
        trainer.predict(Searcher(), datamodule=data)

    outcomes = two_processes(work, tmp_path)
    assert all("error" not in outcome for outcome in outcomes), outcomes
    answers = json.loads((tmp_path / "predictions" / "neighbours.json").read_text())
    assert len(answers) == 1
    assert len(answers[0]["neighbours"]) == min(3, corpus)
    _, found = search_faiss_index(tmp_path / "predictions" / "index.faiss", shapes().flatten(1), 1)
    assert found[:, 0].tolist() == (list(range(ROWS)) if corpus > 1 else [3] * ROWS)


def test_a_prediction_without_a_query_is_left_alone(tmp_path, capsys):
    class Rows(Shapes):
        predict_names = ("rows",)

        def predict_dataloader(self):
            return self._loader(range(ROWS))

    class Whole(Searcher):
        def predict_step(self, batch, batch_idx):
            return super().predict_step(batch, batch_idx, 1)

    toy_trainer(tmp_path, [Neighbours()]).predict(Whole(), datamodule=Rows())
    assert not (tmp_path / "predictions").exists()


def test_what_is_missing_is_named(tmp_path):
    class Silent(Shapes):
        describe = None

    class Plain(Searcher):
        def __init__(self):
            super().__init__()
            del self.evaluation_sets

    with pytest.raises(ValueError, match=r"data=NoneType: Neighbours needs a method describe\(index, side\)"):
        toy_trainer(tmp_path, [Neighbours()]).test(Searcher(), DataLoader([1]))
    with pytest.raises(ValueError, match=r"task=Plain: Neighbours needs an attribute evaluation_sets"):
        toy_trainer(tmp_path, [Neighbours()]).test(Plain(), datamodule=Shapes())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k=0: must be 1 or more"), ({"n_queries": 0}, "n_queries=0: must be 1 or more")],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        Neighbours(**options)


# SWIG's own classes.
@pytest.mark.filterwarnings("ignore:builtin type .*wig.* has no __module__ attribute:DeprecationWarning")
def test_an_index_that_is_read_back_finds_what_a_search_finds(tmp_path):
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    queries, corpus = torch.randn(9, 8, generator=generator), torch.randn(50, 8, generator=generator)
    write_faiss_index(tmp_path / "index.faiss", corpus, index=torch.arange(50) * 2 + 1)
    scores, rows = search_faiss_index(tmp_path / "index.faiss", queries, 5)
    expected = top_k(queries, corpus, 5)
    torch.testing.assert_close(scores, expected[0])
    assert torch.equal(rows, expected[1] * 2 + 1)
    scores, rows = search_faiss_index(tmp_path / "index.faiss", queries, 60)
    assert (rows[:, 50:] == -1).all()
    assert scores[:, 50:].isneginf().all()
    with pytest.raises(ValueError, match=r"embeddings: shape \(2, 3, 4\); must be \(N, D\)"):
        write_faiss_index(tmp_path / "index.faiss", torch.ones(2, 3, 4))


@pytest.mark.filterwarnings("ignore:builtin type .*wig.* has no __module__ attribute:DeprecationWarning")
def test_a_prediction_leaves_an_index_of_the_corpus(tmp_path):
    pytest.importorskip("faiss")
    toy_trainer(tmp_path, [FaissIndex()]).predict(Searcher(), datamodule=Shapes())
    pictures = shapes().flatten(1)
    _, rows = search_faiss_index(tmp_path / "predictions" / "index.faiss", pictures, 1)
    assert rows[:, 0].tolist() == list(range(ROWS))
