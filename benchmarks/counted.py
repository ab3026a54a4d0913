"""FLOPs and least bytes of a chain step per preset, counted beforehand: counting takes seconds per preset.

`tests/benchmarks/test_counted.py` counts them again.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """Of a step, per image: FLOPs of the plain modules and of the frozen pair; bytes of `cost.least_traffic`."""

    plain_flops: int
    frozen_flops: int
    bytes_per_image: int
    bytes_per_step: int

    def least_bytes(self, batch: int, element_size: int) -> float:
        """What a step of `batch` chains must move where every block is one kernel; the counts are in bfloat16."""
        return (batch * self.bytes_per_image + self.bytes_per_step) * element_size / 2


WORK: dict[str, Work] = {
    "cifar10": Work(56_583_078_912, 54_917_940_224, 223_871_764, 230_373_116),
    "celeba_64": Work(22_497_390_080, 19_462_811_136, 164_820_396, 115_677_652),
    "lsun_church_64": Work(23_101_369_856, 20_066_790_912, 167_769_516, 121_578_964),
    "celeba_256": Work(251_517_204_480, 209_498_667_008, 2_027_157_028, 593_333_260),
    "digits": Work(19_648_256, 13_913_856, 424_164, 1_490_876),
}
