"""The settings that determine a job's images; a folder holds images of one configuration.

It omits the number of processes, which changes no image. The torch version and GPU model that started the job are
recorded but not enforced: others may round the last bit of a feature differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from vaebm_fast.config.settings import differences, in_present_terms
from vaebm_fast.sampling.folder import Folder, SamplingError

NAME = "manifest.json"
IMAGES_VERSION = 1  # incremented when a release makes different images from the same settings


def settle(folder: Folder, asked: Mapping[str, Any], choose: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of the job in `folder`: the saved ones, or for a new job `asked` plus those of `choose`.

    Raises SamplingError naming each setting in `asked` that differs from the saved one.
    """
    asked = json.loads(json.dumps({"images_version": IMAGES_VERSION, **asked}))  # tuples to lists, as saved
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
            "use the same settings to complete them, or name another folder."
        )
    return saved


def read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of the folder, or None if it is missing. Raises SamplingError if it is damaged."""
    path = folder.out / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise SamplingError(f"{path} is damaged ({error}); restore it, or name another folder.") from error
    if not isinstance(content, dict):
        raise SamplingError(f"{path} is damaged: it is not a JSON object; restore it, or name another folder.")
    return content
