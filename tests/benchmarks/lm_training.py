"""A GPT of 10 M parameters trained by hand, by trainerkit, and as `transformers` has it: `python -m tests.benchmarks.lm_training`.

GPT-2's architecture (learned positions, LayerNorm, GELU, biases, tied embeddings): 5 layers of 384, vocabulary 4,096,
batches of 8 × 256 tokens; AdamW, clipping, warm-up and cosine, an average of the weights everywhere. The hand-written
loop trains the same network by the same step; `transformers`' GPT-2 (pip install transformers) is trained by that loop
with its own loss. Peak memory of a contender is that of a process of its own.

`python -m tests.benchmarks.lm_training gpu` (one CUDA device): GPT-2 of 124 M parameters, bf16, compiled, sequences of
1,024; milliseconds a step by device events, tokens a second, and model FLOPs utilization.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from tests.benchmarks.mae_training import default_callbacks
from tests.benchmarks.small_steps import Clock
from tests.benchmarks.turns import measure, quiet, table
from trainerkit.callbacks._peak_flops import dense_peak
from trainerkit.callbacks.ema import ema_decay, ema_update_
from trainerkit.data import ArrayDataset, BatchLoader, EpochBatches
from trainerkit.functional.cross_entropy import linear_cross_entropy
from trainerkit.optim import make_optimizer, make_scheduler, warmup_cosine
from trainerkit.tasks.lm import GPT, LanguageModelTask
from trainerkit.trainer import Trainer

STEPS, BATCH, CONTEXT, VOCABULARY = 8, 8, 256, 4096
GPT2 = {"positions": "learned", "activation": "gelu_tanh", "norm": "layernorm", "bias": True, "tie_embeddings": True}
SIZES = {"vocab_size": VOCABULARY, "context_length": CONTEXT, "n_layers": 5, "d_model": 384, "n_heads": 6, **GPT2}
OPTIMIZER = partial(torch.optim.AdamW, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
SCHEDULE = partial(warmup_cosine, warmup_steps=4, min_lr_scale=0.1)


def data(steps: int, batch: int, context: int, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(vocabulary, (steps * batch, context + 1), generator=generator)
    return {"tokens": stream[:, :-1].contiguous(), "targets": stream[:, 1:].contiguous()}


def our_loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, batch["targets"])[0]

    return network(batch["tokens"], head=head)


def their_loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = network(batch["tokens"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def by_hand(make_network: Callable[[], nn.Module], loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor]):
    def run(folder: Path) -> float:
        arrays = data(STEPS, BATCH, CONTEXT, VOCABULARY)
        network = make_network()
        optimizer = make_optimizer(OPTIMIZER, network)
        scheduler = make_scheduler(SCHEDULE, optimizer, total_steps=STEPS, steps_per_epoch=STEPS)
        live = list(network.parameters())
        shadow = [parameter.detach().clone() for parameter in live]
        losses = []
        start = time.perf_counter()
        for step, rows in enumerate(torch.randperm(STEPS * BATCH).split(BATCH)):
            loss = loss_of(network, {name: array[rows] for name, array in arrays.items()})
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(live, 1.0)
            optimizer.step()
            scheduler.step()
            ema_update_(shadow, live, ema_decay(0.999, step))
            losses.append(loss.detach())
        torch.stack(losses).mean().item()
        return (time.perf_counter() - start) / STEPS

    return run


def transformers_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=384, n_layer=5, n_head=6,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip


def trainerkit(folder: Path) -> float:
    clock = Clock()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=CSVLogger(folder), callbacks=[clock, *default_callbacks()],
        gradient_clip_val=1.0, enable_model_summary=False, enable_progress_bar=False, default_root_dir=folder,
    )  # fmt: skip
    task = LanguageModelTask(GPT(**SIZES), optimizer=OPTIMIZER, scheduler=SCHEDULE)
    arrays = data(STEPS, BATCH, CONTEXT, VOCABULARY)
    trainer.fit(task, BatchLoader(ArrayDataset(arrays), EpochBatches(STEPS * BATCH, BATCH, shuffle=True)))
    return clock.seconds / STEPS


CONTENDERS: dict[str, Callable[[Path], float]] = {
    "hand-written": by_hand(lambda: GPT(**SIZES), our_loss),
    "trainerkit, default callbacks": trainerkit,
    "transformers' GPT-2, hand-written": by_hand(transformers_gpt2, their_loss),
}


def peak_memory(name: str) -> float:
    """MiB of a process that does nothing else (Linux)."""
    command = [sys.executable, "-m", "tests.benchmarks.lm_training", "--memory", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(rounds: int = 5) -> None:
    installed = importlib.util.find_spec("transformers") is not None
    contenders = {name: run for name, run in CONTENDERS.items() if installed or not name.startswith("transformers")}
    size = sum(parameter.numel() for parameter in GPT(**SIZES).parameters())
    medians = measure(contenders, rounds)
    table(f"A GPT of {size / 1e6:.1f} M parameters, batches of {BATCH} × {CONTEXT}", medians, "hand-written")
    for name, seconds in medians.items():
        print(f"  {name}: {BATCH * CONTEXT / seconds:,.0f} tokens/s, peak memory {peak_memory(name):.0f} MiB")


# On a GPU


class Events(Callback):
    """Device time from the end of the first ten steps to the end of the last."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx in (9, self.steps - 1):
            self.events[batch_idx > 9].record()

    def seconds_a_step(self) -> float:
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3 / (self.steps - 10)


