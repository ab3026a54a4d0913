"""What resources do the GPU kernels take, and what is their minimum time? Computed without a GPU.

Compiles every csrc/cuda/*.cu for sm_80 and sm_90a and every launch of a Triton kernel (`triton_aot`) for sm_80 and
sm_90; reads registers, shared memory and spills; computes the blocks per SM; and divides the counted work (`cuda_work`,
`triton_work`) by the peak rates of an A100 and an H200. The result is a lower bound: the time of the busiest unit,
which the table names.

    python -m benchmarks kernels                    prints the tables, and writes docs/kernel_tables.md
    python -m benchmarks kernels --launches PART    prints the resources of Triton launches with PART in their name
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.gate import REPOSITORY
from benchmarks.gpu.cuda_work import Kernel, kernels
from benchmarks.work import Work
from vaebm_fast.runtime.files import write

if TYPE_CHECKING:
    from benchmarks.gpu.triton_work import Row

DOCUMENT = REPOSITORY / "docs" / "kernel_tables.md"
HEAD = """# What the GPU kernels need

Written by `python -m benchmarks kernels`, for [kernels.md](kernels.md). [gpu.md](gpu.md) has measured times. Here
times are floors, computed from counted work and the peak rates of an A100 SXM 80 GB (2.04 TB/s, 19.5 TFLOP/s fp32) and
an H200 (4.8 TB/s, 66.9 TFLOP/s fp32). A floor is the time of the busiest unit alone; launches, latency, caches that do
not hold and instructions that are not arithmetic are left out. Work and floors are of one launch at the shape beside
it; TF32 products count twice: tensor cores take them at half the rate of bfloat16.
"""
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "-cubin")


@dataclass(frozen=True)
class Device:
    """A GPU's limits per SM and its peak rates, from NVIDIA's data sheets and CUDA's table of compute capabilities."""

    name: str
    architecture: str
    sms: int
    clock_hz: float
    fp32_lanes: int  # of an SM
    memory_bytes_per_s: float
    tensor_flops: float  # bf16, dense
    shared_kb: int  # per SM; each block takes 1 KB more than it asks for
    registers: int = 65536
    warps: int = 64
    blocks: int = 32

    def times_s(self, work: Work) -> dict[str, float]:
        """Seconds that each unit is busy."""
        clocks_per_s = self.sms * self.clock_hz
        return {
            "memory": work.memory_bytes / self.memory_bytes_per_s,
            "fp32": work.fp32_flop / (2 * self.fp32_lanes * clocks_per_s),
            "tensor": work.tensor_flop / self.tensor_flops,
            "special": work.special / (16 * clocks_per_s),
            "integer": work.integer / (64 * clocks_per_s),
            "shared": work.shared_bytes / (128 * clocks_per_s),
        }


A100 = Device("A100", "sm_80", 108, 1.41e9, 64, 2.04e12, 312e12, shared_kb=164)
H200 = Device("H200", "sm_90a", 132, 1.98e9, 128, 4.8e12, 989e12, shared_kb=228)
DEVICES = (A100, H200)


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel; shared memory and spills in bytes."""

    registers: int
    shared: int
    spilled: int

    def blocks_per_sm(self, device: Device, threads: int, dynamic_shared: int = 0) -> int:
        """Blocks resident on an SM. Registers are allocated by 256 per warp; warps are spread over four schedulers."""
        warps = -(-threads // 32)
        warps_by_registers = device.registers // (-(-32 * self.registers // 256) * 256) // 4 * 4
        shared = -(-(self.shared + dynamic_shared) // 128) * 128 + 1024
        return min(
            device.blocks, device.warps // warps, warps_by_registers // warps, (device.shared_kb << 10) // shared
        )


def short_name(demangled: str) -> str:
    """depthwise_swish_kernel<Bf16, Window<5, (Form)0>> for the demangled name of its entry."""
    name = re.sub(r"\(anonymous namespace\)::|vf::|depthwise::|^void ", "", demangled).replace("> >", ">>")
    return name[: name.rindex("(")]


def compile_kernels(architecture: str) -> dict[str, Resources]:
    """{short_name: Resources} of every kernel in csrc/cuda. Raises RuntimeError if nvcc is missing or fails."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the PATH; install the CUDA toolkit and add its bin folder to it.")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu")):
            command = [nvcc, *FLAGS, f"-arch={architecture}", str(source), "-o", f"{folder}/{source.stem}.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc cannot compile {source.name} for {architecture}:\n{done.stderr}")
            found.update(read_ptxas(done.stdout + done.stderr))
    return found


