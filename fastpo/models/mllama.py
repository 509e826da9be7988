"""Llama-3.2-Vision (Mllama): images as up to four tiles, which the text looks at in cross-attention layers.

A packed row's samples each look at their own images only. In a sample, an image is seen from its token up to the next
image's (images side by side: together), the last by everything after it. A token before the first image looks at all
tiles of its sample, padding too, and skips the layer's MLP; a sample without images skips the whole layer: both as the
plain model does. Facts: transformers 5.23, models/mllama/modeling_mllama.py _prepare_cross_attention_mask,
processing_mllama.py get_cross_attention_token_mask, image_processing_pil_mllama.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from fastpo.config import Model
from fastpo.data import media
from fastpo.models import attention, chat, files, images, llava
from fastpo.models.chat import Chat
from fastpo.sample import Encoded, Media, MicroBatch, Sample, Sampling

parts = MappingProxyType({**llava.parts, "vision": ("model.vision_model",)})
external = ()

HOW_TO = files.how_to("meta-llama/Llama-3.2-11B-Vision-Instruct")


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    chat: Chat
    image_token: str
    image_token_id: int
    size: int  # pixels of a tile's side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling
    tiles: int  # most of an image
    patches: int  # of an image with all its tiles


class View(NamedTuple):
    """Tokens first:stop of a row look at keys start:end, where mask [stop - first, end - start] bool says so."""

    first: int
    stop: int
    start: int
    end: int
    mask: Tensor | None


def processor(cfg: Model) -> Processor:
    """Reads tokenizer, chat template and image settings. Raises ValueError where the folder does not fit the tower."""
    folder = files.checked(cfg.path, "mllama", HOW_TO)
    config = AutoConfig.from_pretrained(folder)
    image = images.processor(folder)
    tower, talk = config.vision_config, chat.read(folder, cfg.question_role)
    made = (image.size["height"], image.max_image_tiles)
    if made != (tower.image_size, tower.max_num_tiles):
        raise ValueError(
            f"model.path: {folder}/preprocessor_config.json makes up to {made[1]} tiles of {made[0]} pixels, but the "
            f"tower reads {tower.max_num_tiles} of {tower.image_size}"
        )
    return Processor(
        chat=talk,
        image_token=str(talk.tokenizer.convert_ids_to_tokens(config.image_token_index)),
        image_token_id=config.image_token_index,
        size=tower.image_size,
        mean=tuple(image.image_mean),
        std=tuple(image.image_std),
        resample=Image.Resampling(image.resample),
        tiles=tower.max_num_tiles,
        patches=tower.max_num_tiles * (tower.image_size // tower.patch_size) ** 2,
    )


def load(cfg: Model) -> PreTrainedModel:
    """The model in cfg.dtype. Raises ValueError where weights are missing or of another kind."""
    return files.loaded(cfg, "mllama", HOW_TO, _register(cfg.attention))


def encode(p: Processor, sample: Sample, sampling: Sampling) -> Encoded:
    """Prompt and responses as token ids, one image token per image. Raises BadSample.

    grid: [images, 2] number of the tiles' arrangement, from 1, and number of tiles.
    """
    llava.only_images(sample, "mllama")
    ids = chat.prompt_ids(p.chat, sample.question.replace("<image>", p.image_token), sample)
    grid = [_arrangement(p, *canvas(*media.size(item), p.size, p.tiles)) for item in sample.media]
    return chat.encoded(
        p.chat,
        sample,
        chat.expand(ids, {p.image_token_id: [1] * len(grid)}, sample.key),
        media=[p.image_token_id],
        patches=len(grid) * p.patches,
        grid=torch.tensor(grid) if grid else None,
    )


def arrangements(tiles: int) -> list[tuple[int, int]]:
    """(rows, columns) of at most so many tiles."""
    sides = range(1, tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= tiles]


def _arrangement(p: Processor, rows: int, columns: int) -> tuple[int, int]:
    return arrangements(p.tiles).index((rows, columns)) + 1, rows * columns


def canvas(height: int, width: int, size: int, tiles: int) -> tuple[int, int]:
    """(rows, columns): that enlarge the image least, or else shrink it least; of these the fewest tiles."""
    scales = {(h, w): min(h * size / height, w * size / width) for h, w in arrangements(tiles)}
    chosen = min((s for s in scales.values() if s >= 1), default=max(scales.values()))
    return min((shape for shape, scale in scales.items() if scale == chosen), key=math.prod)


def fitted(height: int, width: int, rows: int, columns: int, size: int) -> tuple[int, int]:
    """Height and width of the image on its canvas: as large as it is, but at least a tile and at most the canvas."""
    high, wide = (min(max(x, size), n * size) for x, n in ((height, rows), (width, columns)))
    if wide / width < high / height:
        return min(math.floor(height * (wide / width)) or 1, high), wide
    return high, min(math.floor(width * (high / height)) or 1, wide)


def pixels(p: Processor, sample: Sample, sampling: Sampling) -> Tensor | None:
    """[tiles, 3, size, size] uint8 of all images, or None without media. Raises BadSample."""
    return torch.cat([_tiles(p, item) for item in sample.media]) if sample.media else None


def _tiles(p: Processor, item: Media) -> Tensor:
    """The image in the upper left of a black canvas, cut into tiles row by row."""
    image = images.read(item)
    rows, columns = canvas(image.height, image.width, p.size, p.tiles)
    height, width = fitted(image.height, image.width, rows, columns, p.size)
    whole = Image.new("RGB", (columns * p.size, rows * p.size))
    whole.paste(images.resized(image, (width, height), p.resample))
    tiles = torch.from_numpy(np.asarray(whole).copy()).view(rows, p.size, columns, p.size, 3)
    return tiles.permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous()


def blank(p: Processor) -> Encoded:
    """One black image of one tile, no text, no responses."""
    return images.black(p.image_token_id, 1, (1, 3, p.size, p.size), patches=p.patches, grid=(1, 1))


def vision(model: Any, p: Processor, pixels: Tensor, grid: Tensor) -> Tensor:
    """[tiles, 3, size, size] uint8 -> [images * p.tiles, tokens of a tile, H]; missing tiles are grey, and masked."""
    there = torch.arange(p.tiles, device=grid.device) < grid[:, 1:]
    x = torch.zeros(*there.shape, 3, p.size, p.size, device=pixels.device)
    x[there] = images.normalized(pixels, p.mean, p.std)
    seen = model.model.vision_model(
        pixel_values=x[None], aspect_ratio_ids=grid[None, :, 0], aspect_ratio_mask=there[None].long()
    ).last_hidden_state
    return model.model.multi_modal_projector(seen).flatten(0, 2)


def hidden(model: Any, batch: MicroBatch, features: Tensor | None, cache: Any = None) -> Tensor:
    """See Family. Of the images, the cache keeps what the row's last token sees, which all text after it sees too."""
    views, mlp = None, None
    if features is not None:
        views, mlp = _views(model.config, batch, features.shape[1])
    states = model.model.language_model(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        cross_attention_states=features,
        full_text_row_masked_out_mask=None if mlp is None or features is None else mlp.to(features.dtype),
        past_key_values=cache,
        use_cache=cache is not None,
        tree=batch.tree if cache is None else None,
        views=views,
    ).last_hidden_state[0]
    if cache is not None and views is not None and views[-1].mask is not None:
        for i in model.config.text_config.cross_attention_layers:
            layer, visible = cache.layers[i], views[-1].mask[-1]
            layer.keys, layer.values = layer.keys[:, :, visible], layer.values[:, :, visible]
    return states


