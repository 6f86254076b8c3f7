"""The gradient cache gives the gradient of the whole batch, whatever is in the encoder and around it."""

import copy
from collections import Counter, OrderedDict, UserDict, namedtuple
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.support import toy_trainer, two_processes
from trainerkit.callbacks import EMA, GradientAccumulation
from trainerkit.fsdp import shard
from trainerkit.functional.contrastive import info_nce
from trainerkit.tasks.retrieval import losses
from trainerkit.tasks.retrieval.gather import gather
from trainerkit.tasks.retrieval.gradient_cache import GradientCache

ROWS, CHUNK, WIDTH = 14, 4, 6  # the last chunk has 2 rows


def triplet(queries, positives):
    distances = torch.cdist(queries, positives)
    own = distances.diagonal()[:, None]
    return F.relu(own - distances + 0.5).sum() / len(queries)


def between_the_rows(queries, positives):
    """Every row with every other, of its own side and of the other one."""
    both = torch.cat([queries, positives]).sin()
    return (both @ both.T).square().mean() + (queries - positives).pow(4).sum()


def of_module(loss, **options):
    """A loss of `tasks.retrieval.losses`, with explicit negatives unless it gets scores."""

    def value(queries, positives):
        given = {name: option[: len(queries)] for name, option in options.items()}
        if "scores" not in given:
            given |= {"negatives": (positives + queries.flip(0)).cos(), "owners": torch.arange(len(queries)).flip(0)}
        return loss(queries, positives, **given)

    return value


def of_sequences(queries, positives):
    """MaxSim of two and three vectors, the last of which is padding in every second row."""
    padding = (torch.arange(len(positives)) % 2)[:, None]
    sequences = (
        torch.stack([queries, queries.sin()], 1),
        torch.stack([positives, positives.cos(), padding * positives], 1),
    )
    return losses.LateInteraction(symmetric=True)(*sequences)


LABELS, SCORES = torch.arange(100) // 3, torch.arange(100) % 5 / 4
# (queries, positives), (B, D) each -> scalar
LOSSES = {
    "InfoNCE": of_module(losses.InfoNCE(), labels=LABELS),
    "InfoNCE, chosen": of_module(losses.InfoNCE(symmetric=True, hard_negatives=3, false_negative_margin=0.1)),
    "LateInteraction": of_sequences,
    "Matryoshka": of_module(losses.Matryoshka(losses.InfoNCE(), dims=[5, 2], weights=[1.0, 0.3]), labels=LABELS),
    "SigLIP": of_module(losses.SigLIP(), labels=LABELS),
    "SupCon": of_module(losses.SupCon(), labels=LABELS),
    "Triplet": of_module(losses.Triplet(), labels=LABELS),
    "CoSENT": of_module(losses.CoSENT(), scores=SCORES),
    "info_nce": info_nce,
    "info_nce_both_ways": partial(info_nce, symmetric=True, temperature=0.1),
    "triplet": triplet,
    "between_the_rows": between_the_rows,
}


class Encoder(nn.Module):
    """Attention between the parts of a row, dropout, a norm, and what is drawn anew in each forward pass."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.inner = nn.Linear(3, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(WIDTH, 5)

    def forward(self, x):
        hidden = self.inner(x)
        hidden = self.norm(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])
        return self.outer(self.dropout(hidden.mean(1)).tanh())


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[0, 8], ids=["every_chunk_twice", "last_chunk_once"])
def batch(request, monkeypatch):
    """Two sides of a batch; the encoder goes over the last chunk once in batches of few chunks."""
    monkeypatch.setattr("trainerkit.tasks.retrieval.gradient_cache._FEW", request.param)
    return torch.randn(ROWS, 4, 3), torch.randn(ROWS, 4, 3)


def in_chunks(encoder, inputs):
    """The same chunks with all of their activations."""
    return torch.cat([encoder(chunk) for chunk in inputs.split(CHUNK)])


def whole(encoder, inputs):
    return encoder(inputs)


cached = GradientCache(CHUNK)


def gradients(encode, loss, batch, *towers):
    """The loss, each parameter's gradient, and a random number afterwards; the second tower defaults to the first."""
    for tower in towers:
        tower.zero_grad()
    seed_everything(3, verbose=False)
    value = loss(encode(towers[0], batch[0]), encode(towers[-1], batch[1]))
    value.backward()
    found = [parameter.grad for tower in dict.fromkeys(towers) for parameter in tower.parameters()]
    return [value.detach(), *found, torch.rand(())]