def compile_launches(launches: list[Row], device: Device) -> dict[str, Resources]:
    """{label: Resources} of Triton launches."""
    from benchmarks.gpu.triton_aot import compile_launch

    architecture = int(re.sub(r"\D", "", device.architecture))
    compiled = [compile_launch(row.kernel.label, row.launch, architecture) for row in launches]
    return {row.name: Resources(row.registers, row.shared, row.spills) for row in compiled}


def read_ptxas(report: str) -> dict[str, Resources]:
    """{short_name: Resources} from the output of `ptxas -v`."""
    report = subprocess.run(["c++filt"], input=report, capture_output=True, text=True, check=True).stdout
    found = {}
    for entry in report.split("Compiling entry function '")[1:]:

        def number(pattern: str, text: str = entry) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        name = short_name(entry[: entry.index("' for '")])
        found[name] = Resources(number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), spilled)
    return found


def resource_table(rows: list[Kernel], compiled: dict[str, dict[str, Resources]]) -> str:
    """Registers, shared memory, spills and occupancy of every kernel, as Markdown; `compiled` by device name."""
    names = " / ".join(device.architecture for device in DEVICES)
    lines = [
        f"| kernel | threads | registers ({names}) | shared (KB) | spills (bytes) | blocks per SM (A100 / H200) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        each = [(device, compiled[device.name][row.symbol]) for device in DEVICES]
        registers = " / ".join(str(resources.registers) for _, resources in each)
        spills = " / ".join(str(resources.spilled) for _, resources in each)
        blocks = " / ".join(str(r.blocks_per_sm(device, row.threads, row.dynamic_shared)) for device, r in each)
        shared_kb = (each[0][1].shared + row.dynamic_shared) / 1024
        lines.append(f"| {row.label} | {row.threads} | {registers} | {shared_kb:.1f} | {spills} | {blocks} |")
    return "\n".join(lines)


def prediction_table(rows: list[Kernel]) -> str:
    """Counted work and the floor of the time on each device, as Markdown."""
    lines = [
        "| kernel | shape | MB | GFLOP | special (G) | " + " | ".join(f"{d.name} (us)" for d in DEVICES) + " |",
        "|---|---|---|---|---|" + "---|" * len(DEVICES),
    ]
    for row in rows:
        floors = []
        for device in DEVICES:
            unit, time_s = max(device.times_s(row.work).items(), key=lambda item: item[1])
            floors.append(f"{1e6 * time_s:.0f} {unit}")
        flop = row.work.fp32_flop + row.work.tensor_flop
        counts = f"{row.work.memory_bytes / 1e6:.0f} | {flop / 1e9:.1f} | {row.work.special / 1e9:.2f}"
        lines.append(f"| {row.label} | {row.shape} | {counts} | {' | '.join(floors)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Write and print the tables, or print some launches."""
    from benchmarks.gpu import triton_aot, triton_work  # lazy: the rest works without Triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", metavar="PART", help="print these launches, rare windows included, write nothing")
    parser.add_argument("--without", action="append", default=[], metavar="PART", help="none with this in their name")
    options = parser.parse_args(arguments)
    if options.launches is not None:
        for row in triton_aot.report(options.launches, tuple(options.without)):
            print(
                f"{row.name:<58} sm_{row.architecture} {row.num_warps:2} warps {row.registers:4} registers "
                f"{row.shared:7} B shared {row.spills:4} B spilled",
                flush=True,
            )
        return

    launches = list(triton_work.rows(without=triton_work.RARE))
    reports = {
        "CUDA": (kernels(), {device.name: compile_kernels(device.architecture) for device in DEVICES}),
        "Triton": ([row.kernel for row in launches], {d.name: compile_launches(launches, d) for d in DEVICES}),
    }
    document = HEAD
    for kind, (rows, compiled) in reports.items():
        document += f"\n## {kind}\n\n{resource_table(rows, compiled)}\n\n{prediction_table(rows)}\n"
    print(document)
    write(DOCUMENT, document)
