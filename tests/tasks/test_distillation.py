"""Distillation against naive float64, and the teacher: frozen, apart from its student, its cache always right."""

import copy
import multiprocessing
import os
import pickle
import signal
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from tests.support import toy_trainer
from trainerkit.errors import UserError
from trainerkit.tasks.retrieval.distillation import Distillation, embedding_mse, similarity_kl
from trainerkit.tasks.retrieval.embedding_cache import EmbeddingCache, fingerprint
from trainerkit.tasks.retrieval.losses import InfoNCE
from trainerkit.tasks.retrieval.similarity import normalized, similarity
from trainerkit.tasks.retrieval.task import RetrievalTask
from trainerkit.tasks.retrieval.teacher import Teacher

N, D = 5, 4


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_kl(student, teacher, temperature):
    total = 0
    for ours, theirs in zip(student, teacher, strict=True):
        p = (theirs / temperature).exp() / (theirs / temperature).exp().sum()
        q = (ours / temperature).exp() / (ours / temperature).exp().sum()
        for a, b in zip(p, q, strict=True):
            total = total + a * (a / b).log()
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_and_its_gradient_are_those_of_the_naive_sum(temperature):
    student, teacher = randn(N, 7).requires_grad_(), randn(N, 7, seed=1).requires_grad_()
    loss, expected = similarity_kl(student, teacher, temperature), naive_kl(student, teacher.detach(), temperature)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, expected)))
    assert torch.autograd.grad(similarity_kl(student, teacher), teacher, allow_unused=True) == (None,)


def test_kl_is_zero_for_the_teachers_rows_whatever_is_added_to_one_and_whatever_their_order():
    student, teacher, order = randn(N, 7), randn(N, 7, seed=1), torch.randperm(N)
    assert float(similarity_kl(teacher + randn(N, 1, seed=2), teacher)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(similarity_kl(student[order], teacher[order]), similarity_kl(student, teacher))
    assert similarity_kl(student[:0], teacher[:0]) == 0
    half = similarity_kl(student.half(), teacher.half())
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(similarity_kl(student, teacher)), rel=1e-2)


def test_at_a_high_temperature_kl_has_the_gradient_of_half_the_squared_difference():
    """Hinton 2015, section 2.1: (z_student − z_teacher)/M for rows with mean 0, which is why T² stands in front."""
    student, teacher = randn(N, 7), randn(N, 7, seed=1)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    (found,) = torch.autograd.grad(similarity_kl(student, teacher, 1e4), student)
    torch.testing.assert_close(found, ((student - teacher) / 7 / N).detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(N, D), (N, 3, D)])
def test_mse_is_two_minus_two_cosines(shape):
    student, teacher = randn(*shape).requires_grad_(), randn(*shape, seed=1)
    rows = zip(student.reshape(-1, D), teacher.reshape(-1, D), strict=True)
    cosines = [a @ b / (a.norm() * b.norm()) for a, b in rows]
    loss, expected = embedding_mse(3 * student, teacher), 2 - 2 * sum(cosines) / len(cosines)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, expected)))
    assert float(embedding_mse(2 * teacher, teacher)) == pytest.approx(0, abs=1e-12)


def test_padding_of_late_interaction_counts_for_nothing_in_mse():
    student, teacher = randn(N, 3, D), randn(N, 3, D, seed=1)
    padded = [nn.functional.pad(tensor, (0, 0, 0, 4)) for tensor in (student, teacher)]
    torch.testing.assert_close(embedding_mse(*padded), embedding_mse(student, teacher))
    teacher[0, 1:] = 0
    there = teacher.any(-1)
    torch.testing.assert_close(embedding_mse(student, teacher), embedding_mse(student[there], teacher[there]))
    assert embedding_mse(student, 0 * teacher) == 0


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_two_losses_are_weighted(kind, weight):
    student, teacher = [randn(N, D, seed=i).requires_grad_() for i in (0, 1)], [randn(N, D, seed=i) for i in (2, 3)]
    task = InfoNCE()(*student)
    if kind == "kl":
        extra = naive_kl(10 * similarity(*student), 10 * similarity(*teacher), 2.0)
    else:
        extra = (embedding_mse(student[0], teacher[0]) + embedding_mse(student[1], teacher[1])) / 2
    found = Distillation(weight, 2.0, kind, scale=10.0)(task, *student, *teacher)
    torch.testing.assert_close(found, (1 - weight) * task + weight * extra)


