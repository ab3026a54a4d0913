"""Reads published NVAE and VAEBM checkpoints safely and derives network configurations from their arguments and keys.

Owns the published layouts. `networks` checks tensors against the network, for every layout. Errors raised here do not
name the file; the caller adds the name.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaebm_fast.checkpoint.store import CheckpointError, Kind
from vaebm_fast.config import ENERGY_ARCHS, EnergyBlock, EnergyConfig, NVAEConfig, find_energy_arch, parse_blocks

_OLD_FILES_LACK: Mapping[str, Any] = {
    "ada_groups": False,
    "min_groups_per_scale": 1,
    "num_mixture_dec": 10,
    "num_x_bits": 8,
}
_SIDES = {"mnist": 32, "omniglot": 32, "stacked_mnist": 32, "cifar10": 32, "ffhq": 256}
_BINARY = ("mnist", "omniglot")  # 28x28 images padded by 2 on each side
_DERIVED = ("image_size", "image_channels", "likelihood", "num_mixture_dec", "uncounted_border")
READ_PROTOCOLS = (2, 3)  # by torch.load with weights_only=True
LEGACY_MAGIC = b"L1195470"  # begins a legacy file in protocols 0 and 1
DOS_FOLDER = 0x10  # attribute bit of a zip record
_COPIED = tuple(entry.name for entry in fields(NVAEConfig) if entry.name not in _DERIVED)


def unpickle(path: Path) -> dict[str, Any]:
    """The dictionary in a `torch.save` file, zip or legacy; the only Python class allowed is `argparse.Namespace`.

    Raises CheckpointError for a damaged file, for a pickle that imports anything else, naming the import, and for a
    pickle protocol that torch's safe loading cannot read. Leaves `argparse.Namespace` among torch's safe globals:
    removing it would race with loads in other threads.
    """
    try:
        _check_archive(path)
        protocol = _protocol(path)
        if protocol not in READ_PROTOCOLS:
            asked = _foreign_imports(path)
            if asked:
                raise _accusation(asked)
            raise CheckpointError(
                f"its pickle has protocol {protocol or '0 or 1'}, which safe loading does not read. Save it again "
                "where it was made, with torch.save(..., pickle_protocol=2), the default."
            )
        torch.serialization.add_safe_globals([argparse.Namespace])
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files can make the unpickler raise almost any exception
        named = re.search(r"GLOBAL (\S+)", str(error))
        asked = named[1] if named else _foreign_imports(path)
        if asked:
            raise _accusation(asked) from error
        raise CheckpointError("the file is truncated, damaged, or not a checkpoint; download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"the file contains a {type(content).__name__}, not a checkpoint dictionary.")
    return content


def _check_archive(path: Path) -> None:
    """Check the zip's CRC-32 of every record, because torch.load accepts flipped bits. Legacy files have no checksums.

    Also rejects records marked as folders: torch.load would leave their tensors uninitialised.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        record = archive.testzip()
        folders = [entry.filename for entry in archive.infolist() if entry.is_dir() or entry.external_attr & DOS_FOLDER]
    if record is not None:
        raise CheckpointError(f"the file is damaged: {record} does not match its checksum; download it again.")
    if folders:
        raise CheckpointError(f"the file is damaged: {folders[0]} is marked as a folder; download it again.")


def _accusation(asked: str) -> CheckpointError:
    return CheckpointError(
        f"refused, because its pickle imports {asked}; a checkpoint needs only tensors and argparse.Namespace."
    )


def _foreign_imports(path: Path) -> str:
    """What the pickles of a file import besides tensors and namespaces; empty if nothing else."""
    usual = ("argparse.Namespace", "collections.OrderedDict", "copy_reg._reconstructor", "__builtin__.object")
    names: list[str] = []
    with contextlib.suppress(Exception):  # damaged, or past the last pickle: use the names found so far
        names.extend(_imports(path))
    return ", ".join(dict.fromkeys(name for name in names if name not in usual and not name.startswith("torch.")))


