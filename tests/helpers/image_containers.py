"""Writes small images in the layouts of published data sets, byte for byte as their own tools do."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def noise(total: int, height: int, width: int | None = None, channels: int = 3, seed: int = 0) -> Pixels:
    """Random images, uint8 [total, H, W, C]."""
    shape = (total, height, width or height, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def scene(height: int, width: int, seed: int = 0) -> Pixels:
    """A smooth picture in colour, uint8 [H, W, 3]."""
    small = Image.fromarray(noise(1, 8, seed=seed)[0])
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: Pixels, format: str = "PNG", **options: Any) -> bytes:
    """uint8 [H, W, C] as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, format, **options)
    return buffer.getvalue()


def write_zip(path: Path, images: Pixels, labels: Sequence[int] | None = None) -> list[str]:
    """EDM's and StyleGAN's dataset_tool: stored PNG files and dataset.json; the names in order."""
    names = [f"{index // 1000:05d}/img{index:08d}.png" for index in range(len(images))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, encoded(image, compress_level=0, optimize=False))
        pairs = None if labels is None else [[name, label] for name, label in zip(names, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))
    return names


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    """A shard of webdataset."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def write_lmdb(path: Path, values: Mapping[bytes, bytes], map_size: int = 1 << 26, **options: Any) -> None:
    """A database; `path` becomes a folder with data.mdb and lock.mdb."""
    import lmdb

    with (
        lmdb.open(str(path), map_size=map_size, **options) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(key, value)


def write_nvae_lmdb(root: Path, images: Mapping[str, Sequence[bytes]]) -> None:
    """NVAE's databases: train.lmdb and validation.lmdb, keys 0, 1, ... unpadded."""
    root.mkdir(exist_ok=True)
    for name, values in images.items():
        write_lmdb(root / f"{name}.lmdb", {str(index).encode(): value for index, value in enumerate(values)})


def example(features: Mapping[str, Sequence[int] | bytes]) -> bytes:
    """A serialised tf.train.Example of integers and bytes, by protobuf's own library."""
    from google.protobuf import message_factory

    message = message_factory.GetMessageClass(_pool().FindMessageTypeByName("Example"))()
    for name, value in features.items():
        entry = message.features.feature[name]
        if isinstance(value, bytes):
            entry.bytes_list.value.append(value)
        else:
            entry.int64_list.value.extend(value)
    return bytes(message.SerializeToString(deterministic=True))


def _pool() -> Any:
    """The messages of tensorflow/core/example/example.proto and feature.proto."""
    from google.protobuf import descriptor_pb2, descriptor_pool

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, int, str | None]) -> Any:
        added = file.message_type.add(name=name)
        for field, number, kind, label, of in fields:
            added.field.add(name=field, number=number, type=kind, label=label, type_name=of)  # type: ignore[arg-type]
        return added

    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    message("BytesList", ("value", 1, kinds.TYPE_BYTES, many, None))
    message("FloatList", ("value", 1, kinds.TYPE_FLOAT, many, None))
    message("Int64List", ("value", 1, kinds.TYPE_INT64, many, None))
    lists = (("bytes_list", 1, ".BytesList"), ("float_list", 2, ".FloatList"), ("int64_list", 3, ".Int64List"))
    message("Feature", *((name, number, kinds.TYPE_MESSAGE, one, of) for name, number, of in lists))
    features = message("Features", ("feature", 1, kinds.TYPE_MESSAGE, many, ".Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=kinds.TYPE_MESSAGE, label=one, type_name=".Feature")
    entry.options.map_entry = True
    message("Example", ("features", 1, kinds.TYPE_MESSAGE, one, ".Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def write_tfrecord(path: Path, records: Sequence[bytes]) -> None:
    """TFRecord framing; the checksum is TensorBoard's."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with path.open("wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + struct.pack("<I", masked_crc32c(length)))
            file.write(record + struct.pack("<I", masked_crc32c(record)))


def glow_record(image: Pixels, label: int = 0) -> bytes:
    """Glow's celeba-tfr: HWC."""
    return example({"shape": image.shape, "data": image.tobytes(), "label": [label], "attr": [0, 1, -1]})


def progan_record(image: Pixels) -> bytes:
    """ProGAN's dataset_tool: CHW."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    return example({"shape": planes.shape, "data": planes.tobytes()})


def python2_pickle(value: Any) -> bytes:
    """cPickle's protocol 2 of Python 2, as CIFAR's files are: str is bytes, arrays name numpy.core.multiarray."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(entry) for key, entry in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, str):
        value = value.encode("latin1")
    if isinstance(value, bytes):
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if value is None:
        return b"N"
    assert isinstance(value, np.ndarray) and value.dtype == np.uint8
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(_python2, value.shape)) + b"t"
    return made + b"(K\x01" + shape + dtype + b"\x89" + _python2(value.tobytes()) + b"tb"


def write_cifar10(folder: Path, images: Pixels, labels: Sequence[int], *, binary: bool = False) -> None:
    """cifar-10-batches-py or -bin: a sixth of the images in each of five training batches and the test batch."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    for name, rows, classes in zip(names, np.split(images, 6), np.split(np.array(labels, np.uint8), 6), strict=True):
        planes = rows.transpose(0, 3, 1, 2).reshape(len(rows), -1)
        if binary:
            (folder / f"{name}.bin").write_bytes(np.concatenate([classes[:, None], planes], axis=1).tobytes())
        else:
            batch = {
                "batch_label": name,
                "labels": classes.tolist(),
                "data": planes,
                "filenames": ["a.png"] * len(rows),
            }
            (folder / name).write_bytes(python2_pickle(batch))


def write_cifar100(folder: Path, images: Mapping[str, Pixels], fine: Sequence[int], *, binary: bool = False) -> None:
    """cifar-100-python or -binary; the coarse class of each is 19."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in images.items():
        planes, classes = rows.transpose(0, 3, 1, 2).reshape(len(rows), -1), np.array(fine[: len(rows)], np.uint8)
        if binary:
            table = np.concatenate([np.full((len(rows), 1), 19, np.uint8), classes[:, None], planes], axis=1)
            (folder / f"{name}.bin").write_bytes(table.tobytes())
        else:
            coarse = [19] * len(rows)
            batch = {"fine_labels": classes.tolist(), "coarse_labels": coarse, "data": planes}
            (folder / name).write_bytes(python2_pickle(batch))
    if not binary:
        (folder / "meta").write_bytes(python2_pickle({"fine_label_names": ["apple"]}))


def write_svhn(path: Path, images: Pixels, labels: Sequence[int]) -> None:
    """SVHN's format 2: X [32, 32, 3, N] and y [N, 1] of a MATLAB 5 file, where 10 is the digit 0."""
    from scipy.io import savemat

    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}, do_compression=True)


def write_idx(path: Path, array: Pixels) -> None:
    """MNIST's idx of images [n, H, W] or labels [n]."""
    magic = 0x800 + array.ndim
    path.write_bytes(struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes())