def test_a_student_alone_with_its_teacher_learns_its_table():
    torch.manual_seed(0)
    teacher = [normalized(randn(12, 8, seed=i, dtype=torch.float32)) for i in (2, 3)]
    student = [nn.Parameter(randn(12, 6, seed=i, dtype=torch.float32)) for i in (0, 1)]
    optimizer, distillation = torch.optim.Adam(student, lr=0.05), Distillation(weight=1.0)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(distillation(torch.zeros(()), *student, *teacher))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 10


class Encoder(nn.Module):
    """Pixels and a mean of tokens, with what differs between training and evaluation."""

    def __init__(self, width=D, pooling="mean"):
        super().__init__()
        self.embedding_dim = width
        self.pooling = pooling
        self.pixels = nn.Linear(12, width)
        self.tokens = nn.Embedding(20, width, padding_idx=0)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def forward(self, inputs):
        self.calls.append(
            {name: tensor.dtype for name, tensor in inputs.items()} | {"rows": len(next(iter(inputs.values())))}
        )
        found = self.pixels(inputs["image"].flatten(1)) if "image" in inputs else 0
        if "text" in inputs:
            there = inputs["text_mask"][..., None]
            found = found + (self.tokens(inputs["text"]) * there).sum(1) / there.sum(1).clamp(min=1)
        return self.dropout(self.norm(found))


def inputs(rows=6, seed=0, length=5):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    text = torch.randint(1, 20, (rows, length), generator=generator) * mask
    return {"image": torch.rand(rows, 3, 2, 2, generator=generator), "text": text, "text_mask": mask}


def make_teacher(*arguments, seed=0, kind=Encoder, **options):
    torch.manual_seed(seed)
    return Teacher(kind(), *arguments, **options)


def tower(teacher):
    return teacher._towers["encoder"]


class AsLongAsTheLongest(Encoder):
    """A vector for each token of the longest text among those it sees at a time."""

    def forward(self, inputs):
        return inputs["text"][:, : int((inputs["text"] > 0).sum(1).max()), None].float()


class Student(LightningModule):
    def __init__(self, teacher):
        super().__init__()
        self.encoder = Encoder()
        self.teacher = teacher
        self.distillation = Distillation()

    def training_step(self, batch, batch_idx):
        ours = [self.encoder({"image": batch[side]}) for side in ("query", "positive")]
        theirs = [self.teacher.embed({"image": batch[s]}, s, batch["index"]) for s in ("query", "positive")]
        return self.distillation(InfoNCE()(*ours), *ours, *theirs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_run_the_teacher_is_apart_from_its_student_and_stays_as_it_was(tmp_path):
    teacher = make_teacher(cache_dir=tmp_path / "cache")
    before = {name: tensor.clone() for name, tensor in tower(teacher).state_dict().items()}
    student = Student(teacher)
    own = {name for name, _ in student.named_parameters()}
    assert all(name.startswith("encoder.") for name in own)
    student.train()
    assert not any(module.training for module in tower(teacher).modules())
    pictures = torch.rand(8, 3, 2, 2)
    rows = [{"index": i, "query": p, "positive": p.flip(0)} for i, p in enumerate(pictures)]
    trainer = toy_trainer(tmp_path, max_epochs=3)
    trainer.fit(student, DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(student.encoder.state_dict(prefix="encoder."))
    assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == len(own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower(teacher).state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in tower(teacher).parameters())
    assert sum(call["rows"] for call in tower(teacher).calls) == 16  # of three epochs the first


def test_it_gives_embeddings_of_length_one_without_a_graph_in_its_own_precision():
    teacher = make_teacher()
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher.embed(inputs())
    assert not found.requires_grad
    torch.testing.assert_close(found, normalized(tower(teacher)(inputs())))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6))
    half = make_teacher(dtype="bfloat16")
    rounded = half.embed(inputs())
    assert tower(half).calls[-1]["image"] == torch.bfloat16
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, found, rtol=0, atol=0.05)


