"""The README's table of families, from the golden cases: ``python scripts/family_table.py DIR... [--write README.md]``.

A row a family: what its checkpoints can do once loaded, whether it goes back, how many recorded cases agree, and the
largest absolute difference of a recorded output.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.goldens.base import Case, run_case
from scripts.goldens.cases import ADAPTERS
from vlp.checkpoint.exporters import EXPORTERS
from vlp.checkpoint.families import FAMILIES
from vlp.loaded import abilities

BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"


@dataclass
class Row:
    """What was seen of one family."""

    passed: int = 0
    cases: int = 0
    difference: float = 0.0
    tasks: set[str] = field(default_factory=set)


def measure(cases: Iterable[Case]) -> dict[str, Row]:
    """Run every case that loads a checkpoint; rows by family."""
    rows: dict[str, Row] = defaultdict(Row)
    for case in cases:
        adapter = next((one for pattern, one in ADAPTERS.items() if re.fullmatch(pattern, case.name)), None)
        if adapter is None:
            continue
        ran, verdict = run_case(case, adapter)
        name = ran.loaded.report.notes[0].removeprefix("family ")
        row = rows[name]
        row.cases += 1
        row.passed += verdict.passed
        row.difference = max(row.difference, verdict.difference)
        row.tasks |= set(ran.loaded.config.objectives)
        row.tasks |= abilities(ran.loaded.config) - {"embed_texts", "classify"}  # as embed_images
    return rows


def table(rows: dict[str, Row]) -> str:
    """The rows as Markdown, in the order of ``FAMILIES``."""
    lines = [
        "| family | objectives and abilities seen | goes back | cases that agree | largest difference |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        row = rows.get(family.name, Row())
        back = ", ".join(one.to for one in EXPORTERS if one.name == family.name) or "-"
        agree = f"{row.passed} of {row.cases}" if row.cases else "none recorded; tests"
        difference = f"{row.difference:.0e}" if row.cases else ""
        lines.append(f"| {family.name} | {', '.join(sorted(row.tasks))} | {back} | {agree} | {difference} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, help="page whose table between the markers is replaced")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    found = sorted(path.parent for folder in arguments.folders for path in folder.rglob("case.json"))
    text = table(measure(map(Case, found)))
    print(text)
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