def assert_same(ours, theirs, tolerance=1e-12):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("towers", ["shared", "separate"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_with_dropout_it_is_the_gradient_of_the_whole_batch(loss, towers, batch):
    """The masks of the first pass are those of the second, and what is drawn next is what one pass leaves."""
    towers = [Encoder()] if towers == "shared" else [Encoder(), Encoder()]
    assert_same(gradients(cached, loss, batch, *towers), gradients(in_chunks, loss, batch, *towers))


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 7, 13, 14, 100])
def test_it_does_not_depend_on_the_chunks(chunk_size, batch):
    encoder = Encoder(dropout=0)
    assert_same(
        gradients(GradientCache(chunk_size), info_nce, batch, encoder), gradients(whole, info_nce, batch, encoder)
    )


def test_a_permutation_of_the_rows_changes_nothing(batch):
    encoder, order = Encoder(dropout=0), torch.randperm(ROWS)
    permuted = [part[order] for part in batch]
    assert_same(gradients(cached, info_nce, permuted, encoder), gradients(cached, info_nce, batch, encoder))


def test_the_gradient_is_that_of_finite_differences(batch):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Tanh())
    weight = encoder[1].weight

    def loss(value):
        with torch.no_grad():
            weight.copy_(value)
        return info_nce(cached(encoder, batch[0]), cached(encoder, batch[1]), temperature=0.5)

    start, step = weight.detach().clone(), 1e-6
    loss(start).backward()
    for place in [(0, 0), (1, 7), (2, 11)]:
        moved = torch.zeros_like(start)
        moved[place] = step
        expected = (loss(start + moved) - loss(start - moved)) / (2 * step)
        assert weight.grad[place].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


def test_drawing_between_forward_and_backward_and_python_and_numpy_random_numbers_are_no_trouble(batch):
    import random

    import numpy as np

    class Draws(nn.Linear):
        def forward(self, x):
            return super().forward(x[:, 0]) * random.random() + np.random.rand()

    encoder, seen = Draws(3, 5), []
    for encode in (cached, in_chunks):
        encoder.zero_grad()
        seed_everything(1, verbose=False)
        value = triplet(encode(encoder, batch[0]), encode(encoder, batch[1]))
        torch.rand(5), random.random(), np.random.rand()
        value.backward()
        seen.append([value.detach(), encoder.weight.grad, torch.tensor([random.random(), np.random.rand()])])
    assert_same(*seen)


class Calls(nn.Module):
    """Counts forward passes, and in how many of them a graph was built."""

    def __init__(self, network):
        super().__init__()
        self.network, self.rows, self.graphs = network, [], 0

    def forward(self, x):
        self.rows.append(len(x))
        self.graphs += torch.is_grad_enabled()
        return self.network(x)


@pytest.mark.parametrize(("rows", "again"), [(32, 7), (33, 9)])
def test_each_chunk_is_encoded_once_without_and_once_with_a_graph_but_the_last_of_eight_at_most(rows, again):
    encoder = Calls(Encoder())
    found = cached(encoder, torch.randn(rows, 4, 3))
    chunks = [min(4, rows - start) for start in range(0, rows, 4)]
    assert (encoder.rows, encoder.graphs) == (chunks, len(chunks) - again)
    found.sum().backward()
    assert (encoder.rows, encoder.graphs) == (chunks + chunks[:again], len(chunks))


@pytest.mark.parametrize("how", ["frozen", "no_grad", "inference_mode", "eval_no_grad"])
def test_without_gradients_there_is_one_pass_and_no_graph(how, batch):
    encoder = Calls(Encoder(dropout=0))
    contexts = {"frozen": torch.enable_grad, "inference_mode": torch.inference_mode}
    encoder.requires_grad_(how != "frozen").train(how != "eval_no_grad")
    with contexts.get(how, torch.no_grad)():
        found = cached(encoder, batch[0])
        assert not found.requires_grad
        assert encoder.rows == [4, 4, 4, 2]
        torch.testing.assert_close(found, encoder(batch[0]))


