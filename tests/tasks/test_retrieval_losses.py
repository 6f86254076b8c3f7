"""Losses of retrieval against naive float64 loops, what must not change them, and what is refused."""

import math

import pytest
import torch

from tests.support import ROOT
from trainerkit.build import build
from trainerkit.compose import compose_config
from trainerkit.errors import UserError
from trainerkit.plugins import AllowList
from trainerkit.signatures import parameters
from trainerkit.tasks.retrieval.losses import CoSENT, InfoNCE, LateInteraction, Matryoshka, SigLIP, SupCon, Triplet
from trainerkit.tasks.retrieval.losses.cosent import cosent, cosent_of_two
from trainerkit.tasks.retrieval.losses.info_nce import hardest

N, M, D = 5, 6, 5
LABELS = torch.tensor([0, 1, 0, 2, 0])
OWNERS = torch.tensor([0, 0, 1, 3, 3, 2])
SCORES = torch.tensor([0.1, 0.9, 0.9, 0.4, 0.0], dtype=torch.float64)


def embeddings(dtype=torch.float64, sequences=False, seed=0):
    """Queries, positives and negatives; sequences have uneven padding, and negatives another length."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(N, 3, D), (N, 2, D), (M, 1, D)] if sequences else [(N, D), (N, D), (M, D)]
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    found[1] = found[1] + found[0][:, : found[1].shape[1]] / 2 if sequences else found[1] + found[0] / 2
    if sequences:
        found[0][::2, 1:] = 0
        found[1][1, 1:] = 0
    return [part.to(dtype).requires_grad_() for part in found]


def alike(a, b):
    """Cosine, or the mean over a's vectors of the largest cosine with one of b's."""
    if a.ndim == 1:
        return a @ b / (a.norm() * b.norm())
    rows = [[alike(x, y) for y in b if y.any()] for x in a if x.any()]
    return sum(max(row) for row in rows) / len(rows)


def table(queries, candidates):
    return [[alike(query, candidate) for candidate in candidates] for query in queries]


def both(one, symmetric, s, same):
    """A loss of rows in one direction, or the mean with that of columns, where explicit negatives are left out."""
    if not symmetric:
        return one(s, same)
    back = [[s[j][i] for j in range(len(s))] for i in range(len(s))]
    return (one(s, same) + one(back, same)) / 2


def mean(values):
    return sum(values) / len(values)


class Naive:
    """The formulas, pair by pair."""

    def __init__(self, queries, positives, negatives=None, owners=None, labels=None, scores=None):
        negatives = [] if negatives is None else list(negatives)
        self.s = table(queries, [*positives, *negatives])
        labels = list(range(len(queries))) if labels is None else labels.tolist()
        self.same = [[a == b for b in labels] for a in labels]
        self.owners = None if owners is None else owners.tolist()
        self.scores = scores
        self.rows = (queries, positives, negatives, labels)

    def info_nce(self, temperature=0.05, symmetric=False, hard=None, margin=None, own_only=False):
        def one(s, same):
            terms = []
            for i, row in enumerate(s):
                always, rest = [], []
                for j, value in enumerate(row):
                    if j < len(s):
                        if not same[i][j]:
                            rest.append(value)
                    elif self.owners is None or self.owners[j - len(s)] == i:
                        always.append(value)
                    elif not own_only:
                        rest.append(value)
                if margin is not None:
                    rest = [value for value in rest if value <= row[i] - margin]
                if hard is not None:
                    rest = sorted(rest, key=torch.Tensor.item, reverse=True)[:hard]
                terms.append(
                    -(row[i] / temperature) + torch.stack([row[i], *always, *rest]).div(temperature).exp().sum().log()
                )
            return mean(terms)

        return both(one, symmetric, self.s, self.same)

    def sup_con(self, temperature=0.1, symmetric=False):
        def one(s, same):
            terms = []
            for i, row in enumerate(s):
                total = sum(torch.exp(value / temperature) for value in row)
                positive = [row[p] for p in range(len(s)) if same[i][p]]
                terms.append(mean([-(torch.exp(value / temperature) / total).log() for value in positive]))
            return mean(terms)

        return both(one, symmetric, self.s, self.same)

    def sup_con_all_views(self, temperature=0.1):
        queries, positives, negatives, labels = self.rows
        views, terms = [*queries, *positives], []
        for i, anchor in enumerate(views):
            others = [j for j in range(len(views)) if j != i]
            values = {j: torch.exp(alike(anchor, views[j]) / temperature) for j in others}
            total = sum(values.values()) + sum(torch.exp(alike(anchor, other) / temperature) for other in negatives)
            positive = [j for j in others if (labels * 2)[j] == (labels * 2)[i]]
            terms.append(mean([-(values[j] / total).log() for j in positive]))
        return mean(terms)

    def triplet(self, margin=0.5, mining="hard", symmetric=False):
        def one(s, same):
            rows = [
                [torch.relu(margin - row[i] + row[j]) for j in range(len(row)) if j >= len(s) or not same[i][j]]
                for i, row in enumerate(s)
            ]
            if mining == "hard":
                return mean([max(row) if row else torch.zeros(()) for row in rows])
            above = [value for row in rows for value in row if value > 0]
            return sum(above) / max(1, len(above))

        return both(one, symmetric, self.s, self.same)

    def cosent(self, scale=20.0):
        number, pairs = len(self.s), []
        if self.scores is not None:
            pairs = [(self.s[i][i], float(self.scores[i])) for i in range(number)]
            lowest = min(0.0, *(score for _, score in pairs))
        for i, row in enumerate(self.s):
            for j, value in enumerate(row):
                if self.scores is None:
                    pairs.append((value, 1.0 if j < number and self.same[i][j] else 0.0))
                elif j >= number and (self.owners is None or self.owners[j - number] == i):
                    pairs.append((value, lowest))
        terms = [torch.exp(scale * (low - high)) for low, a in pairs for high, b in pairs if a < b]
        return torch.log(1 + sum(terms))

    def siglip(self, scale=10.0, bias=-10.0):
        total = 0
        for i, row in enumerate(self.s):
            for j, value in enumerate(row):
                sign = 1 if j < len(self.s) and self.same[i][j] else -1
                total = total - torch.log(torch.sigmoid(sign * (scale * value + bias)))
        return total / len(self.s)


LOSSES = {
    "info_nce": (InfoNCE, lambda naive: naive.info_nce()),
    "info_nce symmetric": (lambda: InfoNCE(0.2, symmetric=True), lambda naive: naive.info_nce(0.2, True)),
    "info_nce hard": (
        lambda: InfoNCE(0.2, symmetric=True, hard_negatives=2), lambda naive: naive.info_nce(0.2, True, hard=2)
    ),
    "info_nce margin": (
        lambda: InfoNCE(0.2, symmetric=True, false_negative_margin=0.1),
        lambda naive: naive.info_nce(0.2, True, margin=0.1),
    ),
    "info_nce own": (
        lambda: InfoNCE(0.2, own_negatives_only=True, hard_negatives=1),
        lambda naive: naive.info_nce(0.2, hard=1, own_only=True),
    ),
    "info_nce own negatives": (lambda: InfoNCE(0.2, own_negatives_only=True), lambda naive: naive.info_nce(0.2, own_only=True)),
    "info_nce learnt": (lambda: InfoNCE(0.2, learnable_temperature=True), lambda naive: naive.info_nce(0.2)),
    "triplet": (Triplet, lambda naive: naive.triplet()),
    "triplet all": (lambda: Triplet(0.3, "all", symmetric=True), lambda naive: naive.triplet(0.3, "all", True)),
    "cosent": (CoSENT, lambda naive: naive.cosent()),
    "siglip": (SigLIP, lambda naive: naive.siglip()),
    "sup_con": (SupCon, lambda naive: naive.sup_con()),
    "sup_con symmetric": (lambda: SupCon(0.3, symmetric=True), lambda naive: naive.sup_con(0.3, True)),
    "sup_con all views": (lambda: SupCon(0.3, all_views=True), lambda naive: naive.sup_con_all_views(0.3)),
}  # fmt: skip
WITHOUT_LABELS = [name for name in LOSSES if not name.startswith("sup_con")]


def labels_for(name):
    return None if name in WITHOUT_LABELS else LABELS


def compare(loss, expected, inputs):
    torch.testing.assert_close(loss, expected.to(loss))
    found, wanted = (
        torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True) for value in (loss, expected)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sequences", [False, True], ids=["vectors", "sequences"])
@pytest.mark.parametrize("negatives", ["none", "of all", "of owners"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_naive_loss(name, labelled, negatives, sequences):
    make, naive = LOSSES[name]
    inputs = embeddings(sequences=sequences)
    inputs = inputs[:2] if negatives == "none" else inputs
    more = {"labels": LABELS if labelled or name not in WITHOUT_LABELS else None}
    more["owners"] = OWNERS if negatives == "of owners" else None
    compare(make().double()(*inputs, **more), naive(Naive(*inputs, **more)), inputs)


@pytest.mark.parametrize("shift", [0, -0.5])
@pytest.mark.parametrize("negatives", ["none", "of all", "of owners"])
def test_cosent_ranks_graded_pairs_as_their_scores(negatives, shift):
    """Equal scores are no order; explicit negatives are below all that is scored above 0."""
    inputs = embeddings() if negatives != "none" else embeddings()[:2]
    more = {"owners": OWNERS if negatives == "of owners" else None, "scores": SCORES + shift}
    compare(CoSENT()(*inputs, **more), Naive(*inputs, **more).cosent(), inputs)


def test_cosent_of_two_scores_is_cosent():
    similarities, high = torch.randn(40, dtype=torch.float64), torch.rand(40) < 0.3
    torch.testing.assert_close(cosent_of_two(similarities, high, ~high), cosent(similarities, high.double()))
    assert cosent_of_two(similarities, high, torch.zeros_like(high)) == 0
    assert cosent(similarities, torch.ones(40)) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_rows_and_of_negatives_changes_nothing(name):
    loss, (queries, positives, negatives) = LOSSES[name][0]().double(), embeddings()
    labels = labels_for(name)
    order, others = torch.randperm(N), torch.randperm(M)
    moved = torch.argsort(order)[OWNERS[others]]  # where each owner stands now
    again = loss(
        queries[order], positives[order], negatives[others],
        owners=moved, labels=None if labels is None else labels[order],
    )  # fmt: skip
    torch.testing.assert_close(again, loss(queries, positives, negatives, owners=OWNERS, labels=labels))


@pytest.mark.parametrize("name", LOSSES)
def test_turning_everything_and_all_lengths_change_nothing(name):
    loss, inputs = LOSSES[name][0]().double(), embeddings()
    turn, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    turned = [part @ turn * (torch.rand(len(part), 1) + 0.1) for part in inputs]
    more = {"owners": OWNERS, "labels": labels_for(name)}
    torch.testing.assert_close(loss(*turned, **more), loss(*inputs, **more))


@pytest.mark.parametrize("name", LOSSES)
def test_more_padding_changes_nothing(name):
    loss, inputs = LOSSES[name][0]().double(), embeddings(sequences=True)
    padded = [torch.nn.functional.pad(part, (0, 0, 0, 3)) for part in inputs]
    torch.testing.assert_close(loss(*padded, labels=labels_for(name)), loss(*inputs, labels=labels_for(name)))


@pytest.mark.parametrize("name", LOSSES)
def test_explicit_negatives_are_added_and_those_of_the_batch_still_pushed_away(name):
    loss, (queries, positives, negatives) = LOSSES[name][0]().double(), embeddings()
    labels = labels_for(name)
    # Right in front of query 0, so that every loss sees it; the batch's own hardest negative stays one.
    near = torch.cat([queries[:1].detach(), negatives[1:]])
    if name == "triplet all":
        return  # a mean over more of them
    assert loss(queries, positives, near, owners=OWNERS, labels=labels) > loss(queries, positives, labels=labels)
    if name == "triplet":
        return  # the hardest alone
    value = loss(queries, positives, negatives, owners=OWNERS, labels=labels)
    of_others = torch.autograd.grad(value, positives, retain_graph=True)[0]
    assert all(row.any() for row in of_others)
    assert torch.autograd.grad(value, queries)[0].any(1).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(name, dtype):
    loss, inputs = LOSSES[name][0](), embeddings(dtype)
    more = {"owners": OWNERS, "labels": labels_for(name)}
    expected = loss(*[part.float() for part in inputs], **more)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*inputs, **more)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert all(gradient.dtype == dtype for gradient in torch.autograd.grad(found, inputs[:2]))


@pytest.mark.parametrize("name", LOSSES)
def test_one_pair_alone_and_none_at_all_have_a_finite_loss_and_gradient(name):
    for number in (1, 0):
        inputs = [part[:number].detach().requires_grad_() for part in embeddings()[:2]]
        labels = None if name in WITHOUT_LABELS else LABELS[:number]
        loss = LOSSES[name][0]().double()(*inputs, labels=labels)
        if number == 0 or not name.startswith("siglip"):
            assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
        gradients = torch.autograd.grad(loss, inputs)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_where_all_are_alike_the_loss_is_its_closed_form(name):
    ones, extra = torch.ones(N, D, dtype=torch.float64), torch.ones(M, D, dtype=torch.float64)
    found = float(LOSSES[name][0]().double()(ones, ones, extra, owners=OWNERS, labels=labels_for(name)).detach())
    all_, own = math.log(N + M), [1 + (i == OWNERS).sum().item() for i in range(N)]
    closed = {
        "info_nce": all_,
        "info_nce symmetric": (all_ + math.log(N)) / 2,
        "info_nce hard": mean([math.log(number + 2) for number in own]) / 2 + math.log(3) / 2,
        "info_nce margin": mean([math.log(number) for number in own]) / 2,
        "info_nce own": mean([math.log(number + 1) for number in own]),
        "info_nce own negatives": mean([math.log(number + N - 1) for number in own]),
        "info_nce learnt": all_,
        "triplet": 0.5,
        "triplet all": 0.3,
        "cosent": math.log(1 + N * (N * (N - 1) + N * M)),
        "siglip": math.log(2) + (N + M - 1) * math.log(2),  # scale and bias cancel out
        "sup_con": all_,
        "sup_con symmetric": (all_ + math.log(N)) / 2,
        "sup_con all views": math.log(2 * N - 1 + M),
    }
    assert found == pytest.approx(closed[name])


def test_rows_of_one_label_are_no_negatives():
    """With one label for all there is nothing left to tell apart."""
    queries, positives, negatives = embeddings()
    one = torch.zeros(N, dtype=torch.int64)
    assert float(InfoNCE()(queries, positives, labels=one).detach()) == pytest.approx(0)
    assert float(Triplet()(queries, positives, labels=one).detach()) == 0
    assert float(CoSENT()(queries, positives, labels=one).detach()) == 0
    assert float(InfoNCE()(queries, positives, negatives, labels=one).detach()) > 0.1


def test_the_hardest_are_as_many_as_asked_also_where_they_are_alike():
    ties = torch.zeros(3, 8)
    pool = torch.ones(3, 8, dtype=torch.bool)
    pool[0, 2:] = False
    assert hardest(ties, pool, 4).sum(1).tolist() == [2, 4, 4]
    assert torch.equal(hardest(ties, pool, 20), pool)


def test_the_margin_leaves_out_exactly_what_is_more_alike_than_the_positive():
    """Query 0 has its positive at cosine 0.6; the others are at 0.8, 0.6 and 0.5."""
    candidates = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.6, -0.8], [0.5, 0.75**0.5]], dtype=torch.float64)
    queries = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    for margin, left in ((0.0, [0.6, 0.6, 0.5]), (0.05, [0.6, 0.5]), (-0.3, [0.6, 0.8, 0.6, 0.5]), (0.2, [0.6])):
        loss = InfoNCE(1.0, false_negative_margin=margin)
        # Ties with the positive are decided by the last bit: a hair more room.
        loss.false_negative_margin -= 1e-9
        table = queries @ candidates.T
        counted = loss._counted(table, ~torch.eye(4, dtype=torch.bool), None)[0]
        assert sorted([0.6, *table[0][counted].tolist()]) == pytest.approx(sorted(left))


def test_the_temperature_is_trained_stays_above_a_hundredth_and_comes_back():
    queries = torch.eye(8, D).requires_grad_()
    loss = InfoNCE(0.05, learnable_temperature=True)
    assert loss.temperature.item() == pytest.approx(0.05)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1000.0)
    loss(queries[:D], queries[:D]).backward()
    optimizer.step()
    loss.log_scale.data.fill_(9.0)
    value = loss(queries[:D], queries[:D])
    assert loss.temperature.item() == pytest.approx(0.01)
    optimizer.zero_grad()
    loss(queries[:D], queries[:D].roll(1, 0)).backward()  # all wrong: it wants to be softer
    assert loss.log_scale.grad.item() > 1
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert list(InfoNCE().parameters()) == []


def test_scale_and_bias_of_siglip_have_the_gradients_of_the_formula():
    loss, inputs = SigLIP().double(), embeddings()
    naive = Naive(*inputs)
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (10.0, -10.0))
    expected = torch.autograd.grad(naive.siglip(scale, bias), (scale, bias))
    found = torch.autograd.grad(loss(*inputs), (loss.log_scale, loss.bias))
    torch.testing.assert_close(found[0][0], 10 * expected[0])  # of the logarithm
    torch.testing.assert_close(found[1][0], expected[1])
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    loss(*inputs).backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, loss.parameters(), strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sequences", [False, True], ids=["vectors", "sequences"])
def test_matryoshka_is_the_weighted_sum_whatever_the_order_of_dims(name, sequences):
    inner, inputs = LOSSES[name][0]().double(), embeddings(sequences=sequences)
    more = {"owners": OWNERS, "labels": labels_for(name)}
    weights = {5: 1.0, 2: 0.25, 3: 4.0}
    expected = sum(weight * inner(*[part[..., :dim] for part in inputs], **more) for dim, weight in weights.items())
    for order in ([5, 2, 3], [2, 3, 5], [3, 5, 2]):
        found = Matryoshka(inner, order, [weights[dim] for dim in order])(*inputs, **more)
        torch.testing.assert_close(found, expected)
    single = Matryoshka(inner, [D])(*inputs, **more)
    compare(single, inner(*inputs, **more), inputs)


def test_matryoshka_of_a_trained_loss_trains_it():
    loss = Matryoshka(InfoNCE(learnable_temperature=True), [2, 5])
    loss(*embeddings(torch.float32)[:2]).backward()
    assert [name for name, p in loss.named_parameters() if p.grad is not None] == ["loss.log_scale"]


def test_late_interaction_is_info_nce_of_sequences_and_refuses_vectors():
    sequences = embeddings(sequences=True)
    torch.testing.assert_close(LateInteraction(0.1)(*sequences), InfoNCE(0.1)(*sequences))
    with pytest.raises(ValueError, match=r"queries: shape \(5, 5\); late interaction needs \(N, T, D\)"):
        LateInteraction()(*embeddings())


def test_pytorch_metric_learning_has_the_same_losses():
    published = pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, reducers

    assert published
    cosine = distances.CosineSimilarity()
    queries, positives, _ = embeddings()
    rows = torch.arange(N)  # cloned below: the same tensor would mean that both are the same embeddings
    theirs = losses.NTXentLoss(0.07)(queries, rows, ref_emb=positives, ref_labels=rows.clone())
    compare(InfoNCE(0.07)(queries, positives), theirs, (queries, positives))
    views, twice = torch.cat([queries, positives]), LABELS.repeat(2)
    theirs = losses.SupConLoss(0.1)(views, twice)
    compare(SupCon(0.1, all_views=True)(queries, positives, labels=LABELS), theirs, (queries, positives))
    theirs = losses.SupConLoss(0.1)(queries, LABELS, ref_emb=positives, ref_labels=LABELS.clone())
    compare(SupCon(0.1)(queries, positives, labels=LABELS), theirs, (queries, positives))
    each = losses.TripletMarginLoss(0.5, distance=cosine, reducer=reducers.AvgNonZeroReducer())
    theirs = each(queries, rows, ref_emb=positives, ref_labels=rows.clone())
    compare(Triplet(0.5, "all")(queries, positives), theirs, (queries, positives))


CHOICES = {
    "cosent": CoSENT, "info_nce": InfoNCE, "late_interaction": LateInteraction, "matryoshka": Matryoshka,
    "siglip": SigLIP, "sup_con": SupCon, "triplet": Triplet,
}  # fmt: skip


@pytest.fixture
def config_dir(tmp_path):
    """A folder with a task that leaves the loss to choose."""
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "with_loss.yaml").write_text(
        "# @package _global_\n# A task with a loss to choose.\n"
        "defaults:\n  - /loss: info_nce\n  - _self_\nname: with_loss\ntask:\n  lr: 1\n"
    )
    return str(tmp_path)


def test_every_loss_has_a_yaml_with_the_signatures_defaults(config_dir):
    opinions = {"info_nce_both_ways"}  # other values than the signature's, and says so
    assert {path.stem for path in (ROOT / "configs" / "loss").glob("*.yaml")} == set(CHOICES) | opinions
    for choice, kind in CHOICES.items():
        node = compose_config(["task=with_loss", f"loss={choice}"], config_dir).task.loss
        known = parameters(kind)
        assert set(node) == {"_target_", *known}
        assert all(node[key] == known[key].default for key in known if key not in ("loss", "dims")), choice
        assert type(build(node, "task.loss", AllowList())) is kind


def test_the_command_line_chooses_a_loss_and_sets_its_keys(config_dir):
    chosen = compose_config(
        ["task=with_loss", "loss=matryoshka", "task.loss.dims=[4,2]", "task.loss.weights=[1,3]"], config_dir
    )
    assert build(chosen.task.loss, "task.loss", AllowList()).weights == (1, 3)
    assert compose_config(["task=with_loss"], config_dir).task.lr == 1
    with pytest.raises(UserError, match="loss=siglp: there is no such choice. Did you mean siglip?"):
        compose_config(["task=with_loss", "loss=siglp"], config_dir)
    with pytest.raises(UserError, match="Did you mean task.loss.temperature"):
        compose_config(["task=with_loss", "task.loss.temprature=1"], config_dir)
    with pytest.raises(UserError, match="loss=siglip: the task mae has no loss to choose"):
        compose_config(["task=mae", "data=spectra", "loss=siglip"])


ONES = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("inputs", "more", "message"),
    [
        ((ONES, torch.ones(3, 3)), {}, r"queries, positives: shapes \(4, 3\) and \(3, 3\); must be"),
        ((ONES, torch.ones(4, 2)), {}, r"shapes \(4, 3\) and \(4, 2\)"),
        ((ONES, torch.ones(4, 2, 3)), {}, r"shapes \(4, 3\) and \(4, 2, 3\)"),
        ((ONES[0], ONES[0]), {}, r"shapes \(3,\) and \(3,\)"),
        ((ONES, ONES, torch.ones(5, 2)), {}, r"negatives: shape \(5, 2\); must be \(M, 3\) beside .* \(4, 3\)"),
        ((ONES, ONES, torch.ones(5, 2, 3)), {}, r"negatives: shape \(5, 2, 3\)"),
        ((ONES, ONES, ONES), {"owners": torch.zeros(3)}, r"owners: shape \(3,\); must be \(4,\), one of each negative"),
        ((ONES, ONES), {"owners": torch.zeros(3)}, r"owners: shape \(3,\); must be \(0,\)"),
        ((ONES, ONES), {"labels": torch.zeros(4, 1)}, r"labels: shape \(4, 1\); must be \(4,\), one of each query"),
        ((ONES, ONES), {"scores": torch.zeros(5)}, r"scores: shape \(5,\); must be \(4,\)"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_fit_is_refused_with_its_shapes(name, inputs, more, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name][0]()(*inputs, **more)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cosent"])
def test_graded_pairs_are_not_taken_for_equally_good_ones(name):
    with pytest.raises(ValueError, match="scores: .* has no use for graded pairs; take CoSENT"):
        LOSSES[name][0]()(ONES, ONES, labels=torch.zeros(4), scores=torch.ones(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfoNCE(0.0), "temperature=0.0: must be above 0"),
        (lambda: InfoNCE(float("nan")), "temperature=nan: must be above 0"),
        (lambda: InfoNCE(0.005, learnable_temperature=True), "temperature=0.005: must be 0.01 or more where it is"),
        (lambda: InfoNCE(hard_negatives=0), "hard_negatives=0: must be 1 or more"),
        (lambda: InfoNCE(false_negative_margin=math.inf), "false_negative_margin=inf: must be a number"),
        (lambda: SupCon(-1.0), "temperature=-1.0: must be above 0"),
        (lambda: SupCon(symmetric=True, all_views=True), "symmetric=True: must be False with all_views"),
        (lambda: SupCon()(ONES, ONES), "labels: SupCon needs a label of each query"),
        (lambda: Triplet(0.0), "margin=0.0: must be above 0"),
        (lambda: Triplet(mining="easy"), "mining=easy: must be hard or all"),
        (lambda: CoSENT(0.0), "scale=0.0: must be above 0"),
        (lambda: SigLIP(scale=0.0), "scale=0.0: must be above 0"),
        (lambda: SigLIP(bias=math.nan), "bias=nan: must be a number"),
        (lambda: Matryoshka(InfoNCE(), []), r"dims=\[\]: must be one or more"),
        (lambda: Matryoshka(InfoNCE(), [4, 4]), r"dims=\[4, 4\]: must be one or more different"),
        (lambda: Matryoshka(InfoNCE(), [0, 4]), r"dims=\[0, 4\]"),
        (lambda: Matryoshka(InfoNCE(), [2, 4], [1.0]), r"weights=\[1.0\]: must be 2 numbers, one for each of dims"),
        (lambda: Matryoshka(InfoNCE(), [2, 4], [1.0, -1.0]), r"weights=\[1.0, -1.0\]: must be 0 or more"),
        (lambda: Matryoshka(InfoNCE(), [2, 4], [0.0, 0.0]), "and not all 0"),
        (lambda: Matryoshka(InfoNCE(), [2, 4])(ONES, ONES), r"dims=\[2, 4\]: must be at most 3, the embeddings' width"),
    ],
)
def test_what_cannot_be_says_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
