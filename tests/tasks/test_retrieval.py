"""task=retrieval as a whole, in real runs: what the documented trainer promised, and each fault that it had."""

import json
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from safetensors.torch import load_file

from tests.support import toy_trainer, two_processes
from trainerkit.callbacks import CrashSafeCheckpoint, ExactResume, SavePredictions
from trainerkit.cli import main
from trainerkit.data import PairData
from trainerkit.fsdp import FSDP2
from trainerkit.tasks.retrieval import (
    Distillation,
    Encoder,
    HardNegatives,
    ImageCNN,
    RetrievalTask,
    Teacher,
    TextBag,
    TextTransformer,
)
from trainerkit.tasks.retrieval.losses import CoSENT, InfoNCE, LateInteraction, Matryoshka, SigLIP, SupCon, Triplet
from trainerkit.testing._kill_runs import SMALL
from trainerkit.trainer import Trainer

WIDTH, RATE = 8, 0.1
LOSSES = {
    "info_nce": InfoNCE,
    "every option": partial(
        InfoNCE, learnable_temperature=True, symmetric=True, hard_negatives=3, false_negative_margin=0.1
    ),
    "late_interaction": partial(LateInteraction, symmetric=True),
    "matryoshka": lambda: Matryoshka(InfoNCE(), dims=[WIDTH, 3], weights=[1.0, 0.5]),
    "siglip": SigLIP,
    "sup_con": SupCon,
    "triplet": Triplet,
    "cosent": CoSENT,
}


def make_data(folder, batch_size=12, graded=False, given=True, **options):
    """Some fifty questions and answers that train; with labels and none to two negatives each, or with scores."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(72):
        row = {"query": f"what is {i} and {i % 7}", "positive": f"it is {i} {'so' * (i % 3)} {i % 5}"}
        if graded:
            row["score"] = (i % 4) / 3
        elif given:
            row |= {"label": i // 2, "negatives": [f"it is not {i} {n}" for n in range(i % 3)]}
        rows.append(row)
    path = folder / "pairs.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PairData(str(path), batch_size=batch_size, n_buckets=64, max_length=8, **options)


def make_encoder(pooling="mean", dropout=0.0, seed=1):
    torch.manual_seed(seed)
    text = TextTransformer(65, max_length=8, dim=WIDTH, layers=1, heads=2, dropout=dropout)
    return Encoder(text=text, dim=WIDTH, pooling=pooling)


def make_task(loss=None, pooling="mean", dropout=0.0, towers=1, **options):
    encoders = [make_encoder(pooling, dropout, seed) for seed in range(1, towers + 1)]
    options = {"gradient_cache": False, "gradient_cache_chunk_size": 5} | options
    options = {"optimizer": partial(torch.optim.SGD, lr=RATE, fused=False)} | options  # FSDP2 knows no fused one
    return RetrievalTask(*encoders, loss=loss, **options)


def fit(folder, task, data, callbacks=(), kind=Trainer, resume=None, **options):
    """Train, by default three steps in float64 without validation."""
    options = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0, "precision": "64-true"} | options
    trainer = toy_trainer(folder, callbacks, kind=kind, **options)
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    return trainer


def weights(task):
    return {name: tensor.detach().double() for name, tensor in task.state_dict().items()}


def distance(one, other):
    """The largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class Batches(Callback):
    """What was trained on, and the losses."""

    def __init__(self):
        self.seen, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(batch)
        self.losses.append(outputs["loss"].detach().clone())


