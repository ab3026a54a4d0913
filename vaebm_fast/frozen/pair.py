"""FrozenVAEBM, the joint model compiled for chains; `freeze`, which makes one; FrozenNVAE, the decoder alone.

Owns the argument checks (modes, dtypes, devices, shapes, stale weights) and the three potentials. `decoder` and
`energy` hold the two networks, `fold` the algebra.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vaebm_fast import reference
from vaebm_fast.config import EnergyConfig, NoiseLayout, NVAEConfig, Potential, require_potential
from vaebm_fast.frozen.code import KnownCode
from vaebm_fast.frozen.decoder import FrozenDecoder
from vaebm_fast.frozen.energy import FrozenEnergy
from vaebm_fast.frozen.memory import reused_memory
from vaebm_fast.frozen.part import Part, StaleWeightsError, require_finite
from vaebm_fast.models.nvae import NVAE
from vaebm_fast.models.vaebm import VAEBM
from vaebm_fast.ops._backend import Backend, resolve
from vaebm_fast.ops.pixel_head import pixel_head
from vaebm_fast.runtime.devices import without_autocast
from vaebm_fast.runtime.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def freeze(model: VAEBM, dtype: torch.dtype = torch.float32, backend: Backend = "auto") -> FrozenVAEBM:
    """The compiled form of `model`: same noise, same U and gradients, folded weights in `dtype`.

    dtype: float32, bfloat16 or float64 for weights and features; noise, latents, pixels and U are float32 (float64 for
    float64). backend: "auto" is "cpp" for float32 on a CPU with the compiled extension; on a GPU the fastest that was
    measured to be faster than plain PyTorch on such a GPU in this dtype (`vaebm-fast info` says which); otherwise
    "reference". "cuda" runs an inverted residual as one CUDA kernel in bfloat16 from 128 pixels a side on
    (`frozen.cells.FUSED_SIDE`), otherwise as the CUDA depthwise kernel between cuBLAS products; gates, latents and
    heads are Triton kernels.
    After `model` changes, call `refresh()`. Raises ValueError for a VAE in training mode, weights that are not finite
    or on several devices, an unknown dtype or name, and for code of the model's own, which freezing would ignore:
    subclasses, replaced modules, hooks, patched methods; RuntimeError for a missing backend.
    """
    if not isinstance(model, VAEBM):
        raise UserError(f"{type(model).__name__} cannot be frozen: give a VAEBM itself, not its parts or a wrapper.")
    return FrozenVAEBM(model, dtype, backend)


class FrozenNVAE:
    """An NVAE with a folded decoder: maps noise to mean images, which is all that a chain of 0 steps needs.

    Holds its own weights at fixed addresses and tracks the live ones: after those change, every call raises
    StaleWeightsError until `refresh()`. dtype, backend and errors are as in `freeze`. A copy, by `copy.deepcopy` or
    pickle, tracks the copied model. The caller's autocast does not reach inside.
    It has no energy network, so it runs only chains of 0 steps.
    within: the VAEBM that contains `vae`; all of it is checked.
    """

    def __init__(self, vae: NVAE, dtype: torch.dtype, backend: Backend, within: VAEBM | None = None) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype}; a frozen pair takes {', '.join(map(str, DTYPES))}.")
        self._vae, self._model = vae, within or vae
        self._code = KnownCode(self._model)
        self._configs: list[NVAEConfig | EnergyConfig] = [vae.config]
        self.device = _require_foldable(self._vae, self._model)
        self._backends = resolve(backend, self.device, dtype)
        self.backend = self._backends.name
        self.dtype = dtype
        self.noise_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        with self._computing():
            self._decoder = FrozenDecoder(vae, dtype, self._backends)
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
        """Positions of each latent group and of eps_x in an image's noise vector eps."""
        return self._vae.noise_layout

    @property
    def is_stale(self) -> bool:
        """Whether a live weight was edited, or a weight or module replaced, since it was folded.

        Checks every version counter. Changed attributes and hooks are seen by `refresh`.
        """
        return self._code.modules_replaced or any(part.is_stale for part in self._parts)

    def require_fresh(self) -> None:
        """Raise StaleWeightsError if `is_stale`."""
        if self.is_stale:
            raise StaleWeightsError(
                "The model's weights changed, or moved in memory, after it was frozen; call refresh() on the frozen "
                "pair before using it."
            )

    def refresh(self) -> None:
        """Fold the parts whose live weights changed, in place; for the others it only checks version counters.

        Replaced modules of the same architecture, and a changed eps, fold all parts; other code is refused.
        Writes that do not bump the counters, such as torch's fused optimisers and edits through `.data`, go unnoticed;
        call `torch.autograd.graph.increment_version(parameters)` after them. Raises as `freeze` does; a part with
        non-finite weights stays stale.
        """
        stale = [part for part in self._parts if part.is_stale]
        if self._code.has_changed or any(part.has_other_tensors for part in stale):
            self._adopt(self._frozen_anew())
            return
        if stale:
            _require_foldable(self._vae, self._model)
            with self._computing():
                for part in stale:
                    part.refold()
            require_finite(stale)

    def _frozen_anew(self) -> FrozenNVAE:
        return FrozenNVAE(self._vae, self.dtype, self.backend)

    def _adopt(self, fresh: FrozenNVAE) -> None:
        """Take over the weights of a pair that was frozen anew, at the addresses of the old ones, and track its model.

        Raises UserError if it has another architecture or device.
        """
        if (self._configs, self.device) != (fresh._configs, fresh.device):
            raise UserError("The model was replaced by one of another architecture or device; freeze it again.")
        for mine, theirs in zip(self._parts, fresh._parts, strict=True):
            mine.adopt(theirs)
        self._vae, self._code = fresh._vae, fresh._code

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inside, memory is reused between steps, and the caller's autocast is off."""
        with reused_memory(self, self.device), without_autocast(self.device):
            yield

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fresh": [part for part in self._parts if not part.is_stale]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("A frozen pair cannot be copied under torch.inference_mode; copy it outside.")
        fresh = state.pop("_fresh")
        self.__dict__.update(state)
        for part in fresh:
            part.follow()

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """The decoder's mean image in [0, 1], [N, C, H, W]: the result of a chain."""
        self._check(eps_z)
        with self._computing():
            logits, _ = self._decoder(_nhwc(eps_z), float(temperature), with_log_p=False)
            return self._vae.pixels(logits.to(self.noise_dtype)).mean_image()

    def _check(self, eps_z: Sequence[Tensor], eps_x: Tensor | None = None) -> None:
        """Raise unless the weights are fresh and the noise has this pair's shapes, dtype and device."""
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
    """A VAEBM with folded decoder and energy network, differentiable only in the noise; made by `freeze`.

    As `FrozenNVAE`, plus the energy network. `potential_and_grad` never synchronises with the device.
    """

    def __init__(self, model: VAEBM, dtype: torch.dtype, backend: Backend) -> None:
        super().__init__(model.vae, dtype, backend, within=model)
        with self._computing():
            self._energy = FrozenEnergy(model.energy, dtype, self._backends)
        self._parts += self._energy.parts
        require_finite(self._energy.parts)
        self._configs.append(model.energy.config)

    def _frozen_anew(self) -> FrozenVAEBM:
        assert isinstance(self._model, VAEBM)
        return FrozenVAEBM(self._model, self.dtype, self.backend)

    def image(self, eps_z: Sequence[Tensor], eps_x: Tensor, temperature: float = 1.0) -> Tensor:
        """x(eps) = clamp(mu + sigma eps_x, -1, 1) / 2 + 1/2, [N, C, H, W]."""
        self._check(eps_z, eps_x)
        with self._computing():
            logits, _ = self._decoder(_nhwc(eps_z), float(temperature), with_log_p=False)
            return pixel_head(logits, eps_x, with_log_p=False, backend=self._backends["pixel_head"])[0]

    def potential_and_grad(
        self,
        eps_z: Sequence[Tensor],
        eps_x: Tensor,
        potential: Potential = "official",
        temperature: float = 1.0,
    ) -> tuple[Tensor, list[Tensor]]:
        """U [N] and its gradients, one tensor per latent group, then that of `eps_x`; see `VAEBM.potential`.

        Noise is `noise_dtype`, [N, L, H, W] per group and [N, C, H, W]. NHWC memory (from `NoiseLayout.split`) is read
        in place; other layouts are copied. Also works under `torch.no_grad` and `torch.inference_mode`.
        """
        require_potential(potential)
        self._check(eps_z, eps_x)
        with self._computing(), torch.inference_mode(False), torch.enable_grad():
            noise = [eps.clone() if eps.is_inference() else eps.detach() for eps in _nhwc((*eps_z, eps_x))]
            leaves = [eps.requires_grad_() for eps in noise]
            u = self._energy_or_official(leaves, float(temperature), official=potential == "official")
            gradients = list(torch.autograd.grad(u, leaves, torch.ones_like(u)))
        u, noise = u.detach(), [eps.detach() for eps in leaves]
        if potential == "paper":
            u = u + reference.prior_potential(*noise)
            gradients = [gradient + eps for gradient, eps in zip(gradients, noise, strict=True)]
        return u, gradients

    def _energy_or_official(self, noise: Sequence[Tensor], temperature: float, *, official: bool) -> Tensor:
        """E(x), or E(x) - log p(z) - log p(x|z), [N]."""
        logits, log_p_z = self._decoder(noise[:-1], temperature, with_log_p=official)
        x, log_p_x = pixel_head(logits, noise[-1], with_log_p=official, backend=self._backends["pixel_head"])
        u = self._energy(x)
        return u if log_p_z is None or log_p_x is None else u - log_p_z - log_p_x


