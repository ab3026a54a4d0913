"""`vaebm-fast`: one module per command; each parses options, calls the library and prints the result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from vaebm_fast import __version__
from vaebm_fast.cli import convert, cost, demo, info, likelihood, prepare, readjust, sample, show, train
from vaebm_fast.cli._options import registry
from vaebm_fast.runtime import command

COMMANDS: Mapping[str, Callable[..., Any]] = {
    "prepare": prepare.prepare,
    "show": show.show,
    "train": train.describe,
    "sample": sample.sample,
    "info": info.info,
    "convert": convert.convert,
    "likelihood": likelihood.likelihood,
    "readjust": readjust.readjust,
    "cost": cost.cost,
    "demo": demo.demo,
}


def _run(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--version"]:
        print(f"vaebm-fast {__version__}")
        return 0
    if arguments and arguments[0] == "train":  # parses its own options: their defaults depend on the preset
        return train.run(arguments[1:], "vaebm-fast train")
    code: int | None = tyro.extras.subcommand_cli_from_dict(
        dict(COMMANDS),
        prog="vaebm-fast",
        description="Train, sample and evaluate VAEBM models fast. `vaebm-fast --version` prints the version.",
        args=arguments or ["--help"],
        registry=registry,
    )
    return code or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vaebm-fast` with these arguments, by default the command line's; returns the exit code."""
    return command.run(_run, sys.argv[1:] if arguments is None else arguments)
