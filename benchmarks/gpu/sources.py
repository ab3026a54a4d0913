"""Digests of the code that a GPU kernel is compiled from, to tell kernels that changed after they were measured."""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from pathlib import Path

from benchmarks.gate import REPOSITORY
from vaebm_fast.ops._backend import GPU_BACKENDS, OP_BACKENDS, OpBackends
from vaebm_fast.ops._measured import PAIR

BEGIN, END = "# tune_triton: begin", "# tune_triton: end"
TRITON, CUDA = Path("vaebm_fast/triton_kernels"), Path("csrc/cuda")


def sources_of(what: str, backend: str) -> dict[str, str]:
    """{"sources": digest} of a GPU backend, for a row of results; {} for others."""
    return {"sources": digest(what, backend)} if backend in GPU_BACKENDS else {}


def digest(what: str, backend: str, root: Path = REPOSITORY) -> str:
    """Of the code, without comments, from which the kernels of an op or of a pair on `backend` are compiled."""
    ops = dict.fromkeys([what], backend) if what != PAIR else OpBackends.of(backend).by_op  # type: ignore[arg-type]
    files: set[Path] = set()
    for op, compiled in ops.items():
        name = "philox_normal" if op == "philox_words" else op.removesuffix("_backward")
        first = root / (TRITON / f"{name}.py" if compiled == "triton" else CUDA / f"{name}.cu")
        if first.exists():  # products of "cuda" are cuBLAS
            files |= _with_included(first, root)
    hashed = hashlib.sha256()
    for file in sorted(files):
        hashed.update(f"{file.relative_to(root)}\n{code_of(file)}\n".encode())
    return hashed.hexdigest()[:16]


def digest_of_all() -> str:
    """Of the code of all kernels."""
    found = [digest(op, name) for op, backends in OP_BACKENDS.items() for name in backends if name in GPU_BACKENDS]
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def _with_included(source: Path, root: Path) -> set[Path]:
    """The file and those of this repository that it includes or imports, and so on."""
    found, waiting = {source}, [source]
    while waiting:
        file = waiting.pop()
        text = file.read_text(encoding="utf-8")
        included = [file.parent / name for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)]
        imported = re.findall(r"^from vaebm_fast\.triton_kernels\.(\w+) import", text, re.MULTILINE)
        included += [root / TRITON / f"{name}.py" for name in imported]
        new = {path.resolve() for path in included} - found
        found |= new
        waiting += new
    return found


def code_of(file: Path) -> str:
    """The file's tokens (Python) or lines (C++) without comments, docstrings and empty lines."""
    text = file.read_text(encoding="utf-8")
    text = re.sub(rf"{BEGIN}.*?{END}", "", text, flags=re.DOTALL)  # what `tune` writes was timed
    if file.suffix != ".py":
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    tokens = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    begins = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    docstrings = {
        index
        for index, token in enumerate(tokens)
        if token.type == tokenize.STRING and (index == 0 or tokens[index - 1].type in begins)
    }
    return " ".join(token.string.strip() for index, token in enumerate(tokens) if index not in docstrings)
