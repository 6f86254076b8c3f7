"""The harness behind `python -m trainerkit.testing.kill`."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from trainerkit.facts import CONFIG_VARIABLE
from trainerkit.testing._beacon import FILENAME, newest_stat, read_phase, staged
from trainerkit.testing._compare import differences, last_step, unreadable
from trainerkit.testing._kill_runs import small_run
from trainerkit.testing._launch import Order, Plain, Running, Zygote, freeze, kill

# What a run is found doing when it is killed; 'writing': a checkpoint is being staged.
PHASES = ("starting", "step", "validation", "writing", "between", "ending")
# What a kill aims at, and how often. 'any': any moment of training and of what comes after it.
AIMS = {"starting": 1, "any": 3, "step": 2, "validation": 2, "writing": 4}
KILLS_A_RUN = 8
# What a run in this process, or a launcher around it, may have left in the environment.
_OF_ANOTHER_RUN = (CONFIG_VARIABLE, "LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# After so long a run, or what is awaited of it, will never come: ranks wait for each other.
SECONDS_TOO_LONG = 120


@dataclass
class Tally:
    """What was found of one configuration."""

    name: str
    phases: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    problems: list[str] = field(default_factory=list)  # runs that differ or failed, each with its folder
    unreadable: list[str] = field(default_factory=list)
    leftovers: int = 0  # staged files of killed runs that still lie there when the run is finished
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """How often a run was killed."""
        return self.phases.total()

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost."""
        return not self.problems and not self.unreadable


@dataclass(frozen=True)
class _Whole:
    """The uninterrupted run."""

    folder: Path
    starting: float  # seconds until it trained
    training: float  # seconds
    ending: float  # seconds of the test and of what is written about the run
    steps: int


