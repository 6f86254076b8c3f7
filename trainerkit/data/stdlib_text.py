"""The interpreter's own standard library as text: `data=stdlib_text`, nothing is fetched.

734 files of Python without tests, 12.1 MB, in 3.11.7, of which 66 files with 0.70 MB are held out. Another version of
Python has others. Licence: PSF.
"""

import sysconfig
from pathlib import Path
from typing import Literal

from trainerkit.data.text import TextData
from trainerkit.data.text_files import Source

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class StdlibText(TextData):
    """Python's standard library without its tests; whole files train or validate, by a hash of their names.

    Args:
        tokenizer: see `TextData`, as all that follow.
        vocab_size: of the BPE.
        end_of_text: of a tokenizer.json.
        context_length: tokens of a row.
        documents: 'packed' or 'separate'.
        val_fraction: share of the files for validation.
        test_fraction: share of the files for the test.
        eval_stride: tokens from a window to the next in evaluation.
        shift_windows: whether training windows begin at other places in each epoch.
        batch_size: rows a batch and process.
        num_workers: processes that read ahead.
        cache_dir: where tokens are kept.
        shard_bytes: text of a shard.
        tokenize_workers: processes that tokenise.
        prompt: what to go on from in prediction.
        prompt_file: the same from a file.
        seed: of the order of the windows.
    """

    def __init__(
        self,
        *,
        tokenizer: str = "bpe",
        vocab_size: int | None = 4096,
        end_of_text: str | None = None,
        context_length: int = 128,
        documents: Literal["packed", "separate"] = "packed",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        eval_stride: int | None = None,
        shift_windows: bool = True,
        batch_size: int = 8,
        num_workers: int = 0,
        cache_dir: str | None = None,
        shard_bytes: int = 16_777_216,
        tokenize_workers: int | None = None,
        prompt: str | None = None,
        prompt_file: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            sysconfig.get_path("stdlib"),
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            end_of_text=end_of_text,
            context_length=context_length,
            documents=documents,
            split="files",
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            eval_stride=eval_stride,
            shift_windows=shift_windows,
            batch_size=batch_size,
            num_workers=num_workers,
            cache_dir=cache_dir,
            shard_bytes=shard_bytes,
            tokenize_workers=tokenize_workers,
            prompt=prompt,
            prompt_file=prompt_file,
            seed=seed,
        )

    def sources(self) -> list[Source]:
        """Its .py files, sorted by name."""
        root = Path(self.paths[0])
        files = [path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts[:-1])]
        names = {path.relative_to(root).as_posix(): path for path in files}
        return [Source(names[name], name, "file") for name in sorted(names)]
