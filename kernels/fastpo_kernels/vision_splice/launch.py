"""vision_splice with Triton: how its two kernels are launched."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo_kernels.triton_launch import Launch, run
from fastpo_kernels.vision_splice import kernel
from fastpo_kernels.vision_splice.reference import Grid

BLOCK, WARPS = 1024, 4  # 16 bytes of a bf16 row per thread; not timed
LINES = 32  # newlines in one partial sum: about 100 of them for 256 frames of 14 lines


def forward(embeddings: Tensor, features: Tensor, newline: Tensor | None, slot: Tensor, grid: Grid) -> Tensor:
    """slot: [T] int32. See vision_splice."""
    out = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
    run(splice(out, embeddings, features, newline, slot, grid))
    return out


def backward(
    grad: Tensor, at: Tensor, slot: Tensor, grid: Grid, wanted: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of embeddings, features and newline, each in its dtype in `wanted`, or None. grad: [T, H]."""
    size, frames = grad.shape[1], len(at) // grid.tokens
    shapes = ((len(grad), size), (frames, grid.g**2, size), (-(-frames * grid.side // LINES), size))
    dtypes = (*wanted[:2], wanted[2] and torch.float32)
    made = [d and torch.empty(s, dtype=d, device=grad.device) for s, d in zip(shapes, dtypes, strict=True)]
    embeddings, features, parts = made
    run(unsplice(grad, at, slot, grid, embeddings, features, parts))
    return embeddings, features, None if parts is None else parts.sum(0).to(wanted[2])


def splice(
    out: Tensor, embeddings: Tensor, features: Tensor, newline: Tensor | None, slot: Tensor, grid: Grid
) -> Launch:
    """`kernel.forward`, which fills out [T, H]."""
    args = {
        "out_ptr": out,
        "embeddings_ptr": embeddings.contiguous(),
        "features_ptr": features.contiguous(),
        "newline_ptr": None if newline is None else newline.contiguous(),
        "slot_ptr": slot,
    }
    return _launch(kernel.forward, len(out), out.shape[1], grid, args)


def unsplice(
    grad: Tensor,
    at: Tensor,
    slot: Tensor,
    grid: Grid,
    embeddings: Tensor | None,
    features: Tensor | None,
    parts: Tensor | None,
) -> Launch:
    """`kernel.backward`, which fills those of the last three that are there."""
    counts = [0 if features is None else len(features) * grid.g**2, 0 if embeddings is None else len(embeddings)]
    args = {
        "grad_ptr": grad.contiguous(),
        "at_ptr": at.contiguous(),
        "slot_ptr": slot,
        "d_features_ptr": features,
        "d_embeddings_ptr": embeddings,
        "part_ptr": parts,
        "patches": counts[0],
        "rows": counts[1],
        "lines": len(at) // grid.width,
        "LINES": LINES,
    }
    programs = sum(counts) + (0 if parts is None else len(parts))
    return _launch(kernel.backward, programs, grad.shape[1], grid, args)


def _launch(function: object, programs: int, size: int, grid: Grid, args: dict[str, object]) -> Launch:
    block = min(BLOCK, 1 << (size - 1).bit_length())
    args = args | grid._asdict() | {"H": size, "BLOCK": block}
    return Launch(function, (programs, -(-size // block)), args, WARPS)
