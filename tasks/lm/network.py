"""A decoder-only transformer of the GPT family, pre-norm.

Layout and initialisation: A. Radford et al., 'Language models are unsupervised multitask learners', 2019 (GPT-2).
Soft-capped logits: Gemma team, 'Gemma 2: Improving open language models at a practical size', 2024, arXiv:2408.00118.

Shapes: B batch, T tokens, D width, V vocabulary, F width inside the feed-forward layers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainerkit.fsdp import local
from trainerkit.nn.lora import Lora, add_lora, as_lora
from trainerkit.tasks.lm.attention import CausalAttention, document_mask, document_positions, rotary_table
from trainerkit.tasks.lm.block import Activation, Block, FeedForward, Norm, default_d_ff, make_norm
from trainerkit.tasks.lm.cache import KeyValueCache
from trainerkit.tasks.lm.huggingface import load_weights

Positions = Literal["rope", "learned"]
Head = Callable[[Tensor, Tensor], Any]


class GPT(nn.Module):
    """A language model: tokens to the logits of each next token.

    Args:
        vocab_size: tokens V that there are.
        context_length: tokens that are looked at together, at the most.
        n_layers: blocks.
        d_model: width D.
        n_heads: query heads; must divide D.
        n_kv_heads: key and value heads; must divide `n_heads`. None for `n_heads`, 1 for multi-query attention.
        d_ff: width F inside the feed-forward layers; None for 4·D, or with swiglu, which has three matrices instead of
            two, 8/3·D rounded up to a multiple of 64.
        positions: 'rope' turns queries and keys by their positions; 'learned' adds a vector to each embedding.
        activation: 'gelu', its approximation 'gelu_tanh' (GPT-2's), 'swiglu' or 'relu2'.
        norm: 'layernorm' or 'rmsnorm'.
        qk_norm: normalise queries and keys of each head.
        bias: whether linear layers and LayerNorms have biases.
        dropout: probability; of embeddings, attention weights, and what each half of a block adds.
        tie_embeddings: the output layer is the token embedding.
        logit_softcap: logits z become c·tanh(z/c) with this c; None for no cap.
        rope_base: see `rotary_table`.
        checkpoint_activations: in training keep each block's input only and compute the rest again in backward: less
            memory, about a third more time, the same gradient.
        weights: a file to start from: .safetensors or .pt of this network, with or without its adapters; or a folder or
            file with GPT-2's weights in the layout of Hugging Face.
        lora: train low-rank additions to chosen layers instead of the network; None trains the network.

    Raises:
        ValueError: for sizes that do not fit together; the message begins with the argument.
        trainerkit.errors.UserError: for weights that do not fit, or if `peft` is needed and not installed.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int = 256,
        n_layers: int = 6,
        d_model: int = 384,
        n_heads: int = 6,
        n_kv_heads: int | None = None,
        d_ff: int | None = None,
        positions: Positions = "rope",
        activation: Activation = "gelu",
        norm: Norm = "layernorm",
        qk_norm: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        logit_softcap: float | None = None,
        rope_base: float = 10000.0,
        checkpoint_activations: bool = False,
        weights: str | None = None,
        lora: Lora | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "context_length": context_length, "n_layers": n_layers, "d_model": d_model}
        sizes |= {"n_heads": n_heads, "n_kv_heads": 1 if n_kv_heads is None else n_kv_heads}
        _check_sizes(sizes | {"d_ff": 1 if d_ff is None else d_ff})
        _check_choices(positions=(positions, Positions), activation=(activation, Activation), norm=(norm, Norm))
        _check_heads(d_model, n_heads, n_kv_heads or n_heads, positions)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be from 0 to below 1")
        for name, value in {"logit_softcap": logit_softcap, "rope_base": rope_base}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be above 0{', or null' if name == 'logit_softcap' else ''}")
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.n_layers = n_layers
        self.d_model = d_model
        self.n_heads = n_heads
        self.head_dim = d_model // n_heads
        self.activation = activation
        self.logit_softcap = logit_softcap
        self.rope_base = rope_base
        self.checkpoint_activations = checkpoint_activations
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context_length, d_model) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                CausalAttention(d_model, n_heads, n_kv_heads or n_heads, bias, dropout, qk_norm),
                FeedForward(d_model, d_ff or default_d_ff(d_model, activation), activation, bias),
                (make_norm(norm, d_model, bias), make_norm(norm, d_model, bias)),
                dropout,
            )
            for _ in range(n_layers)
        )
        self.final_norm = make_norm(norm, d_model, bias)
        self.output = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)
        self._initialize()
        adapters = None if lora is None else as_lora(lora)
        if weights is not None:
            load_weights(self, weights, adapters)
        elif adapters is not None:
            add_lora(self, adapters)

    def forward(
        self,
        tokens: Tensor,
        *,
        document: Tensor | None = None,
        cache: KeyValueCache | None = None,
        head: Head | None = None,
    ) -> Any:
        """Logits (B, T, V) of the token after each of `tokens`, or what `head` makes instead of them.

        Args:
            tokens: (B, T) int64.
            document: number of the document that each token belongs to, (B, T); a token sees its own document only,
                whose positions begin at 0. Equal numbers stand together in a row. None for one document a row.
            cache: of earlier tokens, which these follow; they are added to it.
            head: called with the hidden states (B, T, D) after the last norm and the output weights (V, D), inside
                this method, where sharded weights are whole. It must cap logits itself.

        Raises:
            ValueError: if `tokens` is not (B, T), or longer than there is room for, or both `document` and `cache` are
                given.
        """
        past = 0 if cache is None else cache.length
        self._check_tokens(tokens, document, cache)
        columns = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        mask = None
        if cache is not None:
            positions, mask = cache.positions(columns), cache.mask(columns)
        elif document is not None:
            # Rotary positions count relative to each other: where they begin makes no difference.
            positions = columns if self.position_embedding is None else document_positions(document)
            mask = document_mask(document)
        else:
            positions = columns
        x = self.token_embedding(tokens)
        rotary = None
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        else:
            exact = torch.float64 if x.dtype == torch.float64 else torch.float32
            rotary = rotary_table(positions, self.head_dim, self.rope_base, exact)
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            if self.checkpoint_activations and self.training and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
            else:
                x = block(x, rotary, mask, None if cache is None else cache.layers[number])
        weight = self.token_embedding.weight if self.output is None else self.output.weight
        return (head or self.logits)(self.final_norm(x), local(weight))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Capped logits (…, V) of hidden states (…, D) and output weights (V, D)."""
        logits = F.linear(hidden, weight)
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _initialize(self) -> None:
        """Normal with a standard deviation of 0.02; what is added to the residual stream by 1/√(2·layers) of that."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                is_added = name.endswith((".attention.out", ".feed_forward.down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.n_layers) if is_added else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _check_tokens(self, tokens: Tensor, document: Tensor | None, cache: KeyValueCache | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens: has shape {tuple(tokens.shape)}; needed is (batch, tokens) with one token or more"
            )
        if document is not None and cache is not None:
            raise ValueError("document: cannot be given together with a cache")
        if document is not None and document.shape != tokens.shape:
            raise ValueError(f"document: has shape {tuple(document.shape)}, tokens {tuple(tokens.shape)}")
        length = tokens.shape[1] + (0 if cache is None else cache.length)
        if length > self.context_length:
            raise ValueError(f"tokens: {length} of them are more than context_length={self.context_length}")
        if cache is not None and length > cache.capacity:
            raise ValueError(f"tokens: {length} of them are more than the cache's capacity={cache.capacity}")


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be 1 or more")


def _check_choices(**choices: tuple[str, Any]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in get_args(allowed):
            raise ValueError(f"{name}={value}: must be one of {', '.join(get_args(allowed))}")


def _check_heads(d_model: int, n_heads: int, n_kv_heads: int, positions: Positions) -> None:
    if d_model % n_heads:
        raise ValueError(f"d_model={d_model}: must be a multiple of n_heads={n_heads}")
    if n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads={n_kv_heads}: must divide n_heads={n_heads}")
    if positions == "rope" and d_model // n_heads % 2:
        raise ValueError(
            f"n_heads={n_heads}: gives heads of {d_model // n_heads} numbers, and positions=rope turns pairs; take "
            "another number of heads, or positions=learned"
        )
