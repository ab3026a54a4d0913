"""`vaebm-fast likelihood`: likelihood bounds of an NVAE on a data set."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import tyro

from vaebm_fast import checkpoint
from vaebm_fast.cli._options import NVAEFile, aligned
from vaebm_fast.config import Transform
from vaebm_fast.data import open_source
from vaebm_fast.evaluation.likelihood import evaluate_likelihood
from vaebm_fast.runtime.devices import DeviceName, choose_device


def likelihood(
    nvae: NVAEFile,
    *,
    data: Annotated[
        str, tyro.conf.arg(metavar="DATA", help="What `vaebm-fast prepare` made or reads, or the built-in `digits`.")
    ],
    split: Literal["train", "held_out"] = "held_out",
    transform: Transform | None = None,
    importance_samples: int = 1,
    batch_size: int = 64,
    device: DeviceName = "auto",
) -> None:
    """Print an NVAE's negative ELBO and its importance-weighted bound on a data set, in bits per dimension.

    Args:
        split: Split of the data set.
        transform: How images become square, as in training; by default as fits the data.
        importance_samples: Posterior samples per image; more give a tighter bound.
        batch_size: Images per batch; affects only speed.
        device: Device; auto uses the GPU if there is one.
    """
    vae = checkpoint.load_nvae(nvae, device=choose_device(device))
    channels, size, _ = vae.image_shape
    source = open_source(data, image_size=size, image_channels=channels, split=split, transform=transform)
    facts = evaluate_likelihood(
        vae, source, importance_samples=importance_samples, batch_size=batch_size, progress=True
    )
    print(
        aligned(
            {"transform": source.transform, **{name.replace("_", " "): value for name, value in asdict(facts).items()}}
        )
    )
