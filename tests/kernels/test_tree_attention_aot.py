"""Every kernel and configuration of the half-precision launch tables, compiled for GPUs that are not here."""

import pytest
import torch

from fastpo_kernels.testing_aot import SHARED_LIMIT, cost
from fastpo_kernels.tree_attention import launch
from fastpo_kernels.tree_attention.work import Work

T, HEADS, KV_HEADS = 1001, 28, 4
MMA = {80: "mma.sync", 90: "wgmma.mma_async"}


def meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(size, dtype, capability):
    x = launch.Inputs(*(meta(T, n, size, dtype=dtype) for n in (HEADS, KV_HEADS, KV_HEADS)), scale=size**-0.5)
    saved = launch.Saved(x.q, meta(HEADS, T, dtype=torch.float32))
    met = Work(*(meta(*shape, dtype=torch.int32) for shape in ((9, 4), (20, 2), (T,))))
    chosen = launch.configs(x, capability)
    return {
        "forward": launch.forward(x, saved, met, chosen.forward),
        "d_queries": launch.d_queries(x, saved, x.q, saved.lse, x.q, met, chosen.d_queries),
        "d_keys": launch.d_keys(x, saved.lse, x.q, saved.lse, x.k, x.v, met, chosen.d_keys),
    }


def compiled(kernel, size, dtype, capability):
    made = launches(size, dtype, capability)[kernel]
    found = cost(made.kernel, made.args, capability, num_warps=made.num_warps, num_stages=made.num_stages)
    blocks = f"{made.args['BLOCK_Q']} x {made.args['BLOCK_K']}, {made.num_warps} warps, {made.num_stages} stages"
    name = f"{kernel} sm_{capability} D={size} {dtype} [{blocks}]"
    print(f"{name}: {found.registers} registers, {found.spilled} B spilled, {found.shared} B shared")
    assert found.spilled == 0, f"{name} spills {found.spilled} bytes"
    assert found.shared <= SHARED_LIMIT[capability], f"{name} wants {found.shared} bytes of shared memory"
    return found


@pytest.mark.parametrize("kernel", launch.Configs._fields)
@pytest.mark.parametrize("capability, size", launch.HALF)
def test_half_precision(kernel, capability, size):
    assert MMA[capability] in compiled(kernel, size, torch.bfloat16, capability).ptx
