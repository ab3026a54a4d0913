"""Who may import whom, and that the package imports without what is optional.

The rows are read from the source with `ast`, so an import inside a function counts too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "vaebm_fast"

# A unit is a module or a subpackage of vaebm_fast, or train.py; it imports only from rows below it and from itself.
ROWS: tuple[tuple[str, ...], ...] = (
    ("__main__", "train.py"),
    ("cli",),
    ("report",),
    ("sampling", "training", "evaluation"),
    ("chain", "checkpoint", "data"),
    ("frozen",),
    ("models",),
    ("ops",),
    ("config", "reference", "triton_kernels"),
    ("runtime",),
    ("_C",),  # loaded by runtime/extension alone
)
ROW_OF = {unit: row for row, units in enumerate(ROWS) for unit in units}
UPWARDS = {("vaebm_fast/models/vaebm.py", "frozen")}  # VAEBM.freeze, the short form of vaebm_fast.freeze
FACE = "__init__"  # the public face imports what it shows; only what stands on the whole package imports the face
USES_FACE = ("cli", "train.py")

OPTIONAL = (
    "triton",
    "nvidia.dali",
    "tyro",
    "tensorboard",
    "sklearn",
    "matplotlib",
    "pynvml",
    "lmdb",
    "google_crc32c",
    "scipy",
    "vaebm_fast._C",
)
# What these modules are for is such a package; the test below shows that no other module loads them when imported.
NEEDS_OPTIONAL = (
    "vaebm_fast.__main__",
    "vaebm_fast._C",
    "vaebm_fast.cli",
    "vaebm_fast.cli.demo",
    "vaebm_fast.data.dali",
    "vaebm_fast.report.figures",
    "vaebm_fast.triton_kernels",
)


def source_files() -> list[Path]:
    train = REPOSITORY / "train.py"
    return sorted(PACKAGE.rglob("*.py")) + ([train] if train.exists() else [])


def unit_of(path: Path) -> str:
    """The first part of the path: ops for vaebm_fast/ops/pointwise.py, __init__ for vaebm_fast/__init__.py."""
    if path == REPOSITORY / "train.py":
        return "train.py"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, unit) of every import of a part of vaebm_fast by a file of `package` (as in "vaebm_fast.ops")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        else:
            continue
        for name in names:
            top, *rest = str(name).split(".")
            if top == "vaebm_fast":
                yield node.lineno, rest[0] if rest and is_unit(rest[0]) else FACE


def is_unit(name: str) -> bool:
    return name in ROW_OF or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()


def imports_of(path: Path) -> list[tuple[int, str]]:
    inside = path.is_relative_to(PACKAGE)
    package = ".".join(path.parent.relative_to(REPOSITORY).parts) if inside else ""
    return list(imported_units(path.read_text(encoding="utf-8"), package))


def violation(unit: str, imported: str) -> str | None:
    """Why `unit` may not import `imported`; None where it may."""
    if unit in (FACE, imported):
        return None
    if imported == FACE:
        return None if unit in USES_FACE else "takes a name from the public face; import the module that defines it"
    if imported not in ROW_OF:
        return f"imports {imported}, which stands in no row"
    if ROW_OF[imported] <= ROW_OF[unit]:
        return f"imports {imported}, which does not stand in a row below {unit}"
    return None


def test_every_file_stands_in_a_row() -> None:
    unlisted = sorted({unit_of(path) for path in source_files()} - set(ROW_OF) - {FACE})
    assert not unlisted, f"{', '.join(unlisted)} stands in no row. Say in ROWS above whom it may import."


def test_every_folder_of_sources_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    bare = sorted(folder.name for folder in folders if not (folder / "__init__.py").exists())
    assert not bare, f"Without an __init__.py these are not installed: {', '.join(bare)}."


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {path.parent for path in (REPOSITORY / "tests").rglob("*.py")}
    bare = sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists())
    assert not bare, f"Without an __init__.py two files of one name cannot both be collected: {', '.join(bare)}."


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_a_file_imports_only_from_rows_below_or_from_its_own_package(path: Path) -> None:
    unit = unit_of(path)
    faults = [
        f"{path.relative_to(REPOSITORY)}:{line} {fault}"
        for line, imported in imports_of(path)
        if unit in ROW_OF and (fault := violation(unit, imported))
        if (path.relative_to(REPOSITORY).as_posix(), imported) not in UPWARDS
    ]
    assert not faults, "\n".join(faults)


def test_chain_never_imports_models_not_even_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for path in source_files():
        graph.setdefault(unit_of(path), set()).update(unit for _, unit in imports_of(path))
    reached, waiting = set(), ["chain"]
    while waiting:
        unit = waiting.pop()
        if unit not in reached:
            reached.add(unit)
            waiting += graph.get(unit, ())
    assert "ops" in reached and "models" not in reached


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import vaebm_fast", FACE),
        ("import vaebm_fast.models.nvae as nvae", "models"),
        ("from vaebm_fast import reference", "reference"),
        ("from vaebm_fast import load_nvae", FACE),
        ("from vaebm_fast.training.loop import run", "training"),
        ("from . import _backend", "ops"),
        ("from .. import chain", "chain"),
        ("from ..models.nvae import NVAE", "models"),
        ("def f():\n    from vaebm_fast.models import NVAE", "models"),
        ("importlib.import_module('vaebm_fast._C')", "_C"),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, expected: str) -> None:
    assert [unit for _, unit in imported_units(source, "vaebm_fast.ops")] == [expected]


def test_the_rows_refuse_upward_and_sideward_imports() -> None:
    assert violation("checkpoint", "chain") and violation("ops", "models") and violation("models", FACE)
    assert violation("training", "report") and violation("chain", "unheard_of")
    assert violation("cli", "report") is None and violation("models", "ops") is None and violation("ops", "ops") is None


IMPORT_WITHOUT_OPTIONAL = """
import importlib, pkgutil, sys

# None as a module: importing it raises ModuleNotFoundError, and looking for it finds nothing.
sys.modules.update(dict.fromkeys({optional!r}))
import vaebm_fast
for module in pkgutil.walk_packages(vaebm_fast.__path__, "vaebm_fast."):
    if not module.name.startswith({skipped!r}):
        importlib.import_module(module.name)

import torch
from vaebm_fast.chain import noise
from vaebm_fast.runtime import extension
assert not torch.cuda.is_available()
assert not extension.is_available() and "has not been built" in extension.why_missing()
"""


def test_the_package_imports_without_the_compiled_part_cuda_and_optional_packages(tmp_path: Path) -> None:
    program = IMPORT_WITHOUT_OPTIONAL.format(optional=OPTIONAL, skipped=NEEDS_OPTIONAL)
    done = subprocess.run(
        [sys.executable, "-W", "error:::vaebm_fast", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
