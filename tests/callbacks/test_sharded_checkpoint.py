"""CrashSafeCheckpoint where every rank writes its shards: FSDP2 in two real processes on gloo."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from tests.support import ToyModule, toy_loader, toy_trainer
from trainerkit.callbacks import CrashSafeCheckpoint
from trainerkit.testing.processes import free_port


class Sharded(ToyModule):
    def configure_model(self):
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def one_rank(rank, port, folder, max_epochs, checkpoint, options):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.manual_seed(1)
    module = Sharded()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=True)
    callback = CrashSafeCheckpoint(monitor=None, keep_checkpoints=2, **options)
    trainer = toy_trainer(folder, [callback], max_epochs=max_epochs, strategy=strategy, devices=2)
    try:
        trainer.fit(module, toy_loader(rows=64), ckpt_path=checkpoint)
        result = {"weight": module.layer.weight.full_tensor().detach(), "last": callback.last_model_path}
    except ValueError as error:
        result = {"error": str(error)}
    torch.save(result, folder / f"rank{rank}.pt")
    os._exit(0)


def in_two_ranks(folder, max_epochs=3, checkpoint=None, **options):
    folder.mkdir(exist_ok=True)
    context, port = multiprocessing.get_context("fork"), free_port()
    arguments = [(rank, port, folder, max_epochs, checkpoint, options) for rank in (0, 1)]
    processes = [context.Process(target=one_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            raise AssertionError("two ranks wait for each other for ever")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "whole"
    return folder, in_two_ranks(folder)


def test_the_manifest_has_every_ranks_shards(whole):
    folder, results = whole
    path = folder / "checkpoints" / "step-00000012.ckpt"
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert sorted(manifest["files"]) == sorted(f"{path.name}/{file.name}" for file in path.iterdir())
    assert {name.rpartition("/")[2][:4] for name in manifest["files"]} >= {"__0_", "__1_", ".met", "meta"}
    assert sorted(p.name for p in path.parent.glob("step*.ckpt")) == ["step-00000008.ckpt", "step-00000012.ckpt"]
    assert Path(results[0]["last"]).resolve() == path
    assert results[0]["last"] == results[1]["last"]


def test_it_resumes_from_shards_and_passes_over_damaged_ones(whole, tmp_path):
    folder, results = whole
    shutil.copytree(folder / "checkpoints", tmp_path / "cut" / "checkpoints", symlinks=True)
    damaged = next((tmp_path / "cut" / "checkpoints" / "step-00000012.ckpt").glob("__1_*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match=r"skipped step-00000012.ckpt: .*/__1_0.distcp has other content"):
        newest = CrashSafeCheckpoint.latest(tmp_path / "cut" / "checkpoints")
    assert newest == str(tmp_path / "cut" / "checkpoints" / "step-00000008.ckpt")
    resumed = in_two_ranks(tmp_path / "cut", checkpoint=newest)
    for rank in (0, 1):
        assert torch.equal(resumed[rank]["weight"], results[rank]["weight"])


def test_shards_are_not_written_behind(tmp_path):
    for result in in_two_ranks(tmp_path / "run", asynchronous=True):
        assert result["error"].startswith("asynchronous=True: must be False for sharded checkpoints")
