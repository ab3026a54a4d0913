"""What would a GPU machine take long to build? Brings it there: the compiled part, and compiled Triton kernels.

    python -m benchmarks kit make [--capability 9.0]     into build/gpu_kit.tar; `make gpu-kit` runs it
    python -m benchmarks kit install                     puts it in place, or builds; `make gpu` runs it

Made without a GPU, with the Python, torch and Triton of the GPU machine. There a compiled part of other sources,
another Python or torch is ignored and built anew; Triton itself passes over kernels of other sources or versions.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import REPOSITORY
from vaebm_fast.runtime import extension
from vaebm_fast.runtime.files import expanded, replacing

KIT = REPOSITORY / "build" / "gpu_kit.tar"
TRITON_CACHE = REPOSITORY / "build" / "triton_cache"
MANIFEST, COMPILED, KERNELS = "manifest.json", "compiled", "triton_cache"
CHECK = "import vaebm_fast\nfrom vaebm_fast.runtime import extension\nraise SystemExit(not extension.has_cuda())"
LAUNCHED = (".json", ".cubin")  # files that a launch reads
GROUP = "__grp__"  # prefix of Triton's lists of a kernel's files, which hold absolute paths


def facts() -> dict[str, str]:
    """What a compiled part depends on."""
    hashed = hashlib.sha256()
    sources = (path for kind in ("cpp", "cu", "h") for path in (REPOSITORY / "csrc").rglob(f"*.{kind}"))
    for path in sorted([REPOSITORY / "setup.py", *sources]):
        hashed.update(f"{path.relative_to(REPOSITORY)}\n".encode() + path.read_bytes())
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "sources": hashed.hexdigest(),
    }


class OtherGPU:
    """In place of Triton's driver: a GPU of this compute capability, such as "9.0", that is not here."""

    def __init__(self, capability: str) -> None:
        self._architecture = int(capability.replace(".", ""))

    def get_current_target(self) -> Any:
        """What to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        """Its index."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """No stream: nothing is launched."""
        return 0


def make(out: Path, capability: str) -> str:
    """Write the kit from the compiled part in place and the Triton kernels of all stages; returns what it holds."""
    compiled = _compiled_part()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        failures = _compile_kernels(capability)
        if failures:
            raise SystemExit("\n".join(failures))
        kernels = [path for path in sorted(Path(folder).iterdir()) if path.is_dir()]
        files = {f"{COMPILED}/{compiled.name}": compiled}
        for path in (path for kernel in kernels for path in sorted(kernel.iterdir())):
            if path.suffix in LAUNCHED:
                files[f"{KERNELS}/{path.parent.name}/{path.name}"] = path
        manifest = Path(folder, MANIFEST)
        of_kernels = {"triton": version("triton"), "capability": capability}
        hashes = {name: _sha256(path) for name, path in files.items()}
        manifest.write_text(json.dumps({**facts(), **of_kernels, "files": hashes}))
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary, tarfile.open(temporary, "w:gz") as tar:
            for name, path in {MANIFEST: manifest, **files}.items():
                tar.add(path, name)
    return f"{out}: {out.stat().st_size / 1e6:.1f} MB, {compiled.name} and {len(kernels)} Triton kernels"


def _compiled_part() -> Path:
    """The compiled part that this Python loads. Raises SystemExit if it holds no CUDA kernels."""
    if not extension.has_cuda():
        raise SystemExit("There is no compiled part with CUDA kernels for this Python; `make gpu-kit` builds it first.")
    return Path(str(importlib.import_module("vaebm_fast._C").__file__))


def _compile_kernels(capability: str) -> list[str]:
    """Into Triton's cache; returns what failed."""
    from triton.runtime.driver import driver

    from benchmarks.gpu.precompile import CALLS, compile_all, recorded

    torch.set_num_threads(1)  # threads do not survive a fork
    driver.set_active(OtherGPU(capability))
    launches, failures = recorded(list(CALLS))
    return failures + compile_all(launches, os.cpu_count() or 1, load=False)


