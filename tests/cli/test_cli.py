"""`vaebm-fast` as its users meet it: what each command prints, its exit code, and how errors are told."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vaebm_fast as vf
from tests.helpers.golden import case_path
from tests.helpers.sampling_jobs import save_networks
from vaebm_fast import __version__, cli
from vaebm_fast.checkpoint import describe, load_energy, save_nvae, save_training
from vaebm_fast.cli import demo, info, sample
from vaebm_fast.config import PRESETS
from vaebm_fast.models import NVAE
from vaebm_fast.ops import _backend, _measured
from vaebm_fast.runtime import command as commands
from vaebm_fast.sampling import SampleOptions

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """The aligned lines that a command prints, value by name; asserts that it succeeds."""
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in out.splitlines())}


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that fails."""
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def tiny_nvae(folder: Path) -> Path:
    """A small fresh NVAE of 8x8 grey images in a file."""
    config = replace(PRESETS["digits"].nvae, num_channels_enc=4, num_channels_dec=4)
    save_nvae(NVAE(config).eval(), folder / "nvae.safetensors")
    return folder / "nvae.safetensors"


def test_without_a_command_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("sample", "info", "convert", "likelihood", "readjust", "demo", "--version"))


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vaebm-fast {__version__}\n"


def test_info_names_every_part_and_the_backend_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines_of(capsys, "info")
    assert shown["vaebm-fast"] == __version__ and shown["torch"] == torch.__version__
    assert shown["threads"] == str(torch.get_num_threads()) and shown["devices"].startswith("cpu")
    parts = ("compiled part", "CUDA kernels", "CUDA device", "Triton", *info.PACKAGES)
    assert all(shown[part] == "there" or shown[part].startswith("missing: ") for part in parts)
    assert {op: shown[f"{op} on cpu"] for op in _backend.OP_BACKENDS} == {
        report.op: report.backend for report in _backend.report(CPU)
    }
    assert shown["frozen pair on cpu"] == vf.VAEBM.from_preset("digits").freeze().backend


def test_python_dash_m_is_the_command() -> None:
    command = [sys.executable, "-m", "vaebm_fast", "--version"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"vaebm-fast {__version__}\n")


def test_a_training_in_place_of_a_network_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_training({"step": 1}, tmp_path / "training.safetensors")
    error = error_of(capsys, "convert", str(tmp_path / "training.safetensors"), str(tmp_path / "out"))
    assert "holds a training state, not a network; networks are in nvae.safetensors" in error


@pytest.mark.parametrize("name", info.PACKAGES)
def test_info_says_what_a_missing_package_is_for_and_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package, purpose = info.PACKAGES[name]
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    part = info.environment()["parts"][name]
    assert part["present"] is False and purpose in part["needs"] and f"pip install {package}" in part["needs"]


@pytest.mark.parametrize(
    ("name", "capability", "pair", "by"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", "cuda", "On CUDA by these measurements: NVIDIA H200, 2026-11-27, commit "),
        (
            "NVIDIA A100-SXM4-80GB", "8.0", "reference",
            "nothing: no NVIDIA A100-SXM4-80GB and no other GPU of compute capability 8.0 was measured; `make gpu`",
        ),
    ],
)  # fmt: skip
def test_info_says_by_which_measurements_auto_decides_on_a_gpu(
    name: str, capability: str, pair: str, by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: name)
    monkeypatch.setattr(_measured, "model_of", lambda index: (name, capability))
    monkeypatch.setattr(_backend, "why_absent", lambda backend: None)
    row = replace(_measured.table()[0], what=_measured.PAIR, backend="cuda", dtype="bfloat16", speedup=2.0)
    monkeypatch.setattr(_measured, "table", lambda: (row,))
    shown = lines_of(capsys, "info")
    assert shown["frozen pair in bfloat16 on cuda"] == pair and shown["frozen pair on cuda"] == "reference"
    info.info()
    assert by in capsys.readouterr().out


def test_info_without_the_compiled_part_says_so_and_picks_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend.extension, "_why_missing", "the compiled part has not been built; build it")
    facts = info.environment()
    assert facts["parts"]["compiled part"] == {
        "present": False,
        "needs": "the compiled part has not been built; build it",
    }
    assert set(facts["auto"]["cpu"].values()) == {"reference"}


def test_info_of_a_file_shows_what_describe_finds(capsys: pytest.CaptureFixture[str]) -> None:
    path = case_path("alt_tiny", "nvae.pt")
    shown, facts = lines_of(capsys, "info", str(path)), describe(path)
    assert shown["image shape"] == "3 x 64 x 64"
    assert shown["latent shapes"] == "2 of 4 x 16 x 16, 2 of 4 x 32 x 32"
    assert shown["parameters"] == f"{facts['parameters']:,}" and shown["content sha256"] == facts["content_sha256"]
    assert set(shown) == {name.replace("_", " ") for name in facts}


