"""Errors for people, and the words they are made of."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right: the message says what was given, what is allowed and what to do.

    The command line prints the message alone and exits with code 2.
    """


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """'Did you mean a or b?', or nothing if nothing is near."""
    near = nearest(given, allowed)
    return f"Did you mean {either(near)}?" if near else ""


def nearest(given: str, allowed: Iterable[str]) -> list[str]:
    """At most three of `allowed` that resemble `given`, the nearest first."""
    return difflib.get_close_matches(given, list(allowed), n=3, cutoff=0.6)


def either(names: Sequence[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def first_lines(error: BaseException, count: int = 6) -> str:
    """Another library's message without its listings and stacks; at most `count` lines that fit a screen."""
    lines = [line[:300] for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:count]) or type(error).__name__


@contextmanager
def answering() -> Iterator[None]:
    """Say what the user can put right, and exit with 2; a bug keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"trainerkit: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntrainerkit: stopped before training began; nothing to go on from.", file=sys.stderr)
        sys.exit(130)
