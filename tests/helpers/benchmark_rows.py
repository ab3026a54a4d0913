"""Rows of results as the benchmarks write them, and programs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks import gate
from benchmarks.environment import environment

CPU = torch.device("cpu")
CEILINGS = {"matrix_gflops": 100.0, "copy_gbps": 10.0}


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own: pytest inside a test must not share this one's plugins."""
    environment = {**os.environ, "PYTHONPATH": str(gate.REPOSITORY)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=gate.REPOSITORY, env=environment, capture_output=True, text=True)


def pair_row(candidate: str, median_s: float, **others: Any) -> dict[str, Any]:
    """A row of N = 2 that computes 8 GFLOP."""
    timing = dict(rounds=5, median_s=median_s, p20_s=0.9 * median_s, p80_s=1.1 * median_s, user_s=1.0, system_s=0.5)
    memory = dict(page_faults=7, peak_memory_mib=900.0, memory_before_mib=300.0, compile_s=None)
    facts = dict(preset="digits", batch=2, candidate=candidate, backend="plain modules", dtype="float32", flops=8e9)
    return {**facts, **timing, **memory, **others}


def op_row(backend: str, median_s: float) -> dict[str, Any]:
    """A row of an op that moves 1 MB and computes nothing."""
    row = pair_row(backend, median_s, op="blur", shape="1x2", backend=backend, bytes=10**6, flops=0)
    return {key: value for key, value in row.items() if key not in ("preset", "batch")}


def content(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"question": "How long?", "environment": environment(), "ceilings": CEILINGS, "results": rows, "refused": []}
