import json
import multiprocessing
import os
import random
import re
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support import FailsOnce, ToyModule, toy_trainer, two_processes
from trainerkit.callbacks import EMA, ExactResume, StepHashes, StepsDiffer
from trainerkit.callbacks._digest import digest, digest_of, flat
from trainerkit.callbacks._step_records import compare_folders, first_difference, make_record, read_records
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches

STEPS = 15  # three epochs of five batches


class Noisy(ToyModule):
    """Drops inputs at random; has a buffer that counts."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        self.count += 1
        x = batch["x"] * (torch.rand_like(batch["x"]) < 0.8)
        return super().training_step((x, batch["y"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch["x"], batch["y"]), batch_idx)


def loader(changed=None):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(40, 4, generator=generator), torch.randn(40, generator=generator)
    if changed is not None:
        y[changed] += 1e-3
    return BatchLoader(ArrayDataset({"x": x, "y": y}), EpochBatches(40, 8, shuffle=True, seed=1))


class Killed(Callback):
    """Saves after one step and ends the run after another: by a signal, or by failing."""

    def __init__(self, saves: int, dies: int, signum: int | None = None) -> None:
        self.saves, self.dies, self.signum = saves, dies, signum

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.saves and not os.path.exists(saved(trainer.default_root_dir)):
            trainer.save_checkpoint(saved(trainer.default_root_dir))
        if trainer.global_step == self.dies:
            if self.signum is not None:
                os.kill(os.getpid(), self.signum)
            raise RuntimeError("killed")


def saved(folder):
    return os.path.join(folder, "saved.ckpt")


def file_of(folder, rank=0):
    return folder / "step_hashes" / f"rank{rank}.jsonl"


def fit(folder, *callbacks, hashes=None, exact=True, resume=False, module=None, data=None, seed=7, **options):
    torch.manual_seed(0)
    module = module or Noisy()
    made = [hashes or StepHashes(), *([ExactResume()] if exact else []), *callbacks]
    trainer = toy_trainer(folder, made, **options)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    data = data or loader()
    trainer.fit(module, data, loader(), ckpt_path=saved(folder) if resume else None)
    return module


def cut(folder, saves=6, dies=11, **options):
    with pytest.raises(RuntimeError, match="killed"):
        fit(folder, Killed(saves, dies), **options)


def history(folder, rank=0):
    """The records, wherever in the file they stand."""
    return {step: replace(record, line=0) for step, record in read_records(file_of(folder, rank)).items()}


def lines(folder):
    return [json.loads(text) for text in file_of(folder).read_text().splitlines()]


def test_a_record_a_step_with_a_hash_of_everything(tmp_path):
    module = fit(tmp_path)
    records = read_records(file_of(tmp_path))
    assert list(records) == list(range(STEPS + 1))
    assert [records[step].epoch for step in (0, 5, 6, 15)] == [0, 0, 1, 2]
    names = [
        "batch.x",
        "batch.y",
        "batch.index",
        "random state of python",
        "random state of numpy",
        "random state of torch",
    ]
    group = [
        "optimizer 0 group 0 " + key for key in torch.optim.SGD(module.parameters()).param_groups[0] if key != "params"
    ]
    state = ["parameter layer.weight", "parameter layer.bias", "buffer count"]
    momentum = [f"optimizer 0 momentum_buffer of layer.{name}" for name in ("weight", "bias")]
    assert list(records[1].names) == [*names, *group, "output.loss", *state, *momentum]
    assert list(records[0].names) == state  # the weights before the first step
    parts = dict(zip(records[STEPS].names, records[STEPS].parts, strict=True))
    for name, tensor in [("parameter layer.weight", module.layer.weight), ("buffer count", module.count)]:
        assert parts[name] == digest(tensor).hex()[:8]
    # Names are written when they change only.
    assert [line for line in lines(tmp_path) if "names" in line] == [
        {"names": list(records[0].names)}, {"names": list(records[1].names)},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.view(torch.int32).bitwise_xor_(1) if t.dtype == torch.float32 else t.bitwise_xor_(1),
        lambda t: t.copy_(t.flip(0)),
    ],
    ids=["one bit", "the order"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_digest_sees_every_bit_and_the_order(change, dtype):
    tensor = torch.arange(1, 7).to(dtype)
    before = digest(tensor)
    assert digest(tensor.clone()) == before
    change(tensor)
    assert digest(tensor) != before


def test_a_digest_tells_dtypes_and_shapes_apart_and_not_layouts():
    tensor = torch.zeros(4, 3)
    others = [tensor.int(), tensor.T, tensor.bfloat16(), tensor[:, :2], tensor.bool(), tensor.to(torch.complex64)]
    assert len({digest(each) for each in [tensor, *others]}) == 7
    assert (
        digest(tensor.T.contiguous().T) == digest(tensor.to_sparse()) == digest(nn.Parameter(tensor)) == digest(tensor)
    )


@dataclass
class Batch:
    x: torch.Tensor
    meta: dict


def test_batches_of_many_kinds_are_seen_whole():
    def batch(value=1.0, row=0, word="a", number=3):
        return [Batch(torch.tensor([value]), {"row": np.array([row]), "word": word}), (np.int64(number), {})]

    one = {name: digest_of(value) for name, value in flat(batch(), "batch")}
    assert list(one) == ["batch.0.x", "batch.0.meta.row", "batch.0.meta.word", "batch.1.0", "batch.1.1"]
    for name, change in zip(one, [{"value": 2.0}, {"row": 1}, {"word": "b"}, {"number": 4}], strict=False):
        other = {name: digest_of(value) for name, value in flat(batch(**change), "batch")}
        assert [key for key in one if one[key] != other[key]] == [name]


def test_a_resumed_run_makes_the_same_steps_again_and_goes_on_with_the_same_chain(tmp_path):
    fit(tmp_path / "whole")
    cut(tmp_path / "cut")
    assert max(read_records(file_of(tmp_path / "cut"))) == 11
    fit(tmp_path / "cut", resume=True)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert compare_folders(*(file_of(tmp_path / name).parent for name in ("whole", "cut"))) == (STEPS, [])


def test_half_a_line_that_a_kill_left_is_cut_off(tmp_path):
    fit(tmp_path / "whole")
    cut(tmp_path / "cut")
    file = file_of(tmp_path / "cut")
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rfind(b'"chain"')])
    assert max(read_records(file)) == 10
    fit(tmp_path / "cut", resume=True)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


def test_the_chain_goes_on_where_the_file_is_lost(tmp_path):
    fit(tmp_path / "whole")
    cut(tmp_path / "cut")
    file_of(tmp_path / "cut").unlink()
    fit(tmp_path / "cut", resume=True)
    ours, whole = (read_records(file_of(tmp_path / name)) for name in ("cut", "whole"))
    assert list(ours) == list(range(7, STEPS + 1))
    assert all(ours[step].chain == whole[step].chain for step in ours)


def test_sigkill_in_the_middle_of_a_run_then_equal(tmp_path):
    fit(tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(
        target=fit, args=(tmp_path / "cut", Killed(6, 11, signal.SIGKILL))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert max(read_records(file_of(tmp_path / "cut"))) == 11  # what was recorded is there without a flush to the disk
    fit(tmp_path / "cut", resume=True)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


class Shuffled(TensorDataset):
    """A plain loader's rows, as a dict."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