def test_chunks_change_nothing_but_how_many_rows_the_teacher_sees(tmp_path):
    expected = make_teacher().embed(inputs(7))
    chunked = make_teacher(chunk_size=3)
    torch.testing.assert_close(chunked.embed(inputs(7)), expected)
    assert [call["rows"] for call in tower(chunked).calls] == [3, 3, 1]
    assert chunked.digest() == make_teacher().digest()
    cached = make_teacher(chunk_size=4, cache_dir=tmp_path)
    torch.testing.assert_close(cached.embed(inputs(7), "query", torch.arange(7)), expected, rtol=0, atol=1e-3)
    assert [call["rows"] for call in tower(cached).calls] == [4, 3]
    sequences = make_teacher(kind=AsLongAsTheLongest, chunk_size=3)
    batch = {"text": torch.tensor([[1, 2, 0], [1, 0, 0], [2, 0, 0], [3, 4, 5]])}
    found = sequences.embed(batch)
    assert found.shape == (4, 3, 1)
    assert not found[0, 2].any()
    assert chunked.embed({"image": torch.rand(0, 3, 2, 2)}).shape == (0, D)


@pytest.mark.parametrize(("own", "gradient_cache", "expected"), [(None, True, 5), (3, True, 3), (None, False, None)])
def test_a_task_with_a_gradient_cache_gives_its_chunk_size_to_a_teacher_without_one(own, gradient_cache, expected):
    teacher = make_teacher(chunk_size=own)
    RetrievalTask(Encoder(), teacher=teacher, gradient_cache=gradient_cache, gradient_cache_chunk_size=5)
    assert teacher.chunk_size == expected


