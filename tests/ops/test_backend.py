"""The dispatcher: choice of `auto`, errors of missing backends, and the package without its compiled part."""

from __future__ import annotations

import copy
import importlib
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from vaebm_fast import reference
from vaebm_fast.chain.noise import draw_tensor, seed_tensor
from vaebm_fast.ops import _backend
from vaebm_fast.ops._backend import OP_BACKENDS, Backend, OpBackends, choose, report, resolve
from vaebm_fast.ops.philox_normal import philox_normal
from vaebm_fast.runtime import extension

REPOSITORY = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulates a compiled part that contains all ops."""
    monkeypatch.setattr(extension, "_why_missing", None)
    monkeypatch.setattr(extension, "_with_cuda", True)
    return monkeypatch


def test_every_op_has_a_reference_of_the_same_name() -> None:
    for op, backends in OP_BACKENDS.items():
        assert "reference" in backends
        assert callable(getattr(reference, op))


def schemas(namespace: str) -> dict[str, str]:
    """The schemas of a namespace's ops on tensors, by name."""
    found = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{namespace}::")]
    on_tensors = [s for s in found if any(str(argument.type) == "Tensor" for argument in s.arguments)]
    return {s.name.partition("::")[2]: str(s).partition("::")[2] for s in on_tensors}


def test_the_table_names_the_ops_of_each_namespace_and_no_others() -> None:
    csrc, triton = schemas("vaebm_fast"), schemas("vaebm_triton")
    of_files = {"jpeg_stream_fault"} if extension.is_available() else set()  # takes the bytes of a file, on a CPU
    assert set(csrc) - of_files == {op for op, backends in OP_BACKENDS.items() if {"cpp", "cuda"} & set(backends)}
    assert set(triton) == {op for op, backends in OP_BACKENDS.items() if "triton" in backends}
    assert all(csrc[op] == triton[op] for op in csrc.keys() & triton.keys())


def test_every_compiled_kernel_has_a_schema() -> None:
    assert not [found for found in torch._C._dispatch_find_dangling_impls() if "vaebm_" in found]


def test_a_compiled_kernel_that_does_not_fit_its_schema_is_an_error_at_import() -> None:
    if not extension.is_available():
        pytest.skip(str(extension.why_missing()))
    program = (
        "from torch.library import Library\ndefine = Library.define\n"
        "Library.define = lambda library, schema: define(library, schema.replace('int it', 'bool it'))\n"
        "import vaebm_fast"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "vaebm_fast::power_iteration" in done.stderr and "doesn't match the expected function schema" in done.stderr
    assert "ImportError: The compiled part is of other sources than these; `pip install" in done.stderr


def test_an_extension_that_defines_schemas_itself_is_called_outdated() -> None:
    program = "from torch.library import Library\nolder = Library('vaebm_fast', 'DEF')\nimport vaebm_fast"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("in the repository builds it again.")


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "cuda"])
def test_the_backends_of_a_pair_are_copied_and_pickled(backend: Backend) -> None:
    backends = OpBackends.of(backend)
    assert copy.deepcopy(backends) == pickle.loads(pickle.dumps(backends)) == backends


def test_auto_is_compiled_on_a_cpu(compiled: pytest.MonkeyPatch) -> None:
    assert choose("philox_normal", CPU, "auto") == "cpp"
    assert choose("philox_normal", torch.device("meta"), "auto") == "reference"


def test_triton_takes_cpu_tensors_only_when_interpreted(compiled: pytest.MonkeyPatch) -> None:
    compiled.setattr(_backend, "OP_BACKENDS", {"blur": ("reference", "triton")})
    compiled.setattr(_backend, "_is_installed", lambda package: True)
    compiled.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"blur cannot run with backend='triton'.*runs on cuda tensors"):
        choose("blur", CPU, "triton")
    compiled.setenv("TRITON_INTERPRET", "1")
    assert choose("blur", CPU, "triton") == "triton"


def test_a_missing_backend_says_how_to_get_it(compiled: pytest.MonkeyPatch) -> None:
    compiled.setattr(extension, "_with_cuda", False)
    with pytest.raises(RuntimeError, match=r"VAEBM_CUDA=1 pip install"):
        choose("philox_normal", CUDA, "cuda")
    with pytest.raises(RuntimeError, match=r"has no such implementation; it has reference, cpp"):
        choose("power_iteration", CUDA, "triton")
    with pytest.raises(RuntimeError, match=r"runs on cpu tensors and these are on cuda:0; move them with"):
        choose("philox_normal", CUDA, "cpp")
    compiled.setattr(extension, "_why_missing", "the compiled part has not been built; `pip install` builds it")
    with pytest.raises(RuntimeError, match=r"cpp'.*has not been built; `pip install` builds it"):
        philox_normal(seed_tensor([0]), draw_tensor(0), stream=0, numel=4, backend="cpp")


def one_for_all(backend: Backend) -> dict[str, Backend]:
    """Every op that each pair runs, on one backend."""
    ops: dict[str, Backend] = dict.fromkeys(
        (
            "depthwise_swish", "pointwise", "bilinear_upsample", "energy_epilogue", "energy_head", "se_gate_residual",
            "gaussian_latent", "pixel_head",
        ),
        backend,
    )  # fmt: skip
    return ops


