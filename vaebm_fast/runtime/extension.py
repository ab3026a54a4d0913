"""Loads the compiled extension `vaebm_fast._C`, which registers the kernels of `torch.ops.vaebm_fast`, if it is built.

The package works without it, more slowly; this module records why it is missing. `vaebm_fast.ops` chooses backends.
"""

from __future__ import annotations

import importlib

import torch  # first: the extension links against libraries that torch loads

BUILD = "`pip install --no-build-isolation -e .` in the repository builds it"


def _load() -> tuple[str | None, bool]:
    """(why the compiled part is missing, or None; whether it holds CUDA kernels)."""
    try:
        module = importlib.import_module("vaebm_fast._C")
    except ModuleNotFoundError:
        return f"the compiled part has not been built; {BUILD}", False
    except ImportError as error:
        return f"the compiled part does not fit torch {torch.__version__} ({error}); {BUILD} again", False
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