def plain_loader():
    data = loader().dataset
    return DataLoader(Shuffled(*(data[slice(None)][name] for name in ("x", "y"))), batch_size=8, shuffle=True)


UNEQUAL = {
    "without the random state": ({"exact": False}, "random state of python"),
    "another learning rate": ({"module": "slower"}, "optimizer 0 group 0 lr"),
    "a row of the data changed": ({"data": "changed"}, "batch.y"),
    "another module": ({"module": "scaled"}, "output.loss"),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_the_first_thing_that_differs_is_named_with_both_values(tmp_path, case):
    class Scaled(Noisy):
        def loss(self, batch):
            return 1.001 * super().loss(batch)

    class Slower(Noisy):
        """The checkpoint's rate is set again: a user who changes it does so after it was restored."""

        def on_train_start(self):
            self.optimizers().param_groups[0]["lr"] = 0.05

    options, name = UNEQUAL[case]
    made = {"slower": Slower, "scaled": Scaled, "changed": lambda: loader(changed=slice(None))}
    options = {key: made[value]() if isinstance(value, str) else value for key, value in options.items()}
    cut(tmp_path, exact=options.get("exact", True))
    before = file_of(tmp_path).read_text()
    (line,) = [n for n, text in enumerate(before.splitlines(), 1) if '"step":7,' in text]
    with pytest.raises(StepsDiffer) as raised:
        fit(tmp_path, resume=True, seed=123, **options)
    text = str(raised.value).replace("\n", " ")
    expected = (
        rf"the resumed run is not the one that was recorded: rank 0, step 7: {name} is [0-9a-f]{{8}} in "
        rf"{file_of(tmp_path)}:{line}, [0-9a-f]{{8}} in the step made again; \d+ more parts of this step differ"
    )
    assert re.fullmatch(expected, text), text
    assert file_of(tmp_path).read_text() == before  # the record stays what it was


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
def test_a_loader_that_begins_anew_is_named_by_its_batch(tmp_path):
    """Lightning's own resume: a plain loader starts again at batch 0, with an order of its own."""
    cut(tmp_path, data=plain_loader(), exact=False)
    with pytest.raises(StepsDiffer, match=r"step 7: batch\.x is "):
        fit(tmp_path, resume=True, data=plain_loader(), exact=False)


def test_a_warning_goes_on_and_the_records_are_those_of_the_new_history(tmp_path):
    cut(tmp_path, exact=False)
    with pytest.warns(UserWarning, match="step 7: random state of python is") as seen:
        fit(tmp_path, resume=True, exact=False, seed=123, hashes=StepHashes("warn"))
    assert len([each for each in seen if "StepHashes" in str(each.message)]) == 1
    old, new = (read_records(file_of(tmp_path)), [line for line in lines(tmp_path) if "step" in line])
    assert [line["step"] for line in new] == [*range(12), *range(7, STEPS + 1)]
    assert list(old) == list(range(STEPS + 1))
    assert old[7].chain == new[12]["chain"] != new[7]["chain"]
    # A checkpoint of the history that was left has nothing to be compared with.
    cut_again = tmp_path / "left"
    cut(cut_again, saves=9, dies=11, seed=5)
    os.replace(file_of(tmp_path), file_of(cut_again))
    with pytest.warns(UserWarning, match="has of step 9 is not what the checkpoint was saved after"):
        fit(cut_again, resume=True)
    assert list(read_records(file_of(cut_again))) == list(range(STEPS + 1))


def test_every_third_step_with_windows_of_two_batches(tmp_path):
    options = {"accumulate_grad_batches": 2, "max_epochs": 4}  # three steps an epoch, the last of one batch
    fit(tmp_path / "whole", hashes=StepHashes(every_n_steps=3), **options)
    records = read_records(file_of(tmp_path / "whole"))
    assert list(records) == [0, 3, 6, 9, 12]
    cut(tmp_path / "cut", saves=4, dies=7, hashes=StepHashes(every_n_steps=3), **options)
    fit(tmp_path / "cut", resume=True, hashes=StepHashes(every_n_steps=3), **options)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    with pytest.raises(StepsDiffer, match=r"step 6: batch\.y is"):
        cut(tmp_path / "other", saves=4, dies=7, hashes=StepHashes(every_n_steps=3), **options)
        fit(tmp_path / "other", resume=True, hashes=StepHashes(every_n_steps=3), data=loader(slice(None)), **options)


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    cut(tmp_path)
    fit(tmp_path, module=Noisy(lr=0.01))
    assert [line["step"] for line in lines(tmp_path) if "step" in line] == list(range(STEPS + 1))


def test_it_changes_nothing_beside_an_average(tmp_path):
    with_it = fit(tmp_path / "a", EMA(decay=0.9))
    torch.manual_seed(0)
    module = Noisy()
    trainer = toy_trainer(tmp_path / "b", [ExactResume(), EMA(decay=0.9)])
    torch.manual_seed(7)
    trainer.fit(module, loader(), loader())
    assert torch.equal(with_it.layer.weight, module.layer.weight)


def test_a_fit_from_the_start_after_one_that_failed_to_resume_begins_at_step_0(tmp_path):
    cut(tmp_path)
    hashes, fails = StepHashes(), FailsOnce()
    with pytest.raises(RuntimeError, match="failed once"):
        fit(tmp_path, fails, hashes=hashes, resume=True)
    fit(tmp_path / "new", fails, hashes=hashes)
    assert list(history(tmp_path / "new")) == list(range(STEPS + 1))


@pytest.mark.filterwarnings("ignore:.*sync_dist.*")
def test_each_of_two_ranks_has_its_own_file_and_one_that_differs_stops_both(tmp_path):
    def train(rank, *callbacks, **options):
        order = EpochBatches(40, 8, shuffle=True, seed=1, num_replicas=2, rank=rank)
        changed = loader(slice(None) if options.pop("changed", None) == rank else None).dataset
        fit(
            tmp_path, *callbacks, data=BatchLoader(changed, order), devices=2, strategy="ddp",
            use_distributed_sampler=False, **options,
        )  # fmt: skip
        return "finished"

    outcomes = two_processes(lambda rank: train(rank, Killed(4, 8), max_epochs=3), tmp_path)
    assert outcomes == [{"error": "RuntimeError: killed"}] * 2
    records = [history(tmp_path, rank) for rank in range(2)]
    assert [max(each) for each in records] == [8, 8]
    step = [dict(zip(each[5].names, each[5].parts, strict=True)) for each in records]
    assert step[0]["batch.x"] != step[1]["batch.x"]
    assert step[0]["parameter layer.weight"] == step[1]["parameter layer.weight"]
    differs = two_processes(lambda rank: train(rank, resume=True, changed=1, max_epochs=3), tmp_path)
    assert differs[0] == differs[1]
    assert "StepsDiffer: " in differs[0]["error"]
    assert "\nrank 1, step 5: batch.y is " in differs[0]["error"]
    assert f"{file_of(tmp_path, 1)}:" in differs[0]["error"]
    file = file_of(tmp_path, 1)
    content = file.read_text()
    file.write_text("no\n" + content)
    damaged = two_processes(lambda rank: train(rank, resume=True, max_epochs=3), tmp_path)
    assert damaged[0] == damaged[1]
    assert f"ValueError: path={file}: line 1 is no record of StepHashes" in damaged[0]["error"]
    file.write_text(content)
    # A kill does not reach both in the same step.
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    assert two_processes(lambda rank: train(rank, resume=True, max_epochs=3), tmp_path) == [{"result": "finished"}] * 2
    for rank, before in enumerate(records):
        after = history(tmp_path, rank)
        assert {step: after[step] for step in before} == before
        assert max(after) == 9


def test_files_that_are_no_records_are_refused(tmp_path):
    file = tmp_path / "rank0.jsonl"
    for text in ("[]\n", "no\n", '{"step":1}\n', '{"step":1,"epoch":0,"content":"","parts":"0","chain":""}\n'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"path=.*rank0\.jsonl: line 1 is no record of StepHashes"):
            read_records(file)
    with pytest.raises(ValueError, match=r"folder=.*: must have record files of the ranks"):
        compare_folders(tmp_path, tmp_path / "none")


def test_a_difference_that_no_short_hash_shows_is_still_one():
    one, other = (make_record(1, 0, {"a": b"\0" * 4 + bytes([last])}, "") for last in (1, 2))
    assert one.parts == other.parts
    assert first_difference(one, other) == ("a part whose short hash is the same", one.content, other.content, 1)
    assert first_difference(one, one) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"on_difference": "stop"}, "on_difference=stop: must be"), ({"every_n_steps": 0}, "every_n_steps=0: must be 1")],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StepHashes(**options)
