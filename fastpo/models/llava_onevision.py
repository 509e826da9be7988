"""LLaVA-OneVision: SigLIP, a projector and Qwen2; one image as tiles, several images as one picture each, videos.

One image of a prompt: tiles as LLaVA-NeXT's, scaled down beyond nine tiles' worth of features. Several: each padded to
a square, one picture, one newline. A video: frames pooled 2 x 2, one newline at its end. As transformers 5.23
(models/llava_onevision: image_processing_pil, processing, modeling pack_image_features and apply_pooling).
"""

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fastpo.config import Model
from fastpo.data import media
from fastpo.models import anyres, files, images, llava, llava_next
from fastpo.models.llava import Processor
from fastpo.models.vision import Apply, at_once
from fastpo.sample import Encoded, Media, MicroBatch, Sample, Sampling

parts = MappingProxyType(dict(llava_next.parts))
external = llava_next.external

ALONE, TOGETHER, VIDEO = range(3)  # the kinds of an item: the only image of a prompt, one of several, a video

HOW_TO = files.how_to("llava-hf/llava-onevision-qwen2-7b-ov-hf")


def processor(cfg: Model) -> Processor:
    """Reads tokenizer, chat template and image settings. Raises ValueError where the folder lacks something."""
    folder, config = llava.opened(cfg, "llava_onevision", HOW_TO)
    kind, _, limit = config.vision_aspect_ratio.rpartition("_")
    if kind != "anyres_max" or not limit.isdigit():
        raise ValueError(f"model.path: {folder}: vision_aspect_ratio {config.vision_aspect_ratio!r}, not anyres_max_N")
    images.check_frames(folder, config.vision_config.image_size)
    return replace(llava_next.tiled(cfg, folder, config), video_token_id=config.video_token_id, limit=int(limit))


def load(cfg: Model) -> PreTrainedModel:
    """The LlavaOnevision model in cfg.dtype. Raises ValueError where weights are missing or of another kind."""
    return files.loaded(cfg, "llava_onevision", HOW_TO)


def encode(p: Processor, sample: Sample, sampling: Sampling) -> Encoded:
    """Prompt and responses as token ids, placeholders expanded by the images' sizes and the videos' frame counts.

    grid: [items, 4] kind, height, width (0 for a video), frames. Raises BadSample.
    """
    items = [_item(sample, item, sampling) for item in sample.media]
    shapes = [_shape(p, item) for item in items]
    return llava.expanded(
        p,
        sample,
        image=[tokens for item, (_, tokens) in zip(items, shapes, strict=True) if item[0] != VIDEO],
        video=[tokens for item, (_, tokens) in zip(items, shapes, strict=True) if item[0] == VIDEO],
        patches=sum(pictures for pictures, _ in shapes) * p.patches**2,
        grid=items,
    )


def pixels(p: Processor, sample: Sample, sampling: Sampling) -> Tensor | None:
    """All pictures, tiles and frames [F, 3, side, side] uint8, or None without media. Raises BadSample."""
    if not sample.media:
        return None
    found = []
    for item in sample.media:
        kind, _, _, frames = _item(sample, item, sampling)
        if kind == VIDEO:
            found.append(images.frames(media.decode(item, frames), p.images.side))
        elif kind == ALONE:
            found.append(images.stack(anyres.tiles(images.read(item), p.images)))
        else:
            found.append(images.stack([images.picture(images.square(images.read(item), p.images.mean), p.images)]))
    return torch.cat(found)


def blank(p: Processor) -> Encoded:
    """One black picture as of several, no text, no responses."""
    item = (TOGETHER, p.images.side, p.images.side, 1)
    return llava.black(p, _shape(p, item)[1], pictures=1, grid=item)


def vision(model: Any, p: Processor, pixels: Tensor, grid: Tensor, apply: Apply = at_once) -> tuple[Tensor, Tensor]:
    """[F, 3, side, side] uint8 and [items, 4] -> features of the images and of the videos, [visual tokens, H] each."""
    items = [tuple(item) for item in grid.tolist()]
    x = llava.vision(model, p, pixels, grid, apply).unflatten(0, (-1, p.tokens))
    newline = model.model.image_newline.to(x)
    still, moving = [x[:0, 0]], [x[:0, 0]]
    for item, found in zip(items, x.split([_shape(p, item)[0] for item in items]), strict=True):
        kind, height, width, _ = item
        if kind == VIDEO:
            moving += [pooled(found).flatten(0, 1), newline[None]]
        elif kind == ALONE:
            still.append(anyres.features(found, anyres.grid(height, width, p.images, p.patches, p.limit), newline))
        else:
            still += [found[0], newline[None]]
    return torch.cat(still), torch.cat(moving)


def pooled(frames: Tensor) -> Tensor:
    """[F, g * g, H] -> [F, side * side, H] with side = ceil(g / 2), bilinear."""
    g = math.isqrt(frames.shape[1])
    x = frames.view(-1, g, g, frames.shape[2]).permute(0, 3, 1, 2).contiguous()
    return F.interpolate(x, size=(math.ceil(g / 2),) * 2, mode="bilinear").flatten(2).transpose(1, 2)


def hidden(model: Any, batch: MicroBatch, features: tuple[Tensor, Tensor] | None, cache: Any = None) -> Tensor:
    """See Family."""
    visual: dict[str, Any] = {}
    if features is not None:
        still, moving = features
        visual |= {"image": [still]} if len(still) else {}
        visual |= {"video": moving[None]} if len(moving) else {}
    return llava.last_hidden(model, batch, visual, cache)


def _item(sample: Sample, item: Media, sampling: Sampling) -> tuple[int, int, int, int]:
    """Its row of the grid. Raises BadSample."""
    if item.kind == "video":
        return VIDEO, 0, 0, media.frame_count(item, sampling)
    alone = sum(other.kind == "image" for other in sample.media) == 1
    return ALONE if alone else TOGETHER, *media.image_size(item.path), 1


def _shape(p: Processor, item: tuple[int, ...]) -> tuple[int, int]:
    """(pictures, visual tokens) of a row of the grid."""
    kind, height, width, frames = item
    if kind == VIDEO:
        return frames, frames * math.ceil(p.patches / 2) ** 2 + 1
    if kind == TOGETHER:
        return 1, p.tokens + 1
    g = anyres.grid(height, width, p.images, p.patches, p.limit)
    return g.tiles, p.tokens + g.tokens
