"""What a sweep leaves: a record beside each job's results, and a table of all of them, best on top."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from trainerkit.errors import UserError, did_you_mean
from trainerkit.files import replacing, write_json
from trainerkit.sweep_picture import draw

DIRECTIONS = ("minimize", "maximize")
_RECORD = "job.json"
_LONGEST = 24  # jobs of a table on the screen; all are in results.csv
_WIDEST = 28  # characters of a value on the screen


@dataclass(frozen=True)
class Objective:
    """What the jobs of a sweep are compared by.

    Attributes:
        metric: its name, e.g. 'val/loss'.
        direction: 'minimize' or 'maximize'.
    """

    metric: str
    direction: str

    def sorted(self, jobs: Iterable["Job"]) -> list["Job"]:
        """The best first, what has no value last."""
        sign = 1 if self.direction == "minimize" else -1
        return sorted(jobs, key=lambda job: (job.value is None, sign * (job.value or 0.0), job.number))


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        number: of the job, and the name of its folder.
        params: what the sweep gave it, as text, by key.
        value: of the objective; None if it has none.
        metrics: all that the run came to, by name.
        seconds: how long this took, the last time.
        error: why there is no value; None if there is one.
    """

    number: int
    params: dict[str, str]
    value: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float | None = None
    error: str | None = "not finished"


def objective(cfg: DictConfig) -> Objective:
    """What `sweep.metric` and `sweep.direction` say; null is what the best checkpoint is chosen by.

    Raises:
        UserError: for another direction.
    """
    checkpoint = OmegaConf.select(cfg, "callbacks.crash_safe_checkpoint")
    monitored = checkpoint.get("monitor") if isinstance(checkpoint, DictConfig) else None
    metric = OmegaConf.select(cfg, "sweep.metric") or monitored or "val/loss"
    own = DIRECTIONS[checkpoint.get("mode") == "max"] if metric == monitored else None
    direction = OmegaConf.select(cfg, "sweep.direction") or own or "minimize"
    if direction not in DIRECTIONS:
        raise UserError(f"sweep.direction={direction}: must be one of {', '.join(DIRECTIONS)}, or null.")
    if own not in (None, direction):
        raise UserError(
            f"sweep.direction={direction}: is the opposite of callbacks.crash_safe_checkpoint.mode, by which a run's "
            f"best {metric} is chosen."
        )
    return Objective(str(metric), direction)


def value_of(metric: str, metrics: dict[str, Any], best: dict[str, Any]) -> float:
    """A run's value of a metric: of what the best checkpoint is chosen by the best, else what the run ended with.

    Args:
        metric: its name.
        metrics: what the run ended with.
        best: the value that the best checkpoint was chosen by, by name.

    Raises:
        UserError: if the run has no such metric, or it is no number.
    """
    values = metrics | best
    if metric not in values:
        known = sorted(values)
        raise UserError(
            f"sweep.metric={metric}: the run has no such metric. {did_you_mean(metric, known)}\n"
            f"It has: {', '.join(known) or 'none'}"
        )
    value = values[metric]
    if value is None or not math.isfinite(value):
        raise UserError(f"{metric} came to {math.nan if value is None else value}.")
    return float(value)


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """The keys to which overrides give more than one value, or a range; of two for one key the last counts."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    last = {override.get_key_element(): override for override in parsed}
    return [key for key, override in last.items() if override.is_sweep_override()]


def check_folder(folder: Path, overrides: Sequence[str], swept: Sequence[str]) -> None:
    """Refuse a folder that has jobs of another sweep in it; one that grows by jobs at its end goes on.

    Args:
        folder: of the sweep.
        overrides: of the command line, for Hydra's own sweeper.
        swept: keys that it gives values to.

    Raises:
        UserError: if a job that is there is none of this sweep.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    there = read_jobs(folder)
    if not there or any(o.is_sweep_override() and not o.is_discrete_sweep() for o in parsed):
        return
    (jobs,) = BasicSweeper.split_arguments([o for o in parsed if not o.is_hydra_override()], None)
    for job in there:
        words = jobs[job.number] if job.number < len(jobs) else []
        given = dict(word.partition("=")[::2] for word in words)
        if job.params != {key: given[key] for key in swept if key in given} or not words:
            raise _of_another(folder, job)


