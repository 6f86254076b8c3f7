"""What a generation goes on from: prompts of different lengths as rows of one."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from trainerkit.data.loader import ArrayDataset
from trainerkit.errors import UserError


def read_prompts(path: str, field: str) -> list[str]:
    """Prompts from a file, one a line.

    Args:
        path: of a text, where an empty line is an empty prompt; or of a .jsonl, where empty lines are left out.
        field: of a line of JSON that holds the prompt.

    Raises:
        UserError: for a file that cannot be read or is empty, or a line without the field.
    """
    file = Path(path).expanduser()
    try:
        # Not splitlines(), which also cuts at characters that stand within a line of JSON.
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={path}: cannot be read ({error}).") from error
    if file.suffix == ".jsonl":
        lines = [_field_of(line, number, path, field) for number, line in enumerate(lines, start=1) if line.strip()]
    if not any(lines):
        raise UserError(f"prompt_file={path}: is empty; needed is a prompt a line.")
    return lines


def prompt_rows(prompts: Sequence[Sequence[int]], filler: int) -> ArrayDataset:
    """Prompts as rows: `{"prompt": (N, P) filled up on the left, "length": (N,) without what was filled up}`."""
    longest = max(map(len, prompts))
    rows = [[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return ArrayDataset({"prompt": torch.tensor(rows), "length": torch.tensor([len(prompt) for prompt in prompts])})


def _field_of(line: str, number: int, path: str, field: str) -> str:
    try:
        prompt = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, IndexError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f"prompt_file={path}: line {number} is no object of JSON with text in the field {field!r}.")
    return prompt
