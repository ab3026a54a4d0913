"""How a command ends: one line for what its user can mend, a traceback for a bug."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vaebm_fast.chain.langevin import NonFiniteChainError
from vaebm_fast.checkpoint import CheckpointError, load_nvae
from vaebm_fast.config import NVAEConfig
from vaebm_fast.data import open_source
from vaebm_fast.ops import _backend
from vaebm_fast.ops._backend import resolve
from vaebm_fast.runtime import command
from vaebm_fast.runtime.errors import NonFiniteError, UserError
from vaebm_fast.sampling import SamplingError
from vaebm_fast.sampling.seeds import Seeds
from vaebm_fast.training.guard import DivergedError

CPU = torch.device("cpu")


def ended(body: Callable[[], object]) -> int:
    """The exit code of a command that does this."""

    def run(_: object) -> int:
        body()
        return 0

    return command.run(run, [])


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: _backend.choose("philox_normal", CPU, "cuda"),
        lambda: _backend.choose("philox_normal", CPU, "tpu"),
        lambda: resolve("triton", CPU, torch.float32),
        lambda: NVAEConfig(image_size=33),
        lambda: open_source("no/such/folder", image_size=8, image_channels=1),
        lambda: Seeds.parse("5-3"),
        lambda: load_nvae("no/such/file"),
    ],
    ids=["missing backend", "unknown backend", "backend of a pair", "configuration", "data", "seeds", "checkpoint"],
)
def test_what_the_user_can_mend_is_a_value_error_and_one_line(
    mistake: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError):
        mistake()
    assert ended(mistake) == command.FAILED
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "bug",
    [
        lambda: torch.cat([torch.zeros(2, 3), torch.zeros(2)]),
        lambda: F.conv2d(torch.zeros(1, 2, 4, 4), torch.zeros(3, 5, 1, 1)),
        lambda: torch.nn.functional.interpolate(torch.zeros(1, 1, 2, 2)),  # ValueError, raised in Python
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: int("three"),
        lambda: [].index(1),
    ],
    ids=["cat", "conv2d", "interpolate", "matmul", "int", "index"],
)
def test_a_bug_keeps_its_traceback(bug: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((RuntimeError, ValueError)) as raised:
        ended(bug)
    assert not isinstance(raised.value, UserError) and capsys.readouterr().err == ""


@pytest.mark.parametrize("builtin", [ValueError, RuntimeError])
def test_a_bug_raised_by_a_module_of_the_package_keeps_its_traceback(
    builtin: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The innermost Python frame says nothing: torch's C++ functions have none."""

    def broken(*_: object) -> None:
        raise builtin("broken")

    monkeypatch.setattr(_backend, "why_not", broken)
    with pytest.raises(builtin, match="broken"):
        ended(lambda: _backend.choose("philox_normal", CPU, "cuda"))


def test_every_error_of_the_package_is_a_user_error_and_keeps_its_builtin_type() -> None:
    assert issubclass(UserError, ValueError)
    for kind in (CheckpointError, SamplingError, NonFiniteError, NonFiniteChainError, DivergedError):
        assert issubclass(kind, UserError)
    assert issubclass(NonFiniteError, FloatingPointError) and issubclass(NonFiniteChainError, RuntimeError)
    assert issubclass(_backend.BackendError, RuntimeError) and issubclass(DivergedError, RuntimeError)


def test_a_system_error_is_one_line_where_it_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: tmp_path.joinpath("missing", "file").write_text("")) == command.FAILED
    assert capsys.readouterr().err == f"error: {tmp_path}/missing/file: No such file or directory.\n"

    def nameless() -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        ended(nameless)


def test_a_warning_is_one_line() -> None:
    assert ended(lambda: None) == 0
    said = warnings.formatwarning(UserWarning("a file called x\ny is odd"), UserWarning, "file.py", 1)
    assert said == "warning: a file called x y is odd\n"


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert ended(interrupted) == command.INTERRUPTED
    assert capsys.readouterr().err == "Interrupted.\n"
