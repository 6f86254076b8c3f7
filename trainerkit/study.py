"""Optuna under `hydra/sweeper=optuna`: the search space, the draws, and a study that survives a kill.

TPE: J. Bergstra et al., 'Algorithms for hyper-parameter optimization', 2011. What is drawn for a job depends on the
seed, the job's number and what the jobs before it came to, and on nothing else: a sweep that was killed and goes on
draws what it would have drawn.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from trainerkit.errors import UserError
from trainerkit.extras import require
from trainerkit.sweep import Objective

SAMPLERS = ("tpe", "random")
_TAGS = {"log", "int"}


@dataclass(frozen=True)
class Trial:
    """A job that was drawn.

    Attributes:
        number: of the job.
        overrides: of its whole command line.
        trial: Optuna's.
    """

    number: int
    overrides: list[str]
    trial: Any


class Study:
    """Optuna's study of one sweep.

    Args:
        overrides: of the command line; those that sweep are the search space.
        objective: what is minimized or maximized.
        folder: of the sweep.
        storage: a file or database URL, where the study is named after `folder`; None for study.db in `folder`.
        sampler: 'tpe' or 'random'.
        startup_trials: jobs drawn at random before 'tpe' learns.
        seed: of the draws.

    Raises:
        UserError: if nothing is to be searched, for a range or a setting that Optuna does not have, if Optuna is not
            installed, or if the folder holds another sweep.
    """

    def __init__(
        self,
        overrides: Sequence[Override],
        objective: Objective,
        folder: Path,
        storage: str | None = None,
        sampler: str = "tpe",
        startup_trials: int = 10,
        seed: int = 0,
    ) -> None:
        self._optuna: Any = require("optuna", "hydra/sweeper=optuna")
        if sampler not in SAMPLERS:
            raise UserError(f"hydra.sweeper.sampler={sampler}: must be one of {', '.join(SAMPLERS)}.")
        for name, number in {"startup_trials": startup_trials, "seed": seed}.items():
            if not isinstance(number, int) or number < 0:
                raise UserError(f"hydra.sweeper.{name}={number}: must be a whole number, 0 or more.")
        overrides = list({override.get_key_element(): override for override in overrides}.values())  # the last counts
        swept = {override.get_key_element(): override for override in overrides if override.is_sweep_override()}
        if not swept:
            raise UserError("hydra/sweeper=optuna: nothing to search; write key=interval(1e-4,1e-2) or key=a,b.")
        self.space = {key: distribution(override) for key, override in swept.items()}
        self._fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
        self._sampler, self._startup_trials, self._seed = sampler, startup_trials, seed
        self._study = self._open(folder, storage, objective)
        asked = [str(override.input_line) for override in overrides if override.key_or_group != "out_dir"]
        self._check_same({"overrides": sorted(asked), "metric": objective.metric, "sampler": sampler, "seed": seed})
        self._take_up()

    def batches(self, n_trials: int, n_jobs: int) -> Iterator[list[Trial]]:
        """Draw up to `n_jobs` jobs at a time, until `n_trials` have ended; each has to be told before the next draw.

        Raises:
            UserError: for numbers below 1.
        """
        for name, number in {"n_trials": n_trials, "n_jobs": n_jobs}.items():
            if not isinstance(number, int) or number < 1:
                raise UserError(f"hydra.sweeper.{name}={number}: must be a whole number, 1 or more.")
        while (ended := self._ended()) < n_trials:
            yield [self._draw(number) for number in range(ended, min(ended + n_jobs, n_trials))]

    def tell(self, trial: Trial, value: float | None) -> None:
        """What a job came to; None if it failed."""
        if value is None:
            trial.trial.set_user_attr("failed", True)
            self._study.tell(trial.trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial.trial, value)

    def _open(self, folder: Path, storage: str | None, objective: Objective) -> Any:
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        place = storage or str(folder / "study.db")
        url = place if "://" in place else f"sqlite:///{Path(place).expanduser().resolve()}"
        try:
            return self._optuna.create_study(
                storage=url,
                study_name=str(folder) if storage else "trainerkit",
                direction=objective.direction,
                load_if_exists=True,
            )
        except Exception as error:  # SQLAlchemy's, Optuna's and the driver's own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"hydra.sweeper.storage={place}: cannot be opened ({reason}).") from error

    def _check_same(self, asked: dict[str, Any]) -> None:
        """A study of another command would learn from runs that are not comparable."""
        before = self._study.user_attrs.get("asked")
        if before is None:
            self._study.set_user_attr("asked", asked)
        elif before != asked:
            changed = [name for name in asked if before.get(name) != asked[name]]
            lines = [_change(name, before.get(name), asked[name]) for name in changed]
            raise UserError(
                "out_dir: holds another sweep; take another, or its command as it was (n_trials may grow).\n  "
                + "\n  ".join(lines)
            )

    def _take_up(self) -> None:
        """Jobs that were running when the process ended are marked as failed, and drawn again as they were."""
        state = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self._study.tell(trial.number, state=state.FAIL)
            if trial.params.keys() == self.space.keys():  # else the process ended while it drew
                self._study.enqueue_trial(trial.params)

    def _ended(self) -> int:
        trials = self._study.get_trials(deepcopy=False)
        complete = self._optuna.trial.TrialState.COMPLETE
        return sum(trial.state == complete or "failed" in trial.user_attrs for trial in trials)

    def _draw(self, number: int) -> Trial:
        self._study.sampler = self._make_sampler(number)
        trial = self._study.ask(fixed_distributions=self.space)
        drawn = [f"{key}={value}" for key, value in trial.params.items()]
        return Trial(number, [*self._fixed, *drawn], trial)

    def _make_sampler(self, number: int) -> Any:
        """A sampler for one job: what was drawn in an earlier process has no part in it."""
        samplers = self._optuna.samplers
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        if self._sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=self._startup_trials)


def _change(name: str, before: Any, now: Any) -> str:
    """A line of how a command differs from that of the study; of its overrides those that differ."""
    if isinstance(before, list) and isinstance(now, list):
        only = [word for word in before if word not in now], [word for word in now if word not in before]
        before, now = (" ".join(words) or "not there" for words in only)
    return f"{name}: was {before}, is {now}"


def distribution(override: Override) -> Any:
    """Optuna's distribution for an override that sweeps.

    `a,b` and `choice(a,b)` are categories; `range(1,5)` whole numbers up to 4, as in Python, in steps;
    `interval(0.1,1)` real numbers, and `int(interval(1,8))` whole ones, both ends included; `tag(log, …)` draws an
    interval on a logarithmic scale.

    Raises:
        UserError: for another tag, or a range that is empty, infinite or has no logarithm.
    """
    distributions: Any = require("optuna.distributions", "hydra/sweeper=optuna")
    sweep, text = override.value(), override.input_line
    tags = set(getattr(sweep, "tags", ()))
    if tags - _TAGS or (tags and not isinstance(sweep, IntervalSweep)):
        raise UserError(f"{text}: tags may be log and int, of an interval.")
    try:
        if isinstance(sweep, IntervalSweep):
            low, high = sweep.start, sweep.end
            assert low is not None
            assert high is not None
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError("both ends must be finite numbers")
            whole = "int" in tags or {type(low), type(high)} == {int}
            kind, number = (distributions.IntDistribution, int) if whole else (distributions.FloatDistribution, float)
            return kind(number(low), number(high), log="log" in tags)
        if isinstance(sweep, RangeSweep):
            return _of_range(distributions, list(sweep.range()))
        choices = [str(choice) for choice in override.sweep_string_iterator()]
        # The same order in each process, or Optuna would take it for another parameter.
        return distributions.CategoricalDistribution(sorted(choices) if getattr(sweep, "shuffle", False) else choices)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from error


def _of_range(distributions: Any, values: list[Any]) -> Any:
    if not values:
        raise ValueError("this range is empty")
    low, high = min(values), max(values)
    step = abs(values[1] - values[0]) if len(values) > 1 else None
    if all(isinstance(value, int) for value in values):
        return distributions.IntDistribution(low, high, step=step or 1)
    # Sums of steps are rounded, and Optuna takes the digits at their word.
    low, high, step = (None if value is None else float(f"{value:.12g}") for value in (low, high, step))
    return distributions.FloatDistribution(low, high, step=step)
