import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import EMA, BestWeights


class Scripted(ToyModule):
    """Validation losses by script; remembers the weights that were scored."""

    losses = (3.0, 1.0, 2.0, 0.5, 4.0)

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.layer.weight.detach().clone())
        self.log("val/loss", torch.tensor(self.losses[self.current_epoch]))


@pytest.mark.parametrize("order", ["before", "after", "without"])
def test_the_weights_that_were_scored_best_are_exported_in_any_order_with_ema(tmp_path, order):
    callbacks: list[Callback] = [BestWeights()]
    if order != "without":
        callbacks.insert(0 if order == "before" else 1, EMA(decay=0.5))
    module = Scripted()
    toy_trainer(tmp_path, callbacks, max_epochs=5).fit(module, toy_loader(), toy_loader(rows=8))
    path = tmp_path / "best_model.safetensors"
    assert torch.equal(load_file(path)["layer.weight"], module.seen[3])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"monitor": "val/loss", "value": "0.5", "epoch": "4", "step": "16"}


def test_the_best_value_goes_through_a_resume(tmp_path):
    best = BestWeights()
    best.load_state_dict({"best": 0.1})
    path = tmp_path / "best_model.safetensors"
    path.write_bytes(b"the best so far")
    toy_trainer(tmp_path, [best], max_epochs=5).fit(Scripted(), toy_loader(), toy_loader())
    assert best.state_dict() == {"best": 0.1}
    assert path.read_bytes() == b"the best so far"


def test_in_a_new_folder_an_old_best_value_does_not_count(tmp_path):
    best = BestWeights()
    best.load_state_dict({"best": 0.1})
    toy_trainer(tmp_path, [best], max_epochs=5).fit(Scripted(), toy_loader(), toy_loader())
    assert best.state_dict() == {"best": 0.5}
    assert (tmp_path / "best_model.safetensors").exists()


def test_without_validation_the_epochs_end_counts_and_nan_never_wins(tmp_path):
    class Trains(ToyModule):
        def training_step(self, batch, batch_idx):
            value = torch.tensor([2.0, 1.0, float("nan")][self.current_epoch])
            self.log("train/loss", value, on_epoch=True, on_step=False)
            return self.loss(batch)

    best = BestWeights("train/loss")
    trainer = toy_trainer(tmp_path, [best], max_epochs=3)
    trainer.fit(Trains(), toy_loader())
    with safe_open(tmp_path / "best_model.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "2"


def test_tied_weights_are_written_twice(tmp_path):
    class Tied(ToyModule):
        def __init__(self):
            super().__init__()
            self.again = self.layer

    toy_trainer(tmp_path, [BestWeights()], max_epochs=1).fit(Tied(), toy_loader(), toy_loader())
    state = load_file(tmp_path / "best_model.safetensors")
    assert torch.equal(state["layer.weight"], state["again.weight"])


def test_a_wrong_mode_is_refused():
    with pytest.raises(ValueError, match="mode=low: must be min or max"):
        BestWeights(mode="low")
