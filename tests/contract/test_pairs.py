"""Every two callbacks of ours in one run that is stopped and resumed; docs/callbacks/pairs.md lists them.

`python -m tests.contract.test_pairs` prints the page's table anew.
"""

from itertools import combinations

import pytest

from tests.contract.test_callbacks import BENCH, MEASURING, OURS, maker
from tests.support import ROOT
from trainerkit.testing import check_together

PAIRS = list(combinations(OURS, 2))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_callbacks_get_along(one, other, tmp_path):
    makers = [maker(name, (BENCH | MEASURING).get(name)) for name in (one, other)]
    check_together(makers, tmp_path)


def test_the_page_lists_every_pair():
    page = (ROOT / "docs" / "callbacks" / "pairs.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in rows[0][1:]]
    cells = {
        (row[0].strip(), name): cell.strip() for row in rows[2:] for name, cell in zip(names, row[1:], strict=True)
    }
    assert {pair: cell for pair, cell in cells.items() if cell} == dict.fromkeys(PAIRS, "ok")


def main():
    """Print the table."""
    print("\n".join(["| | " + " | ".join(OURS[1:]) + " |", "|---" * len(OURS) + "|"]))
    for number, one in enumerate(OURS[:-1]):
        print("| " + " | ".join([one, *[" "] * number, *["ok"] * (len(OURS) - 1 - number)]) + " |")


if __name__ == "__main__":
    main()
