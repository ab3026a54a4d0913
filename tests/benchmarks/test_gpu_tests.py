"""The GPU tests' runner on files of ours: what is red, and that one file's end is not another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import tests as runner

GREEN = "import pytest\n\n@pytest.mark.gpu\ndef test_green():\n    pass\n"
FILES = {
    "test_green.py": GREEN,
    "test_red.py": GREEN
    + "\n@pytest.mark.gpu\n@pytest.mark.parametrize('x', ['a b'])\ndef test_red(x):\n    assert 0, 'c - d'\n",  # noqa: E501
    "test_dead.py": GREEN + "\n@pytest.mark.gpu\ndef test_dead():\n    import os\n    os._exit(139)\n",
    "test_smoke.py": GREEN.replace("test_green", "test_sanitised_kernel"),
    "test_broken.py": "import nothing_of_this_name\n# mark.gpu\n",
    "test_cpu.py": "def test_cpu():\n    assert 0\n",
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose tests run without pytest-xdist, which replaces workers that die."""
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs one\naddopts = -ra\n")
    for name, text in FILES.items():
        (tmp_path / "tests" / name).write_text(text)
    monkeypatch.setattr(runner, "REPOSITORY", tmp_path)
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    return tmp_path


def test_each_file_has_its_own_process_log_and_verdict(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = repository / "logs"
    assert runner.main(["--logs", str(logs)]) == 1
    out = capsys.readouterr().out
    red = {line for line in out.splitlines() if line.startswith("FAILED")}
    assert red == {
        "FAILED tests/test_red.py::test_red[a b]",
        "FAILED tests/test_dead.py (exit code 139; see tests_test_dead.log)",
        "FAILED tests/test_broken.py",
    }
    assert runner.red_tests(out) == [line.removeprefix("FAILED ") for line in out.splitlines() if line in red]
    assert "tests/test_green.py: 1 passed" in out and "tests/test_smoke.py: 1 deselected" in out
    assert "test_cpu" not in out and (logs / "tests_test_green.log").exists()


def test_only_lines_of_the_summary_name_red_tests() -> None:
    log = """
ERROR    vaebm_fast.x:file.py:12 a message
ERROR at setup of test_a
FAILED (errors=1)
FAILED tests/test_a.py::test_b[c - d, e] - AssertionError: assert [1] == 2 - 3
FAILED tests/a/test_c.py::Some::test_d - ValueError: tests/test_x.py [y]
ERROR tests/test_e.py - ImportError
ERROR tests/test_f.py
FAILED tests/test_g.py::test_h[i]
FAILED tests/test_j.py (exit code -11; see tests_test_j.log)
"""
    assert runner.red_tests(log) == [
        "tests/test_a.py::test_b[c - d, e]",
        "tests/a/test_c.py::Some::test_d",
        "tests/test_e.py",
        "tests/test_f.py",
        "tests/test_g.py::test_h[i]",
        "tests/test_j.py (exit code -11; see tests_test_j.log)",
    ]


def test_green_files_are_exit_code_0(repository: Path) -> None:
    for name in ("test_red.py", "test_dead.py", "test_broken.py"):
        (repository / "tests" / name).unlink()
    assert runner.main(["--logs", str(repository / "logs")]) == 0


def test_without_a_gpu_nothing_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        runner.main([])
    assert "these tests need a CUDA device, and there is none" in capsys.readouterr().err


def test_the_files_are_those_with_gpu_tests_and_the_longest_comes_first() -> None:
    names = [path.name for path in runner.files()]
    assert names[0] == "test_gpu.py"
    assert {"test_graphs_gpu.py", "test_replay_gpu.py", "test_noise.py", "test_langevin_update.py"} <= set(names)
    assert "test_frozen.py" not in names
