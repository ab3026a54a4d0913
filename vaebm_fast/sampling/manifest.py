"""What a job's images follow from; a folder holds images of one such configuration.

Not in it: the number of processes, which changes nothing. What it was begun with (torch, the GPU's model) is only told:
another may round the last bit of a feature otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from vaebm_fast.config.settings import differences, in_present_terms
from vaebm_fast.sampling.folder import Folder, SamplingError

NAME = "manifest.json"
IMAGES_VERSION = 1  # raised when a new release makes other images from the same settings


def settle(folder: Folder, asked: Mapping[str, Any], choose: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of the job in `folder`: those it was begun with, or, for a new one, `asked` and what `choose` adds.

    Raises SamplingError naming each setting that is asked for and differs.
    """
    asked = json.loads(json.dumps({"images_version": IMAGES_VERSION, **asked}))  # a schedule as a list, as it is saved
    saved = read_json(folder, NAME)
    if saved is None:
        settings = {**choose(), **asked}
        folder.write_json(NAME, settings)
        return settings
    saved = in_present_terms(saved, asked)
    found = differences({name: value for name, value in saved.items() if name in asked}, asked)
    differing = [f"{name} was {before} and is {now}" for name, (before, now) in found.items()]
    if differing:
        raise SamplingError(
            f"{folder.out} holds images of another configuration ({'; '.join(differing)}); "
            "use the same to complete them, or name another folder."
        )
    return saved


def read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of the folder; None where it is not there. Raises SamplingError for a damaged one."""
    path = folder.out / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise SamplingError(f"{path} is damaged ({error}); restore it, or name another folder.") from error
    if not isinstance(content, dict):
        raise SamplingError(f"{path} is damaged: it is no JSON object; restore it, or name another folder.")
    return content