def gpu(steps: int = 60, batch: int = 32, context: int = 1024, vocabulary: int = 50_304) -> None:
    """The vocabulary is GPT-2's rounded up to a multiple of 128."""
    quiet()
    torch.set_float32_matmul_precision("high")
    sizes = {"vocab_size": vocabulary, "context_length": context, "n_layers": 12, "d_model": 768, "n_heads": 12, **GPT2}
    arrays = data(steps, batch, context, vocabulary)

    def loop(folder: Path) -> float:
        network = GPT(**sizes).cuda()
        optimizer = make_optimizer(OPTIMIZER, network)
        network.compile()
        events = Events(steps)
        for step in range(steps):
            rows = slice(step * batch, (step + 1) * batch)
            with torch.autocast("cuda", torch.bfloat16):
                loss = our_loss(network, {name: array[rows].cuda(non_blocking=True) for name, array in arrays.items()})
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            events.on_train_batch_end(None, None, None, None, step)
        return events.seconds_a_step()

    def fit(folder: Path) -> float:
        events = Events(steps)
        trainer = Trainer(
            max_epochs=1, accelerator="gpu", devices=1, precision="bf16-mixed", logger=CSVLogger(folder),
            callbacks=[events, *default_callbacks()], gradient_clip_val=1.0, enable_model_summary=False,
            enable_progress_bar=False, default_root_dir=folder,
        )  # fmt: skip
        task = LanguageModelTask(GPT(**sizes), optimizer=OPTIMIZER)
        task.network.compile()
        trainer.fit(task, BatchLoader(ArrayDataset(arrays), EpochBatches(steps * batch, batch, shuffle=False)))
        return events.seconds_a_step()

    medians = measure({"hand-written": loop, "trainerkit, default callbacks": fit}, rounds=3)
    table(f"GPT-2, bf16, compiled, batches of {batch} × {context}", medians, "hand-written")
    network = GPT(**sizes)
    parameters = sum(parameter.numel() for name, parameter in network.named_parameters() if "position" not in name)
    flops = batch * context * (6 * parameters + 12 * 12 * 768 * context)  # PaLM, appendix B
    peak = dense_peak(torch.cuda.get_device_name(), "bfloat16")
    for name, seconds in medians.items():
        mfu = f", MFU {flops / seconds / peak:.3f}" if peak else ""
        print(f"  {name}: {batch * context / seconds:,.0f} tokens/s{mfu}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        quiet()
        with tempfile.TemporaryDirectory() as folder:
            CONTENDERS[sys.argv[2]](Path(folder))
        # Not ru_maxrss, which a process takes over from the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
    elif sys.argv[1:2] == ["gpu"]:
        gpu()
    else:
        main(*map(int, sys.argv[1:]))