def _nhwc(noise: Sequence[Tensor]) -> list[Tensor]:
    """The noise with channels innermost in memory; copies only tensors with another layout."""
    return [eps if eps.stride(1) == 1 else eps.contiguous(memory_format=torch.channels_last) for eps in noise]


def _require_foldable(vae: NVAE, model: VAEBM | NVAE) -> torch.device:
    """Raise ValueError unless the live weights of `model`, which contains `vae`, can be folded; return their device."""
    training = [name for name, module in vae.named_modules() if module.training]
    if training:
        raise ValueError(
            f"The NVAE is in training mode (at least its {training[-1] or 'outermost module'}), where batch statistics "
            "replace the running ones that freezing folds; call model.vae.eval() first."
        )
    networks: dict[str, nn.Module] = {"vae": vae} if isinstance(model, NVAE) else {"vae": vae, "energy": model.energy}
    tensors = {
        f"{prefix}.{name}": tensor
        for prefix, network in networks.items()
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {tensor.dtype}; weights are folded in float32 or float64. Keep the model in float32 and "
                "pass the dtype to run in to freeze."
            )
        if tensor.is_inference():
            raise ValueError(
                f"{name} was created under torch.inference_mode, where changes are not counted; load or copy the model "
                "outside it."
            )
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"The model is on {len(devices)} devices ({devices}); move it to one with model.to(device).")
    return devices.pop()
