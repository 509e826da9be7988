"""The table of backend "auto", without a GPU."""

import pytest
import torch

from fastpo_kernels import token_stats
from fastpo_kernels.testing import gemm_passes
from fastpo_kernels.token_stats.ways import choose_way

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
@pytest.mark.parametrize(
    "size, dtype, unit_gradient, name",
    [
        (896, BF16, False, "register"),
        (896, FP16, False, "register"),
        (2048, BF16, False, "register"),
        (2112, BF16, False, "tile"),
        (3584, BF16, False, "tile"),
        (900, BF16, False, "tile"),  # no multiple of 64
        (896, BF16, True, "tile"),
        (896, FP32, False, "tile"),
        (896, FP32, True, "tile"),
        (3584, FP16, True, "tile"),
        (896, FP64, False, "chunked"),
    ],
)
def test_where_kernels_are_compiled_for(capability, size, dtype, unit_gradient, name):
    assert choose_way(capability, size, dtype, unit_gradient) == name


@pytest.mark.parametrize("capability", [None, (7, 5), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_elsewhere(capability, dtype):
    assert choose_way(capability, 896, dtype, False) == choose_way(capability, 896, dtype, True) == "chunked"


@pytest.mark.parametrize("backend, passes", [("auto", 4), ("chunked", 4), ("reference", 3)])
def test_auto_on_the_cpu_is_chunked(backend, passes):
    """Seen from a trained head's recomputed logits."""
    hidden, weight = (torch.ones(n, 5, requires_grad=True) for n in (8, 7))
    target = torch.zeros(8, dtype=torch.int64)
    run = lambda: token_stats(hidden, weight, target, backend=backend).logp.sum().backward()  # noqa: E731
    assert gemm_passes(run, 8, 5, 7) == passes
