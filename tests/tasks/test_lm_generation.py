import math

import pytest
import torch

from trainerkit.tasks.lm import GPT, generate, sample

ROPE, LEARNED = {"n_kv_heads": 2}, {"positions": "learned", "activation": "gelu_tanh"}
GREEDY, SAMPLED, CUT = {"temperature": 0.0}, {"seed": 3}, {"seed": 3, "temperature": 0.8, "top_k": 9, "top_p": 0.8}


def gpt(context_length=24, **options):
    """A network that is sure enough to be interesting."""
    torch.manual_seed(0)
    network = GPT(31, context_length, 2, 32, 4, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return network


def prompts():
    """Three prompts at the right of their rows, and their lengths."""
    return torch.randint(31, (3, 10), generator=torch.Generator().manual_seed(1)), torch.tensor([10, 1, 6])


def naive_continuation(network, prompt, count):
    """Greedy, one row, one whole forward pass a token, with the window that is promised."""
    context, seen, new = network.context_length, prompt[-network.context_length :], []
    for _ in range(count):
        if len(seen) > context:
            seen = seen[-(context // 2) :]
        new.append(int(network(torch.tensor([seen]))[0, -1].argmax()))
        seen = [*seen, new[-1]]
    return new


# What is generated


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [ROPE, LEARNED], ids=["rope", "learned"])
def test_greedy_text_equals_a_naive_loop_also_beyond_the_context(options, use_cache):
    network, (prompt, length) = gpt(**options), prompts()
    found = generate(network, prompt, length, max_new_tokens=50, temperature=0, use_cache=use_cache)
    for row in range(3):
        assert found[row].tolist() == naive_continuation(network, prompt[row, 10 - length[row] :].tolist(), 50)
    assert len({tuple(row) for row in found.tolist()}) == 3


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, CUT], ids=["greedy", "sampled", "cut"])
@pytest.mark.parametrize("options", [ROPE, LEARNED], ids=["rope", "learned"])
def test_with_and_without_cache_the_tokens_are_the_same(options, how):
    network, (prompt, length) = gpt(**options), prompts()
    with_cache, without = (
        generate(network, prompt, length, max_new_tokens=60, use_cache=use, **how) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, CUT], ids=["greedy", "sampled", "cut"])
def test_a_prompt_gives_the_same_text_alone_and_in_a_batch_in_any_order(how):
    network, (prompt, length) = gpt(), prompts()
    whole = generate(network, prompt, length, max_new_tokens=50, **how)
    for row in range(3):
        alone = generate(network, prompt[row : row + 1, 10 - length[row] :], max_new_tokens=50, **how)
        assert torch.equal(alone, whole[row : row + 1])
    order = torch.tensor([2, 0, 1])
    assert torch.equal(generate(network, prompt[order], length[order], max_new_tokens=50, **how), whole[order])


def test_more_tokens_begin_with_the_fewer_ones():
    network, (prompt, length) = gpt(), prompts()
    more = generate(network, prompt, length, max_new_tokens=40, seed=1)
    assert torch.equal(generate(network, prompt, length, max_new_tokens=7, seed=1), more[:, :7])


def test_a_prompt_longer_than_the_context_is_continued_from_its_end():
    network = gpt(context_length=8)
    prompt = torch.randint(31, (1, 20))
    found = generate(network, prompt, max_new_tokens=12, temperature=0)
    assert found[0].tolist() == naive_continuation(network, prompt[0].tolist(), 12)
    assert torch.equal(generate(network, prompt[:, 12:], max_new_tokens=12, temperature=0), found)


def test_seeds():
    network, (prompt, _) = gpt(), prompts()
    same = prompt[:1].expand(3, -1)
    one = generate(network, same, max_new_tokens=20, seed=7)
    assert torch.equal(one[0], one[1])  # one seed, one prompt
    assert torch.equal(generate(network, same, max_new_tokens=20, seed=[7, 7, 7]), one)
    own = generate(network, same, max_new_tokens=20, seed=[7, 8, 9])
    assert torch.equal(own[0], one[0])
    assert len({tuple(row) for row in own.tolist()}) == 3
    unseeded = generate(network, same, max_new_tokens=20)
    assert len({tuple(row) for row in unseeded.tolist()}) == 3


def test_a_row_ends_with_its_end_of_text_and_the_others_go_on():
    network, (prompt, length) = gpt(), prompts()
    free = generate(network, prompt, length, max_new_tokens=30, seed=5)
    end = int(free[1, 4])  # the second row makes it after four others
    first = [row.tolist().index(end) if end in row else 30 for row in free]
    found = generate(network, prompt, length, max_new_tokens=30, seed=5, end_of_text=end)
    assert found.shape[1] == min(30, max(first) + 1)
    for row, at in enumerate(first):
        assert found[row, : at + 1].tolist() == free[row, : min(at + 1, found.shape[1])].tolist()
        assert (found[row, at:] == end).all()


def test_global_random_state_gradients_and_modes_are_left_alone():
    network, (prompt, length) = gpt(dropout=0.5), prompts()
    network.blocks[0].eval()
    modes, state = [module.training for module in network.modules()], torch.get_rng_state()
    found = generate(network, prompt, length, max_new_tokens=15, seed=2)
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    # With dropout on, two runs would differ.
    assert torch.equal(generate(network, prompt, length, max_new_tokens=15, seed=2), found)
    with pytest.raises(ValueError, match="length"):
        generate(network, prompt, length + 100, max_new_tokens=15)
    assert [module.training for module in network.modules()] == modes