def test_a_frozen_tower_is_encoded_once_beside_a_trained_one(batch):
    towers = Calls(Encoder()), Calls(Encoder().requires_grad_(False))
    assert_same(gradients(cached, info_nce, batch, *towers), gradients(in_chunks, info_nce, batch, *towers))
    assert [len(tower.rows) for tower in towers] in ([8 + 4, 4 + 4], [7 + 4, 4 + 4])


def test_a_batch_of_one_chunk_is_encoded_with_its_graph(batch):
    encoder = Calls(Encoder())
    GradientCache(ROWS)(encoder, batch[0]).sum().backward()
    assert (encoder.rows, encoder.graphs) == ([ROWS], 1)


def test_frozen_and_unreached_parameters_keep_no_gradient(batch):
    encoder = Encoder()
    encoder.inner.requires_grad_(False)
    encoder.extra = nn.Linear(2, 2)
    found = gradients(cached, info_nce, batch, encoder)
    assert_same(found, gradients(in_chunks, info_nce, batch, encoder))
    assert encoder.inner.weight.grad is encoder.extra.weight.grad is None


def test_a_parameter_that_is_used_outside_as_well_gets_both_gradients(batch):
    encoder = Encoder()

    def loss(queries, positives):
        return triplet(queries, positives) + encoder.outer.weight.square().sum()

    assert_same(gradients(cached, loss, batch, encoder), gradients(in_chunks, loss, batch, encoder))


def test_towers_that_share_a_layer_add_their_gradients(batch):
    towers = Encoder(), Encoder()
    towers[1].outer = towers[0].outer
    assert_same(gradients(cached, triplet, batch, *towers), gradients(in_chunks, triplet, batch, *towers))


def test_hooks_see_each_parameters_whole_gradient_once(batch):
    encoder, calls = Encoder(), Counter()
    gradients(cached, info_nce, batch, encoder)
    plain = [parameter.grad.clone() for parameter in encoder.parameters()]
    for name, parameter in encoder.named_parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.update([name]))
    gradients(cached, info_nce, batch, encoder)
    assert calls == dict.fromkeys(dict(encoder.named_parameters()), 1)
    assert_same([parameter.grad / 2 for parameter in encoder.parameters()], plain)


def test_gradients_of_several_batches_add_up(batch):
    encoder = Encoder()
    for encode in (cached, in_chunks):
        encoder.zero_grad()
        seed_everything(1, verbose=False)
        for factor in (1, 2, 3):
            info_nce(encode(encoder, factor * batch[0]), encode(encoder, batch[1])).backward()
        if encode is cached:
            ours = [parameter.grad.clone() for parameter in encoder.parameters()]
    assert_same(ours, [parameter.grad for parameter in encoder.parameters()])


def test_a_graph_that_is_kept_can_be_gone_back_through_again(batch):
    encoder = Encoder()
    value = cached(encoder, batch[0]).sin().sum()
    value.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in encoder.parameters()]
    value.backward()
    assert_same([parameter.grad / 2 for parameter in encoder.parameters()], once)


def convolutions(norm):
    return nn.Sequential(
        nn.Conv1d(4, WIDTH, 3, padding=1), norm(WIDTH), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(18, 5)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d, partial(nn.BatchNorm1d, momentum=None), partial(nn.InstanceNorm1d, track_running_stats=True)],
)
def test_running_statistics_move_once_a_chunk_and_statistics_are_the_chunks(norm, training, batch):
    encoder = convolutions(norm).train(training)
    start = copy.deepcopy(encoder.state_dict())
    found = []
    for encode in (cached, in_chunks):
        encoder.load_state_dict(start)
        found.append(
            gradients(encode, info_nce, batch, encoder) + [buffer.double().clone() for buffer in encoder.buffers()]
        )
    assert_same(*found)
    assert torch.equal(encoder[1].running_mean, start["1.running_mean"]) != training


def test_a_graph_over_the_same_batch_norm_is_left_intact(batch):
    encoder = convolutions(nn.BatchNorm1d)
    direct = encoder(batch[0])
    cached(encoder, batch[1]).sum().backward()
    direct.sum().backward()


