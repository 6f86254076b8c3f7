"""Operations by formula beside torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainerkit.functional.flops import decoder_flops_per_token
from trainerkit.tasks.lm import GPT, LanguageModelTask


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def attention(heads, length, width):
    """Forward and backward of softmax(QKᵀ)V, the matrix products written out."""
    q, k, v = (torch.randn(heads, length, width, requires_grad=True) for _ in range(3))
    return counted(lambda: ((q @ k.mT).softmax(-1) @ v).sum().backward())


@pytest.mark.parametrize(("layers", "heads", "width", "length"), [(1, 2, 8, 5), (3, 4, 4, 16)])
def test_the_attentions_part_is_what_torch_counts_for_written_out_products(layers, heads, width, length):
    per_token = decoder_flops_per_token(0, layers, heads * width, length)
    assert per_token * length == layers * attention(heads, length, width)


def test_the_parameters_part_is_what_torch_counts_for_a_linear_layer():
    layer, x = torch.nn.Linear(6, 10, bias=False), torch.randn(7, 6, requires_grad=True)
    assert counted(lambda: layer(x).sum().backward()) == 7 * decoder_flops_per_token(60, 0, 6, 1)


def test_it_grows_linearly_with_parameters_layers_and_length():
    zero = decoder_flops_per_token(0, 2, 8, 5)
    assert decoder_flops_per_token(9, 2, 8, 5) - zero == 54
    assert decoder_flops_per_token(0, 4, 8, 5) == decoder_flops_per_token(0, 2, 8, 10) == 2 * zero


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "positions": "learned"}])
def test_a_language_models_figure_is_torchs_count_and_the_attention_it_does_not_see_on_a_cpu(options):
    network = GPT(50, 16, n_layers=2, d_model=32, n_heads=2, **options)
    seen = counted(lambda: network(torch.randint(50, (1, 16))).square().mean().backward())
    assert LanguageModelTask(network).flops_per_sample() == seen + 16 * 12 * 2 * 32 * 16
