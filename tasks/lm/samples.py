"""Text that the model writes: samples after each validation, and the answers of `stage=predict`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainerkit.files import replacing
from trainerkit.functional.padding import left_padded
from trainerkit.tasks.lm.task import LanguageModelTask

_SHOWN = 4  # answers on the screen; all are in the file


class Tokenizer(Protocol):
    """What turns text into tokens and back."""

    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""


class TextSamples(Callback):
    """Keep what a `LanguageModelTask` writes.

    After each validation it goes on from the same prompts, into `samples/step-00000100.txt` in the run's folder; with
    the averaged weights where `EMA` keeps some. In `stage=predict` prompts and answers go to `predictions/text.jsonl`,
    a line each in the order of the prompts, and the first to the screen. Length and way of sampling are the task's.

    Args:
        prompts: what to go on from; "" is the start of a document.
        dirname: folder of the samples, relative to `trainer.default_root_dir`.

    Raises:
        ValueError: without a prompt; in `setup`, if the data module has no tokenizer.
    """

    def __init__(self, prompts: Sequence[str] = ("", "def ", "class ", "import "), dirname: str = "samples") -> None:
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts={prompts}: must be a list of one or more texts")
        self.prompts = list(prompts)
        self.dirname = dirname
        self._answers: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the tokenizer and the task before anything is trained."""
        if not isinstance(pl_module, LanguageModelTask):
            raise ValueError(f"task={type(pl_module).__name__}: TextSamples needs a LanguageModelTask")
        if not hasattr(getattr(trainer, "datamodule", None), "tokenizer"):
            raise ValueError("data=: TextSamples needs a data module with a tokenizer; leave it out by its key=null")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a file of samples; sharded parameters need every process for that."""
        assert isinstance(pl_module, LanguageModelTask)
        if trainer.sanity_checking:
            return
        tokenizer = _tokenizer(trainer)
        end = tokenizer.end_of_text  # where every document begins
        prompt, length = left_padded([[end, *tokenizer.encode(text)] for text in self.prompts], end)
        answers = pl_module.generate(prompt.to(pl_module.device), length.to(pl_module.device)).tolist()
        if trainer.is_global_zero:
            texts = [
                f"--- {text!r}\n{text}{_decode(tokenizer, answer)}\n"
                for text, answer in zip(self.prompts, answers, strict=True)
            ]
            # At the step of the metrics of this validation.
            path = Path(trainer.default_root_dir) / self.dirname / f"step-{trainer.global_step:08}.txt"
            with replacing(path) as temporary:
                temporary.write_text("\n".join(texts), encoding="utf-8")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._answers = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Turn a batch's tokens into text."""
        tokenizer = _tokenizer(trainer)
        parts = (batch["index"], batch["prompt"], batch["length"], outputs["tokens"])
        for index, prompt, length, answer in zip(*(part.tolist() for part in parts), strict=True):
            given = prompt[len(prompt) - length :]
            if given[:1] == [tokenizer.end_of_text]:  # where every document begins
                given = given[1:]
            text = {"prompt": tokenizer.decode(given), "text": _decode(tokenizer, answer)}
            self._answers.append({"index": index, **text})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the answers of all processes, in the order of the prompts."""
        gathered: list[Any] = [self._answers]
        if trainer.world_size > 1:
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._answers)
        if not trainer.is_global_zero:
            return
        answers = {answer["index"]: answer for part in gathered for answer in part}  # a repeated row stands once
        ordered = [answers[index] for index in sorted(answers)]
        path = Path(trainer.default_root_dir) / "predictions" / "text.jsonl"
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in ordered), encoding="utf-8")
        print()  # the line before is the progress bar's
        for answer in ordered[:_SHOWN]:
            print(f"--- {answer['prompt']!r}\n{answer['prompt']}{answer['text']}")
        print(f"\n{len(ordered)} prompt{'s' if len(ordered) > 1 else ''} answered in {path}")


def _tokenizer(trainer: Trainer) -> Tokenizer:
    # Lightning's connectors set the attribute, so that type checkers do not see it; `setup` has looked for it.
    tokenizer: Tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
    return tokenizer


def _decode(tokenizer: Tokenizer, answer: list[int]) -> str:
    """The text up to the end of the document."""
    end = answer.index(tokenizer.end_of_text) if tokenizer.end_of_text in answer else len(answer)
    return tokenizer.decode(answer[:end])
