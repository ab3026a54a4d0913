"""FrozenVAEBM: the joint model compiled for chains, `freeze`, which makes one, and FrozenNVAE, its decoder alone.

Owns what a user can get wrong (modes, precisions, devices, shapes, stale weights) and the three potentials. The decoder
and the energy network are in `decoder` and `energy`, their algebra in `fold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vaebm_fast.config import POTENTIALS, NoiseLayout, Potential
from vaebm_fast.frozen.decoder import FrozenDecoder
from vaebm_fast.frozen.energy import FrozenEnergy
from vaebm_fast.frozen.memory import reused_memory
from vaebm_fast.frozen.part import Part, StaleWeightsError, require_finite
from vaebm_fast.models.nvae import NVAE
from vaebm_fast.models.vaebm import VAEBM
from vaebm_fast.ops._backend import Backend, backend_for, choose, dtypes, require_dtype, why_not
from vaebm_fast.ops.pixel_head import pixel_head
from vaebm_fast.runtime.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def freeze(model: VAEBM, dtype: torch.dtype = torch.float32, backend: Backend = "auto") -> FrozenVAEBM:
    """The compiled form of `model`: same noise, same U and gradients, folded weights in `dtype`.

    dtype: float32, bfloat16 or float64 for weights and features; noise, latents, pixels and U stay in float32 (float64
    for float64). backend: who computes; "auto" is "cpp" for float32 on a CPU with the compiled part, else "reference".
    "triton" and "cuda" have not run on a GPU yet and are there for who asks. "cuda" is "triton" but for
    inverted residuals of large images in bfloat16, each of which is one kernel in CUDA C++
    (`frozen.cells.InvertedResidualCell`), and needs both.
    Later changes of `model` need `refresh()`. Raises ValueError for a VAE in training mode, weights that are not finite
    or on several devices, a precision or a name that is not known; RuntimeError for a backend that is missing.
    """
    return FrozenVAEBM(model, dtype, backend)


class FrozenNVAE:
    """An NVAE whose decoder is folded: it gives the mean images of noise, which a chain of no steps comes to.

    It holds its own weights, at fixed addresses, and remembers the live ones: after these changed, every call raises
    StaleWeightsError until `refresh()`. dtype and backend, and what is raised, are as in `freeze`.
    It has no energy, so only chains of no steps run on it.
    within: the VAEBM that it is part of, all of which is then checked.
    """

    def __init__(self, vae: NVAE, dtype: torch.dtype, backend: Backend, within: VAEBM | None = None) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype}; a frozen pair is {', '.join(map(str, DTYPES))}.")
        self._vae, self._model = vae, within or vae
        self.device = _require_foldable(self._vae, self._model)
        self.backend = choose_backend(backend, self.device, dtype)
        self.dtype = dtype
        self.noise_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        with reused_memory(self, self.device):
            self._decoder = FrozenDecoder(vae, dtype, self.backend)
        self._parts: list[Part[Any]] = self._decoder.parts
        require_finite(self._parts)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """[(L, H, W), ...] per group, top first."""
        return self._vae.latent_shapes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self._vae.image_shape

    @property
    def noise_layout(self) -> NoiseLayout:
        """Where each latent group, and eps_x, lies in an image's noise vector eps."""
        return self._vae.noise_layout

    @property
    def is_stale(self) -> bool:
        """Whether a live weight was edited or replaced since it was folded; costs a look at every version counter."""
        return any(part.is_stale for part in self._parts)

    def require_fresh(self) -> None:
        """Raise StaleWeightsError where `is_stale`."""
        if self.is_stale:
            raise StaleWeightsError(
                "The model's weights changed after it was frozen; call refresh() on the frozen pair before using it."
            )

    def refresh(self) -> None:
        """Fold the parts whose live weights changed into the same memory; the others cost a look at their counters.

        Writers that do not count, such as torch's fused optimisers and edits through `.data`, are not seen; say so by
        `torch.autograd.graph.increment_version(parameters)`. Raises as `freeze` does; a part whose weights are not
        finite stays stale.
        """
        stale = [part for part in self._parts if part.is_stale]
        if stale:
            _require_foldable(self._vae, self._model)
            for part in stale:
                part.refold()
            require_finite(stale)

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """The decoder's mean image in [0, 1], [N, C, H, W]: what a chain reports."""
        self._check(eps_z)
        with reused_memory(self, self.device):
            logits, _ = self._decoder(_nhwc(eps_z), temperature, with_log_p=False)
            return self._vae.pixels(logits.to(self.noise_dtype)).mean_image()

    def _check(self, eps_z: Sequence[Tensor], eps_x: Tensor | None = None) -> None:
        """Raise unless the weights are fresh and the noise has this pair's shapes, precision and device."""
        self.require_fresh()
        batch = self._vae.check_noise(eps_z)
        if eps_x is not None and tuple(eps_x.shape) != (batch, *self.image_shape):
            raise ValueError(
                f"eps_x has shape {tuple(eps_x.shape)}; this model needs {(batch, *self.image_shape)} [N, C, H, W]."
            )
        for eps in eps_z if eps_x is None else (*eps_z, eps_x):
            if eps.dtype != self.noise_dtype or eps.device != self.device:
                raise ValueError(
                    f"Noise of shape {tuple(eps.shape)} is {eps.dtype} on {eps.device}; "
                    f"this pair takes noise in {self.noise_dtype} on {self.device}."
                )


