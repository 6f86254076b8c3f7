"""`-m`: the jobs of a sweep, and the table at its end."""

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from trainerkit.errors import UserError, answering, first_lines
from trainerkit.plugins import AllowList
from trainerkit.sweep import Job, begin, check_folder, finish, objective, report, swept_keys, value_of

_REFUSED = 2
_STOPPED = (75, 130)  # 'try again later', and Ctrl-C


class SweepJob:
    """What Hydra calls for each job: the run, and a record of what it came to, whether or not it came to its end.

    Picklable, for launchers that start it in another process.

    Args:
        swept: keys that the sweep gives values to.
        allow: decides which targets may be built.
        again: what a command that goes on needs beside the overrides.
        check: refuses a job's config.
    """

    def __init__(
        self, swept: Sequence[str], allow: AllowList, again: Sequence[str], check: Callable[[DictConfig], None]
    ) -> None:
        self.swept = tuple(swept)
        self.allow = allow
        self.again = tuple(again)
        self.check = check

    def __call__(self, cfg: DictConfig) -> float | None:
        """The objective's value, which sweepers that learn from it are told; None if the job failed."""
        from trainerkit.run import run

        hydra = HydraConfig.get()
        folder = Path(str(cfg.out_dir)).expanduser() / str(hydra.job.num)
        cfg.out_dir = str(folder)
        overrides = list(hydra.overrides.task)
        given = dict(override.partition("=")[::2] for override in overrides)
        job = Job(hydra.job.num, {key: given[key] for key in self.swept if key in given})
        with answering():
            begin(folder, job.number, job.params)
        if _leads():
            print(f"\nJob {job.number}: {' '.join(f'{key}={value}' for key, value in job.params.items())}", flush=True)
        start = time.monotonic()
        try:
            self.check(cfg)
            target = objective(cfg)
            metrics: dict[str, Any] = run(cfg, overrides, self.allow, self.again)
            if not _leads():
                return None
            job.metrics = dict(metrics)
            job.value = value_of(target.metric, metrics, _best(folder) if cfg.stage == "fit" else {})
            job.error = None
        except UserError as error:
            job.error = str(error)
            print(f"trainerkit: job {job.number}: {error}", file=sys.stderr, flush=True)
        except Exception as error:  # the other jobs are worth their while all the same
            job.error = f"{type(error).__name__}: {first_lines(error, 1)}"
            traceback.print_exc()
        if _leads():
            job.seconds = round(time.monotonic() - start, 1)
            finish(folder, job)
        return job.value


def _leads() -> bool:
    """Whether this is the first of a job's processes, where a launcher starts them all."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0"


def _best(folder: Path) -> dict[str, float]:
    """What the best checkpoint of the run in a folder was chosen by."""
    path = folder / "results.json"
    best: dict[str, float] = json.loads(path.read_bytes()).get("best", {}) if path.exists() else {}
    return best


class Sweep:
    """A sweep of the command line, as a context around what Hydra does: refusals before it, the table after it.

    Args:
        cfg: the config of its first job.
        overrides: of the command line.
        allow: decides which targets may be built.
        again: what a command that goes on needs beside the overrides.
        check: refuses a job's config.

    Raises:
        UserError: under torchrun or srun, where each process would be the whole sweep; for `out_dir` as one of the keys
            that are swept over, or what cannot be compared by.

    Attributes:
        overrides: with the folder of the sweep, which does not change while it lasts.
        job: what Hydra calls.
    """

    def __init__(
        self,
        cfg: DictConfig,
        overrides: Sequence[str],
        allow: AllowList,
        again: Sequence[str],
        check: Callable[[DictConfig], None],
    ) -> None:
        _refuse_ranks()
        swept = swept_keys(overrides)
        if "out_dir" in swept:
            raise UserError("out_dir: a sweep has one folder, with one in it for each job; give one.")
        self._objective = objective(cfg)
        given = any(override.startswith("out_dir=") for override in overrides)
        folder = str(cfg.out_dir)
        if "task" in swept and not given:
            folder = str(Path(folder).parent.with_name("sweep") / Path(folder).name)
        self.folder = Path(folder).expanduser()
        if not any(override.startswith("hydra/sweeper=") for override in overrides):
            check_folder(self.folder, overrides, swept)  # of others the jobs are not known yet
        self.overrides = list(overrides) if given else [*overrides, f"out_dir={folder}"]
        self.job = SweepJob(swept, allow, again, check)

    def __enter__(self) -> None:
        """Nothing to do yet."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, stack: object) -> None:
        """Print and write the table, also where the sweep was cut short."""
        if isinstance(error, SystemExit) and error.code == _REFUSED:
            return
        jobs = report(self.folder, self._objective)
        if kind is None and jobs and all(job.value is None for job in jobs):
            raise UserError(f"all {len(jobs)} jobs of the sweep failed; the first: {jobs[0].error}")
        if isinstance(error, SystemExit) and error.code in _STOPPED:
            print(f"\nThe sweep was stopped; to go on, the same command with out_dir={shlex.quote(str(self.folder))}")


def _refuse_ranks() -> None:
    for variable, launcher in {"WORLD_SIZE": "torchrun", "SLURM_STEP_NUM_TASKS": "srun"}.items():
        if os.environ.get(variable, "1") not in ("", "1"):
            raise UserError(
                f"-m under {launcher} with {os.environ[variable]} processes: each of them would be the whole sweep. "
                "Start it once; trainer=ddp starts the processes of each job, hydra/launcher=submitit_slurm a SLURM "
                "job for each."
            )
