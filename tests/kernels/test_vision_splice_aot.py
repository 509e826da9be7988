"""Both kernels, compiled for GPUs that are not here."""

import pytest
import torch

from fastpo_kernels.testing_aot import SHARED_LIMIT, cost
from fastpo_kernels.vision_splice import launch
from fastpo_kernels.vision_splice.reference import Grid

FRAMES, ROWS, SIZE = 64, 16384, 3584


def meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(dtype, newline):
    grid = Grid.of(27, "bilinear", newline)
    row, frames = meta(ROWS, SIZE, dtype=dtype), meta(FRAMES, 729, SIZE, dtype=dtype)
    at, slot = meta(FRAMES * grid.tokens, dtype=torch.int64), meta(ROWS, dtype=torch.int32)
    parts = meta(28, SIZE, dtype=torch.float32) if newline else None
    yield launch.splice(row, row, frames, row[0] if newline else None, slot, grid)
    yield launch.unsplice(row, at, slot, grid, row, frames, parts)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_nothing_spills(capability):
    for dtype, newline in ((torch.bfloat16, True), (torch.float32, False))[: 1 + (capability == 80)]:
        for made in launches(dtype, newline):
            found = cost(made.kernel, made.args, capability, num_warps=made.num_warps, num_stages=made.num_stages)
            name = f"{made.kernel.fn.__name__} sm_{capability} {dtype} newline={newline}"
            print(f"{name}: {found.registers} registers, {found.spilled} B spilled, {found.shared} B shared")
            assert found.spilled == 0 and found.registers <= 64, name  # 64: 8 blocks of 4 warps run at once
            assert found.shared <= 4096, name  # where newline's fp32 sums and a half row differ in layout
            assert "ld.global.v4" in found.ptx or "ld.global.v2" in found.ptx, f"{name} loads are not wide"