def install(kit: Path, cache: Path) -> str:
    """Put the compiled part in place, and the kernels into `cache`; returns what was done, a sentence.

    Raises FileNotFoundError without a kit, ValueError for a damaged one or if the compiled part does not fit; in the
    last case the kernels are in `cache` all the same.
    """
    if not kit.exists():
        raise FileNotFoundError(f"There is no {kit}.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # kernels are renamed into the cache, never half copied
        try:
            with tarfile.open(kit, "r:gz") as tar:
                tar.extractall(folder, filter="data")
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{kit} is damaged ({error}); copy or make it again.") from error
        made = json.loads(Path(folder, MANIFEST).read_text())
        files = made.get("files", {MANIFEST: ""})
        damaged = [name for name, digest in files.items() if _sha256(Path(folder, name)) != digest]
        if damaged:
            raise ValueError(f"{kit} is damaged: {damaged[0]} is not what was packed; copy or make it again.")
        kernels = _put_kernels(Path(folder, KERNELS), cache)
        here = facts()
        differing = [name for name, value in here.items() if made.get(name) != value]
        if differing == ["sources"]:
            raise ValueError(f"{kit} was compiled from other sources: setup.py or csrc differs.")
        if differing:
            pairs = ", ".join(f"{name} {made.get(name)}, not {here[name]}" for name in differing if name != "sources")
            raise ValueError(f"{kit} was compiled for {pairs}.")
        (compiled,) = Path(folder, COMPILED).iterdir()
        with replacing(REPOSITORY / "vaebm_fast" / compiled.name) as temporary:
            shutil.copyfile(compiled, temporary)
    return (
        f"{compiled.name} comes from {kit}; so do kernels of Triton {made['triton']} for compute capability "
        f"{made['capability']}, {kernels} of which were not in the cache."
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _put_kernels(folder: Path, cache: Path) -> int:
    """Move the kernels that `cache` lacks there, with the paths in their lists made right; returns their number.

    Triton leaves a folder without a list, or without files of the list, where it has looked a kernel up, or failed to
    compile it.
    """
    kernels = [kernel for kernel in sorted(folder.iterdir()) if not _is_whole(cache / kernel.name)]
    for kernel in kernels:
        for group in kernel.glob(f"{GROUP}*"):
            listed = json.loads(group.read_text())
            files = {name: str(cache / kernel.name / name) for name in listed["child_paths"]}
            group.write_text(json.dumps({**listed, "child_paths": files}))
        shutil.rmtree(cache / kernel.name, ignore_errors=True)
        kernel.rename(cache / kernel.name)
    return len(kernels)


def _is_whole(kernel: Path) -> bool:
    """Whether the folder of a kernel in Triton's cache has a list, and all files of it that a launch reads."""
    try:
        lists = [json.loads(path.read_text())["child_paths"].values() for path in kernel.glob(f"{GROUP}*")]
    except (ValueError, KeyError):
        return False
    read = [Path(name) for listed in lists for name in listed if name.endswith(LAUNCHED)]
    return bool(read) and all(path.exists() for path in read)


def build() -> int:
    """Build the compiled part in place, with CUDA, and load it; 0, or the exit code of what failed.

    One that was there stays if there is no other.
    """
    library = REPOSITORY / "vaebm_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    aside = library.with_suffix(".before")
    if library.exists():
        library.replace(aside)  # setuptools would keep one that is newer than its sources
    command, variables = [sys.executable, "setup.py", "build_ext", "--inplace"], {**os.environ, "VAEBM_CUDA": "1"}
    code = subprocess.run(command, cwd=REPOSITORY, env=variables, check=False).returncode
    if aside.exists():
        aside.replace(library) if code else aside.unlink()
    return code or _load()


def _load() -> int:
    """0 if a new process loads the compiled part and finds CUDA kernels in it."""
    return subprocess.run([sys.executable, "-c", CHECK], cwd=REPOSITORY, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Make the kit, or install it and build what does not come from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("make", "install"))
    parser.add_argument("--kit", type=expanded, default=KIT, help="the tar file; default: build/gpu_kit.tar")
    parser.add_argument("--capability", default="9.0", help="compute capability of the GPU; default: 9.0 (H100, H200)")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"\d+\.\d", options.capability):
        parser.error(f"--capability is {options.capability}; it must be like 8.0 or 9.0.")
    if options.job == "make":
        print(make(options.kit, options.capability))
        return 0
    try:
        print(install(options.kit, Path(os.environ.get("TRITON_CACHE_DIR", TRITON_CACHE))))
    except Exception as error:  # a damaged kit, too, costs no more than the time to build
        print(f"Building: {error}", flush=True)
        return build()
    return 0 if _load() == 0 else build()
