"""The adapters that `stage=predict` writes: a folder each, which the package `peft` loads."""

import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainerkit.adapters import write_adapter
from trainerkit.tasks.t2l.task import TextToLoraTask

_SHOWN = 8  # folders on the screen


@runtime_checkable
class HasDescriptions(Protocol):
    """A data module that knows what it asks for."""

    predict_texts: list[str]


class WriteAdapters(Callback):
    """Write each predicted adapter as a folder of PEFT: `adapters/0000-it-is-red`, numbered as the descriptions are.

    A folder of the same name is replaced; those of other descriptions, written before, stay.

    Args:
        dirname: folder, relative to `trainer.default_root_dir`.
        base_model_name_or_path: what stands in the adapters' configuration as their base model.
        task_type: of PEFT, such as 'CAUSAL_LM'; None for any module.

    Raises:
        ValueError: for an empty folder's name; in `setup`, for another task.
    """

    def __init__(
        self, dirname: str = "adapters", base_model_name_or_path: str = "", task_type: str | None = None
    ) -> None:
        if not dirname:
            raise ValueError(f"dirname={dirname!r}: must be the name of a folder")
        self.dirname = dirname
        self.base_model_name_or_path = base_model_name_or_path
        self.task_type = task_type
        self.paths: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the task before anything is done."""
        if not isinstance(pl_module, TextToLoraTask):
            raise ValueError(f"task={type(pl_module).__name__}: WriteAdapters needs a TextToLoraTask")
        self.paths = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write this process' adapters."""
        assert isinstance(pl_module, TextToLoraTask)
        data = getattr(trainer, "datamodule", None)
        texts = data.predict_texts if isinstance(data, HasDescriptions) else []
        factors = {key: outputs[key].float().cpu() for key in pl_module.layout.keys}
        for place, index in enumerate(outputs["index"].tolist()):
            name = f"{index:04}" + (f"-{slug(texts[index])}" if index < len(texts) else "")
            path = Path(trainer.default_root_dir) / self.dirname / name
            own = {key: factor[place] for key, factor in factors.items()}
            write_adapter(path, pl_module.layout, own, self.base_model_name_or_path, self.task_type)
            self.paths.append(path)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        own = torch.tensor(float(len(self.paths)), device=trainer.strategy.root_device)
        count = int(trainer.strategy.reduce(own, reduce_op="sum"))
        if trainer.is_global_zero:
            print()  # the line before is the progress bar's
            for path in self.paths[:_SHOWN]:
                print(f"  {path}")
            folder = Path(trainer.default_root_dir) / self.dirname
            print(f"{count} adapter{'s' * (count != 1)} written into {folder}")


def slug(text: str, longest: int = 48) -> str:
    """Letters and digits of a text in lower case, everything else as single dashes; at most `longest` characters."""
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    return words[:longest].rstrip("-")