class Validations(Callback):
    """The optimizer steps that were made before each validation."""

    def __init__(self):
        self.steps = []

    def on_validation_start(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


class Killed(Exception):
    pass


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
            raise Killed


# Distillation, which could never run


def of_batch(task, batch):
    """Query and positive embeddings of length 1."""
    return [F.normalize(task.embed(batch, side), dim=1) for side in ("query", "positive")]


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_with_a_teacher_is_the_formula(cached, tmp_path):
    """(1 - w) · InfoNCE + w · T² · KL of the rows of similarities times 20, computed here anew."""
    teacher, batches = Teacher(make_encoder(seed=9)), Batches()
    task = make_task(InfoNCE(0.1), gradient_cache=cached, teacher=teacher, distillation=Distillation(0.3, 2.0))
    fit(tmp_path, task, make_data(tmp_path, given=False), [batches], limit_train_batches=1)
    batch, untrained = batches.seen[0], make_task().double()
    queries, positives = of_batch(untrained, batch)
    queries_of_teacher, positives_of_teacher = of_batch(RetrievalTask(make_encoder(seed=9).eval()), batch)
    ours, theirs = queries @ positives.T, queries_of_teacher @ positives_of_teacher.T
    expected = 0.0
    for i in range(len(ours)):
        expected += 0.7 * -(ours[i] / 0.1).log_softmax(0)[i]
        p, q = (20 * theirs[i] / 2).softmax(0), (20 * ours[i] / 2).softmax(0)
        expected += 0.3 * 4 * sum(p[j] * (p[j] / q[j]).log() for j in range(len(ours)))
    assert float(batches.losses[0]) == pytest.approx(expected.item() / len(ours), rel=1e-5)  # the teacher is in float32


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_changes_what_is_learnt_and_stays_as_it_was_outside_of_the_checkpoint(cached, tmp_path):
    found = {}
    teacher = Teacher(make_encoder(seed=9, dropout=0.5))
    before = {name: tensor.clone() for name, tensor in teacher._towers["encoder"].state_dict().items()}
    for weight in (None, 0.0, 0.5):
        options = {} if weight is None else {"teacher": teacher, "distillation": Distillation(weight)}
        task = make_task(gradient_cache=cached, **options)
        trainer = fit(tmp_path, task, make_data(tmp_path))
        found[weight] = weights(task)
    assert distance(found[None], found[0.0]) < 1e-12
    assert distance(found[None], found[0.5]) > 1e-4
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"encoder"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher._towers["encoder"].state_dict().items())
    assert not any(module.training for module in teacher._towers["encoder"].modules())


# Validation and accumulation, which did not exist


@pytest.mark.parametrize("kind", [Trainer, LightningTrainer])
@pytest.mark.parametrize(
    ("eval_steps", "accumulated", "expected"),
    [
        (0, 1, [5, 10, 15]),
        (4, 1, [4, 8, 12]),
        (7, 1, [7, 14]),
        # Windows of 2, 2 and 1 batches: three steps an epoch.
        (0, 2, [3, 6, 9]),
        (2, 2, [2, 4, 6, 8]),
        (4, 2, [4, 8]),
    ],
)
def test_it_validates_after_so_many_optimizer_steps(eval_steps, accumulated, expected, kind, tmp_path):
    validations = Validations()
    fit(
        tmp_path, make_task(eval_steps=eval_steps), make_data(tmp_path, 6), [validations], kind, max_epochs=3,
        limit_train_batches=5, limit_val_batches=1, accumulate_grad_batches=accumulated,
    )  # fmt: skip
    assert validations.steps == expected


def test_a_resumed_run_validates_at_the_same_steps(tmp_path):
    options = {
        "max_epochs": 3, "limit_train_batches": 5, "limit_val_batches": 1, "accumulate_grad_batches": 2,
    }  # fmt: skip
    with suppress(Killed):
        fit(tmp_path, make_task(eval_steps=2), make_data(tmp_path, 6), [Kill(5)], **options)
    validations = Validations()
    fit(
        tmp_path, make_task(eval_steps=2), make_data(tmp_path, 6), [validations], resume=tmp_path / "last.ckpt",
        **options,
    )  # fmt: skip
    assert validations.steps == [6, 8]