def _of_another(folder: Path, job: Job) -> UserError:
    given = " ".join(f"{key}={value}" for key, value in job.params.items())
    return UserError(f"out_dir={folder}: holds another sweep, whose job {job.number} had {given}; take another.")


def begin(folder: Path, number: int, params: dict[str, str]) -> None:
    """Note what a job is given, before it starts.

    Raises:
        UserError: if its folder is of a job that was given something else.
    """
    before = _read(folder / _RECORD)
    if before is not None and before.params != params:
        raise _of_another(folder.parent, before)
    if before is None:
        write_json(folder / _RECORD, asdict(Job(number, params)))


def finish(folder: Path, job: Job) -> None:
    """Note what a job came to."""
    write_json(folder / _RECORD, asdict(job))


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of a sweep, in the order of their numbers."""
    found = [_read(path) for path in folder.glob(f"*/{_RECORD}")]
    return sorted((job for job in found if job is not None), key=lambda job: job.number)


def _read(path: Path) -> Job | None:
    if not path.exists():
        return None
    try:
        return Job(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is not what a sweep writes ({error}); it is damaged, remove it.") from error


def report(folder: Path, target: Objective) -> list[Job]:
    """Print the table, and write results.csv and results.png; gives the jobs, the best first."""
    jobs = target.sorted(read_jobs(folder))
    if not jobs:
        return jobs
    print(f"\nSweep in {folder}, by {target.metric} ({target.direction})")
    for line in table(jobs, target.metric):
        print(f"  {line}")
    print("  results.csv")
    _write_csv(folder / "results.csv", jobs, target.metric)
    done = [job for job in jobs if job.value is not None]
    try:
        if done:
            in_order = sorted(done, key=lambda job: job.number)
            rows = [(job.number, job.params, job.value or 0.0) for job in in_order]
            draw(folder / "results.png", rows, target.metric, target.direction == "maximize")
            print("  results.png")
    except UserError as error:  # without the package that draws
        print(f"  no picture: {error}")
    return jobs


def table(jobs: Sequence[Job], metric: str) -> list[str]:
    """The lines of the table on the screen: value, parameters, seconds, folder; of those that failed, why."""
    keys = _keys(jobs)
    rows = [[metric, *keys, "seconds", "folder"]]
    for job in jobs[:_LONGEST]:
        lacking = "stopped" if job.seconds is None else "failed"
        value = lacking if job.value is None else f"{job.value:.6g}"
        seconds = "" if job.seconds is None else f"{job.seconds:.0f}"
        rows.append([value, *(_short(job.params.get(key, "")) for key in keys), seconds, str(job.number)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    failed = [job for job in jobs[:_LONGEST] if job.error]
    lines += [f"{job.number}: {str(job.error).splitlines()[0]}" for job in failed]
    if len(jobs) > _LONGEST:
        lines.append(f"and {len(jobs) - _LONGEST} more in results.csv")
    return lines


def _keys(jobs: Iterable[Job]) -> list[str]:
    return list(dict.fromkeys(key for job in jobs for key in job.params))


def _short(text: str) -> str:
    """Numbers with six digits, other values cut to a width."""
    try:
        return text if text.lstrip("-").isdigit() else f"{float(text):.6g}"
    except ValueError:
        return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _write_csv(path: Path, jobs: Sequence[Job], metric: str) -> None:
    keys = _keys(jobs)
    names = sorted({name for job in jobs for name in job.metrics} - {metric})
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", metric, *keys, "seconds", *(f"end {name}" for name in names), "error"])
        for job in jobs:
            params = [job.params.get(key) for key in keys]
            ended = [job.metrics.get(name) for name in names]
            writer.writerow([job.number, job.value, *params, job.seconds, *ended, job.error])
