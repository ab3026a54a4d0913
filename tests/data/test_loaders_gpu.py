"""On a GPU: batches of a set that lives there, and of DALI's decoders, beside those of the torch loader."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers.image_containers import encoded, noise, scene
from vaebm_fast.data import ArraySource, TorchLoader, open_source
from vaebm_fast.data.resident import ResidentLoader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_set_on_the_gpu_gives_the_same_batches() -> None:
    array = ArraySource("noise", noise(40, 16))
    truth = TorchLoader(array, 8, horizontal_flip=True)
    made = ResidentLoader(array, 8, horizontal_flip=True, device="cuda")
    for step in (0, 1, 6, 2):
        found = made.batch(step)
        assert found.device.type == "cuda" and torch.equal(found.cpu(), truth.batch(step))
    truth.close()


def test_dali_on_the_gpu_mirrors_raw_images_exactly_and_decodes_nearly_as_pillow_does(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    from vaebm_fast.data.dali import DaliLoader

    array = ArraySource("noise", noise(40, 16))
    truth, made = (kind(array, 8, horizontal_flip=True) for kind in (TorchLoader, on_gpu(DaliLoader)))
    assert all(torch.equal(made.batch(step).cpu(), truth.batch(step)) for step in (0, 1, 6, 2))
    for index in range(16):
        (tmp_path / f"{index}.jpg").write_bytes(encoded(scene(64, 80, seed=index), "JPEG"))
    for size in (64, 32):
        source = open_source(tmp_path, image_size=size, image_channels=3)
        truth, made = (kind(source, 8) for kind in (TorchLoader, on_gpu(DaliLoader)))
        found = made.batch(0)
        assert found.device.type == "cuda" and found.is_contiguous()
        apart = (found.cpu().int() - truth.batch(0).int()).abs()
        assert apart.double().mean() <= 1  # nvJPEG's inverse DCT is not libjpeg's


def on_gpu(kind: type) -> partial:  # type: ignore[type-arg]
    return partial(kind, device="cuda")
