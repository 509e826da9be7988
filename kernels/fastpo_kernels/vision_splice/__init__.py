"""Visual features, pooled and laid straight into the packed embeddings."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo_kernels.dispatch import choose
from fastpo_kernels.vision_splice import reference
from fastpo_kernels.vision_splice.reference import Grid

HAS_TRITON = find_spec("triton") is not None
RUNS = {  # "triton" is behind "reference" since it has not been timed on a device
    "reference": lambda embeddings: True,
    "triton": lambda embeddings: HAS_TRITON and embeddings.is_cuda and embeddings.dtype != torch.float64,
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def vision_splice(
    embeddings: Tensor,
    features: Tensor,
    newline: Tensor | None,
    at: Tensor,
    *,
    pooling: str = "bilinear",
    backend: str = "auto",
) -> Tensor:
    """A copy of embeddings [T, H] whose visual rows are the frames' pooled features, newline after every pooled row.

    features: [F, g * g, H], each frame's patches in reading order. pooling: "bilinear" resizes g x g to side x side,
    side = ceil(g / 2), as F.interpolate without aligned corners; "average" takes the mean of every 2 x 2 patches, side
    = floor(g / 2), a last odd row and column left out; "none" is side = g. newline: [H] or None for none. A frame is
    n = side * (side + 1) visual tokens, side * side without newline, in reading order.
    at: int64 in [0, T), distinct: [F * n] where each visual token goes, or [F] where each frame's n tokens start.
    Tensors are on one device; the dtypes, fp16, bf16, fp32 or float64, may differ, the result has that of embeddings.

    Not in place, so that nothing is saved but `at`: a long video may come in several calls, each on the row that the
    last one returned, with two rows in memory. Gradients flow to features, newline and the embeddings that were not
    replaced, each in its own dtype. Source of the layout: pritamqu/RRPO a905573, llava/model/llava_arch.py get_2dPool,
    add_token_per_grid.

    backend: "reference", which "auto" chooses, is plain PyTorch and runs anywhere; "triton" (CUDA, not float64) is one
    kernel forward and one backward with sums in fp32 in a fixed order. It has not been timed on a device.

    Raises ValueError for shapes, dtypes, devices, pooling and backends that do not fit, and on the CPU for places that
    are outside of [0, T) or not distinct; on CUDA that is a device-side assertion, without a sync.
    """
    grid = _check(embeddings, features, newline, at, pooling)
    if len(at) != len(features) * grid.tokens:
        at = (at[:, None] + torch.arange(grid.tokens, device=at.device)).flatten()
    name = choose(backend, embeddings, RUNS)
    slot = _slots(at, len(embeddings))
    if name == "reference":
        return reference.splice(embeddings, features, newline, at, pooling)
    out = _Splice.apply(embeddings, features, newline, at, slot, grid)
    assert isinstance(out, Tensor)
    return out


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, features: Tensor, newline: Tensor | None, at: Tensor, slot: Tensor, grid: Grid
    ) -> Tensor:
        from fastpo_kernels.vision_splice import launch  # Triton is imported on first use

        ctx.save_for_backward(at, slot)
        ctx.grid, ctx.like = grid, [None if t is None else t.dtype for t in (embeddings, features, newline)]
        return launch.forward(embeddings, features, newline, slot, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from fastpo_kernels.vision_splice import launch

        wanted = [dtype if needed else None for dtype, needed in zip(ctx.like, ctx.needs_input_grad, strict=False)]
        at, slot = ctx.saved_tensors
        return *launch.backward(grads[0], at, slot, ctx.grid, wanted), None, None, None


def _slots(at: Tensor, tokens: int) -> Tensor:
    """[T] int32: the visual token that replaces each row, or -1. Raises ValueError for `at` that does not fit."""
    _require(((at >= 0) & (at < tokens)).all(), f"at must lie in [0, {tokens})")
    slot = torch.full((tokens,), -1, dtype=torch.int32, device=at.device)
    slot[at] = torch.arange(len(at), dtype=torch.int32, device=at.device)
    _require((slot >= 0).sum() == len(at), "at must not name a row twice")
    return slot


def _require(holds: Tensor, message: str) -> None:
    if holds.is_cuda:
        torch.ops.aten._assert_async.msg(holds, message)
    elif not holds:
        raise ValueError(message)


def _check(embeddings: Tensor, features: Tensor, newline: Tensor | None, at: Tensor, pooling: str) -> Grid:
    """Raises ValueError for arguments that do not fit."""
    if embeddings.ndim != 2 or features.ndim != 3 or features.shape[2] != embeddings.shape[1]:
        shapes = f"{list(embeddings.shape)} and {list(features.shape)}"
        raise ValueError(f"expected embeddings [T, H] and features [F, g * g, H], got {shapes}")
    if newline is not None and newline.shape != embeddings.shape[1:]:
        raise ValueError(f"newline must be {list(embeddings.shape[1:])}, got {list(newline.shape)}")
    for name, t in {"embeddings": embeddings, "features": features, "newline": newline}.items():
        if t is not None and t.dtype not in DTYPES:
            raise ValueError(f"{name} must be of {DTYPES}, got {t.dtype}")
        if t is not None and t.device != at.device:
            raise ValueError(f"{name} is on {t.device}, at on {at.device}")
    g = math.isqrt(features.shape[1])
    if g * g != features.shape[1]:
        raise ValueError(f"features of a frame must be a square grid, got {features.shape[1]} patches")
    grid = Grid.of(g, pooling, newline is not None)
    if at.dtype != torch.int64 or at.shape not in ((len(features) * grid.tokens,), (len(features),)):
        places = f"[{len(features) * grid.tokens}] visual tokens or [{len(features)}] frames"
        raise ValueError(f"at must be int64 of {places}, got {list(at.shape)} of {at.dtype}")
    return grid
