"""One runner for all benchmarks: `python -m benchmarks NAME`, with --help behind a name for its options."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from vaebm_fast.runtime import command

MODULES = {
    "ops": "benchmarks.ops.bench_ops",
    "pair": "benchmarks.step.bench_pair",
    "chains": "benchmarks.step.chains",
    "training": "benchmarks.training",
    "loaders": "benchmarks.loaders",
    "gpu": "benchmarks.gpu.stages",
    "kit": "benchmarks.gpu.kit",
    "tests": "benchmarks.gpu.tests",
    "precompile": "benchmarks.gpu.precompile",
    "profile": "benchmarks.gpu.profile",
    "measured": "benchmarks.gpu.measured",
    "tune": "benchmarks.gpu.tune",
    "kernels": "benchmarks.gpu.kernels",
    "report": "benchmarks.report",
}


def usage() -> str:
    """The names, each with the first line of its module's docstring; imports no module, as some need Triton."""
    lines = ["usage: python -m benchmarks NAME [options]", ""]
    for name, module in MODULES.items():
        source = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:12}{docstring.splitlines()[0]}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; returns the exit code, 2 for a name that there is not."""
    return command.run(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    name, *others = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in MODULES:
        print(f"No benchmark is named {name!r}; there are {', '.join(MODULES)}.", file=sys.stderr)
        return 2
    sys.argv[0] = f"python -m benchmarks {name}"  # for the usage line of its --help
    return int(importlib.import_module(MODULES[name]).main(others) or 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
