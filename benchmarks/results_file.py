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
    """`<name>_<device type>.json`: question, environment, ceilings of the same run, rows, and refused figures."""

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
        self._write()

    def add(self, row: Row) -> None:
        """Record a measured row."""
        self.content["results"].append(row)
        self._write()

    def keep(self, what: str, row: Row) -> None:
        """Record a row, or {"refused": why} as the refusal of `what`."""
        if "refused" in row:
            self.refuse(what, row["refused"])
        else:
            self.add(row)

    def refuse(self, what: str, reason: str) -> None:
        """Record why a figure is missing."""
        self.content["refused"].append({"what": what, "reason": reason})
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, json.dumps(self.content, indent=2) + "\n")
