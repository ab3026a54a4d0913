"""Test gate: code must pass its own tests before it is measured."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
GPU_TESTS = ("tests/test_gpu.py", "-m", "gpu", "-k", "sanitised or frozen")  # of ops and of the pair


@functools.cache
def why_red(*files: str) -> str | None:
    """The last lines of pytest on these files if a test failed, else None.

    Runs in a separate process, because tests change threads and memory settings. Collecting no test counts as failure.
    With a GPU, the tests of ops and of the pair on it decide.
    """
    chosen = (*files, *GPU_TESTS) if torch.cuda.is_available() else files
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
    return f"pytest {' '.join(files)} ended with exit code {done.returncode}:\n{tail}"
