"""Pooled video features laid into the packed embeddings, forward and backward, against the ways of training scripts.

Features and newline have gradients, the embeddings do not. The floor is one copy of the embeddings.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import CUDA, DEVICE, Outputs, Variant
from fastpo_kernels import vision_splice

TEXT = 64  # text tokens before every frame's visual ones


class Case(NamedTuple):
    frames: int
    g: int  # patches along a side
    H: int
    pooling: str
    dtype: torch.dtype
    compiled: bool = True  # whether torch.compile takes part: its compilation is slow


BF16 = torch.bfloat16
GPU = [
    *(Case(frames, 27, H, "bilinear", BF16) for H in (3584, 896) for frames in (32, 256)),
    *(Case(32, 27, 3584, pooling, BF16) for pooling in ("average", "none")),
]
CPU = [
    Case(8, 13, 256, "bilinear", torch.float32),
    *(Case(8, 13, 256, pooling, torch.float32, False) for pooling in ("average", "none")),
    Case(8, 13, 256, "bilinear", BF16, False),
]


def name(case: Case) -> str:
    return f"{case.pooling}-{case.frames}-{case.g}-{case.H}-{str(case.dtype)[6:]}"


class Input(NamedTuple):
    embeddings: Tensor  # [T, H]
    features: Tensor  # [F, g * g, H]
    newline: Tensor  # [H]
    at: Tensor  # [visual tokens]
    is_visual: Tensor  # [T] bool
    grad: Tensor  # [T, H]


@pytest.mark.parametrize("case", GPU if CUDA else CPU, ids=name)
def bench_splice(case, benchmark, results):
    small = case._replace(frames=min(case.frames, 8))
    x, checked = _input(case), _variants(small)
    harness.compare(
        benchmark,
        results,
        "vision splice",
        {
            "frames": case.frames,
            "patches": f"{case.g} x {case.g}",
            "H": case.H,
            "pooling": case.pooling,
            "tokens": len(x.embeddings),
            "dtype": str(case.dtype).removeprefix("torch."),
        },
        checked if small == case else _variants(case),
        exact=_step(_doubled(_input(small)), case.pooling, index_put),
        plain="pool + cat + index_put",
        tokens=len(x.at),
        checked=None if small == case else checked,
        floor=x.embeddings.clone,
    )


def _input(case: Case) -> Input:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(case.dtype)

    side = {"bilinear": math.ceil(case.g / 2), "average": case.g // 2, "none": case.g}[case.pooling]
    is_visual = torch.ones(case.frames, TEXT + side * (side + 1), dtype=torch.bool)
    is_visual[:, :TEXT] = False
    is_visual = is_visual.flatten().to(DEVICE)
    return Input(
        randn(len(is_visual), case.H),
        randn(case.frames, case.g**2, case.H).requires_grad_(),
        randn(case.H).requires_grad_(),
        is_visual.nonzero()[:, 0],
        is_visual,
        randn(len(is_visual), case.H),
    )


def _variants(case: Case) -> dict[str, Variant | str]:
    x = _input(case)
    ways: dict[str, Callable[[Input, str], Tensor]] = {"fastpo": _ours("auto")}
    if CUDA:
        ways["fastpo triton"] = _ours("triton")
    ways |= {
        "pool + cat + index_put": index_put,
        "pool + cat + masked_scatter": masked_scatter,
        "pool + cat of all pieces": pieces,
    }
    if case.compiled:
        ways["torch.compile"] = torch.compile(index_put, dynamic=False)
    return {way: Variant(lambda splice=splice: _step(x, case.pooling, splice)) for way, splice in ways.items()}


def _ours(backend: str) -> Callable[[Input, str], Tensor]:
    return lambda x, pooling: vision_splice(x.embeddings, x.features, x.newline, x.at, pooling=pooling, backend=backend)


def index_put(x: Input, pooling: str) -> Tensor:
    out = x.embeddings.clone()
    out[x.at] = _pooled(x, pooling).flatten(0, 1)
    return out


def masked_scatter(x: Input, pooling: str) -> Tensor:
    """As the models of transformers do."""
    tokens = _pooled(x, pooling).flatten(0, 1)
    return x.embeddings.masked_scatter(x.is_visual[:, None].expand_as(x.embeddings), tokens)


def pieces(x: Input, pooling: str) -> Tensor:
    """As LLaVA's prepare_inputs_labels_for_multimodal does: text and frames in turns, in one cat."""
    tokens = _pooled(x, pooling)
    text = x.embeddings.view(len(tokens), -1, x.embeddings.shape[1])[:, :TEXT]
    return torch.cat([piece for pair in zip(text.unbind(), tokens.unbind(), strict=True) for piece in pair])


def _pooled(x: Input, pooling: str) -> Tensor:
    """[F, tokens of a frame, H], a newline after every row."""
    frames, patches, size = x.features.shape
    g = math.isqrt(patches)
    grid = x.features.view(frames, g, g, size).permute(0, 3, 1, 2)
    if pooling == "bilinear":
        grid = F.interpolate(grid.contiguous(), size=(math.ceil(g / 2),) * 2, mode="bilinear")
    elif pooling == "average":
        grid = F.avg_pool2d(grid.contiguous(), 2)
    newline = x.newline[None, :, None, None].expand(frames, size, grid.shape[2], 1)
    return torch.cat([grid, newline], 3).flatten(2).transpose(1, 2)


def _step(x: Input, pooling: str, splice: Callable[[Input, str], Tensor]) -> Outputs:
    out = splice(x, pooling)
    d_features, d_newline = torch.autograd.grad(out, [x.features, x.newline], x.grad)
    return {"out": out.detach(), "d features": d_features, "d newline": d_newline}


def _doubled(x: Input) -> Input:
    leaves = {key: getattr(x, key).detach().double().requires_grad_() for key in ("features", "newline")}
    return x._replace(embeddings=x.embeddings.double(), grad=x.grad.double(), **leaves)
