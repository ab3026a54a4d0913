"""Every part of a frozen pair runs an op on the backend that the pair resolved for it, once, when it was frozen."""

from __future__ import annotations

from collections import defaultdict
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

import vaebm_fast as vf
from tests.helpers.frozen_pairs import FLOAT32_ERROR, TINY, build, largest_error, noise_of, tiny
from vaebm_fast.config import NVAEConfig
from vaebm_fast.frozen import FrozenVAEBM, cells, pair, units
from vaebm_fast.ops import _backend
from vaebm_fast.ops._backend import Backend, OpBackends
from vaebm_fast.ops.energy_epilogue import energy_epilogue

pytestmark = pytest.mark.usefixtures("compiled")

Asked = dict[str, set[str]]

CPP = [op for op, backend in OpBackends.of("cpp").by_op.items() if backend == "cpp"]


def record(patch: pytest.MonkeyPatch, *, pretend: bool = False) -> Asked:
    """Fills with the backends that are asked of each op; pretend: every backend is there.

    On a CPU a call without a backend asks for "cpp".
    """
    asked: Asked = defaultdict(set)
    why_not = _backend.why_not

    def recording(op: str, device: torch.device, backend: str) -> str | None:
        asked[op].add(backend)
        return None if pretend else why_not(op, device, backend)

    patch.setattr(_backend, "why_not", recording)
    return asked


def freeze_with(backends: OpBackends, model: vf.VAEBM, dtype: torch.dtype = torch.float32) -> FrozenVAEBM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "resolve", lambda *_: backends)
        return model.freeze(dtype)


@pytest.mark.parametrize("arch", ["res_mbconv", "res_bnswish"])
@pytest.mark.parametrize("others", ["reference", "cpp"])
@pytest.mark.parametrize("op", CPP)
def test_one_op_on_another_backend_than_all_others_is_the_only_one_and_changes_no_gradient(
    op: str, others: Backend, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: Backend = "reference" if others == "cpp" else "cpp"
    by_op = dict(OpBackends.of(others).by_op) | {op: own}
    model = build(NVAEConfig(**TINY, arch_instance=arch))
    noise = noise_of(model)
    expected_u, expected = model.freeze(backend="reference").potential_and_grad(*noise)
    mixed = freeze_with(OpBackends(others, MappingProxyType(by_op)), model)
    asked = record(monkeypatch)
    u, gradients = mixed.potential_and_grad(*noise)
    mixed.image(*noise)
    if arch != "res_mbconv" or by_op["depthwise_swish"] == "reference":  # the convolution is PyTorch's, without an op
        del by_op["depthwise_swish"]
    assert asked == {op: {backend} for op, backend in by_op.items()}
    torch.testing.assert_close(u, expected_u, rtol=1e-5, atol=1e-3)
    assert largest_error(gradients, expected) < FLOAT32_ERROR


def asked_on_meta(backends: OpBackends, patch: pytest.MonkeyPatch, *, use_se: bool) -> Asked:
    """Of a step in bfloat16 with channels that whole blocks and cuBLAS take; the meta device needs no kernels."""
    patch.setattr(cells, "FUSED_SIDE", 8)
    with torch.device("meta"):
        model = build(NVAEConfig(**TINY | dict(num_channels_dec=32, image_size=16), use_se=use_se))
        noise = noise_of(model)
    frozen = freeze_with(backends, model, torch.bfloat16)
    asked = record(patch, pretend=True)
    frozen.potential_and_grad(*noise)
    return asked


@pytest.mark.parametrize("use_se", [True, False], ids=["se", "plain"])
def test_a_pair_on_triton_runs_the_fused_tail_only_in_cells_with_a_gate(
    use_se: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = OpBackends.of("triton")
    unused = {"se_gate_residual", "depthwise_swish" if use_se else "residual_tail"}
    expected = {op: {"triton"} for op in backends.by_op if op not in unused}
    assert asked_on_meta(backends, monkeypatch, use_se=use_se) == expected


@pytest.mark.parametrize("use_se", [True, False], ids=["se", "plain"])
def test_a_pair_on_cuda_runs_the_products_that_do_not_suit_cublas_on_triton(
    use_se: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = OpBackends.of("cuda")
    expected = {op: {backend} for op, backend in backends.by_op.items() if use_se or op != "se_gate_residual"}
    expected["pointwise"] = {"cuda", "triton"}
    assert asked_on_meta(backends, monkeypatch, use_se=use_se) == expected


@pytest.mark.parametrize("product", ["cuda", "triton"])
@pytest.mark.parametrize("depthwise", ["cuda", "triton"])
def test_only_a_product_of_cublas_leaves_the_activation_to_the_epilogue(
    product: Backend, depthwise: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the backend of `energy_epilogue`, here the reference."""
    own: dict[str, Backend] = {"pointwise": product, "depthwise_swish": depthwise, "energy_epilogue": "reference"}
    passes: list[str] = []

    def epilogue(h: Tensor, *, backend: str) -> Tensor:
        passes.append(backend)
        return energy_epilogue(h, backend=backend)

    monkeypatch.setattr(units, "energy_epilogue", epilogue)
    asked = asked_on_meta(OpBackends("cuda", {**OpBackends.of("cuda").by_op, **own}), monkeypatch, use_se=True)
    assert set(passes) == ({"reference"} if product == "cuda" else set())
    assert asked["depthwise_swish"] == {depthwise} and asked["energy_epilogue"] == {"reference"}
    assert asked["pointwise"] == {product, "triton"}


@pytest.mark.parametrize(("backend", "fused"), [("triton", "residual_tail"), ("cuda", "inverted_residual")])
def test_without_a_fused_op_its_parts_run(backend: Backend, fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_op = {op: chosen for op, chosen in OpBackends.of(backend).by_op.items() if op != fused}
    expected = {op: {chosen} for op, chosen in by_op.items()}
    if backend == "cuda":
        expected["pointwise"] = {"cuda", "triton"}
    assert asked_on_meta(OpBackends(backend, by_op), monkeypatch, use_se=True) == expected


def test_a_pair_is_resolved_once_for_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step, no image and no refresh resolves again."""
    made: list[OpBackends] = []
    initialize = OpBackends.__init__

    def counted(self: OpBackends, *args: object) -> None:
        made.append(self)
        initialize(self, *args)

    monkeypatch.setattr(OpBackends, "__init__", counted)
    model = tiny()
    frozen = model.freeze()
    eps_z, eps_x = noise_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    frozen.refresh()
    frozen.potential_and_grad(eps_z, eps_x)
    frozen.image(eps_z, eps_x)
    frozen.mean_image(eps_z)
    assert len(made) == 1 and frozen.backend == made[0].name == "cpp"
    assert all(part._backends is made[0] for part in frozen._parts)
