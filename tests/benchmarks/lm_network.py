"""Forward and backward of GPT-2's architecture three ways: `python -m tests.benchmarks.lm_network [rounds]`.

`trainerkit`, a minimal network written by hand (fused projection, `scaled_dot_product_attention`, nothing that can be
chosen), and `GPT2LMHeadModel` of `transformers` where it is installed; the same sizes, no dropout, the same loss. And
ours with each option that replaces a part of GPT-2's. Float32, and bfloat16 under autocast.
"""

import importlib.util
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.turns import measure, table
from trainerkit.tasks.lm import GPT

VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS = 2048, 256, 4, 256, 4
BATCH, STEPS = 2, 2
TOKENS = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
DOCUMENT = (torch.arange(CONTEXT) // 100).expand(BATCH, -1)


class MinimalBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The least that GPT-2's block takes."""
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).contiguous().view(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class MinimalGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(MinimalBlock() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def ours(**options) -> nn.Module:
    gpt2 = {"positions": "learned", "activation": "gelu_tanh"}
    return GPT(VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS, **gpt2 | options)


def of_transformers() -> nn.Module:
    import transformers

    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    config = transformers.GPT2Config(**sizes, **options, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def contender(network: nn.Module, autocast: bool, **inputs):
    def run(folder: Path) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = network(TOKENS[:, :-1], **inputs)
                logits = getattr(logits, "logits", logits)
                loss = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
            network.zero_grad()
            loss.backward()
        return (time.perf_counter() - start) / STEPS

    return run


def main(rounds: int = 7) -> None:
    """Print milliseconds a step, and the ratio to the network written by hand."""
    networks = {"by hand": MinimalGPT(), "trainerkit": ours()}
    if importlib.util.find_spec("transformers"):
        networks["transformers"] = of_transformers()
    for name, autocast in (("float32", False), ("bfloat16 under autocast", True)):
        medians = measure({key: contender(network, autocast) for key, network in networks.items()}, rounds)
        table(
            f"GPT-2's architecture, {LAYERS} layers of {WIDTH}, {BATCH} x {CONTEXT} tokens, {name}", medians, "by hand"
        )
    options = {
        "gpt2": {},
        "rope": {"positions": "rope"},
        "rope, one key head": {"positions": "rope", "n_kv_heads": 1},
        "rmsnorm": {"norm": "rmsnorm"},
        "swiglu": {"activation": "swiglu"},
        "relu2": {"activation": "relu2"},
        "gelu": {"activation": "gelu"},
        "qk_norm": {"qk_norm": True},
        "checkpointed": {"checkpoint_activations": True},
    }
    contenders = {name: contender(ours(**one), False) for name, one in options.items()}
    contenders["documents"] = contender(ours(), False, document=DOCUMENT)
    table("trainerkit's options, float32", measure(contenders, rounds), "gpt2")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
