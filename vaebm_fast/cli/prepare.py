"""`vaebm-fast prepare`: make a checked data set of whatever images there are, or check one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vaebm_fast.cli._options import Switch, aligned
from vaebm_fast.config import Transform
from vaebm_fast.data.prepare import PrepareOptions
from vaebm_fast.data.prepare import prepare as make
from vaebm_fast.data.prepared import LEFT_OUT, Format, check, read_manifest
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import expanded

SHOWN = 5  # faults named by --check


def prepare(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE OUT")],
    *,
    size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    channels: Literal[1, 3] = 3,
    transform: Transform | None = None,
    held_out: float = 0.0,
    format: Format = "array",
    on_bad: Literal["error", "skip"] = "error",
    only_check: Annotated[Switch, tyro.conf.arg(name="check")] = False,
) -> None:
    """Decode, check, resize and hash every image of SOURCE once; `train` and the other commands read the folder OUT.

    SOURCE is a folder, zip or tar of images, an LMDB database, TFRecord files, .npy, .npz, SVHN, CIFAR or MNIST. A
    stopped run continues with the same command. `vaebm-fast prepare --check OUT` compares every image of a prepared
    folder with the hash that was taken then.

    Args:
        paths: The images, and a new folder for the data set.
        size: Side of the square images in pixels.
        channels: 3 for RGB, 1 for grey.
        transform: How images become square. square: resize the short side, crop; celeba: crop CelebA's 178x218 images
            to their box first; pad: zeros on all sides; stacked_mnist: three digits as RGB. Default: as fits SOURCE.
        held_out: Share of the images to hold out, if SOURCE has no published split; the choice is always the same.
        format: One array of images cropped at the centre, or tar shards of uncropped ones, for random crops.
        on_bad: What to do with a damaged image: end with an error, or leave it out and list it.
        only_check: Check a prepared folder.
    """
    if only_check:
        if len(paths) != 1:
            raise UserError("Give --check one folder, which `vaebm-fast prepare` made.")
        _check(expanded(paths[0]))
        return
    if len(paths) != 2 or size is None:
        raise UserError("Give the images, a new folder and --size, such as: vaebm-fast prepare images/ data/ --size 64")
    options = PrepareOptions(
        size=size,
        channels=channels,
        transform=transform,
        held_out=held_out,
        format=format,
        on_bad=on_bad,
    )
    source, out = paths[0], expanded(paths[1])
    print(_summary(out, make(source, out, options, progress=True)))


def _summary(out: Path, manifest: dict[str, Any]) -> str:
    shape = f"{manifest['size']}x{manifest['size']}x{manifest['channels']}"
    rows = {
        split: f"{facts['images']:,} images of {shape}, transform {facts['transform']}"
        for split, facts in manifest["splits"].items()
    }
    damaged = sum(facts["damaged"] for facts in manifest["splits"].values())
    if manifest["left_out"]:
        others = manifest["left_out"] - damaged
        rows["left out"] = f"{damaged:,} damaged images and {others:,} other files, listed in {out / LEFT_OUT}"
    repeated = sum(facts["repeated"] for facts in manifest["splits"].values())
    if repeated:
        rows["repeated"] = f"{repeated:,} images have the pixels of another one of their split"
    enlarged = sum(facts["enlarged"] for facts in manifest["splits"].values())
    if enlarged:
        rows["enlarged"] = f"{enlarged:,} images whose short side was below {manifest['size']}"
    if manifest["in_both_splits"]:
        warnings.warn(
            f"{manifest['in_both_splits']:,} images of the held-out split are in the training split as well.",
            stacklevel=2,
        )
    return aligned({**rows, "use it as": f"--data {out}"})


def _check(out: Path) -> None:
    faults = check(out, progress=True)
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(f"{out} is damaged: {'; '.join(faults[:SHOWN])}{more}. Prepare the images again.")
    totals = {split: facts["images"] for split, facts in read_manifest(out)["splits"].items()}
    print(f"{out} is sound: {', '.join(f'{total:,} images of {split}' for split, total in totals.items())}.")
