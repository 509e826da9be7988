"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and frames of any shape as patches, positions on three axes.

An image or a frame is resized to a multiple of the merged patch within the folder's limits of pixels. Patches span two
frames; an image, or a last odd frame, is repeated. Facts: transformers 5.23, models/qwen2_vl/
image_processing_pil_qwen2_vl.py, models/qwen3_vl/video_processing_qwen3_vl.py and processing_qwen3_vl.py.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedModel,
    Qwen2_5_VLModel,
    Qwen2VLModel,
    Qwen3VLModel,
)

from fastpo.config import Model
from fastpo.data import media
from fastpo.models import chat, files, images
from fastpo.models.chat import Chat
from fastpo.sample import BadSample, Encoded, Media, MicroBatch, Sample, Sampling

parts = MappingProxyType(
    {
        "vision": ("model.visual.patch_embed", "model.visual.pos_embed", "model.visual.blocks"),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }
)
external = ()

MODELS: dict[str, Any] = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}
HOW_TO = {
    "qwen2_vl": files.how_to("Qwen/Qwen2-VL-2B-Instruct"),
    "qwen2_5_vl": files.how_to("Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen3_vl": files.how_to("Qwen/Qwen3-VL-4B-Instruct"),
}
Shape = tuple[int, int, int]  # patches of an item along time, height and width


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """config: of the model folder; its model_type says which of the three this is."""

    chat: Chat
    config: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_pixels: tuple[int, int]  # fewest and most of an image
    video_pixels: tuple[int, int]  # of a frame; Qwen3-VL: of all frames together
    video_tokens: int | None  # most of a video, Qwen3-VL: of a frame, where the folder has cap_pixels_per_frame

    @property
    def stamped(self) -> bool:
        """Qwen3-VL writes each pair of frames' time into the text."""
        return self.config.model_type == "qwen3_vl"


def processor(cfg: Model) -> Processor:
    """Reads tokenizer, chat template and limits. Raises ValueError where the folder lacks something."""
    folder = files.checked(cfg.path, cfg.family, HOW_TO[cfg.family])
    image = images.processor(folder)
    images.check_frames(folder, side=None)
    return Processor(
        chat=chat.read(folder, cfg.question_role),
        config=AutoConfig.from_pretrained(folder),
        mean=tuple(image.image_mean),
        std=tuple(image.image_std),
        image_pixels=_limited((image.size["shortest_edge"], image.size["longest_edge"]), cfg),
        video_pixels=_limited(_video_pixels(folder), cfg),
        video_tokens=_video_tokens(folder, cfg.family),
    )


def _limited(pixels: tuple[int, int], cfg: Model) -> tuple[int, int]:
    low, high = pixels
    if cfg.max_pixels is not None and cfg.max_pixels < low:
        raise ValueError(f"model.max_pixels: {cfg.max_pixels} is below the checkpoint's fewest, {low}")
    return low, min(high, cfg.max_pixels or high)


def _video_pixels(folder: Path) -> tuple[int, int]:
    file, settings = files.settings(folder, "video_processor")
    size = settings.get("size") or {}
    low = settings.get("min_pixels") or size.get("shortest_edge")
    high = settings.get("max_pixels") or size.get("longest_edge")
    if not low or not high:
        raise ValueError(
            f"model.path: {file} says neither min_pixels and max_pixels nor size: its limits are not known"
        )
    return low, high


def _video_tokens(folder: Path, family: str) -> int | None:
    """max_video_tokens, where the settings of videos ask for qwen-vl-utils' rule (transformers 5.22 and later)."""
    _, settings = files.settings(folder, "video_processor")
    if not settings.get("cap_pixels_per_frame"):
        return None
    return settings.get("max_video_tokens", 768 if family == "qwen3_vl" else 128_000)


def load(cfg: Model) -> PreTrainedModel:
    """The model in cfg.dtype. Raises ValueError where weights are missing or of another kind."""
    return files.loaded(cfg, cfg.family, HOW_TO[cfg.family])


def encode(p: Processor, sample: Sample, sampling: Sampling) -> Encoded:
    """Prompt and responses as token ids, each placeholder as many as its item has merged patches. Raises BadSample.

    grid: [items, 3] patches along time, height and width. Qwen3-VL: "<1.5 seconds>" before each pair of frames, the
    mean of their times, and a run of placeholders after it.
    """
    shapes = [_shape(p, item, sampling) for item in sample.media]
    marked = iter([_marked(p, item, shape, sampling) for item, shape in zip(sample.media, shapes, strict=True)])
    ids = chat.prompt_ids(
        p.chat, re.sub("<image>|<video>", lambda found: next(marked, found[0]), sample.question), sample
    )
    merged = p.config.vision_config.spatial_merge_size**2
    counts: dict[int, list[int]] = {p.config.image_token_id: [], p.config.video_token_id: []}
    for item, (t, h, w) in zip(sample.media, shapes, strict=True):
        runs = t if item.kind == "video" and p.stamped else 1
        counts[_token(p, item)] += [t * h * w // merged // runs] * runs
    prompt = chat.expand(ids, counts, sample.key)
    return chat.encoded(
        p.chat,
        sample,
        prompt,
        media=counts,
        positions=positions(p, prompt, sample.media, shapes, sampling) if shapes else None,
        patches=sum(map(math.prod, shapes)),
        grid=torch.tensor(shapes) if shapes else None,
    )


def _token(p: Processor, item: Media) -> int:
    return p.config.video_token_id if item.kind == "video" else p.config.image_token_id


def _marked(p: Processor, item: Media, shape: Shape, sampling: Sampling) -> str:
    """What stands for an item in the text: one media token between marks.

    Qwen3-VL's videos: one for each pair of frames, behind its time, and marks around all of them. transformers keeps
    these, which the chat templates write, since 5.10; before it left them out.
    """
    around = [p.config.vision_start_token_id, _token(p, item), p.config.vision_end_token_id]
    start, token, end = p.chat.tokenizer.convert_ids_to_tokens(around)
    mark = f"{start}{token}{end}"
    if item.kind == "image" or not p.stamped:
        return mark
    frames, pair = media.frame_count(item, sampling), p.config.vision_config.temporal_patch_size
    shown = media.frame_times(item.path, frames, sampling.fps)[1]
    shown += shown[-1:] * (shape[0] * pair - frames)
    means = [(shown[k] + shown[k + pair - 1]) / 2 for k in range(0, len(shown), pair)]
    return start + "".join(f"<{second:.1f} seconds>{mark}" for second in means) + end


def _shape(p: Processor, item: Media, sampling: Sampling) -> Shape:
    """Patches of an item along time, height and width, from its metadata. Raises BadSample."""
    v = p.config.vision_config
    frames, (height, width) = media.frame_count(item, sampling), media.size(item)
    if max(height, width) > 200 * min(height, width):
        raise BadSample(f"{item.path}: {width} x {height} pixels, more than 200 times as long as wide")
    low, high = (p.video_pixels[0], _most(p, frames)) if item.kind == "video" else p.image_pixels
    together = max(frames, v.temporal_patch_size) if item.kind == "video" and p.stamped else None
    height, width = fitted(
        height, width, factor=v.patch_size * v.spatial_merge_size, low=low, high=high, frames=together
    )
    return -(-frames // v.temporal_patch_size), height // v.patch_size, width // v.patch_size


def _most(p: Processor, frames: int) -> int:
    """Pixels of a frame of a video with so many, Qwen3-VL: of all of them: models/qwen*_vl/video_processing*.resize."""
    (low, high), v = p.video_pixels, p.config.vision_config
    if p.video_tokens is None:
        return high
    pixels = p.video_tokens * (v.patch_size * v.spatial_merge_size) ** 2
    least = int(1.05 * low)
    if p.stamped:
        return frames * max(min(pixels, high // frames), least)
    return max(min(high, int(0.9 * pixels) * v.temporal_patch_size // frames), least)


def fitted(height: int, width: int, *, factor: int, low: int, high: int, frames: int | None = None) -> tuple[int, int]:
    """Height and width, rounded to multiples of `factor`, that hold `low` to `high` pixels.

    frames: the limits are of so many frames together (Qwen3-VL's videos). The published smart_resize of Qwen2-VL and,
    with frames, of Qwen3-VL, which counts an odd number of frames now up, now down.
    """
    count, even = (1, 1) if frames is None else (frames, 2 * round(frames / 2))
    if frames is not None and min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = int(height * scale), int(width * scale)
    sides = [round(side / factor) * factor for side in (height, width)]
    if even * math.prod(sides) > high:
        shrink = math.sqrt(count * height * width / high)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif even * math.prod(sides) < low:
        grow = math.sqrt(low / (count * height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def positions(p: Processor, ids: Tensor, items: Sequence[Media], shapes: Sequence[Shape], sampling: Sampling) -> Tensor:
    """[3, n] positions along time, height and width, by the installed model's own get_rope_index, without weights.

    Text after a video continues from the video's start by the larger side of its frames in transformers 5; before, from
    the largest position on any axis (huggingface/transformers#35569). They differ where a clip's times pass that side.
    """
    model = MODELS[p.config.model_type]
    bare = SimpleNamespace(config=p.config, get_vision_position_ids=partial(model.get_vision_position_ids, None))
    of: dict[str, list[Shape]] = {"image": [], "video": []}
    for item, shape in zip(items, shapes, strict=True):
        of[item.kind].append(shape)
    videos = [item for item in items if item.kind == "video"]
    timed = p.config.model_type == "qwen2_5_vl"
    found, _ = model.get_rope_index(
        bare,
        ids[None],
        ((ids == p.config.image_token_id) + 2 * (ids == p.config.video_token_id))[None],
        image_grid_thw=torch.tensor(of["image"]) if of["image"] else None,
        video_grid_thw=torch.tensor(of["video"]) if of["video"] else None,
        second_per_grid_ts=[_seconds_per_patch(p, item, sampling) for item in videos] if timed else None,
    )
    return found[:, 0]


def _seconds_per_patch(p: Processor, item: Media, sampling: Sampling) -> float:
    pair = p.config.vision_config.temporal_patch_size
    return pair * media.duration(item.path, sampling.fps) / media.frame_count(item, sampling)


def pixels(p: Processor, sample: Sample, sampling: Sampling) -> Tensor | None:
    """[patches, 3 * 2 * patch ** 2] uint8 of all items, or None without media. Raises BadSample."""
    if not sample.media:
        return None
    return torch.cat([_patches(p, item, sampling) for item in sample.media])


def _patches(p: Processor, item: Media, sampling: Sampling) -> Tensor:
    """[t * h * w, 3 * time * patch * patch] uint8. The patches that are merged later stand side by side."""
    v, (t, h, w) = p.config.vision_config, _shape(p, item, sampling)
    decoded = media.decode(item, media.frame_count(item, sampling))
    side, merge, time = v.patch_size, v.spatial_merge_size, v.temporal_patch_size
    x = images.frames(decoded, (h * side, w * side))
    x = x[torch.tensor(np.minimum(np.arange(t * time), len(x) - 1))]
    x = x.view(t, time, 3, h // merge, merge, side, w // merge, merge, side)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)


def blank(p: Processor) -> Encoded:
    """One black image of one token, no text, no responses."""
    v = p.config.vision_config
    side = v.spatial_merge_size
    shape = side**2, 3 * v.temporal_patch_size * v.patch_size**2
    return images.black(p.config.image_token_id, 1, shape, patches=side**2, grid=(1, side, side))


def vision(model: Any, p: Processor, pixels: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
    """Rows of patches -> [visual tokens, H], and for Qwen3-VL as much for each of the first layers (deepstack)."""
    visual = model.model.visual
    mean, std = (pixels.new_tensor(x, dtype=torch.float32)[:, None] for x in (p.mean, p.std))
    x = (pixels.view(len(pixels), 3, -1).float() / 255 - mean) / std
    out = visual(x.flatten(1).to(visual.dtype), grid_thw=grid, return_dict=True)
    return (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))


def hidden(model: Any, batch: MicroBatch, features: tuple[Tensor, ...] | None, cache: Any = None) -> Tensor:
    """See Family. features: in row order, images and videos together."""
    text, config, ids = model.model.language_model, model.config, batch.ids
    embeds, deep = text.embed_tokens(ids), {}
    if features is not None:
        visual = (ids == config.image_token_id) | (ids == config.video_token_id)
        embeds = embeds.masked_scatter(visual[:, None], features[0].to(embeds.dtype))
        if features[1:]:
            deep = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": list(features[1:])}
    return text(
        inputs_embeds=embeds[None],
        position_ids=batch.positions.expand(3, -1)[:, None],
        past_key_values=cache,
        use_cache=cache is not None,
        tree=batch.tree if cache is None else None,
        **deep,
    ).last_hidden_state[0]