def test_what_a_forward_pass_leaves_for_the_next_is_replayed(batch):
    """Spectral normalization goes on with its power iteration in each forward pass."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(12, 5)))
    start, found = copy.deepcopy(encoder.state_dict()), []
    for encode in (cached, in_chunks):
        encoder.load_state_dict(start)
        found.append(gradients(encode, triplet, batch, encoder) + [buffer.clone() for buffer in encoder.buffers()])
    assert_same(*found)


def test_autocast_is_that_of_the_first_pass(batch):
    torch.set_default_dtype(torch.float32)
    batch, encoder = [part.float() for part in batch], Encoder()

    def encode(how, tower, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            found = how(tower, inputs)
        assert found.dtype == torch.bfloat16
        return found

    ours, theirs = (gradients(partial(encode, how), info_nce, batch, encoder) for how in (cached, in_chunks))
    assert_same(ours, theirs, tolerance=0.02)  # the chunks' sums are rounded to bfloat16 without the cache, not with it
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(cached, info_nce, batch, encoder)
    assert_same(inside, ours, tolerance=0.02)


def test_under_one_autocast_what_is_encoded_beside_the_cache_keeps_its_gradient(batch):
    """Weights that the first pass has cast are kept by autocast, and must not lack a graph in the next use."""
    torch.set_default_dtype(torch.float32)
    encoder = Encoder(dropout=0)
    with torch.autocast("cpu", torch.bfloat16):
        cached(encoder, batch[0].float())
        beside = encoder(batch[1].float()).float().sum()
    beside.backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_gradient_scaler_scales_and_finds_what_overflows(batch):
    torch.set_default_dtype(torch.float32)
    encoder = Encoder(dropout=0)
    batch = [part.float() for part in batch]
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, skipped in ((1.0, False), (torch.inf, True)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = factor * info_nce(cached(encoder, batch[0]), cached(encoder, batch[1]), temperature=1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not skipped:
            ours = [parameter.grad.clone() for parameter in encoder.parameters()]
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        assert (scaler.get_scale() < before) == skipped
    plain = gradients(whole, partial(info_nce, temperature=1.0), batch, encoder)[1:-1]
    assert all(
        (one - other).abs().max() < 0.05 * other.abs().max() + 1e-3 for one, other in zip(ours, plain, strict=True)
    )


def test_the_sum_over_chunks_of_bfloat16_parameters_loses_nothing():
    encoder = nn.Linear(1, 1, bias=False).bfloat16()
    inputs = torch.ones(1000, 1, dtype=torch.bfloat16)
    GradientCache(1)(encoder, inputs).sum().backward()
    assert encoder.weight.grad.dtype == torch.bfloat16
    assert encoder.weight.grad.item() == 1000  # bfloat16 added up one by one stays at 256


class Checkpointed(Encoder):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_activation_checkpointing_inside_the_encoder_changes_nothing(batch):
    torch.manual_seed(0)
    encoder = Checkpointed()
    assert_same(gradients(cached, info_nce, batch, encoder), gradients(in_chunks, info_nce, batch, encoder))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_encoders_have_the_same_gradient(backend, batch):
    encoder = Encoder()
    compiled = torch.compile(encoder, backend=backend)
    theirs = gradients(in_chunks, info_nce, batch, encoder)
    assert_same(gradients(cached, info_nce, batch, compiled), theirs)


class Words(nn.Module):
    """Texts, token ids without an end, a picture and possibly nothing, to several outputs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 5)
        self.picture = nn.Linear(3, 5)

    def forward(self, inputs):
        rows = [[len(text), *ids] for text, ids in zip(inputs["texts"], inputs["more"]["ids"], strict=True)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        vectors = self.table(ids) * (ids > 0)[..., None]
        assert inputs["more"]["none"] is None
        pooled = vectors.sum(1) + self.picture(inputs["image"])
        return {"pooled": pooled, "vectors": (vectors, ids > 0), "nothing": None}


def words(rows=ROWS):
    ids = [[1 + (5 * row + place) % 40 for place in range(1 + row % 6)] for row in range(rows)]
    return {
        "texts": ["x" * (row % 9 + 1) for row in range(rows)],
        "more": {"ids": ids, "none": None},
        "image": torch.randn(rows, 3),
    }


def test_ragged_trees_of_lists_and_tensors_are_cut_along_their_rows():
    """Sequences that are longer in some chunks are filled up with zeros, as the whole batch's encoding is."""
    encoder, inputs, found = Words(), words(), []
    for encode in (cached, whole):
        encoder.zero_grad()
        out = encode(encoder, inputs)
        vectors, mask = out["vectors"]
        (out["pooled"].sin().sum() + (vectors.sum(1) @ out["pooled"].T).sigmoid().sum()).backward()
        found.append([out["pooled"].detach(), vectors.detach(), mask.double(), *(p.grad for p in encoder.parameters())])
        assert out["nothing"] is None
        assert mask.dtype == torch.bool
    assert_same(*found)


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "make",
    [lambda x: (x, x), lambda x: Pair(x, x), lambda x: OrderedDict(x=x, y=x), lambda x: UserDict({"x": x, "y": x})],
)
def test_chunks_are_of_the_containers_kind(make, batch):
    seen = set()

    class Adds(nn.Linear):
        def forward(self, inputs):
            seen.add(type(inputs))
            one, other = inputs if isinstance(inputs, tuple) else inputs.values()
            return super().forward(one[:, 0] + other[:, 1])

    inputs = make(batch[0])
    cached(Adds(3, 2), inputs).sum().backward()
    assert seen == {type(inputs)}


