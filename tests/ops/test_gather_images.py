"""Batches of cropped and mirrored images: a loop in numpy, 64-bit offsets, values out of range, bad arguments."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.kernels import (
    assert_never_falls_back,
    assert_refused,
    assert_same_bits_for_any_number_of_threads,
    device_of,
)
from vaebm_fast import reference
from vaebm_fast.ops._backend import Backend, why_not
from vaebm_fast.ops.gather_images import gather_images

TRITON = pytest.param("triton", marks=pytest.mark.gpu)  # in the interpreter, too, by `test_triton.py`
# M, H, W, size: one pixel; below, at and above the pixels that a shuffle of the CPU mirrors; whole images; an odd side;
# several of Triton's tiles of rows and, in colour, of bytes
SHAPES = [
    (1, 1, 1, 1),
    (3, 7, 9, 5),
    (2, 9, 7, 6),
    (2, 8, 11, 7),
    (2, 11, 12, 11),
    (3, 16, 16, 16),
    (4, 23, 19, 17),
    (1, 90, 88, 87),
]


def required(op: str, name: str) -> None:
    """Skip where the backend cannot run."""
    reason = why_not(op, device_of(name), name)
    if reason is None and device_of(name).type == "cuda" and not torch.cuda.is_available():
        reason = "no GPU is visible"
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["reference", "cpp", TRITON])
def backend(request: pytest.FixtureRequest) -> Backend:
    name: Backend = request.param
    required("gather_images", name)
    return name


def random_images(*size: int) -> Tensor:
    return torch.randint(256, size, dtype=torch.uint8)


def everywhere(M: int, H: int, W: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index, flip, top and left of every image at every edge and in the middle, both ways round."""
    rows, columns = (sorted({0, (side - size) // 2, side - size}) for side in (H, W))
    each = list(product(range(M), (False, True), rows, columns))
    index, flip, top, left = (torch.tensor(values) for values in zip(*each, strict=True))
    return index, flip, top, left


def by_hand(images: Tensor, index: Tensor, flip: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Pixel by pixel, of the definition."""
    source = images.numpy()
    out = np.empty((len(index), size, size, source.shape[3]), np.uint8)
    for n, (m, mirrored, first, begin) in enumerate(
        zip(index.tolist(), flip.tolist(), top.tolist(), left.tolist(), strict=True)
    ):
        for y in range(size):
            for x in range(size):
                out[n, y, x] = source[m, first + y, begin + (size - 1 - x if mirrored else x)]
    return torch.from_numpy(out)


def run(backend: Backend, images: Tensor, *given: Tensor, size: int) -> Tensor:
    """The batch, on the CPU."""
    device = device_of(backend)
    batch = gather_images(images.to(device), *(each.to(device) for each in given), size=size, backend=backend)
    assert batch.dtype == torch.uint8 and batch.is_contiguous() and batch.device.type == device.type
    return batch.cpu()


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gathers_every_byte(shape: tuple[int, int, int, int], C: int, backend: Backend) -> None:
    M, H, W, size = shape
    images, given = random_images(M, H, W, C), everywhere(*shape)
    assert torch.equal(run(backend, images, *given, size=size), by_hand(images, *given, size))


def test_kernel_gathers_an_image_repeatedly_and_in_any_order(backend: Backend) -> None:
    images = random_images(5, 8, 8, 3)
    index = torch.tensor([4, 0, 0, 4, 2, 4])
    flip = torch.tensor([True, False, True, False, True, True])
    zeros = torch.zeros(6, dtype=torch.int64)
    batch = run(backend, images, index, flip, zeros, zeros, size=8)
    expected = torch.where(flip[:, None, None, None], images[index].flip(2), images[index])
    assert torch.equal(batch, expected) and torch.equal(batch[0], batch[5])


def test_kernel_takes_any_strides_of_the_indices_and_images_that_begin_anywhere(backend: Backend) -> None:
    device = device_of(backend)
    images = random_images(5, 7, 9, 3)
    given = tuple(each[:6] for each in everywhere(4, 7, 9, 5))
    expected = by_hand(images[1:], *given, 5)
    wide = [torch.stack((each, ~each if each.dtype == torch.bool else each + 1000), 1) for each in given]
    narrow = [each.to(device)[:, 0] for each in wide]
    assert all(each.stride() == (2,) for each in narrow)
    batch = gather_images(images.to(device)[1:], *narrow, size=5, backend=backend)  # 189 bytes behind the first
    assert torch.equal(batch.cpu(), expected)
    same = torch.tensor([2], device=device).expand(4), torch.tensor([True], device=device).expand(4)
    batch = gather_images(images.to(device), *same, same[0], same[0], size=5, backend=backend)
    assert torch.equal(batch.cpu(), images[2, 2:7, 2:7].flip(1).expand(4, -1, -1, -1))


@pytest.mark.parametrize("M", [0, 2])
def test_kernel_gives_no_images_for_no_indices(M: int, backend: Backend) -> None:
    given = [torch.zeros(0, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.int64, torch.int64)]
    assert run(backend, random_images(M, 6, 8, 3), *given, size=5).shape == (0, 5, 5, 3)


def test_kernel_gives_the_same_bits_for_any_number_of_threads(compiled: None) -> None:
    images, given = random_images(9, 23, 19, 3), everywhere(9, 23, 19, 17)
    assert_same_bits_for_any_number_of_threads(lambda: [run("cpp", images, *given, size=17)])


def test_kernel_reads_images_behind_4_gib(backend: Backend, tmp_path: Path) -> None:
    """A file of holes but for its last image. An offset cut to 32 bits, with or without a sign, would fall on zeros."""
    if device_of(backend).type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("the GPU's memory is too small")
    M, side = 23_000, 256
    images = torch.from_file(str(tmp_path / "images"), shared=True, size=M * side**2 * 3, dtype=torch.uint8)
    images = images.view(M, side, side, 3)
    images[-1] = random_images(side, side, 3)
    last, zeros = torch.tensor([M - 1, M - 1]), torch.tensor([1, 1])
    batch = run(backend, images, last, torch.tensor([False, True]), zeros, zeros, size=255)
    expected = images[-1, 1:, 1:]
    assert torch.equal(batch[0], expected) and torch.equal(batch[1], expected.flip(1))


# Values out of range.
OUTSIDE = [
    ({"index": torch.tensor([0, 4, 5])}, r"index\[2\] is 5; it must be within 0..4"),
    ({"index": torch.tensor([0, -1, 7])}, r"index\[1\] is -1; it must be within 0..4"),
    ({"top": torch.tensor([3, 2, 2])}, r"top\[0\] is 3; it must be within 0..2"),
    ({"top": torch.tensor([0, 0, -1])}, r"top\[2\] is -1; it must be within 0..2"),
    ({"left": torch.tensor([4, 5, 0])}, r"left\[1\] is 5; it must be within 0..4"),
    ({"left": torch.tensor([-(2**62), 0, 0])}, r"left\[0\] is -4611686018427387904; it must be within 0..4"),
]


@pytest.mark.parametrize(("change", "sentence"), OUTSIDE)
def test_values_out_of_range_are_refused_on_a_cpu(change: dict[str, Any], sentence: str) -> None:
    given = arguments(**change)
    assert_refused(gather_images, torch.ops.vaebm_fast.gather_images, given, sentence)
    with pytest.raises(ValueError, match=sentence):
        gather_images(**given, backend="reference")


@pytest.mark.parametrize("name", [pytest.param("reference", marks=pytest.mark.gpu), TRITON])
def test_values_out_of_range_are_clamped_where_no_host_waits_for_them(name: Backend) -> None:
    required("gather_images", name)
    device = torch.device("cuda") if name == "reference" else device_of(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is visible")
    images, given, clamped = outside()
    batch = gather_images(images.to(device), *(each.to(device) for each in given), size=5, backend=name)
    assert torch.equal(batch.cpu(), by_hand(images, *clamped, 5))


def test_the_reference_itself_clamps_values_out_of_range() -> None:
    images, given, clamped = outside()
    assert torch.equal(reference.gather_images(images, *given, size=5), by_hand(images, *clamped, 5))


def outside() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Images, indices one of which is out of range each, and the same within their ranges."""
    images = random_images(4, 7, 9, 3)
    far = [-(2**62), -1, 0, 2**31, 2**62]
    index = torch.tensor([*far, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    top = torch.tensor([1, 1, 1, 1, 1, *far, 1, 1, 1, 1, 1])
    left = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, *far])
    flip = torch.arange(15) % 2 == 0
    return images, [index, flip, top, left], [index.clamp(0, 3), flip, top.clamp(0, 2), left.clamp(0, 4)]


# No host waits.
def test_the_reference_is_traced_without_a_value_of_its_tensors() -> None:
    images, given, _ = outside()
    traced = make_fx(lambda *tensors: reference.gather_images(*tensors, size=5), tracing_mode="fake")(images, *given)
    assert torch.equal(traced(images, *given), reference.gather_images(images, *given, size=5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_a_cuda_graph_gathers_another_batch_at_each_replay(name: Backend) -> None:
    """Capture refuses a host sync."""
    required("gather_images", name)
    images, given = random_images(4, 23, 19, 3), everywhere(4, 23, 19, 17)
    on_device, tensors = images.cuda(), [each.cuda() for each in given]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles
        gather_images(on_device, *tensors, size=17, backend=name)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = gather_images(on_device, *tensors, size=17, backend=name)
    for order in (torch.arange(len(given[0])), torch.randperm(len(given[0]))):
        for tensor, each in zip(tensors, given, strict=True):
            tensor.copy_(each[order])
        graph.replay()
        assert torch.equal(batch.cpu(), by_hand(images, *(each[order] for each in given), 17))


# Arguments.
def arguments(**change: Any) -> dict[str, Any]:
    given = {
        "images": torch.zeros(5, 8, 10, 3, dtype=torch.uint8),
        "index": torch.tensor([0, 4, 4]),
        "flip": torch.tensor([False, True, False]),
        "top": torch.tensor([0, 1, 2]),
        "left": torch.tensor([4, 3, 0]),
        "size": 6,
    }
    return given | change


BAD = [
    ({"images": torch.zeros(5, 8, 10, 3)}, r"images must be uint8 \[M, H, W, C\]"),
    ({"images": torch.zeros(5, 8, 10, dtype=torch.uint8)}, r"images must be uint8 \[M, H, W, C\]"),
    ({"images": torch.zeros(5, 8, 10, 2, dtype=torch.uint8)}, r"C = 1 or 3.*; it is .*\[5, 8, 10, 2\]"),
    ({"images": torch.zeros(5, 3, 8, 10, dtype=torch.uint8).permute(0, 2, 3, 1)}, r"contiguous; .* \[240, 10, 1, 80\]"),
    ({"images": torch.zeros(0, 8, 10, 3, dtype=torch.uint8)}, "images is empty, so there is none to gather"),
    ({"index": torch.tensor([0, 1, 2], dtype=torch.int32)}, r"index must be int64 \[n\]; it is .* \[3\]"),
    ({"index": torch.tensor([[0, 1, 2]])}, r"index must be int64 \[n\]; it is .* \[1, 3\]"),
    ({"index": torch.zeros(3, dtype=torch.int64, device="meta")}, "index is on meta; move it to cpu"),
    ({"flip": torch.tensor([False, True])}, r"flip must be bool \[3\], as many as index has; it is .* \[2\]"),
    ({"flip": torch.tensor([0, 1, 0], dtype=torch.uint8)}, r"flip must be bool \[3\]"),
    ({"flip": torch.zeros(3, dtype=torch.bool, device="meta")}, "flip is on meta; move it to cpu"),
    ({"top": torch.tensor([0])}, r"top must be int64 \[3\], as many as index has; it is .* \[1\]"),
    ({"top": torch.tensor([0, 1, 2], dtype=torch.int32)}, r"top must be int64 \[3\]"),
    ({"top": torch.zeros(3, dtype=torch.int64, device="meta")}, "top is on meta; move it to cpu"),
    ({"left": torch.tensor(0)}, r"left must be int64 \[3\], as many as index has; it is .* \[\]"),
    ({"left": torch.tensor([0.0, 1.0, 2.0])}, r"left must be int64 \[3\]"),
    ({"left": torch.zeros(3, dtype=torch.int64, device="meta")}, "left is on meta; move it to cpu"),
    ({"size": 0}, r"size is 0; it must be within 1..8 for images \[5, 8, 10, 3\]"),
    ({"size": -1}, "size is -1; it must be within 1..8"),
    ({"size": 9}, "size is 9; it must be within 1..8"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Any], sentence: str) -> None:
    assert_refused(gather_images, torch.ops.vaebm_fast.gather_images, arguments(**change), sentence)


def test_tensors_without_memory_give_one_without_memory() -> None:
    given = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments().items()}
    for backend in ("auto", "reference"):
        batch = gather_images(**given, backend=backend)
        assert batch.shape == (3, 6, 6, 3) and batch.dtype == torch.uint8 and batch.device.type == "meta"


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    assert_never_falls_back(monkeypatch, "gather_images", lambda: gather_images(**given, backend="cpp"))
    assert gather_images(**given).shape == (3, 6, 6, 3)


def test_it_has_no_cuda_kernel() -> None:
    with pytest.raises(RuntimeError, match="it has reference, cpp, triton"):
        gather_images(**arguments(), backend="cuda")


@pytest.mark.parametrize("C", [1, 3])
def test_cpp_op_passes_opcheck(C: int, compiled: None) -> None:
    images, given = random_images(3, 7, 9, C), everywhere(3, 7, 9, 5)
    torch.library.opcheck(torch.ops.vaebm_fast.gather_images.default, (images, *given, 5))
    none = [each[:0] for each in given]
    torch.library.opcheck(torch.ops.vaebm_fast.gather_images.default, (images, *none, 5))
