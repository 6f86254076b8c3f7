import math

import pytest
import torch
import torch.nn.functional as F

from tests.tasks.small_gpt import SMALL, gpt, tokens
from trainerkit.tasks.lm import GPT, KeyValueCache
from trainerkit.tasks.lm.attention import CausalAttention, document_mask, document_positions, rotary_table, rotate

VARIANTS = {
    "default": {},
    "gpt2": {"positions": "learned", "activation": "gelu_tanh"},
    "llama": {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "n_kv_heads": 2, "d_ff": 40},
    "multi-query": {"n_kv_heads": 1, "activation": "relu2", "qk_norm": True, "logit_softcap": 0.5},
    "untied": {"tie_embeddings": False, "rope_base": 50.0},
}


def naive_norm(x, kind, weight, bias):
    """Of one vector."""
    if kind == "layernorm":
        mean = sum(x) / len(x)
        scale = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    else:
        mean, scale = 0.0, math.sqrt(sum(v**2 for v in x) / len(x) + 1e-6)
    return torch.stack([(v - mean) / scale * w for v, w in zip(x, weight, strict=True)]) + (0 if bias is None else bias)


def naive_turn(x, position, base):
    """Pairs (i, i + E/2) of one head's vector as complex numbers, turned."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * complex(math.cos(a), math.sin(a)) for i in range(half)
              for a in [position * base ** (-i / half)]]  # fmt: skip
    return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=torch.float64)


def naive_activation(kind, x):
    if kind == "swiglu":
        gate, value = x[: len(x) // 2], x[len(x) // 2 :]
        return gate / (1 + (-gate).exp()) * value
    if kind == "relu2":
        return torch.where(x > 0, x**2, 0)
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def naive_logits(options, state, row):
    """Logits (T, V) of one row, in float64, token by token and head by head."""
    o = {"positions": "rope", "activation": "gelu", "norm": "layernorm", "rope_base": 10000.0} | SMALL | options
    p = {name: tensor.double() for name, tensor in state.items()}
    n_heads, n_kv, width = o["n_heads"], o.get("n_kv_heads") or o["n_heads"], o["d_model"] // o["n_heads"]

    def linear(name, x):
        return p[f"{name}.weight"] @ x + p.get(f"{name}.bias", 0)

    def norm(name, x):
        return naive_norm(x, o["norm"], p[f"{name}.weight"], p.get(f"{name}.bias"))

    stream = [p["token_embedding.weight"][token] for token in row]
    if o["positions"] == "learned":
        stream = [x + p["position_embedding.weight"][i] for i, x in enumerate(stream)]
    for layer in range(o["n_layers"]):
        block = f"blocks.{layer}"
        queries, keys, values = [], [], []
        for i, x in enumerate(stream):
            heads = list(linear(f"{block}.attention.qkv", norm(f"{block}.norm1", x)).split(width))
            q, k, v = heads[:n_heads], heads[n_heads : n_heads + n_kv], heads[n_heads + n_kv :]
            if o.get("qk_norm"):
                q = [naive_norm(h, "rmsnorm", p[f"{block}.attention.query_norm.weight"], None) for h in q]
                k = [naive_norm(h, "rmsnorm", p[f"{block}.attention.key_norm.weight"], None) for h in k]
            if o["positions"] == "rope":
                q, k = ([naive_turn(h, i, o["rope_base"]) for h in part] for part in (q, k))
            queries.append(q), keys.append(k), values.append(v)
        for i, x in enumerate(stream):
            attended = []
            for head in range(n_heads):
                shared = head * n_kv // n_heads
                scores = [float(queries[i][head] @ keys[j][shared]) / math.sqrt(width) for j in range(i + 1)]
                weights = [math.exp(s - max(scores)) for s in scores]
                attended.append(sum(w / sum(weights) * values[j][shared] for j, w in enumerate(weights)))
            stream[i] = x + linear(f"{block}.attention.out", torch.cat(attended))
        for i, x in enumerate(stream):
            hidden = naive_activation(o["activation"], linear(f"{block}.feed_forward.up", norm(f"{block}.norm2", x)))
            stream[i] = x + linear(f"{block}.feed_forward.down", hidden)
    weight = p.get("output.weight", p["token_embedding.weight"])
    logits = torch.stack([weight @ norm("final_norm", x) for x in stream])
    cap = o.get("logit_softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_a_naive_float64_reference(options):
    network = gpt(**options)
    expected = torch.stack([naive_logits(options, network.state_dict(), row) for row in tokens().tolist()])
    assert expected.std() > 0.3
    torch.testing.assert_close(network(tokens()).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network.double()(tokens()), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_under_autocast_logits_are_those_in_float32_to_the_resolution_of_bfloat16(options):
    network = gpt(**options)
    expected = network(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        found = network(tokens())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_later_token_changes_no_earlier_logits(options):
    network, changed = gpt(**options), tokens()
    changed[:, 6:] = (changed[:, 6:] + 1) % 23
    before, after = network(tokens()), network(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=1e-6)
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(-1).any()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_rows_are_independent_and_permute(options):
    network, order = gpt(**options), torch.tensor([2, 0, 1])
    whole = network(tokens(3))
    torch.testing.assert_close(network(tokens(3)[order]), whole[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network(tokens(3)[1:2]), whole[1:2], atol=1e-5, rtol=1e-5)


# Positions


def test_rotated_products_depend_on_the_distance_only_and_lengths_stay():
    query, key = torch.randn(2, 1, 1, 3, 8, dtype=torch.float64)

    def product(at, other):
        turned = [rotate(x, rotary_table(torch.tensor([p]), 8, 100.0, torch.float64))
                  for x, p in ((query, at), (key, other))]  # fmt: skip
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(product(3, 1), product(503, 501))
    torch.testing.assert_close(product(7, 7), (query * key).sum(-1))
    assert not torch.isclose(product(3, 1), product(3, 2)).any()
    turned = rotate(query, rotary_table(torch.tensor([9]), 8, 100.0, torch.float64))
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1))


def test_rotation_equals_complex_multiplication():
    x = torch.randn(1, 5, 2, 6)
    turned = rotate(x, rotary_table(torch.arange(5), 6, 30.0))
    for position in range(5):
        for head in range(2):
            expected = naive_turn(x[0, position, head].tolist(), position, 30.0)
            torch.testing.assert_close(turned[0, position, head].double(), expected, atol=1e-6, rtol=1e-6)


def test_positions_and_masks_of_documents():
    document = torch.tensor([[4, 4, 4, 9, 9, 2], [0, 1, 1, 1, 1, 1]])
    assert document_positions(document).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    mask = document_mask(document)
    for row in range(2):
        for i in range(6):
            for j in range(6):
                assert mask[row, 0, i, j] == (j <= i and document[row, i] == document[row, j])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_documents_in_one_row_equal_rows_of_their_own(options):
    network = gpt(**options)
    document = torch.tensor([[0] * 4 + [1] * 7, [5] * 9 + [3] * 2])
    together = network(tokens(), document=document)
    for row, cut in ((0, 4), (1, 9)):
        apart = [network(part[None])[0] for part in (tokens()[row, :cut], tokens()[row, cut:])]
        torch.testing.assert_close(together[row], torch.cat(apart), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(together, network(tokens()), atol=1e-3)
    same = torch.full_like(document, 8)
    torch.testing.assert_close(network(tokens(), document=same), network(tokens()), atol=1e-5, rtol=1e-5)


# Heads


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    grouped, full = CausalAttention(24, 4, 2), CausalAttention(24, 4, 4)
    full.out.load_state_dict(grouped.out.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            query, rest = getattr(grouped.qkv, name).split([24, 24])
            key, value = (part.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for part in rest.chunk(2))
            getattr(full.qkv, name).copy_(torch.cat([query, key, value]))
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-6, rtol=1e-5)


def test_as_many_key_heads_as_query_heads_is_multi_head_attention():
    plain, named = gpt(), gpt(n_kv_heads=4)
    named.load_state_dict(plain.state_dict())
    assert torch.equal(plain(tokens()), named(tokens()))


# Parameters


@pytest.mark.parametrize(
    ("n_layers", "d_model", "n_heads", "parameters"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
    ids=["gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"],
)
def test_parameter_counts_of_gpt2(n_layers, d_model, n_heads, parameters):
    with torch.device("meta"):
        network = GPT(50257, 1024, n_layers, d_model, n_heads, positions="learned", activation="gelu_tanh")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_swiglu_has_as_many_weights_as_gelu_by_default():
    # 8/3 · 384 = 1024 is a multiple of 64.
    counts = {
        kind: sum(p.numel() for p in GPT(10, 8, 1, 384, 6, activation=kind, bias=False).blocks.parameters())
        for kind in ("gelu", "swiglu")
    }
    assert counts["gelu"] == counts["swiglu"]


def test_tied_embeddings_are_one_parameter_that_learns_from_both_ends():
    network = gpt()
    assert sum(p.shape == (23, 24) for p in network.parameters()) == 1
    seen = {}
    logits = network(tokens()[:, :1], head=lambda hidden, weight: seen.update(weight=weight) or hidden @ weight.T)
    assert seen["weight"] is network.token_embedding.weight
    logits.sum().backward()
    assert (seen["weight"].grad.abs().sum(1) > 0).all()  # tokens that were not in the batch too
    assert sum(p.shape == (23, 24) for p in gpt(tie_embeddings=False).parameters()) == 2


def test_initialisation_is_that_of_gpt2():
    torch.manual_seed(0)
    network = GPT(300, 64, 8, 128, 4)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            added = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (4 if added else 1), rel=0.03), name
    logits = network(torch.randint(300, (2, 64)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(300, (128,)))
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)


# What forward gives


def test_the_head_gets_normalised_hidden_states_and_the_output_weights():
    network = gpt(tie_embeddings=False)
    hidden, weight = network(tokens(), head=lambda *given: given)
    assert hidden.shape == (2, 11, 24)
    assert weight is network.output.weight
    torch.testing.assert_close(hidden @ weight.T, network(tokens()))


def test_capped_logits_stay_below_the_cap_and_small_ones_stay_what_they_are():
    network = gpt(logit_softcap=2.0)
    assert network(tokens()).abs().max() < 2
    free = gpt()
    free.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(tokens()), 2 * torch.tanh(free(tokens()) / 2))


def test_dropout_is_off_in_evaluation_and_on_in_training():
    network = gpt(dropout=0.5)
    plain = gpt()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(tokens()), plain(tokens()))
    network.train()
    assert not torch.allclose(network(tokens()), network(tokens()), atol=0.1)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"dropout": 0.3, **VARIANTS["llama"]}], ids=["gelu", "llama"])
def test_checkpointed_activations_give_the_same_loss_and_gradient_with_dropout_on(options):
    document = torch.tensor([[0] * 4 + [1] * 7] * 2)
    results = []
    for checkpointed in (False, True):
        network = gpt(checkpoint_activations=checkpointed, **options)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            torch.manual_seed(5)
            loss = network(tokens(), document=document).logsumexp(-1).sum()
        loss.backward()
        results.append((loss, [p.grad for p in network.parameters()], sum(kept)))
    (loss, gradients, kept), (other, others, kept_fewer) = results
    assert torch.equal(loss, other)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert kept_fewer < kept / 3


def test_it_is_one_graph_for_torch_compile_and_gives_the_same():
    torch.compiler.reset()
    network = gpt(**VARIANTS["multi-query"])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")  # fullgraph raises where it would break
    document = torch.tensor([[0] * 4 + [1] * 7] * 2)
    for inputs in ({}, {"document": document}):
        torch.testing.assert_close(compiled(tokens(), **inputs), network(tokens(), **inputs), atol=1e-5, rtol=1e-5)


# Cache


@pytest.mark.parametrize("cuts", [(11,), (4, 11), (1, 2, 3, 11), (10, 11)], ids=str)
@pytest.mark.parametrize(
    "options", [*VARIANTS.values(), {"checkpoint_activations": True}], ids=[*VARIANTS, "checkpointed"]
)
def test_parts_with_a_cache_equal_the_whole(options, cuts):
    network, cache = gpt(**options), KeyValueCache(2, 16)
    starts = (0, *cuts[:-1])
    parts = [network(tokens()[:, a:b], cache=cache) for a, b in zip(starts, cuts, strict=True)]
    assert cache.length == 11
    torch.testing.assert_close(torch.cat(parts, 1), network(tokens()), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_padding_at_the_left_changes_no_logits_and_gives_no_nan(options):
    network, padding = gpt(**options), torch.tensor([3, 0])
    cache = KeyValueCache(2, 16, padding)
    padded = torch.stack([torch.cat([tokens()[0, :0].new_zeros(3), tokens()[0, :8]]), tokens()[1]])
    found = torch.cat([network(padded[:, :6], cache=cache), network(padded[:, 6:7], cache=cache),
                       network(padded[:, 7:], cache=cache)], 1)  # fmt: skip
    assert found.isfinite().all()
    torch.testing.assert_close(found[:1, 3:], network(tokens()[:1, :8]), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found[1:], network(tokens()[1:]), atol=2e-5, rtol=2e-5)


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 25}, "d_model=25: must be a multiple of n_heads=4"),
        ({"n_kv_heads": 3}, "n_kv_heads=3: must divide n_heads=4"),
        ({"n_kv_heads": 0}, "n_kv_heads=0: must be 1 or more"),
        ({"n_heads": 8}, "n_heads=8: gives heads of 3 numbers, and positions=rope turns pairs"),
        ({"n_layers": 0}, "n_layers=0: must be 1 or more"),
        ({"d_ff": 0}, "d_ff=0: must be 1 or more"),
        ({"positions": "sine"}, "positions=sine: must be one of rope, learned"),
        ({"activation": "relu"}, "activation=relu: must be one of gelu, gelu_tanh, swiglu, relu2"),
        ({"norm": "batch"}, "norm=batch: must be one of layernorm, rmsnorm"),
        ({"dropout": 1.0}, "dropout=1.0: must be from 0 to below 1"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0: must be above 0, or null"),
        ({"rope_base": -1.0}, "rope_base=-1.0: must be above 0"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        GPT(**SMALL | options)


def test_wrong_inputs_say_what_is_allowed():
    network = gpt()
    for given, options, message in (
        (tokens(2, 17), {}, "tokens: 17 of them are more than context_length=16"),
        (tokens()[0], {}, r"tokens: has shape \(11,\); needed is \(batch, tokens\)"),
        (tokens(), {"document": tokens()[:, :5]}, r"document: has shape \(2, 5\), tokens \(2, 11\)"),
        (tokens(), {"cache": KeyValueCache(2, 8)}, "tokens: 11 of them are more than the cache's capacity=8"),
        (tokens(), {"cache": KeyValueCache(2, 16), "document": tokens()}, "document: cannot be given together"),
    ):
        with pytest.raises(ValueError, match=message):
            network(given, **options)
    cache = KeyValueCache(2, 16)
    network(tokens(), cache=cache)
    with pytest.raises(ValueError, match="tokens: 17 of them are more than context_length=16"):
        network(tokens(2, 6), cache=cache)
