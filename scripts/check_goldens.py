"""Compare loaded reference checkpoints with what the references recorded: ``python scripts/check_goldens.py DIR...``.

Every folder below the given ones that holds a case.json is a case. Where it shares the weights of another case, that
may lie beside it, elsewhere below the given ones, or in tests/goldens. One line a case, then ``N of M cases pass``;
exit status 1 if any fails.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.goldens import misc
from scripts.goldens.base import Case, Verdict, run_case
from scripts.goldens.cases import ADAPTERS

SUITE = Path(__file__).resolve().parents[1] / "tests" / "goldens"


def check(case: Case) -> Verdict:
    """Run one case; whatever goes wrong is its verdict."""
    if (verdict := _of_no_model(case)) is not None:
        return verdict
    adapter = next((one for pattern, one in ADAPTERS.items() if re.fullmatch(pattern, case.name)), None)
    if adapter is None:
        return Verdict(case.name, problems=["no adapter"])
    try:
        return run_case(case, adapter)[1]
    except Exception as error:  # a case that fails must not hide the others
        reason = next(iter(str(error).splitlines()), "")
        return Verdict(case.name, problems=[f"{type(error).__name__}: {reason[:300]}"])


def _of_no_model(case: Case) -> Verdict | None:
    try:
        return misc.check(case)
    except Exception as error:
        return Verdict(case.name, problems=[f"{type(error).__name__}: {error}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--only", default="", help="regular expression of case names")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    found = sorted(path.parent for folder in arguments.folders for path in folder.rglob("case.json"))
    elsewhere = (*dict.fromkeys(folder.parent for folder in found), SUITE)
    cases = [Case(folder, elsewhere) for folder in found if re.search(arguments.only, folder.name)]
    passed = 0
    for case in cases:
        verdict = check(case)
        passed += verdict.passed
        print(verdict.line(), flush=True)
    print(f"{passed} of {len(cases)} cases pass")
    return 0 if passed == len(cases) and cases else 1


if __name__ == "__main__":
    sys.exit(main())