def test_info_prints_the_same_facts_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = case_path("cifar_tiny", "energy.pth")
    assert cli.main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(path)
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.environment()


def test_the_energy_options_reach_the_reading_of_a_published_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, destination = str(case_path("cifar_tiny", "energy.pth")), tmp_path / "energy.safetensors"
    blocks = "1-1d 1-1 1-2d 2-2 2-2d 2-2"
    options = ("--energy-arch", blocks, "--image-size", "64")
    assert lines_of(capsys, "info", source, *options)["image shape"] == "3 x 64 x 64"
    assert "celeba64" in error_of(capsys, "info", source, "--energy-arch", "celeba64")
    assert cli.main(["convert", source, str(destination), *options]) == 0
    assert load_energy(destination).config.image_size == 64


def test_convert_writes_our_format_and_replaces_a_file_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, destination = str(case_path("cifar_tiny", "nvae.pt")), tmp_path / "nvae.safetensors"
    assert cli.main(["convert", source, str(destination)]) == 0
    assert str(destination) in capsys.readouterr().out
    assert describe(destination)["content_sha256"] == describe(source)["content_sha256"]
    assert "exists already" in error_of(capsys, "convert", source, str(destination))
    assert cli.main(["convert", source, str(destination), "--overwrite"]) == 0


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs", b"\x80\x02garbage"])
def test_a_file_that_is_no_checkpoint_is_one_line_naming_it(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    for arguments in (("info", str(path)), ("convert", str(path), str(tmp_path / "out"))):
        assert str(path) in error_of(capsys, *arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


@pytest.fixture
def demo_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The demos that would have run."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(demo, "run_demo", lambda out, **options: calls.append({"out": out, **options}))
    return calls


def test_demo_hands_its_options_on(demo_calls: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()  # left by an earlier demo
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--out", str(tmp_path), "--train-seeds", "3", "--no-progress"]) == 0
    assert demo_calls == [
        {"out": Path("runs/demo"), "train_seeds": 1, "progress": True},
        {"out": tmp_path, "train_seeds": 3, "progress": False},
    ]


def test_demo_never_replaces_a_folder_of_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert str(tmp_path) in error_of(capsys, "demo", "--out", str(tmp_path))
    assert (tmp_path / "thesis.tex").exists()
    assert "train_seeds is 0" in error_of(capsys, "demo", "--train-seeds", "0")


def test_ctrl_c_ends_with_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_reader_that_stops_early_is_no_error() -> None:
    """As in `vaebm-fast info | head -1`: nothing on stderr, neither from the command nor from Python's shutdown."""
    program = "import sys\nfrom vaebm_fast.cli import main\nsys.stdin.read()\nsys.exit(main(['info']))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()  # now it may print
    assert process.wait() == 0
    assert process.stderr.read() == b""


def test_likelihood_prints_both_bounds_and_their_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvae = str(tiny_nvae(tmp_path))
    arguments = ["--data", "digits", "--importance-samples", "2", "--batch-size", "300", "--device", "cpu"]
    shown = lines_of(capsys, "likelihood", nvae, *arguments)
    assert float(shown["importance weighted bits per dim"]) < float(shown["elbo bits per dim"])
    assert shown["total images"] == "899" and "not comparable" in shown["unit"]
    assert "batch_size is 0" in error_of(capsys, "likelihood", nvae, "--data", "digits", "--batch-size", "0")


@pytest.mark.parametrize("command", [("likelihood", "--data", "digits"), ("readjust", "--temperature", "0.7")])
def test_a_gpu_that_is_not_there_is_one_sentence(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU" in error_of(capsys, *command, str(tiny_nvae(tmp_path)), "--device", "cuda")


def test_readjust_writes_its_result_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_nvae(tmp_path)
    assert cli.main(["readjust", str(path), "--temperature", "0.7", "--batches", "2"]) == 0
    written = path.with_name(f"{path.stem}.bn-t0.7.safetensors")
    said = capsys.readouterr()
    assert str(written) in said.out and said.err == ""  # no bar where there is no terminal
    assert describe(written)["info"]["temperature"] == 0.7


def sampling_arguments(folder: Path, *others: str) -> list[str]:
    nvae, energy = save_networks(folder)
    return ["sample", "--nvae", str(nvae), "--energy", str(energy), "--out", str(folder / "out"), *others]


def test_sample_hands_its_options_on_and_ends_with_the_jobs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SampleOptions] = []
    monkeypatch.setattr(sample, "run_job", lambda options: seen.append(options) or commands.INTERRUPTED)
    arguments = sampling_arguments(tmp_path, "--preset", "celeba_256", "--seeds", "0-49999", "--format", "tar")
    assert cli.main(arguments) == 130
    [options] = seen
    assert options == SampleOptions(
        nvae=Path(arguments[2]), energy=Path(arguments[4]), preset="celeba_256", seeds="0-49999",
        out=tmp_path / "out", format="tar",
    )  # fmt: skip


def test_sample_writes_images_and_tells_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = ("--steps", "2", "--step-size", "0.05", "--device", "cpu", "--no-progress")
    arguments = sampling_arguments(tmp_path)
    assert cli.main([*arguments, *chain, "--seeds", "3-5"]) == 0
    assert "Made 3 images" in capsys.readouterr().out and len(list(tmp_path.rglob("*.png"))) == 3
    assert "'5-3' are not an ascending range" in error_of(capsys, *arguments, *chain, "--seeds", "5-3")
    assert "give --preset, or both" in error_of(capsys, *arguments, "--seeds", "3-5")
    assert "seeds was 3-5 and is 3-6" in error_of(capsys, *arguments, *chain, "--seeds", "3-6")


# Paths, terminals and destinations, for every command.
def test_a_home_is_expanded_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shell leaves the ~ of --out=~/x alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny_nvae(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8), 3).save(tmp_path / "images" / "a.png")
    seen: list[SampleOptions] = []
    monkeypatch.setattr(sample, "run_job", lambda options: seen.append(options) or 0)
    monkeypatch.setattr(demo, "run_demo", lambda out, **_: print(f"demo in {out}"))
    for command in (
        ["info", "~/nvae.safetensors"],
        ["convert", "~/nvae.safetensors", "~/copy.safetensors"],
        ["readjust", "~/nvae.safetensors", "--temperature=0.7", "--batches=1", "--out=~/readjusted.safetensors"],
        ["likelihood", "~/nvae.safetensors", "--data=~/images", "--split=train", "--device=cpu"],
        ["sample", "--nvae=~/n", "--energy=~/e", "--out=~/o", "--seeds=0", "--steps=0"],
        ["demo", "--out=~/d"],
    ):
        assert cli.main(command) == 0, command
    out = capsys.readouterr().out
    assert f"demo in {tmp_path}/d" in out and f"Wrote {tmp_path}/copy.safetensors" in out
    [options] = seen
    assert (options.nvae, options.energy, options.out) == (tmp_path / "n", tmp_path / "e", tmp_path / "o")
    assert not (tmp_path / "~").exists() and (tmp_path / "readjusted.safetensors").is_file()


COMMANDS = [[name] for name in cli.COMMANDS] + [["train", "vae"], ["train", "energy"]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_every_help_is_printed_whole_on_a_terminal_without_its_characters(
    encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(command: list[str], encoding: str) -> tuple[int, str]:
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as context:
            context.setattr(sys, "stdout", stream)
            try:
                code = cli.main([*command, "--help"])
            except SystemExit as ended:
                code = int(ended.code or 0)
        return code, stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]

    for command in COMMANDS:
        code, text = printed(command, encoding)
        options = re.findall(r"(?<!-)--[a-z][a-z.-]+", text)
        assert (
            code == 0 and options and options == re.findall(r"(?<!-)--[a-z][a-z.-]+", printed(command, "utf-8")[1])
        ), command


def test_likelihood_of_unsplit_images_names_the_option_that_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nvae = str(tiny_nvae(tmp_path))
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8), 3).save(tmp_path / "images" / "a.png")
    command = ["likelihood", nvae, "--data", str(tmp_path / "images"), "--device", "cpu"]
    assert "--split train" in error_of(capsys, *command)
    assert lines_of(capsys, *command, "--split", "train")["total images"] == "1"


def test_readjust_names_a_destination_that_cannot_be_written_before_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvae, out = str(tiny_nvae(tmp_path)), tmp_path / "no" / "x"
    monkeypatch.setattr("vaebm_fast.training.readjust.readjust_batch_norm", None)
    error = error_of(capsys, "readjust", nvae, "--temperature", "0.7", "--out", str(out))
    assert error == f"error: {out}: No such file or directory.\n"


def test_likelihood_reads_images_by_the_transform_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nvae = str(tmp_path / "nvae.safetensors")
    save_nvae(NVAE(PRESETS["digits"].nvae), nvae)
    (tmp_path / "images").mkdir()
    Image.new("L", (10, 20)).save(tmp_path / "images" / "a.png")
    command = ["likelihood", nvae, "--data", str(tmp_path / "images"), "--split", "train", "--device", "cpu"]
    assert cli.main(command) == 0
    assert "it is 10x20, not 178x218" in error_of(capsys, *command, "--transform", "celeba")
