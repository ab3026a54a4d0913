"""The frozen pair on backend "cuda" without a GPU: who runs which op, and that the ops are strung together rightly.

References stand in for the kernels; the kernels are tested one by one, in emulation and in Triton's interpreter.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import vaebm_fast as vf
from benchmarks.step.sensitive import make_sensitive
from tests.helpers.golden import relative_error
from tests.helpers.stand_ins import StandIns, inverted_residual, pretend_a_gpu
from vaebm_fast.config import EnergyConfig, NVAEConfig, parse_blocks
from vaebm_fast.frozen import FrozenVAEBM, cells
from vaebm_fast.models import EnergyNetwork
from vaebm_fast.ops import _backend
from vaebm_fast.ops._backend import Backend

pytestmark = pytest.mark.usefixtures("compiled")

BACKENDS: tuple[Backend, ...] = ("cuda", "triton")

SMALL = NVAEConfig(
    image_size=16, num_latent_scales=2, num_groups_per_scale=1, num_latent_per_group=2, num_channels_enc=8,
    num_channels_dec=32, num_preprocess_cells=1, num_postprocess_cells=2, num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
)  # fmt: skip


def small() -> vf.VAEBM:
    """Cells of 32, 64 and 128 channels at 16x16, 8x8 and 4x4, and batch normalisations that matter."""
    model = vf.VAEBM(vf.NVAE(SMALL), EnergyNetwork(EnergyConfig(16, 3, 8, parse_blocks("1-1d 1-2d"))))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
    return model.eval()


def gradient(pair: vf.VAEBM | FrozenVAEBM, eps: Tensor) -> Tensor:
    """Of the official potential, [N, D]."""
    layout = pair.noise_layout
    _, gradients = pair.potential_and_grad(*layout.split(eps), "official")
    return layout.join(gradients[:-1], gradients[-1])


def noise(model: vf.VAEBM, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.noise_layout.dim)


@cache
def on_meta(preset: str, dtype: torch.dtype, backend: Backend) -> Counter[str]:
    """The ops that a step of the preset calls."""
    with torch.device("meta"):
        model = vf.VAEBM(vf.NVAE(vf.PRESETS[preset].nvae), EnergyNetwork(vf.PRESETS[preset].energy))
    pair = model.eval().freeze(dtype, backend)
    with StandIns() as kernels:
        gradient(pair, torch.empty_like(noise(model, 1), device="meta"))
    return kernels.calls


def test_large_cells_are_whole_blocks_and_the_others_a_depthwise_kernel_between_products_of_cublas() -> None:
    """celeba_256 in bfloat16: of its cells with H >= 128 nine do not upsample, which no whole block does."""
    calls = on_meta("celeba_256", torch.bfloat16, "cuda")
    for way in ("", "_backward"):
        assert calls[f"vaebm_fast::inverted_residual{way}"] == 9
        assert calls[f"vaebm_fast::depthwise_swish{way}"] == 44 - 9
        assert calls[f"vaebm_triton::se_gate_residual{way}"] == 44
        assert calls[f"vaebm_triton::residual_tail{way}"] == calls[f"vaebm_triton::depthwise_swish{way}"] == 0
    # Triton's products are those of the latents, which are narrow or have an ELU: 19 priors, 20 halves of a combiner.
    assert calls["vaebm_triton::pointwise"] == 39
    assert calls["aten::addmm"] >= 2 * (44 - 9)


def test_no_launch_fills_gradients_that_nobody_asks_for() -> None:
    """Of h2, which is as large as the hidden tensor, and of what a gate keeps."""
    calls = on_meta("celeba_256", torch.bfloat16, "cuda")
    assert calls["aten::zeros"] == calls["aten::zeros_like"] == calls["aten::new_zeros"] == 0


@pytest.mark.parametrize(("preset", "dtype"), [("digits", torch.bfloat16), ("celeba_256", torch.float32)], ids=str)
def test_there_are_no_whole_blocks_in_float32_nor_in_small_images(preset: str, dtype: torch.dtype) -> None:
    """Though three cells of digits, 28x28, have channels that are taken."""
    calls = on_meta(preset, dtype, "cuda")
    assert calls["vaebm_fast::inverted_residual"] == 0 and calls["vaebm_fast::depthwise_swish"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_pair_has_the_gradient_of_the_plain_modules(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 to rounding; bfloat16 within twice the error of the same pair in plain PyTorch, and 1%."""
    model = make_sensitive(small())
    eps = noise(model)
    truth = gradient(vf.VAEBM(model.vae.double(), model.energy.double()), eps.double())
    model = vf.VAEBM(model.vae.float(), model.energy.float())
    plain = relative_error(gradient(model.freeze(dtype, "reference"), eps), truth)
    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cells, "FUSED_SIDE", 8)
    pair = model.freeze(dtype, "cuda")
    with StandIns() as kernels:
        off = relative_error(gradient(pair, eps), truth)
    assert pair.backend == "cuda"
    assert kernels.calls["vaebm_fast::inverted_residual"] == (2 if dtype == torch.bfloat16 else 0)
    assert off < (1e-5 if dtype == torch.float32 else 2 * plain + 0.01)


def test_refreshed_whole_blocks_read_the_new_weights_at_the_old_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cells, "FUSED_SIDE", 8)
    pair, eps = model.freeze(torch.bfloat16, "cuda"), noise(model, 1)
    read: list[list[int]] = []

    def kernel(*arguments: Tensor) -> tuple[Tensor, ...]:
        read.append([argument.data_ptr() for argument in arguments[1:4]])
        return inverted_residual(*arguments)

    with StandIns({"inverted_residual": kernel}):
        before = gradient(pair, eps)
        with torch.no_grad():
            for parameter in model.vae.parameters():
                parameter.mul_(1.1)
        pair.refresh()
        after = gradient(pair, eps)
        fresh = gradient(model.freeze(torch.bfloat16, "cuda"), eps)
    assert torch.equal(after, fresh) and not torch.equal(after, before)
    assert len(read) == 6 and read[:2] == read[2:4]


@pytest.mark.parametrize("missing", ["cuda", "triton"])
def test_the_pair_needs_both_and_says_how_to_get_what_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(op: str, device: torch.device, backend: str) -> str | None:
        return "this is how to get it" if backend == missing else None

    monkeypatch.setattr(_backend, "why_not", why_not)
    with pytest.raises(RuntimeError, match=rf"cannot run with backend='{missing}': this is how to get it\."):
        small().freeze(backend="cuda")


def test_precisions_that_it_does_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch)
    with pytest.raises(ValueError, match="A frozen pair with backend='cuda' takes float32 or bfloat16, not .*float64"):
        small().freeze(torch.float64, "cuda")
