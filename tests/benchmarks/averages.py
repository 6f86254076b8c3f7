"""What an average of the weights costs: `python -m tests.benchmarks.averages`.

One update, turn by turn, for 400 tensors of 16 numbers and for 28 million numbers in 36 tensors: a bare
`torch._foreach_lerp_` (the limit), EMA, Lightning's EMAWeightAveraging, torch's AveragedModel with its foreach function,
ema-pytorch where it is installed (pip install --no-deps ema-pytorch==0.8.3). Then what a validation pays for having the
average: swap in and out.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.benchmarks.turns import quiet, table
from trainerkit.callbacks import EMA


class Weights(LightningModule):
    """Nothing but parameters."""

    def __init__(self, tensors: int, numbers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(numbers)) for _ in range(tensors))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def contenders(tensors: int, numbers: int) -> dict[str, Callable[[], object]]:
    """One update by each."""
    module = Weights(tensors, numbers)
    optimizer = module.configure_optimizers()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy._lightning_module = module
    trainer.strategy.optimizers = [optimizer]

    ema = EMA()
    ema.on_fit_start(trainer, module)
    lightnings = EMAWeightAveraging()
    lightnings.setup(trainer, module, "fit")
    torchs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    torchs.update_parameters(module)
    shadow = [p.detach().clone() for p in module.parameters()]
    live = [p.detach() for p in module.parameters()]
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total

    def lightning_step() -> None:
        steps.completed += 1  # what trainer.global_step reads
        lightnings.on_train_batch_end(trainer, module, None, None, 0)

    def validation() -> None:
        ema._swap_in(module)
        ema._swap_out()

    return {
        "bare torch._foreach_lerp_": lambda: torch._foreach_lerp_(shadow, live, 0.001),
        "EMA": lambda: ema._after_step(trainer, 0, optimizer),
        "Lightning's EMAWeightAveraging": lightning_step,
        "torch's AveragedModel, foreach": lambda: torchs.update_parameters(module),
        "EMA, swapped for a validation and back": validation,
        "Lightning's, the same": lambda: (lightnings._swap_models(module), lightnings._swap_models(module)),
    }


def against_ema_pytorch(tensors: int, numbers: int) -> dict[str, Callable[[], object]]:
    """As fast as ema-pytorch goes: an update a step, no start to wait for, its foreach option."""
    from ema_pytorch import EMA as Theirs

    module = Weights(tensors, numbers)
    theirs = Theirs(module, beta=0.999, update_every=1, update_after_step=0, use_foreach=True)
    ours = contenders(tensors, numbers)
    names = ("bare torch._foreach_lerp_", "EMA")
    return {name: ours[name] for name in names} | {"ema-pytorch, foreach": theirs.update}


def median(functions: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Seconds a call, the contenders taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            if number:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(rounds: int = 21) -> None:
    """Print both tables."""
    quiet()
    torch.set_num_threads(1)
    for tensors, numbers, repeats in ((400, 16, 20), (36, 28_000_000 // 36, 2)):
        medians = median(contenders(tensors, numbers), rounds, repeats)
        title = f"{tensors} tensors, {tensors * numbers:,} numbers, one thread"
        table(title, medians, against="bare torch._foreach_lerp_")
        ratio = medians["Lightning's EMAWeightAveraging"] / medians["EMA"]
        print(f"  EMA is {ratio:.1f} times as fast as Lightning's")
        if importlib.util.find_spec("ema_pytorch"):
            # By itself: what one contender leaves in the allocator decides what the temporaries of another cost.
            medians = median(against_ema_pytorch(tensors, numbers), rounds, repeats)
            table(title, medians, against="bare torch._foreach_lerp_")


if __name__ == "__main__":
    main()
