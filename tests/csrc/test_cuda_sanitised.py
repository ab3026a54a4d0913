"""Every CUDA kernel in the emulation, built with sanitisers: no step beside memory, no race, no barrier too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cuda_build import KERNELS, barriers, emulate_sanitised, run_sanitised

pytestmark = pytest.mark.slow

# Those with a program; the noise of philox_normal is part of langevin_update.
DRIVERS = ("depthwise_swish", "inverted_residual", "langevin_update", "power_iteration")
BARRIERS = [(source.stem, barrier) for source in KERNELS for barrier in barriers(source)]


@pytest.fixture(scope="module")
def race_checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The drivers of kernels that share memory, built with ThreadSanitizer."""
    folder = tmp_path_factory.mktemp("emulation")
    return {driver: emulate_sanitised(driver, "thread", folder) for driver in dict(BARRIERS)}


@pytest.mark.parametrize("driver", DRIVERS)
def test_address_sanitizer_finds_nothing(driver: str, tmp_path: Path) -> None:
    done = run_sanitised(emulate_sanitised(driver, "address", tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("driver", dict(BARRIERS))
def test_thread_sanitizer_finds_nothing(driver: str, race_checked: dict[str, Path]) -> None:
    done = run_sanitised(race_checked[driver])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("driver", "barrier"), BARRIERS)
def test_every_barrier_is_needed(driver: str, barrier: str, race_checked: dict[str, Path]) -> None:
    done = run_sanitised(race_checked[driver], drop_barrier=barrier)
    kernel = driver.split("_")[0]  # names of kernels begin so
    assert done.returncode == 66 and "data race" in done.stderr and f"{kernel}_" in done.stderr
