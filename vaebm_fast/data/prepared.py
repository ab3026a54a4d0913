"""Data sets that `prepare` made: their files, opening them as sources, and checking every image.

prepared.json     the manifest: how the set was made; per split the number of images and their digest
train.npy         uint8 [N, H, W, C]; held_out.npy likewise. Or, for images of any width or height:
train-00000.tar   shards of PNG_PER_SHARD images whose shorter side is H, for webdataset and `containers`
train.jsonl       a line per image: key, bytes, sha256, width, height of the stored image; pixels_sha256; label
train_labels.npy  int64 [N], if the images have classes
left_out.jsonl    a line per file that is not in the set: key and why
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from vaebm_fast.config import Transform
from vaebm_fast.data.containers import Split
from vaebm_fast.data.containers.archives import TarImages
from vaebm_fast.data.containers.find import NoHeldOutError
from vaebm_fast.data.images import Pixels, decode
from vaebm_fast.data.sources import ArraySource, ImageSource, StoredImages, identity
from vaebm_fast.runtime.errors import UserError

Format = Literal["array", "shards"]
MANIFEST = "prepared.json"
LEFT_OUT = "left_out.jsonl"
PARTIAL = ".partial"  # the folder of what is not complete
VERSION = 1
PER_SHARD = 1000
Row = Mapping[str, Any]


def is_prepared(root: Path) -> bool:
    """Whether `prepare` made this folder and has completed it. Raises UserError if it has only begun."""
    if (root / MANIFEST).is_file():
        return True
    if (root / PARTIAL).is_dir():
        raise UserError(f"{root} is not complete; run the same `vaebm-fast prepare` again to continue.")
    return False


def prepared(
    root: Path, *, image_size: int, image_channels: int, split: Split = "train", transform: Transform | None = None
) -> ImageSource:
    """The split of a prepared set as a source: an `ArraySource` of the mapped array, or `StoredImages` of its shards.

    transform: by which it must have been made. Nothing is hashed: the manifest holds the digest, and `check` compares
    it. Raises UserError, naming the folder, if files are missing, are of another size than the manifest says, or the
    set has another shape or transform.
    """
    manifest = read_manifest(root)
    if (manifest["size"], manifest["channels"]) != (image_size, image_channels):
        raise UserError(
            f"{root} was prepared at {_shape(manifest['size'], manifest['channels'])}; this needs "
            f"{_shape(image_size, image_channels)}. Prepare the images again with --size {image_size} --channels "
            f"{image_channels}."
        )
    facts = manifest["splits"].get(split)
    if facts is None:
        raise NoHeldOutError(root)
    if transform not in (None, facts["transform"]):
        raise UserError(
            f"{root} was prepared with transform {facts['transform']}; this needs {transform}. Prepare the images "
            f"again with --transform {transform}, or, if they are right as they are, ask for --transform "
            f"{facts['transform']}."
        )
    labels = _load(root / f"{split}_labels.npy", (facts["images"],), np.int64) if facts["labels"] else None
    name = f"{root}, {split}"
    if manifest["format"] == "array":
        shape = (facts["images"], image_size, image_size, image_channels)
        array = _load(root / f"{split}.npy", shape)
        return ArraySource(name, array, labels, facts["sha256"], facts["transform"])
    source = StoredImages(
        _shards(root, split, facts["images"]),
        image_size=image_size,
        image_channels=image_channels,
        sha256=facts["sha256"],
    )
    source.name, source.labels = name, labels
    return source


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a prepared set. Raises UserError if it is damaged or of a later version."""
    path = root / MANIFEST
    if not path.exists():
        raise UserError(f"{root} was not made by `vaebm-fast prepare`, or is not complete: {path.name} is missing.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the images again.") from error
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, this vaebm-fast reads {VERSION}; prepare the images again.")
    if manifest_digest(manifest) != manifest.get("manifest_sha256"):
        raise UserError(f"{path} is damaged or was edited; prepare the images again.")
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, without this digest."""
    content = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check(root: Path, *, progress: bool = False) -> list[str]:
    """What is wrong with a prepared set, a sentence each; empty if every image has the pixels of its line.

    Raises UserError if the set cannot be opened.
    """
    manifest = read_manifest(root)
    faults: list[str] = []
    for split, facts in manifest["splits"].items():
        rows = list(rows_of(root / f"{split}.jsonl"))
        if len(rows) != facts["images"] or digest(rows) != facts["sha256"]:
            faults.append(f"{root / split}.jsonl is not the list of images that the manifest describes")
            continue
        source = prepared(root, image_size=manifest["size"], image_channels=manifest["channels"], split=split)
        labels = [row["label"] for row in rows] if facts["labels"] else None
        if labels != (None if source.labels is None else source.labels.tolist()):
            faults.append(f"{root / split}_labels.npy has other classes than {split}.jsonl")

        def fault(index: int, source: ImageSource = source, rows: list[Row] = rows) -> str | None:
            try:
                pixels = _pixels(source, index)
            except Exception as error:
                return f"{source.name}, {rows[index]['key']}: {error}"
            same = identity(pixels)[1] == rows[index]["pixels_sha256"]
            return None if same else f"{source.name}, {rows[index]['key']}: other pixels than were prepared"

        with ThreadPoolExecutor() as pool:
            checked = pool.map(fault, range(len(rows)))
            shown = tqdm(checked, f"checking {split}", len(rows), disable=None if progress else True, unit="image")
            faults += [problem for problem in shown if problem is not None]
    return faults


def digest(rows: Iterable[Row]) -> str:
    """SHA-256 that identifies a split: of every image's key, pixels and class, in order."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(f"{row['key']}\0{row.get('pixels_sha256')}\0{row.get('label')}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()


def rows_of(path: Path) -> Iterator[Row]:
    """The lines of a list, as objects. Raises UserError if it is damaged."""
    try:
        with path.open() as file:
            for line in file:
                row: Row = json.loads(line)
                if not isinstance(row, dict) or "key" not in row:
                    raise ValueError("a line without a key")
                yield row
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); prepare the images again.") from error


def _pixels(source: ImageSource, index: int) -> Pixels:
    """The stored, uncropped pixels of an image."""
    if isinstance(source, ArraySource):
        return source.images[index]
    assert isinstance(source, StoredImages)
    return decode(source.container.read(index), source.image_shape[0])


def _load(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> Any:
    """The array of a file, mapped (torch wants it writable, so written pages would be private), if of this shape."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the images again.") from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{path} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)}{list(shape)}; prepare the images again."
        )
    return np.asarray(array)


def _shards(root: Path, split: str, images: int) -> TarImages:
    paths = [root / shard_name(split, number) for number in range(-(-images // PER_SHARD))]
    container = TarImages(root, paths)
    if len(container.names) != images:
        raise UserError(
            f"{root} has {len(container.names)} images of {images} in its {split} shards; prepare it again."
        )
    return container


def shard_name(split: str, number: int) -> str:
    """The name of a shard."""
    return f"{split}-{number:05d}.tar"


def _shape(size: int, channels: int) -> str:
    return f"{size}x{size} with {channels} channel{'s' * (channels > 1)}"
