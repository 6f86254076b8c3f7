"""What a generation goes on from: prompts of different lengths as rows of one, and their loader."""

import json
from pathlib import Path

from trainerkit.data.loader import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.data.tokenizers import Tokenizer
from trainerkit.errors import UserError
from trainerkit.functional.padding import left_padded


def read_prompts(path: str, field: str, key: str = "prompt_file") -> list[str]:
    """Prompts from a file, one a line.

    Args:
        path: of a text, where an empty line is an empty prompt; or of a .jsonl, where empty lines are left out.
        field: of a line of JSON that holds the prompt.
        key: what named the file, for messages.

    Raises:
        UserError: for a file that cannot be read or is empty, or a line without the field.
    """
    file = Path(path).expanduser()
    try:
        # Not splitlines(), which also cuts at characters that stand within a line of JSON.
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path}: cannot be read ({error}).") from error
    if file.suffix == ".jsonl":
        lines = [
            _field_of(line, f"{key}={path}: line {number}", field)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not any(lines):
        raise UserError(f"{key}={path}: is empty; needed is a text a line.")
    return lines


def prompt_loader(
    prompt: str | None,
    prompt_file: str | None,
    field: str,
    *,
    tokenizer: Tokenizer,
    context_length: int,
    batch_size: int,
    world: dict[str, int],
) -> BatchLoader:
    """Batches of prompts, in order.

    Args:
        prompt: the only one; None for nothing but the end of text.
        prompt_file: where they are instead, see `read_prompts`.
        field: of a line of JSON.
        tokenizer: by which they become tokens.
        context_length: tokens of the longest, at most.
        batch_size: prompts a batch and process.
        world: `num_replicas` and `rank` of `EpochBatches`.

    Raises:
        UserError: for a file that cannot be used, a prompt that is too long, or fewer prompts than processes.
    """
    texts = [prompt or ""] if prompt_file is None else read_prompts(prompt_file, field)
    where = f"prompt_file={prompt_file}" if prompt_file is not None else "prompt"
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
    longest, processes = max(map(len, prompts)), world.get("num_replicas", 1)
    if longest > context_length:
        allowed = f"allowed are context_length={context_length}"
        raise UserError(f"{where}: {longest} tokens, the end of text among them; {allowed}.")
    if len(prompts) < processes:
        raise UserError(f"{where}: each of {processes} processes needs a prompt, and there are {len(prompts)}.")
    tokens, length = left_padded(prompts, tokenizer.end_of_text)
    dataset = ArrayDataset({"prompt": tokens, "length": length})
    return BatchLoader(dataset, EpochBatches(len(dataset), batch_size, shuffle=False, even=False, **world))


def check_prompts(prompt: str | None, prompt_file: str | None) -> None:
    """Refuse a prompt beside a file of them, by a ValueError."""
    if prompt is not None and prompt_file is not None:
        raise ValueError(f"prompt_file={prompt_file}: give a prompt or a file of them, not both")


def _field_of(line: str, place: str, field: str) -> str:
    try:
        prompt = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, IndexError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f"{place} is no object of JSON with text in the field {field!r}.")
    return prompt
