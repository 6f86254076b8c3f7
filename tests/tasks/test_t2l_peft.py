"""Adapters that the network writes, in the package that is to load them."""

import pytest
import torch
from torch import nn

from trainerkit.adapters import write_adapter
from trainerkit.tasks.t2l import FrozenBase, HyperNetwork

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LAYERS = [[f"model.layers.{i}.self_attn.{name}", 16, 16] for i in range(2) for name in ("q_proj", "v_proj")]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


class Logits(nn.Module):
    """A language model of one tensor to one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    def forward(self, ids):
        return self.lm_head(self.model(ids).last_hidden_state)


@pytest.mark.filterwarnings("ignore")
def test_a_written_adapter_runs_in_peft_as_it_was_meant(tmp_path):
    network = HyperNetwork(LAYERS, rank=2, embedding_dim=8, latent_dim=16, head_dim=16, scaling=1.5)
    with torch.no_grad():
        for parameter in network.heads.parameters():  # far enough from nothing to be seen
            parameter.normal_()
    factors = {key: factor.detach() for key, factor in network(torch.randn(3, 8)).items()}
    ids = torch.randint(32, (3, 1, 7))
    meant = FrozenBase(Logits(llama()), network.layout)(factors, ids)
    bare = llama()(ids[:, 0]).logits
    for task in range(3):
        own = {key: factor[task] for key, factor in factors.items()}
        write_adapter(tmp_path / str(task), network.layout, own, "llama", "CAUSAL_LM")
        found = peft.PeftModel.from_pretrained(llama(), tmp_path / str(task))(ids[task]).logits
        torch.testing.assert_close(found, meant[task], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[0], bare[task], atol=1e-2)
