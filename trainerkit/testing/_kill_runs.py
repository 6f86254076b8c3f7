"""What the kill harness runs: each task small, in the ways that a resume has to be exact in."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Steps often enough that a kill falls between two checkpoints of one epoch.
SAVE_EVERY = 3

# Overrides by name. What they change goes with any task; a check of everything that a resume could forget.
CONFIGURATIONS: dict[str, list[str]] = {
    "plain": [],
    "workers": ["data.num_workers=2"],
    "ema_accumulation": [
        "callbacks.ema.decay=0.9",
        "callbacks.ema.warmup=false",
        "callbacks.ema.every_n_steps=2",
        "callbacks.ema.start_step=3",
        # The last window of an epoch is shorter.
        "trainer.accumulate_grad_batches=3",
    ],
    "unfreezing_epochs": [
        "callbacks=[default,progressive_unfreezing]",
        "callbacks.progressive_unfreezing.every_n_epochs=2",
        "callbacks.progressive_unfreezing.warmup_steps=15",
    ],
    "unfreezing_steps": [
        "callbacks=[default,progressive_unfreezing]",
        "callbacks.progressive_unfreezing.every_n_steps=7",
        "callbacks.progressive_unfreezing.warmup_steps=5",
    ],
    "early_stopping": [
        "callbacks.early_stopping.patience=2",
        "callbacks.early_stopping.start_ratio=0.5",
        # Larger than any improvement: it ends when patience and ratio say so, long before the last epoch.
        "callbacks.early_stopping.min_delta=1000",
    ],
    "validation_in_epoch": ["trainer.val_check_interval=4"],
    "asynchronous": ["callbacks.crash_safe_checkpoint.asynchronous=true"],
    "ddp": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
}

# Of several optimizers each accumulates for itself.
_SEVERAL = {
    ("gan", "trainer.accumulate_grad_batches=3"): "task.optimizers.discriminator.accumulate_grad_batches=3",
}


def small_run(task: str, configuration: str, folder: Path) -> list[str]:
    """The command line of a run of about a second.

    Args:
        task: a choice of the group `task`; one that is not known here needs overrides that keep it short.
        configuration: a name of `CONFIGURATIONS`.
        folder: where data may be written, once.
    """
    overrides = [f"task={task}"]
    if task in SMALL:
        overrides += SMALL[task](folder)
    overrides += [_SEVERAL.get((task, word), word) for word in CONFIGURATIONS[configuration]]  # may say otherwise
    if configuration != "ddp":
        overrides.append("trainer=cpu")
    return [
        *overrides,
        "trainer.max_epochs=6",
        "trainer.log_every_n_steps=3",
        "callbacks.progress_bar=null",
        "+callbacks.beacon._target_=trainerkit.testing._beacon.Beacon",
        f"callbacks.crash_safe_checkpoint.save_every={SAVE_EVERY}",
        "out_dir=run",
    ]


def _mae(folder: Path) -> list[str]:
    """400 spectra of 40 bands, ten steps an epoch, three batches to validate."""
    path = folder / "spectra.npy"
    if not path.exists():
        place = np.linspace(0, 2 * np.pi, 40)
        curves = np.stack([np.sin(k * place + k) for k in (1, 2, 3)])
        np.save(path, (np.random.default_rng(0).normal(size=(400, 3)) @ curves).astype("float32"))
    return [
        "data=spectra",
        f"data.path={path}",
        "data.batch_size=32",
        "data.val_fraction=0.2",
        "task.network.n_patches=8",
        "task.network.n_mask=6",
        "task.network.latent_dim=4",
        "task.network.d_model=16",
        "task.network.nhead=2",
        "task.network.num_layers=1",
        "task.network.dim_feedforward=32",
        "task.network.decoder_dim=16",
        "task.network.decoder_num_layers=1",
        "task.network.dropout=0.1",
        "callbacks.reconstruction_report.probes=false",
        "callbacks.reconstruction_report.pictures=false",
    ]


def _lm(folder: Path) -> list[str]:
    """20,000 letters of text, some nine steps an epoch, three batches to validate."""
    path = folder / "text.txt"
    if not path.exists():
        words = np.random.default_rng(0).choice(["one", "two", "three", "four", "five", "six"], size=4600)
        path.write_text("\n".join(" ".join(line) for line in words.reshape(-1, 10)) + "\n", encoding="utf-8")
    return [
        "data=text",
        f"data.path={path}",
        f"data.cache_dir={folder / 'cache'}",
        "data.context_length=32",
        "data.batch_size=64",
        "data.test_fraction=0.1",
        "task.network.n_layers=1",
        "task.network.d_model=16",
        "task.network.n_heads=2",
        "task.network.dropout=0.1",
        "task.max_new_tokens=4",
        "trainer.val_check_interval=9",
        # Measure time and memory, which no two runs have the same.
        "callbacks.throughput=null",
        "callbacks.memory_monitor=null",
    ]


def _retrieval(folder: Path) -> list[str]:
    """180 questions and answers, some nine steps an epoch in chunks, three batches to validate, mined negatives."""
    path = folder / "pairs.jsonl"
    if not path.exists():
        names = np.random.default_rng(0).choice(["ab", "ce", "di", "fo", "gu"], size=(180, 3))
        rows = [
            {"query": f"{one} {other} {i}", "positive": f"{other} {i} {last}"}
            for i, (one, other, last) in enumerate(names)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mining = "callbacks.hard_negatives"
    return [
        "data=pairs",
        f"data.path={path}",
        "data.mode=t2t",
        "data.batch_size=16",
        "data.max_length=8",
        "data.n_buckets=256",
        "data.val_fraction=0.2",
        "data.test_fraction=0.1",
        "data.mined_negatives=2",
        "task.encoder.text._target_=trainerkit.tasks.retrieval.TextTransformer",
        "++task.encoder.text.max_length=8",
        "task.encoder.text.dim=16",
        "++task.encoder.text.layers=1",
        "++task.encoder.text.heads=2",
        "task.encoder.text.dropout=0.1",
        "task.encoder.dim=16",
        "task.gradient_cache=true",
        "task.gradient_cache_chunk_size=6",
        "task.loss.learnable_temperature=true",
        f"++{mining}._target_=trainerkit.tasks.retrieval.HardNegatives",
        f"++{mining}.k=2",
        f"++{mining}.sample=random",
        "callbacks.neighbours.n_queries=2",
        "trainer.check_val_every_n_epoch=1",
    ]


def _t2l(folder: Path) -> list[str]:
    """80 rules with adapters that have learnt little, eight steps an epoch; half of the layers come in by a ramp."""
    progressive = "++task.progressive"
    return [
        f"data.cache_dir={folder / 'cache'}",
        "data.rules=80",
        "data.val_rules=6",
        "data.test_rules=10",
        "data.steps=2",
        "data.base_steps=2",
        "data.objects=8",
        "data.batch_size=8",
        "task.network.latent_dim=16",
        "task.network.head_dim=16",
        "task.network.dropout=0.1",
        "task.loss.sparsity=0.01",
        "task.loss.consistency=0.1",
        f"{progressive}._target_=trainerkit.tasks.t2l.Progressive",
        f"{progressive}.initial_layers=[up]",
        f"{progressive}.layer_addition_interval=1",
        f"{progressive}.layer_warmup_steps=10",
    ]


def _classification(folder: Path) -> list[str]:
    """808 digits, nine steps an epoch, one batch to validate; all that draws at random is on."""
    return [
        "data.batch_size=90",
        "task.network.backbone.widths=[8]",
        "task.network.dropout=0.1",
        "task.mixup=0.4",
        "task.augment.mirror=0.5",
        "callbacks.classification_report.baselines=false",
        "callbacks.classification_report.picture=false",
    ]


def _gan(folder: Path) -> list[str]:
    """The 808 digits of 8 x 8 pixels, nine steps an epoch; the generator's window of two batches holds one at times."""
    optimizers = "task.optimizers"
    return [
        "data=digits",
        "data.batch_size=96",
        "task.noise_dim=8",
        "task.generator.width=8",
        "task.discriminator.width=8",
        "task.r1=0.1",
        "task.r1_every=2",
        f"{optimizers}.generator.accumulate_grad_batches=2",
        f"{optimizers}.discriminator.gradient_clip_val=1.0",
        "callbacks.sample_report.judge_steps=10",
        "callbacks.sample_grid.rows=1",
    ]


# The tasks that ship, each with data written into a folder and a network of milliseconds.
SMALL: dict[str, Callable[[Path], list[str]]] = {
    "classification": _classification,
    "gan": _gan,
    "lm": _lm,
    "mae": _mae,
    "retrieval": _retrieval,
    "t2l": _t2l,
}