def test_accumulated_batches_give_the_mean_of_their_gradients_which_is_not_that_of_one_batch(tmp_path):
    """Rows are compared within their own batch: for more negatives the batch has to grow, which the cache is for."""
    batches, task = Batches(), make_task(gradient_cache=True)
    data = make_data(tmp_path, 6, given=False)
    fit(tmp_path, task, data, [batches], limit_train_batches=2, accumulate_grad_batches=2)
    one, other = batches.seen

    def after(*losses):
        """The weights after a step on a mean of losses of batches."""
        expected = make_task().double()
        loss = sum(expected.loss(*(expected.embed(batch, side) for side in ("query", "positive"))) for batch in losses)
        (loss / len(losses)).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= RATE * parameter.grad
        return weights(expected)

    longest = {name: max(one[name].shape[1], other[name].shape[1]) for name in one if "text" in name}
    both = {
        name: torch.cat([F.pad(b[name], (0, longest[name] - b[name].shape[1])) if name in longest else b[name] for b in batches.seen])
        for name in one
    }  # fmt: skip
    assert distance(weights(task), after(one, other)) < 1e-12
    assert distance(weights(task), after(both)) > 1e-3


# Processes, which diverged


def train_and_validate(folder, batch_size, loss, **options):
    """Weights and metrics of a run with labels, negatives that were given, and mined ones."""
    warnings.simplefilter("ignore")  # Lightning's, of metrics that are the same in every process as they are logged
    miner = HardNegatives(k=2, start_epoch=0, margin=None)
    task = make_task(LOSSES[loss](), gradient_cache=True)
    data = make_data(folder / "data", batch_size, mined_negatives=2)
    trainer = fit(folder, task, data, [miner], max_epochs=2, limit_val_batches=None, **options)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"weights": {name: tensor.tolist() for name, tensor in weights(task).items()}, "metrics": metrics}


@pytest.mark.parametrize("loss", ["every option", "siglip"])
def test_two_processes_equal_one_with_the_double_batch(loss, tmp_path):
    make_data(tmp_path / "data")
    work = partial(train_and_validate, tmp_path, 6, loss, devices=2, strategy="ddp")
    outcomes = two_processes(lambda rank: work(), tmp_path)
    assert all("error" not in outcome for outcome in outcomes), outcomes
    first, second = (outcome["result"] for outcome in outcomes)
    assert first["weights"] == second["weights"]
    single = train_and_validate(tmp_path, 12, loss)
    for name, weight in single["weights"].items():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), torch.tensor(weight), rtol=0, atol=1e-10)
    assert single["metrics"].keys() == first["metrics"].keys()
    alike = {name for name in single["metrics"] if name != "val/loss"}  # the loss depends on the batches' rows
    for name in alike:
        assert first["metrics"][name] == pytest.approx(single["metrics"][name], abs=1e-6), name


# Resuming, which there was not


@pytest.mark.parametrize(("loss", "learnt"), [("every option", ["log_scale"]), ("siglip", ["log_scale", "bias"])])
def test_a_run_killed_in_mid_epoch_goes_on_to_the_bit_with_its_mined_negatives_and_the_losss_own_weights(
    loss, learnt, tmp_path
):
    def run(folder, more=(), resume=None):
        saving = [ExactResume(), CrashSafeCheckpoint(monitor=None, stop_on_signal=False)]
        miner = HardNegatives(k=2, sample="random", margin=None)
        task = make_task(LOSSES[loss](), dropout=0.2, gradient_cache=True)
        begun = weights(task)
        data = make_data(tmp_path, mined_negatives=2)
        fit(folder, task, data, [*saving, miner, *more], resume=resume, max_epochs=3, precision="32-true")
        return begun, weights(task)

    begun, whole = run(tmp_path / "whole")
    with suppress(Killed):
        run(tmp_path / "cut", [Kill(5)])
    path = tmp_path / "cut" / "last.ckpt"
    _, resumed = run(tmp_path / "cut", resume=path)
    assert distance(resumed, whole) == 0
    saved = torch.load(path, weights_only=True)
    for name in (f"loss.{part}" for part in learnt):
        assert name in saved["state_dict"]
        assert not torch.equal(begun[name], whole[name])