def _imports(path: Path) -> Iterator[str]:
    """Names imported by the pickles of a file, in order, without executing them. Propagates read errors."""
    data = _pickles(path)
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        memo: dict[int, str | None] = {}
        pushed: list[str | None] = []  # what each opcode pushed, if it is a string
        for opcode, found, _ in pickletools.genops(stream):
            argument: Any = found
            if opcode.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(name or "?" for name in pushed[-2:])
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = pushed[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                pushed.append(memo.get(argument))
            elif opcode.name not in ("PROTO", "FRAME"):
                pushed.append(argument if isinstance(argument, str) else None)


def _protocol(path: Path) -> int:
    """The pickle protocol of a file; 0 stands for 0 and 1, which no byte tells apart; 2 for what is no pickle."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        head = _pickles(path)[:8]
    else:
        with path.open("rb") as file:
            head = file.read(8)
    if head[:1] == pickle.PROTO and head[1:2] and head[1] <= pickle.HIGHEST_PROTOCOL:
        return head[1]
    return 0 if (is_zip and head) or head.startswith(LEGACY_MAGIC) else 2


def _pickles(path: Path) -> bytes:
    """The pickles of a file; those of a legacy file are followed by its tensors."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))


def kind(content: Mapping[str, Any]) -> Kind:
    """Which of the two published layouts a dictionary has."""
    if "state_dict" in content:
        return "nvae"
    if "model" in content:
        return "energy"
    raise CheckpointError(
        "this is neither an NVAE file (keys state_dict, args) nor an energy file (key model); "
        f"it has {', '.join(map(str, list(content)[:5])) or 'no entries'}."
    )


def read_nvae(content: Mapping[str, Any]) -> tuple[NVAEConfig, dict[str, Tensor], dict[str, Any]]:
    """(configuration, float32 state dictionary, {dataset, epoch, global_step}) of an NVAE file's dictionary."""
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        raise CheckpointError("an NVAE file needs args, an argparse.Namespace, but this one has none.")
    config = nvae_config(vars(args))
    counters = {key: content[key] for key in ("epoch", "global_step") if isinstance(content.get(key), int)}
    return config, _network_state(content["state_dict"]), {"dataset": args.dataset, **counters}


def nvae_config(args: Mapping[str, Any]) -> NVAEConfig:
    """Configuration from an NVAE file's arguments, with defaults for those that old files lack."""
    args = {**_OLD_FILES_LACK, **args}
    missing = [name for name in ("dataset", *_COPIED) if name not in args]
    if missing:
        raise CheckpointError(f"its args lack {', '.join(missing)}, so the network cannot be built.")
    dataset = str(args["dataset"])
    side = _SIDES.get(dataset) or dataset.rpartition("_")[2]
    if not str(side).isdecimal():
        raise CheckpointError(f"its args name the dataset {dataset!r}, whose image size is unknown.")
    shape: dict[str, Any] = {"image_size": int(side), **{name: args[name] for name in _COPIED}}
    if dataset in _BINARY:
        return NVAEConfig(**shape, image_channels=1, likelihood="bernoulli", uncounted_border=2)
    if args["num_mixture_dec"] == 1:
        return NVAEConfig(**shape, likelihood="gaussian")
    return NVAEConfig(**shape, likelihood="logistic_mixture", num_mixture_dec=args["num_mixture_dec"])


def read_energy(
    content: Mapping[str, Any], arch: str | None = None, image_size: int | None = None
) -> tuple[EnergyConfig, dict[str, Tensor], dict[str, Any]]:
    """(configuration, float32 state dictionary, {}) of an energy file's dictionary.

    The architecture is inferred from the keys. `arch` overrides it with a name of ENERGY_ARCHS or a list of blocks
    ("1-1d 1-2"); a list also needs `image_size`, which the keys do not determine. The keys must still match.
    """
    state = _network_state(content["model"])
    width, image_channels, signature = _energy_signature(state)
    if arch is None:
        names = [name for name, known in ENERGY_ARCHS.items() if _signature(known.blocks, width) == signature]
        if len(names) != 1:
            raise CheckpointError(
                f"its blocks ({_describe(signature)}) match {' and '.join(names) or 'no published energy network'}; "
                f"name one with --energy-arch: {', '.join(ENERGY_ARCHS)}, or a list of blocks such as '1-1d 1-2'."
            )
        arch = names[0]
    blocks = energy_blocks(arch)
    if _signature(blocks, width) != signature:
        raise CheckpointError(
            f"its blocks ({_describe(signature)}) do not match {arch} ({_describe(_signature(blocks, width))})."
        )
    if image_size is None:
        named = find_energy_arch(arch)
        if named is None:
            raise CheckpointError(f"the blocks {arch!r} do not determine the image size; give image_size too.")
        image_size = named.image_size
    return EnergyConfig(image_size, image_channels, width, blocks), state, {}


def energy_blocks(arch: str) -> tuple[EnergyBlock, ...]:
    """The blocks for a name accepted by `find_energy_arch`, or for a list such as '1-1d 1-2'."""
    if (named := find_energy_arch(arch)) is not None:
        return named.blocks
    sentence = f"{arch!r} is not an energy network; use {', '.join(ENERGY_ARCHS)}, or blocks such as '1-1d 1-2'."
    try:
        blocks = parse_blocks(arch)
    except ValueError as error:
        raise CheckpointError(sentence) from error
    if not blocks:
        raise CheckpointError(sentence)
    return blocks


_Signature = tuple[tuple[int, int, bool], ...]  # per block: channels in, channels out, whether the skip has a conv


def _signature(blocks: Iterable[EnergyBlock], width: int) -> _Signature:
    return tuple(
        (width * b.in_channels, width * b.out_channels, b.downsample or b.in_channels != b.out_channels) for b in blocks
    )


def _energy_signature(state: Mapping[str, Tensor]) -> tuple[int, int, _Signature]:
    """(width, image channels, block signature) inferred from the keys and shapes of an energy network's state."""

    def channels(name: str) -> tuple[int, int]:
        weight = state.get(name)
        if weight is None or weight.ndim != 4:
            raise CheckpointError(f"it lacks {name}, a convolution that every supported energy network has.")
        return weight.shape[1], weight.shape[0]

    image_channels, width = channels("conv1.weight")
    count = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    names = [f"blocks.{index}" for index in range(count)]
    signature = tuple((*channels(f"{name}.conv1.weight"), f"{name}.skip.0.weight" in state) for name in names)
    return width, image_channels, signature


def _describe(signature: _Signature) -> str:
    return ", ".join(f"{inside}-{out}{' with skip' if skip else ''}" for inside, out, skip in signature)


def _network_state(state: Any) -> dict[str, Tensor]:
    """Strip DataParallel's `module.` and drop `weight_normalized`; convert floating-point tensors to float32."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"its state dictionary is a {type(state).__name__}.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"its state dictionary entry {key!r} is a {type(value).__name__}, not a tensor.")
    prefix = "module." if state and all(key.startswith("module.") for key in state) else ""
    return {
        key.removeprefix(prefix): value.detach().float() if value.is_floating_point() else value.detach()
        for key, value in state.items()
        if key.rpartition(".")[2] != "weight_normalized"
    }