def _views(config: Any, batch: MicroBatch, tokens: int) -> tuple[tuple[View, ...], Tensor]:
    """What each sample of the row looks at, and [1, 1, T, 1] 1 where a token sees an image: there the MLPs run."""
    places, tiles = (batch.ids == config.image_token_index).nonzero()[:, 0].tolist(), config.vision_config.max_num_tiles
    chains = batch.tree.plan.spans
    borders = [chain[0][0] for chain in chains if len(chain) == 1] + [len(batch.ids)]
    found, sees = [], []
    for first, stop in zip(borders[:-1], borders[1:], strict=True):
        own = [i for i, place in enumerate(places) if first <= place < stop]
        visible = seen([places[i] - first for i in own], stop - first).to(batch.ids.device)  # [n, images]
        sees.append(visible.any(1))
        full = torch.arange(tiles, device=batch.ids.device) < batch.grid[own, 1:]
        mask = (visible[:, :, None] & full).flatten(1) | ~sees[-1][:, None]
        start, width = (own[0] if own else 0) * tiles * tokens, len(own) * tiles * tokens
        found.append(View(first, stop, start, start + width, mask.repeat_interleave(tokens, dim=1)))
    return tuple(found), torch.cat(sees)[None, None, :, None]


def seen(places: Sequence[int], tokens: int) -> Tensor:
    """[tokens, images] bool: image i from its place up to the next one's, side by side: up to the last one's end."""
    ends = [*places[1:], tokens]
    for i in range(len(places) - 2, -1, -1):
        if places[i + 1] == places[i] + 1:
            ends[i] = ends[i + 1]
    at = torch.arange(tokens)[:, None]
    return (at >= torch.tensor(places, dtype=torch.int64)) & (at < torch.tensor(ends[: len(places)], dtype=torch.int64))


def _register(backend: str) -> str:
    """Registers tree attention for the text's own tokens and views for its cross-attention. Returns the name."""
    name = attention.register(backend)
    own = ALL_ATTENTION_FUNCTIONS[name]

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        views: Any = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        if not isinstance(module, MllamaTextCrossAttention):
            return own(module, query, key, value, mask, **more)
        if views is None:  # a forward that is not packed, with transformers' own mask
            views = (View(0, query.shape[2], 0, key.shape[2], mask),)
        return _look(query, key, value, views, more["scaling"]), None

    AttentionInterface.register(f"{name}_mllama", attend)
    return f"{name}_mllama"


def _look(query: Tensor, key: Tensor, value: Tensor, views: tuple[View, ...], scale: float) -> Tensor:
    """[1, heads, T, D] queries on [1, kv_heads, keys, D] -> [1, T, heads, D], 0 where a sample has no image."""
    found = []
    for view in views:
        q, kv = query[:, :, view.first : view.stop], slice(view.start, view.end)
        if view.start == view.end:
            found.append(torch.zeros_like(q))
            continue
        found.append(
            F.scaled_dot_product_attention(
                q, key[:, :, kv], value[:, :, kv], attn_mask=view.mask, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(found, dim=2).transpose(1, 2)