# Keys that were dropped without a word


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("data.qurey_column=a", "data.qurey_column: there is no such key. Did you mean data.query_column"),
        ("task.gradient_cach_chunk_size=8", "Did you mean task.gradient_cache_chunk_size"),
        ("task.loss.temprature=0.1", "Did you mean task.loss.temperature"),
        ("task.distillation.wieght=1", "Did you mean task.distillation.weight"),
        ("+task.batch_size=3", "RetrievalTask has no such"),
        ("loss=infonce", "loss=infonce: there is no such choice. Did you mean info_nce"),
        ("task.eval_steps=-1", "task.eval_steps=-1: must be 0 (after each epoch) or more"),
        ("task.queries=both", "task.queries=both: must be one of together, separate"),
        ("task.metrics=[recall]", "task.metrics=recall: must be recall@k"),
        ("task.gradient_cache_chunk_size=0", "task.gradient_cache_chunk_size=0: must be 1 or more"),
    ],
)
def test_a_key_that_is_none_or_a_value_that_cannot_be_is_an_error(override, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["task=retrieval", *SMALL["retrieval"](tmp_path), "trainer=cpu", "out_dir=run", override])
    assert stop.value.code == 2
    assert answer in capsys.readouterr().err


# The gradient cache in the task


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_with_and_without_the_gradient_cache_the_weights_are_the_same(loss, towers, tmp_path):
    """Three steps on labels and negatives, or on scores; batches of 12 pairs in chunks of 5."""
    found = []
    for cached in (False, True):
        pooling = "none" if loss == "late_interaction" else "mean"
        task = make_task(LOSSES[loss](), pooling, towers=towers, gradient_cache=cached)
        begun = weights(task)
        fit(tmp_path, task, make_data(tmp_path, graded=loss == "cosent"))
        found.append(weights(task))
        assert distance(begun, found[-1]) > 1e-4
    assert distance(*found) < 1e-12


def test_batches_in_which_no_row_has_a_negative_train_as_without_negatives(tmp_path):
    """As in the epochs before the first mining; a transformer takes no batch of nothing."""
    found = []
    for room in (0, 3):
        task = make_task(gradient_cache=True)
        fit(tmp_path, task, make_data(tmp_path, given=False, mined_negatives=room))
        found.append(weights(task))
    assert distance(*found) == 0


# Queries of a picture and a text


def test_composed_queries_are_one_and_separate_ones_two_of_the_same_positives():
    torch.manual_seed(1)
    encoder = Encoder(ImageCNN(1, 8, widths=(8,), grid=2), TextBag(20, 6), dim=WIDTH)
    index, mask = torch.arange(6), torch.ones(6, 3, dtype=torch.bool)
    batch = {
        "index": index, "query_image": torch.rand(6, 1, 8, 8), "positive_image": torch.rand(6, 1, 8, 8),
        "query_text": torch.randint(1, 20, (6, 3)), "query_text_mask": mask,
    }  # fmt: skip
    image = {"image": batch["query_image"]}
    text = {"text": batch["query_text"], "text_mask": mask}
    positives = encoder({"image": batch["positive_image"]})
    loss = InfoNCE()
    alone = [loss(encoder(part), positives) for part in (image, text)]
    composed = loss(encoder(image | text), positives)
    found = {how: RetrievalTask(encoder, queries=how).training_step(batch, 0) for how in ("together", "separate")}
    torch.testing.assert_close(found["separate"], sum(alone) / 2)
    torch.testing.assert_close(found["together"], composed)
    assert abs((composed - sum(alone) / 2).item()) > 1e-4


# From end to end


