"""A plugin: a task of its own, and a built-in config overridden."""

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.task import Task


class LineTask(Task):
    """Fits y = ax + b."""

    def __init__(self, hidden: int = 4, **parts):
        super().__init__(**parts)
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: must be 1 or more")
        self.network = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def _loss(self, batch):
        return (self.network(batch["x"]) - batch["y"]).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.track("train/loss", loss, weight=len(batch["x"]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.track("val/loss", self._loss(batch), weight=len(batch["x"]))


class LineData(LightningDataModule):
    """200 noisy points on a line."""

    def _loader(self, seed, shuffle):
        x = torch.rand(200, 1, generator=torch.Generator().manual_seed(seed))
        data = ArrayDataset({"x": x, "y": 2 * x - 1})
        return BatchLoader(data, EpochBatches(200, 20, shuffle=shuffle, even=shuffle))

    def train_dataloader(self):
        return self._loader(0, True)

    def val_dataloader(self):
        return self._loader(1, False)
