"""LLaVA-Video: SigLIP, a projector and Qwen2, in transformers' LlavaOnevision modules with LLaVA-Video's frame tokens.

Per frame the g x g patch grid is pooled 2 x 2 and `image_newline` follows every pooled row, where LlavaOnevision has
one newline per video. Facts: pritamqu/RRPO a905573, llava/model/llava_arch.py get_2dPool, add_token_per_grid.
"""

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from fastpo.config import Model
from fastpo.data import media
from fastpo.models import chat, files, images, llava
from fastpo.models.chat import Chat
from fastpo.models.vision import Apply, at_once
from fastpo.sample import BadSample, Encoded, MicroBatch, Sample, Sampling

parts = MappingProxyType({**llava.parts, "projector": ("model.multi_modal_projector", "model.image_newline")})
external = ("model.image_newline",)

HOW_TO = (
    "Download a LLaVA-Video checkpoint, for example with `hf download lmms-lab/LLaVA-Video-7B-Qwen2 --local-dir "
    "weights/original`, convert it with `python -m fastpo.convert weights/original weights/LLaVA-Video-7B-Qwen2` and "
    "point model.path at that folder (config.json, *.safetensors, tokenizer.json, preprocessor_config.json)."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    chat: Chat
    video_token: str
    video_token_id: int
    size: int  # pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patches: int  # per row of a frame
    pooling: str
    time_instruction: bool

    @property
    def side(self) -> int:
        """Pooled patches per row of a frame."""
        return math.ceil(self.patches / 2) if self.pooling == "bilinear" else self.patches // 2

    @property
    def tokens_per_frame(self) -> int:
        return self.side * (self.side + 1)


def processor(cfg: Model) -> Processor:
    """Reads tokenizer, chat template and image settings. Raises ValueError where the folder lacks something."""
    folder = files.checked(cfg.path, "llava_onevision", HOW_TO)
    config = AutoConfig.from_pretrained(folder)
    talk = chat.read(folder, cfg.question_role)
    _, image = files.settings(folder, "image_processor")
    return Processor(
        chat=talk,
        video_token=str(talk.tokenizer.convert_ids_to_tokens(config.video_token_id)),
        video_token_id=config.video_token_id,
        size=config.vision_config.image_size,
        mean=tuple(image.get("image_mean", (0.5, 0.5, 0.5))),
        std=tuple(image.get("image_std", (0.5, 0.5, 0.5))),
        patches=config.vision_config.image_size // config.vision_config.patch_size,
        pooling=cfg.pooling,
        time_instruction=cfg.time_instruction,
    )


def load(cfg: Model) -> PreTrainedModel:
    """The LlavaOnevision model in cfg.dtype. Raises ValueError where weights are missing or of another kind."""
    return files.loaded(cfg, "llava_onevision", HOW_TO)


def encode(p: Processor, sample: Sample, sampling: Sampling) -> Encoded:
    """Prompt and responses as token ids, each placeholder expanded to frames * tokens_per_frame. Raises BadSample."""
    if any(item.kind != "video" for item in sample.media):
        raise BadSample(f"{sample.key}: family llava_video takes videos, not images")
    frames = [media.frame_count(item, sampling) for item in sample.media]
    question = sample.question
    if p.time_instruction:
        counts = zip(sample.media, frames, strict=True)
        question = _timed(question, [media.frame_times(item.path, n, sampling.fps) for item, n in counts])
    ids = chat.prompt_ids(p.chat, question.replace("<video>", p.video_token), sample)
    return chat.encoded(
        p.chat,
        sample,
        chat.expand(ids, {p.video_token_id: [n * p.tokens_per_frame for n in frames]}, sample.key),
        media=[p.video_token_id],
        patches=sum(frames) * p.patches**2,
    )


def _timed(question: str, times: list[tuple[float, list[float]]]) -> str:
    """The question with each video's length and frame times after its placeholder.

    Word for word what LLaVA-Video was trained with (LLaVA-VL/LLaVA-NeXT, docs/LLaVA_Video_1003.md, its missing space
    too), but the times are those of the frames that are read here.
    """
    first, *others = question.split("<video>")
    if len(others) != len(times):
        return question  # chat.expand says what is wrong
    for (seconds, at), text in zip(times, others, strict=True):
        first += (
            f"<video>\nThe video lasts for {seconds:.2f} seconds, and {len(at)} frames are uniformly sampled from it. "
            f"These frames are located at {','.join(f'{t:.2f}s' for t in at)}."
            "Please answer the following questions related to this video.\n" + text.removeprefix("\n")
        )
    return first


def pixels(p: Processor, sample: Sample, sampling: Sampling) -> Tensor | None:
    """Decoded and resized frames [F, 3, size, size] uint8, or None without media. Raises BadSample."""
    if not sample.media:
        return None
    decoded = [media.decode(item, media.frame_count(item, sampling)) for item in sample.media]
    return torch.cat([images.frames(x, p.size) for x in decoded])


def blank(p: Processor) -> Encoded:
    """One black frame, no text, no responses."""
    return images.black(p.video_token_id, p.tokens_per_frame, (1, 3, p.size, p.size), patches=p.patches**2)


def vision(model: Any, p: Processor, pixels: Tensor, grid: Tensor, apply: Apply = at_once) -> Tensor:
    """[F, 3, size, size] uint8 -> [F * tokens_per_frame, H]: tower, projector, pooling, a newline after every row."""

    def encode(frames: Tensor) -> Tensor:
        features = llava.project(model, images.normalized(frames, p.mean, p.std))
        return grid_tokens(features, model.model.image_newline, pooling=p.pooling)

    return apply(encode, pixels)


def grid_tokens(features: Tensor, newline: Tensor, *, pooling: str) -> Tensor:
    """[F, g * g, H] projected patches and [H] newline -> [F * side * (side + 1), H] in reading order.

    side is ceil(g / 2) for "bilinear" (as trained) and floor(g / 2) for "average" (as the authors infer).
    """
    frames, patches, width = features.shape
    g = math.isqrt(patches)
    x = features.view(frames, g, g, width).permute(0, 3, 1, 2)
    if pooling == "bilinear":
        x = F.interpolate(x.contiguous(), size=(math.ceil(g / 2),) * 2, mode="bilinear")
    else:
        x = F.avg_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1)
    rows = torch.cat([x, newline.to(x).expand(*x.shape[:2], 1, width)], dim=2)
    return rows.reshape(-1, width)


def hidden(model: Any, batch: MicroBatch, features: Tensor | None, cache: Any = None) -> Tensor:
    """See Family. features: [visual tokens, H] in row order."""
    return llava.last_hidden(model, batch, {} if features is None else {"video": features[None]}, cache)