@pytest.mark.parametrize("loss", ["late_interaction", "matryoshka"])
def test_it_learns_to_find_what_it_has_trained_on(loss, tmp_path):
    pooling = "none" if loss == "late_interaction" else "mean"
    task = make_task(LOSSES[loss](), pooling, gradient_cache=True, optimizer=partial(torch.optim.AdamW, lr=0.01))
    data = make_data(tmp_path, given=False, val_path=str(tmp_path / "pairs.jsonl"), test_fraction=0.0)
    before = toy_trainer(tmp_path, kind=Trainer).validate(task, datamodule=data, verbose=False)[0]
    fit(tmp_path, task, data, max_epochs=30, limit_train_batches=None, precision="32-true")
    after = toy_trainer(tmp_path, kind=Trainer).validate(task, datamodule=data, verbose=False)[0]
    assert after["val/mrr"] > before["val/mrr"] + 0.1
    assert after["val/loss"] < before["val/loss"]


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_predictions_are_the_embeddings_in_the_order_of_the_rows(format, tmp_path):
    task, data = make_task(), make_data(tmp_path, 7)
    trainer = toy_trainer(tmp_path, [SavePredictions(format)], kind=Trainer)
    trainer.predict(task, datamodule=data, return_predictions=False)
    folder = tmp_path / "predictions"
    if format == "npy":
        found = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("index", "embedding", "query")}
    else:
        found = load_file(folder / "predictions.safetensors")
    assert found["index"].tolist() == list(range(72))
    tokens, mask = data.sets.rows.query.texts.take(torch.arange(72))
    expected = task.eval()({"text": tokens, "text_mask": mask})
    torch.testing.assert_close(found["query"], expected)
    torch.testing.assert_close(found["embedding"].norm(dim=1), torch.ones(72))


def test_the_command_line_shows_a_querys_neighbours_and_writes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [
        "task=retrieval", *SMALL["retrieval"](tmp_path), "trainer=cpu", "callbacks.progress_bar=null", "out_dir=run",
    ]  # fmt: skip
    main([*options, "trainer.max_epochs=1"])
    capsys.readouterr()
    main([*options, "stage=predict", "query=ab ce 7", "k=3"])
    found = json.loads((tmp_path / "run" / "predictions" / "neighbours.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    neighbours = found[0]["neighbours"]
    assert [neighbour["rank"] for neighbour in neighbours] == [1, 2, 3]
    assert [neighbour["text"] for neighbour in neighbours] == [rows[n["row"]]["positive"] for n in neighbours]
    screen = capsys.readouterr().out
    assert all(f"row {neighbour['row']}: {neighbour['text']}" in screen for neighbour in neighbours)
    corpus = np.load(tmp_path / "run" / "predictions" / "1" / "embedding.npy")
    query = np.load(tmp_path / "run" / "predictions" / "0" / "embedding.npy")[0]
    assert np.argsort(-corpus @ query, kind="stable")[:3].tolist() == [neighbour["row"] for neighbour in neighbours]


@pytest.mark.parametrize("given", [False, True])
def test_in_pieces_it_trains_as_whole(given, tmp_path):
    """FSDP2 in two processes with other numbers of negatives, and of rows in validation, beside one process."""

    def run(folder, batch_size, **options):
        warnings.simplefilter("ignore")
        task, data = (
            make_task(gradient_cache=True, gradient_cache_chunk_size=3),
            make_data(tmp_path, batch_size, given=given),
        )
        trainer = fit(folder, task, data, precision="32-true", limit_val_batches=None, **options)
        state = trainer.strategy.lightning_module_state_dict()
        found = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in state.items()}
        return {name: tensor.tolist() for name, tensor in found.items()}

    make_data(tmp_path, given=given)
    outcomes = two_processes(lambda rank: run(tmp_path / "two", 6, devices=2, strategy=FSDP2()), tmp_path)
    assert all("error" not in outcome for outcome in outcomes), outcomes
    for name, weight in run(tmp_path / "one", 12).items():
        torch.testing.assert_close(torch.tensor(outcomes[0]["result"][name]), torch.tensor(weight), rtol=0, atol=1e-5)
