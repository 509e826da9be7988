"""LLaVA-Video: SigLIP, a projector and Qwen2, in transformers' LlavaOnevision modules with LLaVA-Video's frame tokens.

Per frame the g x g patch grid is pooled 2 x 2 and `image_newline` follows every pooled row, where LlavaOnevision has
one newline per video. Facts: pritamqu/RRPO a905573, llava/model/llava_arch.py get_2dPool, add_token_per_grid.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import output_capturing

from fastpo.config import Model
from fastpo.data import media, phrases
from fastpo.models import attention
from fastpo.sample import BadSample, Encoded, Sample
from fastpo_kernels import Tree

parts = MappingProxyType(
    {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector", "model.image_newline"),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }
)
external = ("model.image_newline",)

# transformers 5.23 keeps only the hidden state asked for; before, all layers' (0.7 GB for 16 frames of SigLIP-so400m)
CAPTURES_ONE = hasattr(output_capturing, "select_hidden_states")


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    tokenizer: PreTrainedTokenizerBase
    tagger: phrases.Tagger
    end: str  # what the chat template puts after an answer
    video_token: str
    video_token_id: int
    size: int  # pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int  # pooled patches per row of a frame
    pooling: str

    @property
    def tokens_per_frame(self) -> int:
        return self.side * (self.side + 1)


def processor(cfg: Model) -> Processor:
    """Reads tokenizer, chat template and image settings. Raises ValueError where the folder lacks something."""
    folder = _folder(cfg)
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast or not tokenizer.chat_template:
        raise ValueError(f"model.path: {folder}: needs a fast tokenizer (tokenizer.json) with a chat template")
    image = json.loads((folder / "preprocessor_config.json").read_text())
    patches = config.vision_config.image_size // config.vision_config.patch_size
    return Processor(
        tokenizer=tokenizer,
        tagger=phrases.tagger(tokenizer),
        end=_end(tokenizer),
        video_token=str(tokenizer.convert_ids_to_tokens(config.video_token_id)),
        video_token_id=config.video_token_id,
        size=config.vision_config.image_size,
        mean=tuple(image.get("image_mean", (0.5, 0.5, 0.5))),
        std=tuple(image.get("image_std", (0.5, 0.5, 0.5))),
        side=math.ceil(patches / 2) if cfg.pooling == "bilinear" else patches // 2,
        pooling=cfg.pooling,
    )


def load(cfg: Model) -> PreTrainedModel:
    """The LlavaOnevision model in cfg.dtype. Raises ValueError where weights are missing or of another kind."""
    return AutoModelForImageTextToText.from_pretrained(
        _folder(cfg),
        dtype=getattr(torch, cfg.dtype),
        attn_implementation={"text_config": attention.register(cfg.attention), "vision_config": "sdpa"},
    )


def encode(p: Processor, sample: Sample, frames: int) -> Encoded:
    """Prompt and responses as token ids, the placeholder expanded to frames * tokens_per_frame. Raises BadSample."""
    if any(item.kind != "video" for item in sample.media):
        raise BadSample(f"{sample.key}: family llava_video takes videos, not images")
    messages = [{"role": "user", "content": sample.question.replace("<video>", p.video_token)}]
    text = p.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor(p.tokenizer(str(text), add_special_tokens=False).input_ids)
    is_video = ids == p.video_token_id
    if int(is_video.sum()) != len(sample.media):
        raise BadSample(f"{sample.key}: {int(is_video.sum())} video placeholders for {len(sample.media)} videos")
    repeats = torch.where(is_video, frames * p.tokens_per_frame, 1)
    responses = tuple(
        torch.tensor(phrases.response_ids(p.tokenizer, response.text, p.end)) for response in sample.responses
    )
    return Encoded(
        key=sample.key,
        prompt=ids.repeat_interleave(repeats),
        responses=responses,
        weights=_weights(p, sample),
        scores=tuple(response.score for response in sample.responses),
        frames=frames * len(sample.media),
    )


def pixels(p: Processor, sample: Sample, frames: int) -> Tensor | None:
    """Decoded and resized frames [F, 3, size, size] uint8, or None without media. Raises BadSample."""
    if not sample.media:
        return None
    return torch.cat([media.resize(media.decode(item, frames), p.size) for item in sample.media])


def blank(p: Processor) -> Encoded:
    """One black frame, no text, no responses."""
    return Encoded(
        key="blank",
        prompt=torch.full((p.tokens_per_frame,), p.video_token_id),
        responses=(),
        weights=None,
        scores=(),
        frames=1,
        pixels=torch.zeros(1, 3, p.size, p.size, dtype=torch.uint8),
    )


def vision(model: Any, p: Processor, pixels: Tensor) -> Tensor:
    """[F, 3, size, size] uint8 -> [F * tokens_per_frame, H]: tower, projector, pooling, a newline after every row."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    dtype = model.model.image_newline.dtype
    x = ((pixels.float() / 255 - pixels.new_tensor(p.mean, dtype=torch.float32)[:, None, None])
         / pixels.new_tensor(p.std, dtype=torch.float32)[:, None, None])  # fmt: skip
    out = tower(x.to(dtype), output_hidden_states=layer if CAPTURES_ONE else True, return_dict=True)
    features = model.model.multi_modal_projector(out.hidden_states[layer])
    return grid_tokens(features, model.model.image_newline, pooling=p.pooling)


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


def hidden(model: Any, ids: Tensor, positions: Tensor, features: Tensor, tree: Tree) -> Tensor:
    """ids, positions [T]; features [visual tokens, H] in row order -> last hidden states [T, H], head not applied."""
    return model.model(
        input_ids=ids[None],
        position_ids=positions[None],
        mm_encoder_outputs={"video": BaseModelOutputWithPooling(pooler_output=features[None])},
        use_cache=False,
        tree=tree,
    ).last_hidden_state[0]


def _weights(p: Processor, sample: Sample) -> tuple[Tensor, ...] | None:
    if any(response.tagged is None for response in sample.responses):
        return None
    try:
        masks = [
            phrases.phrase_mask(p.tagger, r.text, r.tagged, p.end) for r in sample.responses if r.tagged is not None
        ]
    except BadSample as error:
        raise BadSample(f"{sample.key}: {error}") from None
    return tuple(torch.tensor([float(sign > 0) for sign in mask]) for mask in masks)


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition("ANSWER")[2]


def _folder(cfg: Model) -> Path:
    folder, howto = (
        Path(cfg.path),
        (
            "Download a LLaVA-Video checkpoint, for example with `hf download lmms-lab/LLaVA-Video-7B-Qwen2 "
            "--local-dir weights/original`, bring it into transformers' llava_onevision layout and point model.path at "
            "that folder (config.json, *.safetensors, tokenizer.json, preprocessor_config.json)."
        ),
    )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path: {folder} is not a model folder (no config.json). {howto}")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "llava_onevision":
        raise ValueError(f"model.path: {folder} has model_type {kind!r}, expected 'llava_onevision'. {howto}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model.path: {folder} has no *.safetensors weights. {howto}")
    missing = [name for name in ("tokenizer.json", "preprocessor_config.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"model.path: {folder} lacks {', '.join(missing)}. {howto}")
    return folder
