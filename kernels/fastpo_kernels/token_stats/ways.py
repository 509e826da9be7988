"""Which way token_stats goes where it may choose: a table that needs no GPU to be read.

Nothing in it is measured: no way of it has run on a GPU. It is a paper analysis (H100, 798 TFLOP/s, 3.0 TB/s). Writing
and reading a tile of bf16 logits costs 59 % of a GEMM pass at H = 896 and 15 % at 3584, one of fp32 logits twice that,
and Triton's own GEMM was taken to reach 70 to 85 % of cuBLAS: logits in registers win up to H of about 2048. V and the
number of rows play no part, since both sides are proportional to them. On a tile one Triton kernel reads and writes it
once or twice, PyTorch's elementwise operations do so up to ten times.
"""

from typing import NamedTuple

import torch

HALF = (torch.float16, torch.bfloat16)
BLOCK_H = 64  # of the register way, which takes multiples of it


class Way(NamedTuple):
    name: str
    majors: tuple[int, ...]  # of the compute capability: 8.x and 9.x, for which the kernels are compiled ahead of time
    dtypes: tuple[torch.dtype, ...]
    sizes: range  # H
    unit_gradient: bool  # whether its forward also makes the unit gradient of a frozen head


TABLE = (  # best first
    Way("register", (8, 9), HALF, range(BLOCK_H, 2048 + 1, BLOCK_H), False),
    Way("tile", (8, 9), (*HALF, torch.float32), range(1, 1 << 31), True),
)


def choose_way(capability: tuple[int, int] | None, size: int, dtype: torch.dtype, unit_gradient: bool) -> str:
    """Name of the first way that fits: both are of backend "triton". "chunked", PyTorch alone, where none does.

    capability: of the CUDA device; None on the CPU. size: H. unit_gradient: whether the forward is to make the gradient
    of each row (frozen head).
    """
    major = None if capability is None else capability[0]
    for way in TABLE:
        served = way.unit_gradient or not unit_gradient
        if major in way.majors and dtype in way.dtypes and size in way.sizes and served:
            return way.name
    return "chunked"


def capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