def test_only_the_outputs_that_the_loss_uses_are_gone_back_through():
    encoder, inputs = Words(), words()
    cached(encoder, inputs)["vectors"][0].sum().backward()
    assert encoder.picture.weight.grad is None
    assert encoder.table.weight.grad is not None


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_without_rows_are_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size}: must be 1 or more"):
        GradientCache(chunk_size)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"image": torch.zeros(6, 2), "text": {"ids": ["a"] * 5}},
            r"inputs\['text'\]\['ids'\]: has 5 rows, and inputs\['image'\] has 6",
        ),
        ((torch.zeros(6, 2), torch.zeros(7)), r"inputs\[1\]: has 7 rows, and inputs\[0\] has 6"),
        ({"image": torch.zeros(6), "scale": 0.5}, r"inputs\['scale'\]=0.5: must be a tensor or a list with rows first"),
        (
            {"image": torch.zeros(6), "scale": torch.tensor(0.5)},
            r"inputs\['scale'\]=tensor.*: must be a tensor or a list with rows",
        ),
        ({"none": None}, "inputs: must hold a tensor or a list with rows first"),
        (torch.zeros(6, 2, requires_grad=True), "inputs: requires a gradient; only the encoder's parameters get one"),
    ],
)
def test_inputs_that_cannot_be_cut_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        cached(nn.Identity(), inputs)


@pytest.mark.parametrize(
    ("output", "found"), [(lambda x: x.sum(), r"\(\)"), (lambda x: x[:1], r"\(1, 2\)"), (lambda x: (x, "text"), "str")]
)
def test_an_encoder_whose_output_has_other_rows_is_refused(output, found):
    class Other(nn.Linear):
        def forward(self, x):
            return output(super().forward(x))

    with pytest.raises(ValueError, match=f"encoder: gave {found} for 4 rows; must give tensors with as many rows"):
        cached(Other(3, 2), torch.zeros(9, 3))


@pytest.mark.parametrize("when", ["by the encoder", "afterwards"])
def test_inputs_that_are_written_to_are_an_error(when, batch):
    encoder = Encoder()
    if when == "by the encoder":
        encoder.inner.register_forward_pre_hook(lambda _, inputs: (inputs[0].mul_(2),))
    found = cached(encoder, batch[0])
    if when == "afterwards":
        batch[0].zero_()
    with pytest.raises(RuntimeError, match="inputs: were written to after they were given to the gradient cache"):
        found.sum().backward()


def test_parameters_that_are_written_to_between_the_passes_are_an_error(batch):
    encoder = Encoder()
    found = cached(encoder, batch[0]).square().sum()
    with torch.no_grad():
        encoder.inner.weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameters: were written to between the forward and the backward pass"):
        found.backward()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("rows", [CHUNK, ROWS])
def test_embeddings_with_sparse_gradients_are_refused_by_name_unless_they_are_frozen(kind, rows):
    encoder = nn.Sequential(OrderedDict(tokens=kind(10, 4, sparse=True), outer=nn.Linear(4, 4)))
    ids = torch.randint(10, (rows, 3))
    with pytest.raises(ValueError, match="encoder: tokens has sparse=True"):
        cached(encoder, ids)
    encoder.tokens.requires_grad_(False)
    cached(encoder, ids).sum().backward()
    assert encoder.tokens.weight.grad is None


