"""Images of any shape as tiles: which resolution, the tiles, and which features of their grid show the image.

An image is shrunk or grown into the best of some resolutions, multiples of the tower's, and padded there with black;
its features are the whole image in one tile, then the grid of tiles without the padding, a newline after every row.
Facts: transformers 5.23, image_processing_utils.py:642 select_best_resolution, models/llava_next/modeling_llava_next.py
unpad_image and pack_image_features, models/llava_onevision/ the same with a limit.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastpo.models.images import Settings, resized


class Grid(NamedTuple):
    """Features of an image's tiles: rows x columns of tiles, and what is kept of their features."""

    rows: int
    columns: int
    top: int  # features of padding above, and below
    left: int
    height: int  # features kept, before scaling
    width: int
    scaled: tuple[int, int] | None  # size after scaling down

    @property
    def tiles(self) -> int:
        """With the one that shows the whole image."""
        return self.rows * self.columns + 1

    @property
    def tokens(self) -> int:
        """Of the grid with its newlines, without the whole image's."""
        height, width = self.scaled or (self.height, self.width)
        return height * (width + 1)


def best(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The resolution that keeps most of the image's pixels, of these the one with the least padding, the first."""

    def rank(target: tuple[int, int]) -> tuple[int, int]:
        scale = min(target[1] / width, target[0] / height)
        kept = min(int(width * scale) * int(height * scale), height * width)
        return kept, kept - target[0] * target[1]

    return max(pinpoints, key=rank)


def grid(height: int, width: int, s: Settings, patches: int, limit: int | None = None) -> Grid:
    """For an image of height x width pixels and towers of patches x patches features.

    limit: most tiles' worth of features (LLaVA-OneVision's anyres_max_9); beyond 1.21 times as many, scaled down.
    """
    rows, columns = (x // s.side for x in best(height, width, s.pinpoints))
    full_h, full_w = rows * patches, columns * patches
    top = left = 0
    if width / height > full_w / full_h:
        top = (full_h - int(round(height * (full_w / width), 7))) // 2
    else:
        left = (full_w - int(round(width * (full_h / height), 7))) // 2
    kept_h, kept_w = full_h - 2 * top, full_w - 2 * left
    ratio = math.sqrt(kept_h * kept_w / (limit * patches**2)) if limit else 0
    scaled = (int(kept_h // ratio), int(kept_w // ratio)) if ratio > 1.1 else None
    return Grid(rows, columns, top, left, kept_h, kept_w, scaled)


def tiles(image: Image.Image, s: Settings) -> list[Image.Image]:
    """The whole image in one tile, whatever its shape; then the tiles of the padded image, row by row."""
    height, width = best(image.height, image.width, s.pinpoints)
    scale_w, scale_h = width / image.width, height / image.height
    if scale_w < scale_h:
        fitted = width, min(math.ceil(image.height * scale_w), height)
    else:
        fitted = min(math.ceil(image.width * scale_h), width), height
    padded = Image.new("RGB", (width, height))
    padded.paste(resized(image, fitted, s.resample), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    cuts = [(x, y, x + s.side, y + s.side) for y in range(0, height, s.side) for x in range(0, width, s.side)]
    return [resized(image, (s.side, s.side), s.resample), *map(padded.crop, cuts)]


def features(x: Tensor, g: Grid, newline: Tensor) -> Tensor:
    """[tiles, patches * patches, H] projected features and [H] newline -> [patches * patches + g.tokens, H]."""
    patches, width = math.isqrt(x.shape[1]), x.shape[2]
    full = x[1:].view(g.rows, g.columns, patches, patches, width).permute(4, 0, 2, 1, 3)
    full = full.reshape(width, g.rows * patches, g.columns * patches)
    kept = full[:, g.top : g.top + g.height, g.left : g.left + g.width]
    if g.scaled:
        kept = F.interpolate(kept[None], g.scaled, mode="bilinear")[0]
    rows = torch.cat([kept, newline.to(kept)[:, None, None].expand(-1, kept.shape[1], 1)], dim=2)
    return torch.cat([x[0], rows.flatten(1).T])
