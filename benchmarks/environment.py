"""Device, versions and commit, recorded with every result."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, threads, versions, commit and date, as JSON values.

    VAEBM_COMMIT overrides the commit, for copies without a git repository.
    """
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "device_type": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        **(_of_the_gpu() if cuda else {}),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _of_the_gpu() -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    return {"capability": f"{major}.{minor}", "cuda": torch.version.cuda, "triton": _version("triton")}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """VAEBM_COMMIT if set; otherwise the commit, with a plus sign if tracked files differ from it."""
    told = os.environ.get("VAEBM_COMMIT")
    if told:
        return told

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    known = git("rev-parse", "--short", "HEAD")
    if not known:
        return "unknown"
    return known + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