class FrozenVAEBM(FrozenNVAE):
    """A VAEBM whose decoder and energy network are folded for input gradients alone; made by `freeze`.

    As `FrozenNVAE`, with the energy. Weights get no gradients. `potential_and_grad` never waits for the device.
    """

    def __init__(self, model: VAEBM, dtype: torch.dtype, backend: Backend) -> None:
        super().__init__(model.vae, dtype, backend, within=model)
        with reused_memory(self, self.device):
            self._energy = FrozenEnergy(model.energy, dtype, self.backend)
        self._parts += self._energy.parts
        require_finite(self._energy.parts)

    def image(self, eps_z: Sequence[Tensor], eps_x: Tensor, temperature: float = 1.0) -> Tensor:
        """x(eps) = clamp(mu + sigma eps_x, -1, 1) / 2 + 1/2, [N, C, H, W]."""
        self._check(eps_z, eps_x)
        with reused_memory(self, self.device):
            logits, _ = self._decoder(_nhwc(eps_z), temperature, with_log_p=False)
            return pixel_head(logits, eps_x, with_log_p=False, backend=backend_for("pixel_head", self.backend))[0]

    def potential_and_grad(
        self,
        eps_z: Sequence[Tensor],
        eps_x: Tensor,
        potential: Potential = "official",
        temperature: float = 1.0,
    ) -> tuple[Tensor, list[Tensor]]:
        """U [N] and its gradients, one tensor per latent group, then that of `eps_x`; see `VAEBM.potential`.

        Noise is `noise_dtype`, [N, L, H, W] per group and [N, C, H, W]; NHWC in memory (as `NoiseLayout.split` gives
        it) is read as it is, anything else is copied. Works under `torch.no_grad` and `torch.inference_mode` too.
        """
        if potential not in POTENTIALS:
            raise UserError(f"Potential {potential!r} is not known; it is one of {', '.join(POTENTIALS)}.")
        self._check(eps_z, eps_x)
        with reused_memory(self, self.device), torch.inference_mode(False), torch.enable_grad():
            noise = [eps.clone() if eps.is_inference() else eps.detach() for eps in _nhwc((*eps_z, eps_x))]
            leaves = [eps.requires_grad_() for eps in noise]
            u = self._energy_or_official(leaves, temperature, official=potential == "official")
            gradients = list(torch.autograd.grad(u, leaves, torch.ones_like(u)))
        u, noise = u.detach(), [eps.detach() for eps in leaves]
        if potential == "paper":
            for eps in noise:
                u = u + 0.5 * (eps * eps).flatten(1).sum(1)
            gradients = [gradient + eps for gradient, eps in zip(gradients, noise, strict=True)]
        return u, gradients

    def _energy_or_official(self, noise: Sequence[Tensor], temperature: float, *, official: bool) -> Tensor:
        """E(x), or E(x) - log p(z) - log p(x|z), [N]."""
        logits, log_p_z = self._decoder(noise[:-1], temperature, with_log_p=official)
        backend = backend_for("pixel_head", self.backend)
        x, log_p_x = pixel_head(logits, noise[-1], with_log_p=official, backend=backend)
        u = self._energy(x)
        return u if log_p_z is None or log_p_x is None else u - log_p_z - log_p_x


def _nhwc(noise: Sequence[Tensor]) -> list[Tensor]:
    """The noise with channels innermost in memory, copied only where they are not."""
    return [eps if eps.stride(1) == 1 else eps.contiguous(memory_format=torch.channels_last) for eps in noise]


def choose_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    """What a pair asked for with `backend` runs on: "auto" is the C++ one where it is there and takes the precision.

    Raises ValueError and RuntimeError as `freeze` does.
    """
    if backend == "auto":
        is_compiled = dtype in dtypes("cpp") and why_not("pointwise", device, "cpp") is None
        return "cpp" if is_compiled else "reference"
    for op in ("depthwise_swish", "energy_epilogue"):  # one of each kind: with a kernel in CUDA C++, and without
        chosen = choose(op, device, backend_for(op, backend))
        require_dtype("A frozen pair", chosen, dtype)
    return backend


def _require_foldable(vae: NVAE, model: nn.Module) -> torch.device:
    """Raise ValueError unless the live weights of `model`, of which `vae` is, can be folded; their one device."""
    training = [name for name, module in vae.named_modules() if module.training]
    if training:
        raise ValueError(
            f"The NVAE is in training mode (its {training[-1] or 'outermost module'} at least), where batch statistics "
            "replace those that are folded; call model.vae.eval() first."
        )
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {tensor.dtype}; weights are folded in float32 or float64. Keep the model in float32 and "
                "give freeze the precision to run in."
            )
        if tensor.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode, where changes are not counted; load or copy the model "
                "outside of it."
            )
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"The model is on {len(devices)} devices ({devices}); move it to one with model.to(device).")
    return devices.pop()
