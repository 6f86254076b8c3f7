"""Kill real runs at random moments, resume them, and hold what they end with against the uninterrupted run.

    python -m trainerkit.testing.kill --task mae --kills 200

A run is started as a process, killed with SIGKILL (its workers and other ranks with it), started again by the same
command, and so on until it finishes. Then its checkpoints, weights, history and results must be those of a run that was
never killed, byte for byte. After each kill every file that stands under its final name must be readable, and no step
that was saved may be gone. docs/kill_harness.md has the rest.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainerkit.testing._kill_harness import AIMS, PHASES, Harness, Tally
from trainerkit.testing._kill_runs import CONFIGURATIONS

_COLUMNS = ("configuration", "kills", *PHASES, "equal", "different", "unreadable", "left over", "seconds")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives 0 if every run ended as if never killed and every file was readable, else 1."""
    options = _parser().parse_args(arguments)
    names = list(CONFIGURATIONS) if options.config == ["all"] else options.config
    seed = int(time.time()) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="trainerkit-kill-")) if options.keep is None else options.keep
    if options.keep is not None and folder.exists() and any(folder.iterdir()):
        _parser().error(f"--keep {folder}: must be a new or an empty folder")
    if options.fresh is not None and not hasattr(os, "pidfd_open"):
        _parser().error("--fresh: must be all here, since forking needs Linux")
    aims = AIMS if options.aim is None else {options.aim: 1}
    print(f"{options.kills} kills of task={options.task}, --seed {seed}, in {folder}", flush=True)
    say = (lambda text: print(f"  {text}", flush=True)) if options.verbose else (lambda text: None)
    tallies: list[Tally] = []
    try:
        with Harness(options.task, folder, seed, aims, options.fresh, options.overrides, say) as harness:
            _print_row(_COLUMNS)
            for place, name in enumerate(names):
                share = options.kills // len(names) + (place < options.kills % len(names))
                if share:
                    tallies.append(harness.kill_runs(name, share))
                    _print_row(_cells(tallies[-1]))
    except KeyboardInterrupt:
        print("stopped; its processes are ended", file=sys.stderr)
        return 130
    _print_row(_cells(_total(tallies)))
    good = all(tally.is_good for tally in tallies)
    for tally in tallies:
        for problem in [*tally.problems, *(f"unreadable: {found}" for found in tally.unreadable)]:
            print(f"\n{tally.name}: {problem}")
    if good and options.keep is None:
        shutil.rmtree(folder)
    elif not good:
        print(f"\nThe runs are kept in {folder}; the same moments again: --seed {seed}")
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainerkit.testing.kill", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--task", required=True, help="a choice of the group task")
    parser.add_argument("--kills", type=_count, default=20, help="in all, shared out over the configurations (20)")
    parser.add_argument(
        "--config", nargs="+", choices=["all", *CONFIGURATIONS], default=["all"], metavar="NAME",
        help=f"of {', '.join(CONFIGURATIONS)}; all is the default",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the moments; printed, so that they can be had again")
    parser.add_argument("--aim", choices=list(AIMS), help="what every kill aims at; a mixture by default")
    parser.add_argument(
        "--fresh", type=_fresh, default=0, metavar="N|all",
        help="processes of each configuration to start as `python -m trainerkit`, a few seconds each; the others are "
        "forked from one process that has imported everything (0)",
    )  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what the runs wrote there")
    parser.add_argument("--verbose", action="store_true", help="a line for each kill")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="more of each run's command line, after --")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be 1 or more")
    return number


def _fresh(text: str) -> int | None:
    return None if text == "all" else int(text)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _cells(tally: Tally) -> list[str]:
    phases = [str(tally.phases[phase]) for phase in PHASES]
    found = [tally.equal, len(tally.problems), len(tally.unreadable), tally.leftovers]
    return [tally.name, str(tally.kills), *phases, *map(str, found), f"{tally.seconds:.0f}"]


def _total(tallies: Sequence[Tally]) -> Tally:
    total = Tally("all")
    for tally in tallies:
        total.phases += tally.phases
        total.equal += tally.equal
        total.problems += tally.problems
        total.unreadable += tally.unreadable
        total.leftovers += tally.leftovers
        total.seconds += tally.seconds
    return total


def _print_row(cells: Sequence[str]) -> None:
    numbers = [cell.rjust(max(5, len(name))) for cell, name in zip(cells[1:], _COLUMNS[1:], strict=True)]
    print("  ".join([cells[0].ljust(20), *numbers]), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # ends the runs too
    sys.exit(main())
