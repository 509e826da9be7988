"""Every kernel and configuration of the launch table, compiled for GPUs that are not here.

Each with one of the dtypes it takes, in turn, so that every dtype and every target is met. H is no constant of a
kernel: 896 stands for every size of the register way, and `rows`, which has 3584 and fp32, knows none.
"""

import pytest
import torch

from fastpo_kernels.testing_aot import SHARED_LIMIT, cost
from fastpo_kernels.token_stats import launch, trained
from fastpo_kernels.token_stats.reference import Inputs

N, H, V = 441, 896, 151936
CAPABILITY = {False: 80, True: 90}  # of a configuration without and with TMA
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def inputs(reference, dtype=BF16, *, extras=True):
    """extras: the bias and the softcap, which cost registers."""
    return Inputs(
        hidden=meta(N, H, dtype=dtype),
        weight=meta(V, H, dtype=dtype),
        bias=meta(V, dtype=dtype) if extras else None,
        target=meta(N, dtype=torch.int64),
        ref_hidden=None if reference == "none" else meta(N, H, dtype=dtype),
        ref_weight=meta(V, H, dtype=dtype) if reference == "own" else None,
        kl_rows=None,
        softcap=30.0 if extras else None,
        temperature=1.0,
    )


STATS = meta(9, N, dtype=FP32)


def compiled(made, capability):
    found = cost(made.kernel, made.args, capability, num_warps=made.num_warps, num_stages=made.num_stages)
    name = f"{made.kernel.fn.__name__} sm_{capability} {[v for k, v in made.args.items() if k.startswith('BLOCK')]}"
    print(f"{name}: {found.registers} registers, {found.spilled} B spilled, {found.shared} B shared")
    assert found.spilled == 0, f"{name} spills {found.spilled} bytes"
    assert found.shared <= SHARED_LIMIT[capability], f"{name} wants {found.shared} bytes of shared memory"
    return found


@pytest.mark.parametrize("tma, reference, dtype", [(*key, (BF16, FP16)[i % 2]) for i, key in enumerate(launch.HEAD)])
def test_head(tma, reference, dtype):
    head, merge = launch.registers(inputs(reference, dtype), STATS, tma, processors=132)
    found = compiled(head, CAPABILITY[tma])
    assert ("wgmma" in found.ptx) == tma and ("mma.sync" in found.ptx) == (not tma)
    assert ("cp.async.bulk.tensor" in found.ptx) == tma  # the descriptor, not a loop of plain loads
    assert ("cp.async.cg" in found.ptx) == (not tma)
    if reference == "own":  # of whose merge that of "none" is a part
        compiled(merge, CAPABILITY[tma])


def test_figures_are_of_the_launch_that_runs():
    """What Triton is not told about its arguments costs the copies that bypass the registers, which test_head sees."""
    made = launch.registers(inputs("none", extras=False), STATS, False, processors=132)[0]
    odd = made._replace(args=made.args | {"H": H - 1})
    assert "cp.async" not in cost(odd.kernel, odd.args, 80, num_warps=odd.num_warps, num_stages=odd.num_stages).ptx


def overwrites_what_it_read(ptx):
    """Gradients go where other threads have just read logits: a barrier lies between."""
    loads = ptx[: ptx.rindex("st.global")]
    return "bar.sync" in loads[loads.rindex("ld.global") :]


@pytest.mark.parametrize("capability, dtype", [(80, FP32), (90, FP16)])
def test_rows(capability, dtype):
    """Statistics and unit gradients with both divergences on half of the rows, which cost registers."""
    half = torch.arange(N) < N // 2
    x, z = inputs("own", dtype)._replace(kl_rows=half, reverse_kl_rows=half), meta(N, V, dtype=FP32)
    x, u = x._replace(bias=meta(V, dtype=FP32)), launch.in_place(z, dtype)  # the bias as chunked makes it
    made = launch.rows(z, z, x, torch.arange(N), STATS, u=u, k=u, r=meta(N // 2, V, dtype=dtype))
    assert overwrites_what_it_read(compiled(made, capability).ptx)


@pytest.mark.parametrize("capability, dtype", [(80, BF16), (90, FP32)])
def test_columns(capability, dtype):
    """Of a trained head, with both divergences."""
    n, v = 16384, 4096
    x, z = inputs("own", dtype)._replace(bias=meta(v, dtype=FP32)), meta(n, v, dtype=FP32)
    row = meta(n, dtype=FP32)
    live = trained.Live(meta(n, dtype=torch.int64), *[row] * 9)
    made = launch.columns(z, z, x, live, launch.in_place(z, dtype))
    assert overwrites_what_it_read(compiled(made, capability).ptx)
