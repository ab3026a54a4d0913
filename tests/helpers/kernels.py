"""What the tests of compiled kernels share: how accurate a result must be, and the laws that every kernel keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vaebm_fast.ops import _backend
from vaebm_fast.runtime import extension


def device_of(backend: str) -> torch.device:
    """Where a backend runs: Triton on a GPU, but for its interpreter."""
    is_gpu = backend == "cuda" or (backend == "triton" and not _backend.is_interpreting())
    return torch.device("cuda" if is_gpu else "cpu")


def nhwc(*size: int, scale: float = 1.0) -> Tensor:
    """Normals of this size with channels innermost in memory."""
    return (scale * torch.randn(size)).to(memory_format=torch.channels_last)


def assert_as_accurate(result: Tensor, fp32: Tensor, fp64: Tensor) -> None:
    """Error at most twice plain PyTorch's in float32, plus 2^-23 of the largest number: roundings differ in order."""
    assert result.shape == fp64.shape and result.dtype == torch.float32 and fp64.dtype == torch.float64
    if result.numel() == 0:
        return
    allowed = 2 * (fp32 - fp64).abs().max() + 2.0**-23 * fp64.abs().max()
    assert (result - fp64).abs().max() <= allowed


def ulps(result: Tensor, exact: Tensor) -> Tensor:
    """|result - exact| in units of the last place that a float32 near `exact` has."""
    _, exponent = torch.frexp(exact)
    return (result - exact).abs() / torch.ldexp(torch.ones_like(exact), (exponent - 24).clamp(min=-149))


def assert_same_bits_for_any_number_of_threads(run: Callable[[], Sequence[Tensor]]) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def strided(x: Tensor) -> Tensor:
    """The same numbers as a view of every second column of something wider, whose other half is NaN."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def assert_refused(face: Any, op: Any, given: dict[str, Any], sentence: str) -> None:
    """By the public face, and by the C++ op where it can be called."""
    with pytest.raises(ValueError, match=sentence):
        face(**given)
    on_cpu = all(value.device.type == "cpu" for value in given.values() if isinstance(value, Tensor))
    if on_cpu and extension.is_available():
        with pytest.raises(ValueError, match=sentence):
            op(**given)


def assert_never_falls_back(monkeypatch: pytest.MonkeyPatch, op: str, run: Callable[[], Any]) -> None:
    """`run` asks for backend="cpp" where the compiled part is missing."""
    monkeypatch.setattr(_backend.extension, "_why_missing", "the compiled part has not been built")
    with pytest.raises(RuntimeError, match=f"^{op} cannot run with backend='cpp': the compiled part has not"):
        run()
