"""GPU utilisation, memory and energy during sampling, from NVML (package nvidia-ml-py); omitted without it."""

from __future__ import annotations

import importlib
import statistics
import threading
from types import ModuleType, TracebackType
from typing import Any

import torch

PERIOD_S = 0.5


class GpuMeter:
    """Context manager that samples one GPU; `nvml`: pynvml or a module like it; `handle`: its device."""

    def __init__(self, nvml: ModuleType | Any, handle: Any, period_s: float = PERIOD_S) -> None:
        self._nvml, self._handle, self._period_s = nvml, handle, period_s
        self._utilisation: list[float] = []
        self._memory: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)
        self._started_mj: int | None = None
        self._used_j: float | None = None

    def __enter__(self) -> GpuMeter:
        self._started_mj = self._energy_mj()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        ended_mj = self._energy_mj()
        if self._started_mj is not None and ended_mj is not None:
            self._used_j = (ended_mj - self._started_mj) / 1000

    def figures(self, images: int) -> dict[str, float | None]:
        """Mean utilisation, peak memory of all programs on the GPU, and joules; None for unsupported figures."""
        return {
            "utilisation_percent": statistics.fmean(self._utilisation) if self._utilisation else None,
            "memory_gib": max(self._memory) / 2**30 if self._memory else None,
            "joules": self._used_j,
            "joules_per_image": self._used_j / images if self._used_j is not None and images else None,
        }

    def _watch(self) -> None:
        while True:
            try:
                self._utilisation.append(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
                self._memory.append(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
            except self._nvml.NVMLError:
                return  # MIG instances report no utilisation
            if self._stop.wait(self._period_s):
                return

    def _energy_mj(self) -> int | None:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:
            return None  # unsupported before Volta


def gpu_meter(device: torch.device) -> GpuMeter | None:
    """The meter of a CUDA device; None for a CPU or without NVML."""
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        nvml.nvmlInit()
        # By UUID: NVML ignores CUDA_VISIBLE_DEVICES and numbers devices differently.
        return GpuMeter(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
    except nvml.NVMLError:
        return None
