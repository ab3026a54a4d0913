"""The compiled part, `vaebm_fast._C`: loaded once, here, if it is there. It registers `torch.ops.vaebm_fast`.

The package works without it, more slowly; this module remembers why it is missing. Which op runs what is decided in
`vaebm_fast.ops`.
"""

from __future__ import annotations

import importlib

import torch  # before the compiled part, which links against the libraries that torch loads

BUILD = "`pip install --no-build-isolation -e .` in the repository builds it"


def _load() -> tuple[str | None, bool]:
    """(why the compiled part is missing, or None; whether it holds CUDA kernels)."""
    try:
        module = importlib.import_module("vaebm_fast._C")
    except ModuleNotFoundError:
        return f"the compiled part has not been built; {BUILD}", False
    except ImportError as error:
        return f"the compiled part does not fit torch {torch.__version__} ({error}); {BUILD} anew", False
    return None, bool(module.with_cuda)


_why_missing, _with_cuda = _load()


def is_available() -> bool:
    """Whether the compiled part is loaded."""
    return _why_missing is None


def has_cuda() -> bool:
    """Whether the compiled part is loaded and holds the CUDA kernels."""
    return _with_cuda


def why_missing() -> str | None:
    """Why the compiled part is not loaded and how to get it, as a clause; None when it is loaded."""
    return _why_missing
