"""LLaVA-NeXT (1.6): LLaVA with every image as tiles, the padding cut from their features, a newline after every row."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpo.config import Model
from fastpo.data import media
from fastpo.models import anyres, files, images, llava
from fastpo.models.llava import Processor, hidden
from fastpo.models.vision import Apply, at_once
from fastpo.sample import Encoded, Sample, Sampling

__all__ = ["blank", "encode", "external", "hidden", "load", "parts", "pixels", "processor", "vision"]

parts = MappingProxyType({**llava.parts, "projector": ("model.multi_modal_projector", "model.image_newline")})
external = ("model.image_newline",)

HOW_TO = files.how_to("llava-hf/llava-v1.6-mistral-7b-hf")


def processor(cfg: Model) -> Processor:
    """Reads tokenizer, chat template and image settings. Raises ValueError where the folder lacks something."""
    return tiled(cfg, *llava.opened(cfg, "llava_next", HOW_TO))


def tiled(cfg: Model, folder: Path, config: Any) -> Processor:
    """LLaVA's facts of a folder whose tiles can be laid side by side. Raises ValueError where they cannot."""
    p = llava.facts(cfg, folder, config)
    if [tuple(hw) for hw in config.image_grid_pinpoints] != list(p.images.pinpoints):
        raise ValueError(
            f"model.path: {folder}: image_grid_pinpoints differ in config.json and preprocessor_config.json"
        )
    if p.tokens != p.patches**2:
        raise ValueError(f"model.path: {folder}: {p.tokens} features per tile are not {p.patches} x {p.patches}")
    return p


def load(cfg: Model) -> PreTrainedModel:
    """The LlavaNext model in cfg.dtype. Raises ValueError where weights are missing or of another kind."""
    return files.loaded(cfg, "llava_next", HOW_TO)


def encode(p: Processor, sample: Sample, sampling: Sampling) -> Encoded:
    """Prompt and responses as token ids, placeholders expanded by the images' sizes. grid: [images, 2] height, width.

    Raises BadSample.
    """
    llava.only_images(sample, "llava_next")
    sizes = [media.image_size(item.path) for item in sample.media]
    grids = [anyres.grid(*size, p.images, p.patches) for size in sizes]
    return llava.expanded(
        p,
        sample,
        image=[p.tokens + g.tokens for g in grids],
        patches=sum(g.tiles for g in grids) * p.patches**2,
        grid=sizes,
    )


def pixels(p: Processor, sample: Sample, sampling: Sampling) -> Tensor | None:
    """All images' tiles [tiles, 3, side, side] uint8, or None without media. Raises BadSample."""
    if not sample.media:
        return None
    return images.stack([tile for item in sample.media for tile in anyres.tiles(images.read(item), p.images)])


def blank(p: Processor) -> Encoded:
    """One black image of a tile's size, no text, no responses."""
    side = p.images.side
    g = anyres.grid(side, side, p.images, p.patches)
    return llava.black(p, p.tokens + g.tokens, pictures=g.tiles, grid=(side, side))


def vision(model: Any, p: Processor, pixels: Tensor, grid: Tensor, apply: Apply = at_once) -> Tensor:
    """[tiles, 3, side, side] uint8 and [images, 2] -> [visual tokens, H]."""
    grids = [anyres.grid(height, width, p.images, p.patches) for height, width in grid.tolist()]
    x = llava.vision(model, p, pixels, grid, apply).unflatten(0, (-1, p.tokens))
    found = x.split([g.tiles for g in grids])
    newline = model.model.image_newline
    return torch.cat([anyres.features(tiles, g, newline) for tiles, g in zip(found, grids, strict=True)])