def test_the_cache_reads_each_token_once_until_the_context_is_full():
    network, (prompt, _) = gpt(), prompts()
    read = {True: [], False: []}
    for use_cache, counts in read.items():
        with torch.no_grad():
            hook = network.token_embedding.register_forward_hook(
                lambda m, i, o, counts=counts: counts.append(o.shape[1])
            )
            generate(network, prompt[:1], max_new_tokens=17, temperature=0, use_cache=use_cache)
            hook.remove()
    # Context 24: 10 of the prompt and 14 new ones fit; then the last 12 are read again.
    assert read[True] == [10] + [1] * 14 + [12, 1]
    assert read[False] == [*range(10, 25), 12, 13]


def test_generation_under_autocast_stays_close():
    network, (prompt, length) = gpt(), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(network, prompt, length, max_new_tokens=8, temperature=0)
    expected = generate(network, prompt, length, max_new_tokens=8, temperature=0)
    assert (found[:, 0] == expected[:, 0]).all()  # later ones may part where two tokens are equally likely


# Sampling


def naive_probabilities(logits, temperature, top_k, top_p):
    """The distribution that is drawn from, as a list, in float64."""
    scaled = [x / temperature for x in logits]
    ranked = sorted(range(len(scaled)), key=lambda i: -scaled[i])[: top_k or len(scaled)]
    weights = {i: math.exp(scaled[i] - scaled[ranked[0]]) for i in ranked}
    total, kept, together = sum(weights.values()), [], 0.0
    for i in ranked:
        if top_p is not None and together >= top_p:
            break
        kept.append(i)
        together += weights[i] / total
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.7), (5, 0.6), (1, None), (None, 1e-9)])
def test_shares_of_drawn_tokens_equal_a_naive_distribution(temperature, top_k, top_p):
    logits = torch.randn(9) * 2
    expected = naive_probabilities(logits.double().tolist(), temperature, top_k, top_p)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # evenly, so that shares are exact to one of 4,000
    drawn = sample(logits.expand(4000, -1), grid, temperature, top_k, top_p)
    shares = torch.bincount(drawn, minlength=9) / 4000
    torch.testing.assert_close(shares.double(), torch.tensor(expected).double(), atol=1 / 4000, rtol=0)


def test_drawing_does_not_depend_on_a_constant_and_permutes_with_rows():
    logits, uniform = torch.randn(6, 11), torch.rand(6)
    found = sample(logits, uniform, 0.7, 8, 0.9)
    assert torch.equal(sample(logits + 50, uniform, 0.7, 8, 0.9), found)
    order = torch.randperm(6)
    assert torch.equal(sample(logits[order], uniform[order], 0.7, 8, 0.9), found[order])


def test_limits_that_cut_nothing_off_change_nothing():
    logits, uniform = torch.randn(50, 11), torch.rand(50)
    assert torch.equal(sample(logits, uniform, 1.0, 11, 1.0), sample(logits, uniform))
    assert torch.equal(sample(logits, uniform, 1.0, 100), sample(logits, uniform))


def test_the_ends_of_the_unit_interval_give_tokens_that_are_possible():
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf, 2.0, -math.inf]])
    assert sample(logits, torch.tensor([0.0])).item() == 1
    assert sample(logits, torch.tensor([1.0])).item() == 4  # torch.rand gives less, which float32 may round up to it


def test_a_low_temperature_is_greedy_and_equal_logits_are_cut_to_k():
    logits = torch.randn(20, 11)
    assert torch.equal(sample(logits, torch.rand(20), 1e-4), logits.argmax(-1))
    assert torch.equal(sample(logits, torch.rand(20), 0.0), logits.argmax(-1))
    drawn = sample(torch.zeros(100, 7), torch.linspace(0, 0.999, 100), 1.0, 3)
    assert len(set(drawn.tolist())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be 1 or more"),
        ({"temperature": -0.1}, "temperature=-0.1: must be 0 or more"),
        ({"temperature": math.nan}, "temperature=nan: must be 0 or more"),
        ({"top_k": 0}, "top_k=0: must be 1 or more, or null"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1, or null"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"seed": [1, 2]}, r"seed=\[1, 2\]: must be one number, or one for each of 3 prompts"),
        ({"length": torch.tensor([0, 1, 2])}, r"length=\[0, 1, 2\]: must be 3 numbers from 1 to 10"),
        ({"prompt": torch.zeros(3, 0, dtype=torch.long)}, r"prompt: has shape \(3, 0\)"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(options, message):
    prompt, length = prompts()
    with pytest.raises(ValueError, match=message):
        generate(gpt(), **{"prompt": prompt, "length": length, "max_new_tokens": 2} | options)


@pytest.mark.parametrize("row", [[torch.nan] * 5, [1.0, torch.inf, 2.0, 0.0, 1.0], [-torch.inf] * 5])
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0])
def test_logits_of_a_run_that_diverged_still_give_a_token(row, temperature):
    token = sample(torch.tensor([row]), torch.tensor([0.5]), temperature)
    assert 0 <= int(token) < 5


def test_the_smallest_temperature_takes_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, torch.tensor([0.9]), 1e-320).tolist() == [1]


def test_a_compiled_network_generates_uncompiled():
    """Each length would be compiled anew."""
    network = gpt()
    prompt = torch.tensor([[1, 2, 3]])
    expected = generate(network, prompt, max_new_tokens=6, seed=0)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    network.compile(backend=backend)
    assert torch.equal(generate(network, prompt, max_new_tokens=6, seed=0), expected)
    assert compiled == []
    network(prompt)
    assert compiled
