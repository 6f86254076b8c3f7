"""Run a training step again from the file that NonFiniteGuard wrote, and say what goes bad first.

    python -m trainerkit.callbacks._replay non_finite/step00000012_rank0.pt --module train.py:Module

The module is made of its class and the hyperparameters that it saved (`save_hyperparameters`). If it needs more, make
it yourself: `NonFiniteGuard.replay(path, Module(...))`. A script that is named as file.py:Class is imported, so its
`fit` has to stand under `if __name__ == "__main__":`. Exit code: 1 if something is not finite, 0 if everything is, 2 if
it could not be run.
"""

import argparse
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import nn

from trainerkit.callbacks._non_finite import FORMAT, Finding, Replay
from trainerkit.callbacks._parameters import named_parameters, plain_name
from trainerkit.callbacks._twin import make_twin
from trainerkit.callbacks.exact_resume import set_random_state


def replay(path: str | Path, module: Any, batch: Any = None, device: str | None = None) -> Finding | None:
    """As `NonFiniteGuard.replay`."""
    content = read_dump(path)
    kind = device or (content["device"] if content["device"] != "cuda" or torch.cuda.is_available() else "cpu")
    batch = content.get("batch") if batch is None else batch
    if batch is None:
        raise ValueError(f"batch=None: must be given, for the dump has none: {content.get('batch_left_out')}")
    trainer = _trainer_for(module, content, kind)
    trainer.strategy.connect(module)
    module.trainer = trainer
    module.configure_model()
    module = trainer.precision_plugin.convert_module(module).to(kind)
    _load(module, content)
    if not module.automatic_optimization:
        trainer.strategy.setup_optimizers(trainer)  # for training_step asks for them; they do not step
    twin = make_twin(trainer, module)
    set_random_state(content["random"])
    run = Replay(twin, trainer.precision_plugin.train_step_context, lambda loss: loss)
    found = run.step(move_data_to_device(batch, kind), content["batch_idx"])
    module.trainer = None  # it ends here
    return found


def read_dump(path: str | Path) -> dict[str, Any]:
    """The content of a dump.

    Raises:
        ValueError: if the file is something else.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"path={path}: must be a dump of NonFiniteGuard (format {FORMAT})")
    return content


def _trainer_for(module: Any, content: dict[str, Any], kind: str) -> Any:
    """A trainer of the module's own namespace, at the epoch and step of the dump."""
    home = next(cls.__module__ for cls in type(module).__mro__ if cls.__name__ == "LightningModule")
    precision = content["precision"]
    trainer = importlib.import_module(home.partition(".core")[0]).Trainer(
        accelerator={"cuda": "gpu"}.get(kind, kind),
        devices=1,
        precision="bf16-mixed" if kind == "cpu" and precision == "16-mixed" else precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loop = trainer.fit_loop
    loop.epoch_progress.current.completed = content["epoch"]
    loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = content["global_step"]
    loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = content["global_step"]
    return trainer


@torch.no_grad()
def _load(module: nn.Module, content: dict[str, Any]) -> None:
    """Give the module the weights, buffers and modes of the dump."""
    parameters = named_parameters(module)
    if odd := sorted(set(parameters) ^ set(content["weights"])):
        raise ValueError(f"module={type(module).__name__}: must have the weights of the dump; not in both: {odd[:5]}")
    for name, parameter in parameters.items():
        parameter.copy_(content["weights"][name])
        parameter.requires_grad_(name not in content["frozen"])
    modules = {plain_name(name): part for name, part in module.named_modules()}
    for name, part in modules.items():
        part.training = name not in content["evaluating"]
    for name, buffer in content["buffers"].items():
        owner, _, key = name.rpartition(".")
        live = modules[owner]._buffers[key] if owner in modules else None
        if live is not None:
            modules[owner]._buffers[key] = buffer.to(live)


def find_class(spelled: str) -> Any:
    """The class that 'package.module:Class' or 'file.py:Class' names.

    Raises:
        ValueError: if there is none.
    """
    home, _, name = spelled.rpartition(":")
    if not home or not name:
        raise ValueError(f"module={spelled}: must be package.module:Class or file.py:Class")
    try:
        if home.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(home).stem, home)
            assert spec is not None
            assert spec.loader is not None
            found: Any = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(Path(home).resolve().parent))
            sys.modules.setdefault(spec.name, found)
            spec.loader.exec_module(found)
        else:
            sys.path.insert(0, "")
            found = importlib.import_module(home)
        for part in name.split("."):
            found = getattr(found, part)
    except (OSError, ImportError, AttributeError) as error:
        raise ValueError(f"module={spelled}: must be package.module:Class or file.py:Class; {error}") from error
    return found


def build(kind: Any, hyperparameters: dict[str, Any]) -> Any:
    """The module from the hyperparameters that it saved.

    Raises:
        ValueError: if it needs more.
    """
    known = inspect.signature(kind).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    try:
        return kind(**{key: value for key, value in hyperparameters.items() if takes_any or key in known})
    except TypeError as error:
        raise ValueError(
            f"module={kind.__name__}: cannot be made of its saved hyperparameters {sorted(hyperparameters)} ({error}); "
            "call NonFiniteGuard.replay(dump, module) from Python"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainerkit.callbacks._replay", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("dump", help="the file that NonFiniteGuard wrote")
    parser.add_argument("--module", required=True, help="package.module:Class or file.py:Class of the LightningModule")
    parser.add_argument("--device", help="cpu or cuda; default: what the step ran on")
    given = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    try:
        content = read_dump(given.dump)
        found = replay(given.dump, build(find_class(given.module), content["hyperparameters"]), device=given.device)
    except (ValueError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    print(f"optimizer step {content['step']} (epoch {content['epoch']}, batch {content['batch_idx']})")
    print(f"  then:  {content['finding']}")
    print(f"  again: {found.text if found else 'everything is finite'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