def test_an_error_in_the_second_pass_leaves_random_state_and_buffers_as_they_were(batch):
    encoder = convolutions(nn.BatchNorm1d)
    found = cached(encoder, batch[0])
    encoder.append(nn.Linear(1, 1))
    before = [torch.get_rng_state(), *(buffer.clone() for buffer in encoder.buffers())]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        found.sum().backward()
    assert all(map(torch.equal, before, [torch.get_rng_state(), *encoder.buffers()]))


class Foreign(LightningModule):
    """A module that knows nothing of trainerkit but the cache."""

    def __init__(self, cache, dropout=0.3, gathers=False):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = Encoder(dropout)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.cache, self.gathers, self.losses = cache, gathers, []

    def training_step(self, batch, batch_idx):
        embeddings = [self.cache(self.encoder, side) for side in batch]
        queries, positives = [gather(side) for side in embeddings] if self.gathers else embeddings
        loss = info_nce(queries / self.temperature, positives, 1.0, normalize=False)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def pairs(batch_size, rank=0, ranks=1):
    sides = torch.randn(2, 56, 4, 3, generator=torch.Generator().manual_seed(2))
    chosen = sides.view(2, -1, ranks, batch_size, 4, 3)[:, :, rank].flatten(1, 2)
    return DataLoader(list(zip(*chosen, strict=True)), batch_size=batch_size)


def fit(folder, cache, batch_size=ROWS, dropout=0.3, gathers=False, **options):
    torch.set_num_threads(1)
    seed_everything(5, verbose=False)
    options = {"precision": "64-true", "max_epochs": 2, "gradient_clip_val": 0.1} | options
    trainer = toy_trainer(folder, use_distributed_sampler=False, **options)
    module = Foreign(cache, dropout, gathers)
    trainer.fit(module, pairs(batch_size, trainer.global_rank, trainer.world_size))
    weights = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    return {"losses": module.losses, "weights": weights}


def assert_same_run(ours, theirs, tolerance=1e-10):
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(torch.tensor(ours["weights"][name]), torch.tensor(weight), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {},
        lambda: {"accumulate_grad_batches": 2},
        lambda: {"callbacks": [GradientAccumulation(steps=2), EMA(decay=0.5)]},
    ],
    ids=["clipping", "accumulation", "callbacks"],
)
def test_a_foreign_module_trains_as_without_it(options, tmp_path):
    ours, theirs = (fit(tmp_path, encode, **options()) for encode in (cached, in_chunks))
    assert_same_run(ours, theirs)
    assert ours["losses"][-1] < ours["losses"][0]


def test_mixed_precision_of_the_trainer_is_near(tmp_path):
    torch.set_default_dtype(torch.float32)
    ours, theirs = (fit(tmp_path, encode, precision="bf16-mixed") for encode in (cached, in_chunks))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.02)
    assert ours["losses"][-1] < ours["losses"][0]


class Reductions(Callback):
    """Counts how often a parameter of so many numbers is reduced over the processes."""

    def __init__(self):
        self.counts = Counter()

    def on_train_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, self.reduce)

    def reduce(self, _, bucket):
        self.counts.update(parameter.numel() for parameter in bucket.parameters())
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])


def test_two_processes_equal_one_with_all_rows(tmp_path):
    """Losses and weights over two epochs, and one reduction a step of each parameter."""

    def work(rank):
        reductions = Reductions()
        result = fit(tmp_path, cached, 7, 0.0, True, devices=2, strategy="ddp", callbacks=[reductions])
        return result | {"reductions": sorted(reductions.counts.items())}

    outcomes = two_processes(work, tmp_path)
    assert "error" not in outcomes[0], outcomes[0]
    assert outcomes[0] == outcomes[1]
    result = outcomes[0]["result"]
    single = fit(tmp_path, whole, ROWS, 0.0)
    assert_same_run(result, single, tolerance=1e-12)
    sizes = Counter(parameter.numel() for parameter in Foreign(cached).parameters())
    assert result["reductions"] == sorted([size, 8 * count] for size, count in sizes.items())


def in_a_group(work, folder):
    """`work(rank)` in two processes that know each other."""

    def run(rank):
        dist.init_process_group("gloo", rank=rank, world_size=2)
        torch.set_num_threads(1)
        return work(rank)

    return [outcome.get("result", outcome) for outcome in two_processes(run, folder)]


