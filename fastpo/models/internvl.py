"""InternVL (2.5, 3, 3.5 in transformers' layout): images as square tiles and a thumbnail, frames as one tile each.

The tiles' columns and rows come closest to the image's shape; the tower's features are shuffled to a quarter and
projected. Facts: transformers 5.23, models/got_ocr2/image_processing_pil_got_ocr2.py, models/internvl/.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from fastpo.config import Model
from fastpo.data import media
from fastpo.models import chat, files, images, llava
from fastpo.models.chat import Chat
from fastpo.models.vision import Apply, at_once
from fastpo.sample import Encoded, Media, MicroBatch, Sample, Sampling

parts = llava.parts
external = ()

HOW_TO = files.how_to("OpenGVLab/InternVL3-1B-hf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    chat: Chat
    image_token: str
    image_token_id: int
    size: int  # pixels of a tile's side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tiles: tuple[int, int]  # fewest and most of an image, without the thumbnail
    patches: int  # per row of a tile
    tokens_per_tile: int


def processor(cfg: Model) -> Processor:
    """Reads tokenizer, chat template and image settings. Raises ValueError where the folder does not fit the tower."""
    folder = files.checked(cfg.path, "internvl", HOW_TO)
    config = AutoConfig.from_pretrained(folder)
    image = images.processor(folder)
    talk, side = chat.read(folder, cfg.question_role), config.vision_config.image_size
    if {image.size["height"], image.size["width"], *side} != {side[0]} or image.resample != Image.Resampling.BICUBIC:
        raise ValueError(
            f"model.path: {folder}/preprocessor_config.json makes tiles of {image.size['height']} x "
            f"{image.size['width']} pixels by resample {image.resample}; expected {side[0]} x {side[1]} by 3 (bicubic)"
        )
    images.check_frames(folder, side[0])
    patches = side[0] // config.vision_config.patch_size[0]
    return Processor(
        chat=talk,
        image_token=str(talk.tokenizer.convert_ids_to_tokens(config.image_token_id)),
        image_token_id=config.image_token_id,
        size=side[0],
        mean=tuple(image.image_mean),
        std=tuple(image.image_std),
        tiles=(image.min_patches, image.max_patches),
        patches=patches,
        tokens_per_tile=int(patches * config.downsample_ratio) ** 2,
    )


def load(cfg: Model) -> PreTrainedModel:
    """The model in cfg.dtype. Raises ValueError where weights are missing or of another kind."""
    return files.loaded(cfg, "internvl", HOW_TO)


def encode(p: Processor, sample: Sample, sampling: Sampling) -> Encoded:
    """Prompt and responses as token ids: "<img>...</img>" around an image's tiles, "Frame1: " before each frame's.

    Raises BadSample.
    """
    runs = [_runs(p, item, sampling) for item in sample.media]
    marked = iter([_marked(p, item, len(run)) for item, run in zip(sample.media, runs, strict=True)])
    question = re.sub("<image>|<video>", lambda found: next(marked, found[0]), sample.question)
    ids = chat.prompt_ids(p.chat, question, sample)
    tiles = [n for run in runs for n in run]
    return chat.encoded(
        p.chat,
        sample,
        chat.expand(ids, {p.image_token_id: [n * p.tokens_per_tile for n in tiles]}, sample.key),
        media=[p.image_token_id],
        patches=sum(tiles) * p.patches**2,
    )


def _runs(p: Processor, item: Media, sampling: Sampling) -> list[int]:
    """Tiles of an image, with its thumbnail, or of each frame."""
    if item.kind == "video":
        return [1] * media.frame_count(item, sampling)
    columns, rows = tiling(*media.size(item), p.size, *p.tiles)
    return [columns * rows + (columns * rows > 1)]


def _marked(p: Processor, item: Media, frames: int) -> str:
    """What stands for an item in the text, one image token for an image or a frame."""
    mark = f"<img>{p.image_token}</img>"
    return mark if item.kind == "image" else "\n".join(f"Frame{k + 1}: {mark}" for k in range(frames))


def tiling(height: int, width: int, size: int, low: int, high: int) -> tuple[int, int]:
    """Columns and rows of `low` to `high` tiles, the ones nearest to the image in width / height.

    Of equal ones the smallest, or a larger one if half of its tiles are no more than the image's pixels.
    """
    shapes = [(w, h) for w in range(1, high + 1) for h in range(1, high + 1) if low <= w * h <= high]
    best, least = (1, 1), float("inf")
    for w, h in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        difference = abs(width / height - w / h)
        if difference < least or (difference == least and height * width > 0.5 * size**2 * w * h):
            best, least = (w, h), difference
    return best


def pixels(p: Processor, sample: Sample, sampling: Sampling) -> Tensor | None:
    """[tiles, 3, size, size] uint8 of all items, or None without media. Raises BadSample."""
    if not sample.media:
        return None
    return torch.cat([_tiles(p, item, sampling) for item in sample.media])


def _tiles(p: Processor, item: Media, sampling: Sampling) -> Tensor:
    """The tiles row by row, then the whole image in one."""
    decoded = media.decode(item, media.frame_count(item, sampling))
    if item.kind == "video":
        return images.frames(decoded, p.size)
    height, width = decoded.shape[1:3]
    columns, rows = tiling(height, width, p.size, *p.tiles)
    whole = images.frames(decoded, (rows * p.size, columns * p.size))
    tiles = whole.view(3, rows, p.size, columns, p.size).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return tiles if len(tiles) == 1 else torch.cat([tiles, images.frames(decoded, p.size)])


def blank(p: Processor) -> Encoded:
    """One black tile, no text, no responses."""
    return images.black(p.image_token_id, p.tokens_per_tile, (1, 3, p.size, p.size), patches=p.patches**2)


def vision(model: Any, p: Processor, pixels: Tensor, grid: Tensor, apply: Apply = at_once) -> Tensor:
    """[tiles, 3, size, size] uint8 -> [tiles * tokens_per_tile, H]."""

    def encode(tiles: Tensor) -> Tensor:
        x = images.normalized(tiles, p.mean, p.std)
        return model.model.get_image_features(x, return_dict=True).pooler_output.flatten(0, 1)

    return apply(encode, pixels)


def hidden(model: Any, batch: MicroBatch, features: Tensor | None, cache: Any = None) -> Tensor:
    """See Family. features: [visual tokens, H] in row order."""
    return llava.last_hidden(model, batch, {} if features is None else {"image": features}, cache)
