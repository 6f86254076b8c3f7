"""Text from a language model, token by token.

Top-p: A. Holtzman et al., 'The curious case of neural text degeneration', 2019, arXiv:1904.09751.

A row sees at most `context_length` tokens. When it has more, it forgets all but the last half of a context, and goes on
from there: rarely, since everything is read again then. What a row sees depends on its own length alone.

Shapes: B batch, P columns of the prompts, N new tokens, V vocabulary.
"""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from trainerkit.tasks.lm.cache import KeyValueCache
from trainerkit.tasks.lm.network import GPT


@torch.no_grad()
def generate(
    network: GPT,
    prompt: Tensor,
    length: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    end_of_text: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue prompts.

    What is drawn for a row depends on its seed and its prompt, not on the other rows; no global random state is read
    or changed. The network is in evaluation mode meanwhile.

    Args:
        network: gives the logits.
        prompt: tokens, (B, P) int64; a shorter prompt stands at the right of its row.
        length: tokens of each prompt, (B,), from 1 to P; None for P.
        max_new_tokens: N, for each row.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens; None from all.
        top_p: draw from the fewest tokens that have this probability together; None from all.
        seed: of the draws, 0 or more; a sequence has one for each row. None draws seeds from the system.
        end_of_text: the token that ends a row; None for none.
        use_cache: keep keys and values, instead of reading everything again for each token. The tokens are the same,
            up to the rounding of two nearly equal probabilities.

    Returns:
        The new tokens, (B, N) int64. After a row's `end_of_text` there is nothing but `end_of_text`; there are fewer
        columns if all rows have ended.

    Raises:
        ValueError: for a value that is not possible.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    length = _checked_length(prompt, length)
    rows, columns = prompt.shape
    uniform = _uniform(_row_seeds(seed, prompt, length), max_new_tokens).to(prompt.device)
    text = torch.cat([prompt, prompt.new_zeros(rows, max_new_tokens)], dim=1)
    # The column in which what a row sees begins.
    start = (columns - length).clamp_min(columns - network.context_length)
    ended = torch.zeros(rows, dtype=torch.bool, device=prompt.device)
    window: _Window | None = None
    with _evaluating(network), _uncompiled(network):
        for step in range(max_new_tokens):
            end = columns + step
            is_full = end - start > network.context_length
            # Without a synchronization with the device while no row can be full.
            if end > network.context_length and is_full.any():
                start = torch.where(is_full, end - max(network.context_length // 2, 1), start)
                window = None
            if window is None or not use_cache:
                window = _Window(network, start, columns + max_new_tokens)
            logits = window.next_logits(text, end)
            token = sample(logits, uniform[:, step], temperature, top_k, top_p)
            if end_of_text is not None:
                token = token.masked_fill(ended, end_of_text)
                ended |= token == end_of_text
            text[:, end] = token
            if end_of_text is not None and ended.all():
                return text[:, columns : end + 1]
    return text[:, columns:]


class _Window:
    """What the rows see, from `start` (B,) on, read once; columns before are padding."""

    def __init__(self, network: GPT, start: Tensor, stop: int) -> None:
        self.network = network
        self.first = int(start.min())
        padding = start - self.first
        capacity = min(network.context_length, stop - self.first)
        self.cache = KeyValueCache(network.n_layers, capacity, padding if padding.any() else None)

    def next_logits(self, text: Tensor, end: int) -> Tensor:
        """Logits (B, V) of the token in column `end`, after reading the columns that were not read so far."""
        unread = text[:, self.first + self.cache.length : end]
        logits: Tensor = self.network(unread, cache=self.cache, head=self._last_logits)
        return logits

    def _last_logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self.network.logits(hidden[:, -1], weight)


def sample(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draw a token from each row of logits (B, V), by inverting the distribution function at `uniform` (B,) in [0, 1).

    Args:
        logits: unnormalised log probabilities.
        uniform: one number for each row.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: see `generate`; of equal logits at the limit the first are kept.
        top_p: see `generate`; counted after `top_k`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Apple's devices have no float64.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    # The largest is 0, so that no temperature makes it infinite.
    scaled = (logits.to(exact) - logits.amax(-1, keepdim=True).to(exact)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, kept = scaled.topk(top_k)
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, kept, values)
    probability = scaled.softmax(-1)
    if top_p is not None:
        ranked, order = probability.sort(dim=-1, descending=True, stable=True)
        # A token is needed if those before it have less than top_p together.
        needed = ranked.cumsum(-1) - ranked < top_p
        probability = probability * torch.zeros_like(needed).scatter(-1, order, needed)
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total in spite of rounding, so that no token of probability 0 is taken.
    place = torch.minimum(uniform[:, None].to(exact) * total, total.nextafter(torch.zeros_like(total)))
    # Logits of NaN, as of a run that diverges, have no place; they still give a token that there is.
    return torch.searchsorted(cumulative, place, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def _row_seeds(seed: int | Sequence[int] | None, prompt: Tensor, length: Tensor) -> list[int]:
    """One seed of 63 bits for each row, made of its own seed and its prompt."""
    rows = len(prompt)
    if seed is None:
        seeds = [secrets.randbits(63) for _ in range(rows)]
    else:
        seeds = [seed] * rows if isinstance(seed, int) else [int(one) for one in seed]
    if len(seeds) != rows:
        raise ValueError(f"seed={seeds}: must be one number, or one for each of {rows} prompts")
    if any(one < 0 for one in seeds):
        raise ValueError(f"seed={seed}: must be 0 or more")
    made = []
    for own, row, tokens in zip(seeds, prompt.tolist(), length.tolist(), strict=True):
        words = " ".join(map(str, [own, *row[len(row) - tokens :]]))
        made.append(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1)
    return made


def _uniform(seeds: Sequence[int], count: int) -> Tensor:
    """Numbers in [0, 1), (B, `count`), a row from each seed; made on the CPU, so that they are the same everywhere."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def _uncompiled(network: GPT) -> AbstractContextManager[None]:
    """Leave compiled code alone inside: each new number of tokens would be compiled anew."""
    if all(module._compiled_call_impl is None for module in network.modules()):
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _evaluating(network: GPT) -> Iterator[None]:
    """Evaluation mode inside; afterwards each layer has the mode that it had."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _checked_length(prompt: Tensor, length: Tensor | None) -> Tensor:
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"prompt: has shape {tuple(prompt.shape)}; needed is (rows, tokens), one token or more")
    rows, columns = prompt.shape
    if length is None:
        return torch.full((rows,), columns, device=prompt.device)
    if length.shape != (rows,) or not bool(((length >= 1) & (length <= columns)).all()):
        raise ValueError(f"length={length.tolist()}: must be {rows} numbers from 1 to {columns}")
    return length.to(prompt.device)


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise a ValueError for a value that `generate` does not take."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be 1 or more, or null for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1, or null for all tokens")
