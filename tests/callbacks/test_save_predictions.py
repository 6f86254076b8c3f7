import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import ToyModule, toy_trainer, two_processes
from trainerkit.callbacks import SavePredictions
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches


class Predicts(ToyModule):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"index": batch["index"], "twice": 2 * batch["x"]}


def shuffled(rows=10, **world):
    data = ArrayDataset({"x": torch.arange(float(rows))[:, None]})
    return BatchLoader(data, EpochBatches(rows, 4, shuffle=True, seed=4, even=False, **world))


def test_rows_are_written_in_the_order_of_the_data(tmp_path):
    callback = SavePredictions()
    toy_trainer(tmp_path, [callback]).predict(Predicts(), shuffled(), return_predictions=False)
    assert np.load(tmp_path / "predictions" / "twice.npy")[:, 0].tolist() == [2.0 * i for i in range(10)]
    assert [path.name for path in callback.paths] == ["index.npy", "twice.npy"]


def test_one_safetensors_file_holds_all_keys(tmp_path):
    toy_trainer(tmp_path, [SavePredictions("safetensors")]).predict(Predicts(), shuffled(), return_predictions=False)
    content = load_file(tmp_path / "predictions" / "predictions.safetensors")
    assert content["twice"][:, 0].tolist() == [2.0 * i for i in range(10)]


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_loaders_whose_rows_have_the_same_numbers_are_kept_apart(format, tmp_path):
    callback = SavePredictions(format)
    loaders = [shuffled(rows=3), shuffled(rows=10)]
    toy_trainer(tmp_path, [callback]).predict(Predicts(), loaders, return_predictions=False)
    for number, rows in enumerate((3, 10)):
        folder = tmp_path / "predictions" / str(number)
        found = (
            load_file(folder / "predictions.safetensors")["twice"].numpy()
            if format == "safetensors"
            else np.load(folder / "twice.npy")
        )
        assert found[:, 0].tolist() == [2.0 * i for i in range(rows)]
    assert {path.parent.name for path in callback.paths} == {"0", "1"}
    assert all(path.is_file() for path in callback.paths)


def test_two_processes_write_of_each_loader_what_one_writes(tmp_path):
    def work(rank):
        world = {"num_replicas": 2, "rank": rank}
        trainer = toy_trainer(
            tmp_path, [SavePredictions()], devices=2, strategy="ddp", use_distributed_sampler=False
        )  # fmt: skip
        trainer.predict(Predicts(), [shuffled(rows=3, **world), shuffled(**world)], return_predictions=False)

    outcomes = two_processes(work, tmp_path)
    assert all("error" not in outcome for outcome in outcomes), outcomes
    for number, rows in enumerate((3, 10)):
        found = np.load(tmp_path / "predictions" / str(number) / "twice.npy")
        assert found[:, 0].tolist() == [2.0 * i for i in range(rows)]


def test_rows_that_a_sampler_repeated_stand_once():
    from trainerkit.callbacks.save_predictions import _in_order

    rows = {"index": torch.tensor([2, 0, 1, 0]), "a": torch.tensor([20, 0, 10, 0])}
    assert _in_order(rows)["a"].tolist() == [0, 10, 20]


def test_a_step_that_returns_something_else_is_an_error(tmp_path):
    class Wrong(ToyModule):
        def predict_step(self, batch, batch_idx):
            return batch["x"]

    with pytest.raises(ValueError, match="must return a dict of tensors with 'index', got Tensor"):
        toy_trainer(tmp_path, [SavePredictions()]).predict(Wrong(), shuffled())
    with pytest.raises(ValueError, match="format=csv: must be npy or safetensors"):
        SavePredictions("csv")
