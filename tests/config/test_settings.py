"""Chain settings, and comparison with settings saved by older versions."""

from __future__ import annotations

import pytest

from vaebm_fast.config import ChainConfig
from vaebm_fast.config.settings import differences, in_present_terms


def test_what_older_versions_left_out_has_its_default_and_renamed_values_their_present_name() -> None:
    now = {"backend": "cpp", "temperature": 1.0, "start_temperature": 1.0, "seed": 3}
    saved = in_present_terms({"backend": "cpu", "seed": 3}, now)
    assert differences(saved, now) == {}
    assert differences(in_present_terms({"backend": "cuda", "seed": 3, "temperature": 0.7}, now), now) == {
        "backend": ("cuda", "cpp"),
        "temperature": (0.7, 1.0),
    }


def test_defaults_are_only_those_of_settings_that_there_are_now() -> None:
    assert in_present_terms({"seed": 3}, {"seed": 4}) == {"seed": 3}
    assert differences({"seed": 3, "gone": 1}, {"seed": 4, "new": 2}) == {
        "gone": (1, None),
        "new": (None, 2),
        "seed": (3, 4),
    }


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"steps": -1}, "steps is -1; it must be 0 or more"),
        ({"step_size": 0.0}, "step_size is 0.0; it must be a positive number"),
        ({"step_size": (0.1, float("nan"))}, "step_size is nan; it must be a positive number"),
        ({"step_size": (0.1, 0.2, 0.3)}, "step_size has 3 values; a chain of 2 steps needs 1 or 2"),
        ({"potential": "free"}, "Potential 'free' is not known; it must be one of energy, paper, official"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be finite and at least 0"),
        ({"start_temperature": float("inf")}, "start_temperature is inf; it must be finite and at least 0"),
    ],
    ids=str,
)
def test_values_that_make_no_chain_are_refused(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ChainConfig(**{"steps": 2, "step_size": 0.1, **wrong})  # type: ignore[arg-type]


def test_step_sizes_are_one_per_step() -> None:
    assert ChainConfig(3, 0.5).step_sizes == (0.5, 0.5, 0.5)
    assert ChainConfig(2, (0.5, 0.25)).step_sizes == (0.5, 0.25)
    assert ChainConfig(0, 0.5).step_sizes == ChainConfig(0, ()).step_sizes == ()
