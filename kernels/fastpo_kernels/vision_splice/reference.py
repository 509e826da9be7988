"""vision_splice in plain PyTorch: the definition, on any device."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Grid(NamedTuple):
    """A frame of g x g patches, whose first extent x extent are resized to side x side tokens.

    Every pooling is bilinear sampling at (i + 1/2) * extent / side - 1/2: between two patches for "average", on one for
    "none".
    """

    g: int
    extent: int
    side: int
    width: int  # tokens of a row, newline included

    @classmethod
    def of(cls, g: int, pooling: str, newline: bool) -> "Grid":
        """Raises ValueError for an unknown pooling and for a grid that is too small for it."""
        sides = {"bilinear": math.ceil(g / 2), "average": g // 2, "none": g}
        if pooling not in sides:
            raise ValueError(f"pooling must be one of {', '.join(sides)}, got {pooling!r}")
        side = sides[pooling]
        if side == 0:
            raise ValueError(f"{pooling} pooling has nothing to pool in a grid of {g} x {g}")
        return cls(g, 2 * side if pooling == "average" else g, side, side + newline)

    @property
    def tokens(self) -> int:
        return self.side * self.width


def splice(embeddings: Tensor, features: Tensor, newline: Tensor | None, at: Tensor, pooling: str) -> Tensor:
    """at: [F * tokens]. See vision_splice. CUDA's backward of the bilinear pooling adds up in no fixed order."""
    frames, patches, size = features.shape
    g = math.isqrt(patches)
    x = features.reshape(frames, g, g, size).permute(0, 3, 1, 2)
    if pooling == "bilinear":
        x = F.interpolate(x, size=(math.ceil(g / 2),) * 2, mode="bilinear")
    elif pooling == "average":
        x = F.avg_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).to(embeddings.dtype)
    if newline is not None:
        x = torch.cat([x, newline.to(x).expand(*x.shape[:2], 1, size)], dim=2)
    return embeddings.index_copy(0, at, x.reshape(-1, size))
