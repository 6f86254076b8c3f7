"""The documented trainer writes attention's backward by hand, wrongly: `GradientCheck` shows it, and ours passes."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from tests.support import toy_trainer
from tests.tasks.small_gpt import gpt, tokens
from trainerkit.callbacks import GradientCheck, GradientMismatch
from trainerkit.tasks.lm.attention import CausalAttention, rotate

LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "n_kv_heads": 2, "qk_norm": True}


class DocumentedAttention(torch.autograd.Function):
    """Causal softmax(QKᵀ/√d)·V, whose backward is the documented one: scores' gradients without softmax's Jacobian and
    times √d instead of divided by it."""

    @staticmethod
    def forward(ctx, query, key, value):
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        return weights @ value

    @staticmethod
    def backward(ctx, d_attended):
        query, key, value, weights = ctx.saved_tensors
        d_scores = d_attended @ value.mT * math.sqrt(query.shape[-1])
        return d_scores @ key, d_scores.mT @ query, weights.mT @ d_attended


class Attention(CausalAttention):
    """As `CausalAttention`, with the documented backward."""

    def forward(self, x, rotary=None, mask=None, cache=None):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.chunk(3, dim=2)
        query, key = rotate(query, rotary), rotate(key, rotary)
        attended = DocumentedAttention.apply(*(part.transpose(1, 2) for part in (query, key, value)))
        return self.out(attended.transpose(1, 2).flatten(2))


class LanguageModel(LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit_with_check(tmp_path, network):
    check = GradientCheck(n_parameters=28)
    trainer = toy_trainer(tmp_path, [check], max_epochs=1)
    try:
        trainer.fit(LanguageModel(network), DataLoader(tokens(4, 9), batch_size=4))
    except GradientMismatch as error:
        return check, str(error)
    return check, None


def test_the_documented_backward_of_attention_is_caught_in_a_gpt(tmp_path):
    network, plain = gpt(), gpt()
    for block in network.blocks:
        wrong = Attention(24, 4, 4)
        wrong.load_state_dict(block.attention.state_dict())
        block.attention = wrong
    # Forward it is the same: no look at the loss of a step would show it.
    torch.testing.assert_close(network(tokens()), plain(tokens()), atol=1e-5, rtol=1e-5)
    check, message = fit_with_check(tmp_path, network)
    assert " of 28 checked derivatives are wrong (rtol=0.0001)" in message
    wrong = {one.name for one in check.coordinates if one.differs(check.rtol)}
    # The last block's own output and what follows it are not behind the wrong term.
    assert "network.blocks.1.attention.qkv.weight" in wrong
    assert not any(name.startswith(("network.final_norm", "network.blocks.1.attention.out")) for name in wrong)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["default", "llama"])
def test_our_backward_passes_the_check_to_seven_digits(tmp_path, options):
    check, message = fit_with_check(tmp_path, gpt(**options))
    assert message is None
    assert {one.name.split(".")[-2] for one in check.coordinates} >= {"qkv", "out", "up", "down", "token_embedding"}
    assert max(one.relative_error for one in check.coordinates if one.scale > 1e-5) < 1e-6
