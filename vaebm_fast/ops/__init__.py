"""Ops with more than one implementation, one module per op: argument checks, backend choice, schema, fake, autograd.

`vaebm_fast.reference` holds the references; csrc and `vaebm_fast.triton_kernels` hold the kernels. Importing the
package defines every op in torch.
"""

from vaebm_fast.ops import (  # noqa: F401
    bilinear_upsample,
    depthwise_swish,
    energy_epilogue,
    energy_head,
    gather_images,
    gaussian_latent,
    inverted_residual,
    langevin_update,
    philox_normal,
    pixel_head,
    pointwise,
    power_iteration,
    residual_tail,
    se_gate_residual,
)