def test_of_two_towers_each_has_its_side_and_weights_are_those_of_a_run(tmp_path):
    torch.manual_seed(3)
    two = {"encoder": Encoder(), "candidate_encoder": Encoder()}
    state = {f"{name}.{key}": tensor for name, part in two.items() for key, tensor in part.state_dict().items()}
    save_file(state | {"loss.log_scale": torch.ones(1)}, tmp_path / "run.safetensors")
    teacher = Teacher(Encoder(), Encoder(), weights=tmp_path / "run.safetensors")
    for side, part in (("query", two["encoder"]), ("positive", two["candidate_encoder"])):
        torch.testing.assert_close(teacher.embed(inputs(), side), normalized(part.eval()(inputs())))
    save_file(two["encoder"].state_dict(), tmp_path / "alone.safetensors")
    shared = Teacher(Encoder(), weights=tmp_path / "alone.safetensors")
    torch.testing.assert_close(shared.embed(inputs(), "positive"), teacher.embed(inputs(), "query"))
    with pytest.raises(UserError, match="weights=.*does not fit this network"):
        Teacher(Encoder(width=3), weights=tmp_path / "alone.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_cache_gives_to_the_bit_what_it_gave_first_for_any_choice_of_rows(dtype, tmp_path):
    make = partial(make_teacher, cache_dir=tmp_path, cache_dtype=dtype)
    first, batch, rows = make(), inputs(), torch.tensor([7, 0, 900, 3, 4, 12])
    found = first.embed(batch, "query", rows)
    torch.testing.assert_close(found, make_teacher().embed(batch), rtol=0, atol=1e-3 if dtype == "float16" else 1e-6)
    again, order = make(), torch.tensor([4, 0, 2])
    some = {name: tensor[order] for name, tensor in batch.items()}
    assert torch.equal(again.embed(some, "query", rows[order]), found[order])
    assert torch.equal(copy.deepcopy(first).embed(batch, "query", rows), found)
    assert torch.equal(pickle.loads(pickle.dumps(first)).embed(batch, "query", rows), found)
    assert tower(again).calls == []
    # Half known, half new: only the new ones are embedded, and all stand in their places.
    mixed = {
        name: torch.cat([tensor[2:4], more[:2]])
        for (name, tensor), more in zip(batch.items(), inputs(seed=1).values(), strict=True)
    }
    values = again.embed(mixed, "query", torch.tensor([900, 3, 50, 51]))
    assert torch.equal(values[:2], found[2:4])
    assert [call["rows"] for call in tower(again).calls] == [2]
    torch.testing.assert_close(values[2:], make_teacher().embed(inputs(seed=1))[:2], rtol=0, atol=1e-3)
    again.embed(batch, "positive", rows)  # the other side is another place
    assert [call["rows"] for call in tower(again).calls] == [2, 6]


def test_a_row_whose_input_changed_is_embedded_anew_and_other_padding_is_no_change(tmp_path):
    teacher, batch, rows = make_teacher(cache_dir=tmp_path), inputs(), torch.arange(6)
    teacher.embed(batch, "query", rows)
    padded = {name: nn.functional.pad(tensor, (0, 3)) if "text" in name else tensor for name, tensor in batch.items()}
    teacher.embed(padded, "query", rows)
    assert len(tower(teacher).calls) == 1
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["image"][2, 0, 0, 0] += 1e-6
    found = teacher.embed(changed, "query", rows)
    assert tower(teacher).calls[-1]["rows"] == 1
    torch.testing.assert_close(found, make_teacher().embed(changed), rtol=0, atol=1e-3)


def test_a_row_that_asks_with_its_picture_and_with_its_text_has_a_record_of_each_and_of_both(tmp_path):
    teacher, batch, rows = make_teacher(cache_dir=tmp_path), inputs(), torch.arange(6)
    views = [batch, {"image": batch["image"]}, {name: part for name, part in batch.items() if name != "image"}]
    first = [teacher.embed(view, "query", rows) for view in views]
    again = [teacher.embed(view, "query", rows) for view in views]
    assert len(tower(teacher).calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], first[2])


def test_another_teacher_and_another_data_set_have_another_cache(tmp_path):
    base = make_teacher()
    others = [
        make_teacher(seed=1), make_teacher(kind=partial(Encoder, pooling="cls")), make_teacher(dtype="bfloat16"),
        Teacher(tower(make_teacher()), Encoder()),
    ]  # fmt: skip
    digests = {teacher.digest() for teacher in [base, *others]} | {base.digest("mine")}
    assert len(digests) == 6
    assert make_teacher().digest() == base.digest()
    for dataset in ("", "mine"):
        make_teacher(cache_dir=tmp_path, dataset=dataset).embed(inputs(), "query", torch.arange(6))
    assert len(list(tmp_path.glob("teacher/*/query-image+text-4.float16"))) == 2


def test_fingerprints_tell_rows_places_and_parts_apart():
    batch = inputs(rows=200)
    found = fingerprint(batch)
    assert len(set(found.tolist())) == 200
    order = torch.randperm(200)
    assert torch.equal(fingerprint({name: tensor[order] for name, tensor in batch.items()}), found[order])
    assert not torch.equal(fingerprint(batch | {"text": batch["text"].flip(1)}), found)
    assert not torch.equal(fingerprint({"image": batch["image"]}), found)
    few = torch.cartesian_prod(*[torch.arange(5)] * 4)  # small numbers, as tokens are
    assert len(set(fingerprint({"text": few}).tolist())) == 625


