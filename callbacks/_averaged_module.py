"""What EMA hangs on the module it averages: the average goes into files, and gives way to weights from files."""

import copy
from functools import partial
from typing import Any

from torch import nn


class SavesAverage:
    """A module's `on_save_checkpoint` with the average put in before.

    The module's hook is the only one that Lightning calls for a checkpoint with `save_weights_only` as well. It stays
    after fit, when a checkpoint may be saved too; a copy or pickle of the module has its own hook again.
    """

    def __init__(self, original: Any, ema: Any) -> None:
        self.original = original
        self.ema = ema

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        module = self.original.__self__
        if module._trainer is not None and self.ema in module.trainer.callbacks:  # not a later fit without it
            self.ema.put_into(checkpoint)
        self.original(checkpoint)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return self.original.__reduce__()


class GivesWay:
    """Tells an average that weights were loaded into its module; a copy or pickle of the module tells nobody."""

    def __init__(self, ema: Any) -> None:
        self.ema = ema

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        self.ema.give_way(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # it asks which module it is

    def __reduce__(self) -> Any:
        return partial, (_ignore,)


def _ignore(*_: Any) -> None:
    return None