PAIRS: dict[Backend, dict[str, Backend]] = {
    "reference": one_for_all("reference"),
    "cpp": one_for_all("cpp") | {"bilinear_upsample": "reference"},
    "triton": one_for_all("triton") | {"residual_tail": "triton"},
    "cuda": one_for_all("triton") | {"depthwise_swish": "cuda", "pointwise": "cuda", "inverted_residual": "cuda"},
}


@pytest.mark.parametrize("backend", PAIRS)
def test_a_pair_has_one_backend_per_op_and_no_fused_op_that_it_runs_as_its_parts(
    backend: Backend, compiled: pytest.MonkeyPatch
) -> None:
    compiled.setattr(_backend, "_is_installed", lambda package: True)
    backends = resolve(backend, CPU if backend == "cpp" else CUDA, torch.float32)
    assert backends.name == backend and dict(backends.by_op) == PAIRS[backend]
    assert all(backends[op] == PAIRS[backend][op] for op in PAIRS[backend])
    assert [op for op in OP_BACKENDS if op in backends] == [op for op in OP_BACKENDS if op in PAIRS[backend]]


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        (CPU, torch.float32, "cpp"),
        (CPU, torch.bfloat16, "reference"),
        (CUDA, torch.float32, "reference"),
        (torch.device("meta"), torch.float32, "cpp"),  # as on a CPU, to be counted
    ],
    ids=str,
)
def test_an_auto_pair_is_compiled_only_in_float32(
    device: torch.device, dtype: torch.dtype, backend: Backend, compiled: pytest.MonkeyPatch
) -> None:
    assert resolve("auto", device, dtype) == resolve(backend, device, dtype)
    compiled.setattr(extension, "_why_missing", "the compiled part has not been built")
    assert resolve("auto", device, dtype).name == "reference"


def test_a_pair_that_cannot_run_here_is_refused(compiled: pytest.MonkeyPatch) -> None:
    compiled.setattr(_backend, "_is_installed", lambda package: package != "triton")
    with pytest.raises(RuntimeError, match=r"^depthwise_swish cannot run with backend='triton': Triton is not"):
        resolve("triton", CUDA, torch.float32)
    with pytest.raises(RuntimeError, match=r"^energy_epilogue cannot run with backend='triton': Triton is not"):
        resolve("cuda", CUDA, torch.float32)
    with pytest.raises(RuntimeError, match=r"^depthwise_swish cannot run with backend='cpp': it runs on cpu tensors"):
        resolve("cpp", CUDA, torch.float32)
    with pytest.raises(ValueError, match=r"^A frozen pair with backend='cpp' takes float32, not torch.bfloat16"):
        resolve("cpp", CPU, torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"^Backend 'cudnn' is not known; it must be one of auto, reference, cpp, triton, cuda"
    ):
        resolve("cudnn", CPU, torch.float32)  # type: ignore[arg-type]


def test_an_unknown_backend_is_named_together_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cudnn' is not known; it must be one of auto, reference, cpp, triton, cuda"):
        choose("philox_normal", CPU, "cudnn")


def test_report_lists_each_op_with_its_pick_and_what_is_missing(compiled: pytest.MonkeyPatch) -> None:
    compiled.setattr(extension, "_with_cuda", False)
    compiled.setattr(_backend, "_is_installed", lambda package: True)
    reports = {entry.op: entry for entry in report(CUDA)}
    assert set(reports) == set(OP_BACKENDS)
    assert reports["philox_normal"].backend == "reference" and report(CPU)[0].backend == "cpp"
    assert "VAEBM_CUDA=1" in reports["philox_normal"].unusable["cuda"]


def test_a_compiled_part_of_another_torch_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib, "import_module", broken)
    reason, with_cuda = extension._load()
    assert reason is not None and "does not fit torch" in reason and "undefined symbol" in reason
    assert not with_cuda


def test_the_package_works_without_its_compiled_part() -> None:
    program = (
        "import sys; sys.modules['vaebm_fast._C'] = None\n"
        "from vaebm_fast.chain import noise\nfrom vaebm_fast.runtime import extension\n"
        "z = noise.normal(noise.seed_tensor([3]), 1, noise.Stream.CHAIN, 5)\n"
        "print(z.tolist()); print(extension.why_missing())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers, reason = done.stdout.splitlines()
    expected = reference.philox_normal(seed_tensor([3]), draw_tensor(1), stream=0, numel=5)
    assert numbers == str(expected.tolist())
    assert "has not been built" in reason


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("VAEBM_CUDA", "yes", "VAEBM_CUDA is 'yes'; it must be auto, 0 or 1."),
        ("VAEBM_CUDA", "1", "VAEBM_CUDA=1 requires the CUDA part, but torch .* was built without CUDA"),
        ("CXX", "no-such-compiler", "needs a C\\+\\+ compiler, but 'no-such-compiler' is not on the PATH"),
    ],
)
def test_setup_says_in_a_sentence_why_it_cannot_build(
    variable: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=sentence):
        runpy.run_path(str(REPOSITORY / "setup.py"))


def test_setup_says_that_setuptools_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"needs setuptools 77.0.3 or newer, but found 65.5.0; run `pip install"):
        runpy.run_path(str(REPOSITORY / "setup.py"))