def test_rows_are_gathered_in_the_order_of_ranks_and_filled_up_with_zeros(tmp_path):
    sizes = (2, 3), (4, 1)

    def work(rank):
        rows, length = sizes[rank]
        embeddings = (1 + torch.arange(rows * length * 2.0).view(rows, length, 2) + 100 * rank).requires_grad_()
        found = gather(embeddings)
        weights = torch.arange(found.numel()).view(found.shape).double()
        (found * weights).sum().backward()
        others = [gather(torch.full((rows,), rank, dtype=kind)) for kind in (torch.int64, torch.bool, torch.float32)]
        with torch.no_grad():
            assert not gather(embeddings).requires_grad
        kinds = [str(other.dtype) for other in others]
        return [found.tolist(), embeddings.grad.tolist(), [other.tolist() for other in others], kinds]

    expected = torch.zeros(6, 3, 2)
    expected[:2] = 1 + torch.arange(12.0).view(2, 3, 2)
    expected[2:, :1] = 101 + torch.arange(8.0).view(4, 1, 2)
    weights = torch.arange(36.0).view(6, 3, 2)
    for rank, (found, gradient, others, kinds) in enumerate(in_a_group(work, tmp_path)):
        assert found == expected.tolist()
        own = (slice(0, 2), slice(0, 3)) if rank == 0 else (slice(2, 6), slice(0, 1))
        assert gradient == (2 * weights[own]).tolist()  # times the number of processes, which DDP divides by
        assert others == [[0, 0, 1, 1, 1, 1]] * 3
        assert kinds == ["torch.int64", "torch.bool", "torch.float32"]


def test_without_other_processes_gathering_is_nothing():
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather(rows) is rows


def test_an_encoder_in_ddp_is_refused(tmp_path):
    def work(rank):
        with pytest.raises(ValueError, match="encoder: is wrapped in DistributedDataParallel; wrap the module that"):
            cached(DistributedDataParallel(Encoder()), torch.zeros(9, 4, 3))
        return "refused"

    assert in_a_group(work, tmp_path) == ["refused", "refused"]


def test_parameters_in_pieces_get_the_gradient_of_all_rows(tmp_path):
    """FSDP2; the chunks are checkpointed there."""

    def step(encode, rank=0, ranks=1, mesh=None):
        torch.manual_seed(1)
        encoder = Encoder(dropout=0)
        if mesh is not None:
            shard(encoder, mesh)
        sides = torch.randn(2, ROWS, 4, 3, generator=torch.Generator().manual_seed(2))
        rows = ROWS // ranks
        embeddings = [gather(encode(encoder, side[rank * rows : (rank + 1) * rows])) for side in sides]
        info_nce(*embeddings).backward()
        return [p.grad.full_tensor() if mesh is not None else p.grad for p in encoder.parameters()]

    def work(rank):
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        return [gradient.tolist() for gradient in step(cached, rank, 2, mesh)]

    theirs = step(whole)
    for ours in in_a_group(work, tmp_path):
        assert isinstance(ours, list), ours
        assert_same([torch.tensor(gradient) for gradient in ours], theirs, tolerance=1e-6)  # reduced in float32


@pytest.mark.parametrize("small", [0, 20, 10**9])
def test_gradients_of_large_and_of_small_parameters_are_added_alike(small, batch, monkeypatch):
    """One by one as they arrive, or those of a chunk together; 20 numbers have both kinds."""
    monkeypatch.setattr("trainerkit.tasks.retrieval.gradient_cache._SMALL", small)
    encoder = Encoder()
    assert len({parameter.numel() <= 20 for parameter in encoder.parameters()}) == 2
    assert_same(gradients(cached, info_nce, batch, encoder), gradients(in_chunks, info_nce, batch, encoder))


def test_a_graph_within_the_kept_chunk_sees_buffers_as_it_left_them(batch):
    """The encoder multiplies by a buffer that it counts up: the backward pass needs the last chunk's count."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 5)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return self.layer(x.flatten(1)).sin() * self.count

    encoder, found = Counting(), []
    for encode in (cached, in_chunks):
        encoder.count.zero_()
        found.append([*gradients(encode, triplet, batch, encoder), encoder.count.clone()])
    assert_same(*found)
