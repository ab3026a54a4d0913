"""A results file, rewritten after every row, so an interrupted run keeps its measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment
from vaebm_fast.runtime.files import write

Row = dict[str, Any]
Keep = Callable[[str, Row], None]  # takes a candidate's name and row as soon as it is measured


class ResultsFile:
    """`<name>_<device type>.json`: question, environment, ceilings of the same run, rows, and refused figures.

    Written with the first row or refusal; until then an older file stays.
    """

    def __init__(self, name: str, question: str, ceilings: dict[str, float], folder: Path = RESULTS) -> None:
        ran = environment()
        self.path = folder / f"{name}_{ran['device_type']}.json"
        self.content: dict[str, Any] = {
            "question": question,
            "environment": ran,
            "ceilings": ceilings,
            "results": [],
            "refused": [],
        }

    def add(self, row: Row) -> None:
        """Record a measured row, without its single times: the tables need quantiles only."""
        self.content["results"].append({name: value for name, value in row.items() if name != "times_s"})
        self._write()

    def keep(self, what: str, row: Row) -> None:
        """Record a row, or {"refused": why} as the refusal of `what`, with the row's other facts."""
        if "refused" in row:
            self.refuse(what, row["refused"], {name: value for name, value in row.items() if name != "refused"})
        else:
            self.add(row)

    def refuse(self, what: str, reason: str, facts: Row | None = None) -> None:
        """Record why a figure is missing."""
        self.content["refused"].append({"what": what, "reason": reason, **(facts or {})})
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, as_text(self.content))


def as_text(content: dict[str, Any]) -> str:
    """A result file's JSON with one line per row."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in content["results"])
    text = json.dumps({**content, "results": []}, indent=2) + "\n"
    return text.replace('"results": []', f'"results": [\n{rows}\n  ]', 1) if rows else text