def write_forever(folder, ready):
    cache, rows = EmbeddingCache(folder), list(range(3000))
    values = np.random.default_rng(0).normal(size=(3000, 64))
    cache.write("query", rows[:50], rows[:50], values[:50])
    ready.set()
    while True:
        cache.write("query", rows, rows, values)


def test_killed_while_it_writes_it_leaves_a_cache_of_which_nothing_wrong_is_read(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=write_forever, args=(tmp_path, ready))
    writer.start()
    assert ready.wait(120)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    path = tmp_path / "query-64.float16"
    with path.open("r+b") as file:  # what a power failure leaves: half a record, a page of zeros
        file.seek(10 * 140 + 30)
        file.write(bytes(60))
        file.truncate(max(20 * 140 + 5, path.stat().st_size - 70))
    values = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float16)
    rows = list(range(3000))
    found, embeddings = EmbeddingCache(tmp_path).read("query", rows, rows)
    assert not found[10]
    assert 19 <= sum(found) < 3000
    assert np.array_equal(embeddings, values[np.array(found)])
    cache = EmbeddingCache(tmp_path)
    cache.write("query", rows, rows, values)
    found, embeddings = cache.read("query", rows, rows)
    assert all(found)
    assert np.array_equal(embeddings, values)


def write_share(folder, rank, wait):
    cache, rows = EmbeddingCache(folder), list(range(rank, 400, 2)) + list(range(50))
    wait.wait(120)
    for row in rows:
        cache.write("query", [row], [row], np.full((1, 8), row))


def test_two_processes_fill_one_cache_each_its_rows_and_some_both(tmp_path):
    context = multiprocessing.get_context("fork")
    wait = context.Barrier(2)
    processes = [context.Process(target=write_share, args=(tmp_path, rank, wait)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found, embeddings = EmbeddingCache(tmp_path).read("query", list(range(400)), list(range(400)))
    assert all(found)
    assert np.array_equal(embeddings, np.repeat(np.arange(400.0)[:, None], 8, 1))


class Sequences(Encoder):
    def forward(self, inputs):
        return super().forward(inputs)[:, None].expand(-1, 3, -1)


def test_what_cannot_be_says_what_is_allowed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir: .* cannot be written"):
        make_teacher(cache_dir=tmp_path / "file")
    assert make_teacher(kind=Sequences).embed(inputs()).shape == (6, 3, D)
    for make, message in (
        (lambda: similarity_kl(torch.ones(2, 3), torch.ones(3, 2)), r"shapes \(2, 3\) and \(3, 2\); must be \(N, M\)"),
        (lambda: similarity_kl(torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature=0.0: must be above 0"),
        (
            lambda: embedding_mse(torch.ones(2, 3), torch.ones(2, 4)),
            r"\(2, 3\) and \(2, 4\); .* projection .* kind='kl'",
        ),
        (lambda: Distillation(1.5), "weight=1.5: must be from 0 to 1"),
        (lambda: Distillation(temperature=-1), "temperature=-1: must be above 0"),
        (lambda: Distillation(kind="ce"), "kind=ce: must be kl or mse"),
        (lambda: Distillation(scale=0), "scale=0: must be above 0"),
        (lambda: make_teacher(dtype="int8"), "dtype=int8: must be float32"),
        (lambda: make_teacher(chunk_size=0), "chunk_size=0: must be 1 or more, or null for all rows at once"),
        (lambda: make_teacher(cache_dtype="int8"), "cache_dtype=int8: must be float16 or float32"),
        (lambda: make_teacher().embed(inputs(), "negatives"), "side=negatives: must be query or positive"),
        (
            lambda: make_teacher(kind=Sequences, cache_dir=tmp_path).embed(inputs(), "query", torch.arange(6)),
            r"cache_dir: keeps embeddings \(B, D\); this teacher's are \(6, 3, 4\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
