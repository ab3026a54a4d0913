"""Prepares a source into a folder, or completes what was begun there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaebm_fast.data.prepare.job import Job, Row
from vaebm_fast.data.prepare.options import PrepareOptions
from vaebm_fast.data.prepare.parts import Part, parts_of
from vaebm_fast.data.prepared import LEFT_OUT, MANIFEST, PARTIAL, VERSION, digest, manifest_digest, read_manifest
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import expanded, remove_temporaries, replacing, sync, write
from vaebm_fast.runtime.locks import Lock

SETTINGS = "settings.json"


def prepare(source: str | Path, out: Path, options: PrepareOptions, *, progress: bool = False) -> dict[str, Any]:
    """Prepare `source` into the folder `out`; returns the manifest. Continues what was stopped; complete, does nothing.

    Decodes with as many threads as there are cores. Raises UserError if `out` holds anything else or was begun with
    other settings or images, or, unless options.on_bad is "skip", at the first damaged image; OSError if an image
    cannot be read for a reason other than damage. Progress is kept up to the last save: a second or two of work, or a
    shard.
    """
    _require_own_folder(out, source)
    is_begun = (out / MANIFEST).exists() or (out / PARTIAL).exists()
    parts = [] if is_begun else parts_of(source, options)  # what cannot be opened leaves no folder behind
    out.mkdir(parents=True, exist_ok=True)
    with Lock(out / ".lock", out):
        settings = {
            "version": VERSION,
            "source": source if source == "digits" else os.path.abspath(expanded(os.fspath(source))),
            "size": options.size,
            "channels": options.channels,
            "transform": options.transform,
            "held_out": options.held_out,
            "format": options.format,
        }
        partial = out / PARTIAL
        for complete in (out, partial):
            if (complete / MANIFEST).exists():
                _require_same(out, settings, read_manifest(complete))
        if (out / MANIFEST).exists():
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed at its very end
            return read_manifest(out)
        if partial.exists():
            remove_temporaries(partial)
        if not (partial / MANIFEST).exists():
            parts = parts or parts_of(source, options)
            _begin(partial, out, settings, parts, options)
            results = [Job(part, partial, options).run(progress) for part in parts]
            _complete(partial, settings, parts, results)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):  # the manifest last
            if path.name != SETTINGS and not path.name.endswith(".journal"):
                os.replace(path, out / path.name)
        sync(out)
        shutil.rmtree(partial)
        return read_manifest(out)


def _begin(
    partial: Path, out: Path, settings: Mapping[str, Any], parts: Sequence[Part], options: PrepareOptions
) -> None:
    """Record settings and images, or require those of the run that is continued; require room on the disk."""
    asked = {**settings, "images": {part.split: _names_digest(part) for part in parts}}
    path = partial / SETTINGS
    if path.exists():
        _require_same(out, asked, json.loads(path.read_text()))
        return
    needed = sum(len(part.indices) for part in parts) * options.size**2 * options.channels
    free = shutil.disk_usage(out).free
    if needed > free and options.format == "array":
        raise UserError(f"{out} has {free / 1e9:.3g} GB free; the images need {needed / 1e9:.3g} GB.")
    partial.mkdir(exist_ok=True)
    write(path, json.dumps(asked), durable=True)


def _complete(partial: Path, settings: Mapping[str, Any], parts: Sequence[Part], results: Sequence[list[Row]]) -> None:
    """Write the lists of images and the manifest."""
    splits: dict[str, Any] = {}
    left_out: list[Row] = []
    seen: Counter[str] = Counter()
    for part, rows in zip(parts, results, strict=True):
        good = [{name: value for name, value in row.items() if name != "index"} for row in rows if "why" not in row]
        if not good:
            raise UserError(f"{part.container.path} has no image that can be read; see why: {rows[0]['why']}.")
        seen.update({row["pixels_sha256"] for row in good})
        left_out += [{"split": part.split, "key": row["key"], "why": row["why"]} for row in rows if "why" in row]
        write(partial / f"{part.split}.jsonl", "".join(json.dumps(row) + "\n" for row in good), durable=True)
        labelled = all("label" in row for row in good)
        if labelled:
            with replacing(partial / f"{part.split}_labels.npy", durable=True) as path, path.open("wb") as file:
                np.save(file, np.array([row["label"] for row in good], np.int64))
        splits[part.split] = {
            "images": len(good),
            "sha256": digest(good),
            "source_sha256": _source_digest(rows),
            "damaged": len(rows) - len(good),
            "enlarged": sum(min(row["height"], row["width"]) < settings["size"] for row in good),
            "repeated": len(good) - len({row["pixels_sha256"] for row in good}),
            "labels": labelled,
            "path": str(part.container.path),
            "transform": part.made_by,
        }
    for container in {id(part.container): part.container for part in parts}.values():
        left_out += [{"key": name, "why": why} for why, names in container.passed_over.items() for name in names]
    write(partial / LEFT_OUT, "".join(json.dumps(row) + "\n" for row in left_out), durable=True)
    in_both = sum(times > 1 for times in seen.values())
    manifest = {**settings, "splits": splits, "left_out": len(left_out), "in_both_splits": in_both}
    manifest["manifest_sha256"] = manifest_digest(manifest)
    write(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n", durable=True)


def _source_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of every stored image's name, size and SHA-256, as `StoredImages.digest`."""
    sha = hashlib.sha256()
    for row in rows:
        line = f"{row['key']}\0{row.get('bytes')}\0{row.get('sha256')}\n"
        sha.update(line.encode(errors="surrogateescape"))
    return sha.hexdigest()


def _names_digest(part: Part) -> str:
    names = part.container.names
    return hashlib.sha256(
        "\0".join(names[int(index)] for index in part.indices).encode(errors="surrogateescape")
    ).hexdigest()


def _require_own_folder(out: Path, source: str | Path) -> None:
    """Raise UserError unless `out` is new, empty or begun by `prepare`, and not within the source."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new folder.")
    if source != "digits" and expanded(os.fspath(source)).resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out} lies in {source}, of which it would be made; name another folder.")
    names = {path.name for path in out.iterdir()} - {".lock"} if out.exists() else set()
    if names and not names & {PARTIAL, MANIFEST}:
        raise UserError(f"{out} holds other files, such as {min(names)}; name a new or empty folder.")


def _require_same(out: Path, asked: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    differing = [name for name in asked if asked[name] != saved.get(name)]
    if differing:
        shown = "; ".join(
            f"{name} was {saved.get(name)} and is {asked[name]}" if name != "images" else "its images have changed"
            for name in differing
        )
        raise UserError(f"{out} was made with other settings ({shown}); use the same, or name another folder.")