class Harness:
    """Kills runs of one task.

    Args:
        task: a choice of the group `task`.
        folder: where runs and data are written.
        seed: of the moments; what a run does by then is the machine's.
        aims: weights of what kills aim at, by name.
        fresh: processes of each configuration that are started as `python -m trainerkit`; the others are forked from
            a process that has imported everything. None: all of them.
        overrides: more of the runs' command lines.
        say: told each kill and each finished run.
    """

    def __init__(
        self,
        task: str,
        folder: Path,
        seed: int = 0,
        aims: Mapping[str, int] = AIMS,
        fresh: int | None = 0,
        overrides: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.task = task
        self.folder = folder.resolve()
        self.seed = seed
        self.aims = dict(aims)
        self.fresh = fresh
        self.overrides = list(overrides)
        self.say = say
        self.folder.mkdir(parents=True, exist_ok=True)
        # For what killed processes leave; of a short name, for a worker's socket has at most 107 letters.
        self._temporary = tempfile.TemporaryDirectory(prefix="kill-", ignore_cleanup_errors=True)
        inherited = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_RUN}
        self._environment = inherited | {"OMP_NUM_THREADS": "1", "TMPDIR": self._temporary.name}
        self._zygote: Zygote | None = None
        self._running: Running | None = None
        self._plain_started = 0

    def __enter__(self) -> "Harness":
        if self.fresh is not None:
            self._zygote = Zygote(self._environment, self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._end_running()
        if self._zygote is not None:
            self._zygote.__exit__()
        self._temporary.cleanup()

    def kill_runs(self, configuration: str, kills: int) -> Tally:
        """Kill runs of a configuration so many times, or until something is wrong."""
        began = time.monotonic()
        tally = Tally(configuration)
        self._plain_started = 0
        self._chance = random.Random(f"{self.seed} {self.task} {configuration}")
        try:
            whole = self._run_whole(configuration, "whole", tally)
            number = 0
            while whole is not None and tally.kills < kills and tally.is_good:
                number += 1
                self._kill_until_finished(whole, configuration, number, min(KILLS_A_RUN, kills - tally.kills), tally)
        except TimeoutError as error:
            self._end_running()
            tally.problems.append(str(error))
        tally.seconds = time.monotonic() - began
        return tally

    def _run_whole(self, configuration: str, name: str, tally: Tally) -> _Whole | None:
        folder = self._new_folder(configuration, name)
        run = self._start(configuration, folder)
        marks = [time.monotonic()]
        self._wait(run, lambda: read_phase(folder / "run") != "starting")
        marks.append(time.monotonic())
        self._wait(run, lambda: read_phase(folder / "run") == "ending")
        marks.append(time.monotonic())
        self._wait(run)
        marks.append(time.monotonic())
        if not self._ended_well(run, folder, tally):
            return None
        starting, training, ending = (later - earlier for earlier, later in pairwise(marks))
        self.say(
            f"{configuration}: {name} starts for {starting:.2f} s, trains for {training:.2f}, ends for {ending:.2f}"
        )
        return _Whole(folder / "run", starting, training, ending, last_step(folder / "run"))

    def _kill_until_finished(self, whole: _Whole, configuration: str, number: int, kills: int, tally: Tally) -> None:
        """One run: killed up to so many times, resumed, compared."""
        folder = self._new_folder(configuration, f"killed-{number}")
        run_folder = folder / "run"
        killed = in_vain = 0
        step = -1
        while True:
            run = self._start(configuration, folder)
            # The very first kill comes after a checkpoint, so that there is something to resume; and so does a
            # kill after two that were in vain, or there would be no end.
            needs_progress = tally.kills == 0 or in_vain >= 2
            if killed == kills:
                self._wait(run)
                break
            phase = self._kill(run, run_folder, whole, step, needs_progress)
            if phase is None:
                break
            killed += 1
            tally.phases[phase] += 1
            now = last_step(run_folder)
            self.say(f"{configuration}: run {number}, kill {killed}: {phase}, step {now} is saved")
            tally.unreadable += [f"{folder}: {found}" for found in unreadable(run_folder)]
            if now < step:
                tally.problems.append(f"{folder}: step {step} was saved, after a kill only {now}")
            in_vain = in_vain + 1 if now == step else 0
            step = now
            if not tally.is_good:
                return
        if not self._ended_well(run, folder, tally) or killed == 0:
            return
        tally.leftovers += sum(path.name.startswith(".") for path in run_folder.rglob("*"))
        found = differences(whole.folder, run_folder)
        if found:
            found += self._check_that_whole_runs_are_equal(whole, configuration, tally)
            tally.problems += [f"{folder}: {difference}" for difference in found]
        else:
            tally.equal += 1
            shutil.rmtree(folder)
        self.say(f"{configuration}: run {number} is {'different' if found else 'equal'} after {killed} kills")

    def _check_that_whole_runs_are_equal(self, whole: _Whole, configuration: str, tally: Tally) -> list[str]:
        """Whether a difference is the resume's: a run may give something else each time."""
        again = self._run_whole(configuration, "whole-again", tally)
        if again is None or not (found := differences(whole.folder, again.folder)):
            return []
        return [f"but two runs that nobody killed differ too: {found[0]}"]

    # One process

    def _end_running(self) -> None:
        run, self._running = self._running, None
        if run is not None:
            kill(run)
            run.end()

    def _start(self, configuration: str, folder: Path) -> Running:
        (folder / "run" / FILENAME).unlink(missing_ok=True)
        arguments = [*small_run(self.task, configuration, self.folder), *self.overrides]
        order = Order(arguments, str(folder), str(folder / "log.txt"), ranks=2 if configuration == "ddp" else 1)
        plainly = self._zygote is None or (self.fresh is not None and self._plain_started < self.fresh)
        # The uninterrupted run is forked where that is possible: so the two ways are held against each other.
        if plainly and (self._zygote is None or not folder.name.startswith("whole")):
            self._plain_started += 1
            self._running = Plain(order, self._environment)
        else:
            assert self._zygote is not None
            self._running = self._zygote.start(order)
        return self._running

    def _wait(self, run: Running, until: Callable[[], bool] = lambda: False, pause: float = 0.002) -> None:
        """Wait for something, or for the run's end."""
        limit = time.monotonic() + SECONDS_TOO_LONG
        while run.poll() is None and not until():
            if time.monotonic() > limit:
                raise TimeoutError(f"a run waits for something for {SECONDS_TOO_LONG} s; it was killed")
            time.sleep(pause)

    def _kill(self, run: Running, folder: Path, whole: _Whole, step: int, needs_progress: bool) -> str | None:
        """Kill a run at a moment by chance; gives what it was doing, None if it was over before."""
        checkpoints = folder / "checkpoints"
        stale = staged(checkpoints)
        newest = newest_stat(checkpoints)
        chance = self._chance
        aim = chance.choices(list(self.aims), list(self.aims.values()))[0]
        part, more = chance.random(), chance.random()
        left = whole.training * (1 - max(step, 0) / whole.steps)

        if needs_progress:
            self._wait(run, lambda: newest_stat(checkpoints) != newest, 0.0002)
        if aim == "starting" and not needs_progress:
            self._sleep(run, part * whole.starting)
        else:
            self._wait(run, lambda: read_phase(folder) != "starting")
            # Aimed at nothing in particular it may come after training; else some of training must be left.
            self._sleep(run, part * (left + whole.ending if aim == "any" and not needs_progress else 0.6 * left))
            if aim == "writing":
                self._wait(run, lambda: bool(staged(checkpoints) - stale), 0.0002)
                self._sleep(run, more**3 * 0.02)
            elif aim in ("step", "validation"):
                self._wait(run, lambda: read_phase(folder) == aim, 0.0002)
                self._sleep(run, more**2 * 0.004)

        freeze(run)  # so that what it is doing is known for certain
        phase = "writing" if staged(checkpoints) - stale else read_phase(folder)
        if kill(run) != -signal.SIGKILL:
            return None
        run.end()
        self._running = None
        return phase

    def _sleep(self, run: Running, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._wait(run, lambda: time.monotonic() >= end, 0.0002)

    def _ended_well(self, run: Running, folder: Path, tally: Tally) -> bool:
        code = run.poll()
        run.end()
        self._running = None
        if code == 0:
            return True
        said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        tally.problems.append("\n    ".join([f"{folder}: ended with {code}", *said[-15:]]))
        return False

    def _new_folder(self, configuration: str, name: str) -> Path:
        folder = self.folder / configuration / name
        folder.mkdir(parents=True)
        return folder
