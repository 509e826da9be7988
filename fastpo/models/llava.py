"""LLaVA-1.5: CLIP, a projector and Llama, in transformers' Llava modules; what the LLaVA families share.

Pictures follow the folder's image processor: the llava-hf folders cut out the middle (CLIPImageProcessor), the original
code pads to a square (LlavaImageProcessor with do_pad).
"""

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import output_capturing

from fastpo.config import Model
from fastpo.models import chat, files, images
from fastpo.models.chat import Chat
from fastpo.models.vision import Apply, at_once
from fastpo.sample import BadSample, Encoded, MicroBatch, Sample, Sampling

parts = MappingProxyType(
    {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }
)
external = ()

HOW_TO = files.how_to("llava-hf/llava-1.5-7b-hf")

# transformers 5.23 keeps only the hidden states asked for; before, all layers' (0.7 GB for 16 frames of SigLIP-so400m)
CAPTURES_ONE = hasattr(output_capturing, "select_hidden_states")

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """tokens: of one picture, after the tower. patches: per side of a picture. video_*, limit: LLaVA-OneVision's."""

    chat: Chat
    image_token_id: int
    images: images.Settings
    patches: int
    tokens: int
    video_token_id: int = -1
    limit: int | None = None


def processor(cfg: Model) -> Processor:
    """Reads tokenizer, chat template and image settings. Raises ValueError where the folder lacks something."""
    return facts(cfg, *opened(cfg, "llava", HOW_TO))


def opened(cfg: Model, model_type: str, how_to: str) -> tuple[Path, Any]:
    """The folder and its configuration. Raises ValueError where it holds no model of this type."""
    folder = files.checked(cfg.path, model_type, how_to)
    return folder, AutoConfig.from_pretrained(folder)


def facts(cfg: Model, folder: Path, config: Any) -> Processor:
    """What all LLaVA families need to know of a folder. Raises ValueError where it lacks something."""
    tower = config.vision_config
    if tower.model_type not in CLASS_TOKENS:
        raise ValueError(
            f"model.path: {folder}: its tower is a {tower.model_type}, not one of {', '.join(CLASS_TOKENS)}"
        )
    patches = tower.image_size // tower.patch_size
    dropped = config.vision_feature_select_strategy == "default"
    return Processor(
        chat=chat.read(folder, cfg.question_role),
        image_token_id=config.image_token_id,
        images=images.settings(folder, tower.image_size),
        patches=patches,
        tokens=patches**2 + CLASS_TOKENS[tower.model_type] - dropped,
    )


def load(cfg: Model) -> PreTrainedModel:
    """The Llava model in cfg.dtype. Raises ValueError where weights are missing or of another kind."""
    return files.loaded(cfg, "llava", HOW_TO)


def encode(p: Processor, sample: Sample, sampling: Sampling) -> Encoded:
    """Prompt and responses as token ids, each placeholder expanded to one picture's tokens. Raises BadSample."""
    only_images(sample, "llava")
    return expanded(p, sample, image=[p.tokens] * len(sample.media), patches=len(sample.media) * p.patches**2)


def only_images(sample: Sample, family: str) -> None:
    """Raises BadSample where there is a video."""
    if any(item.kind != "image" for item in sample.media):
        raise BadSample(f"{sample.key}: family {family} takes images, not videos")


def expanded(
    p: Processor,
    sample: Sample,
    *,
    image: list[int],
    video: list[int] | None = None,
    patches: int,
    grid: list[tuple[int, ...]] | None = None,
) -> Encoded:
    """The sample's tokens; image, video: visual tokens of each item of the kind. Raises BadSample."""
    question, counts = sample.question, {p.image_token_id: image}
    if video is not None:
        counts[p.video_token_id] = video
    for placeholder, token in zip(("<image>", "<video>"), counts, strict=False):
        question = question.replace(placeholder, str(p.chat.tokenizer.convert_ids_to_tokens(token)))
    return chat.encoded(
        p.chat,
        sample,
        chat.expand(chat.prompt_ids(p.chat, question, sample), counts, sample.key),
        media=counts,
        patches=patches,
        grid=torch.tensor(grid) if grid else None,
    )


def pixels(p: Processor, sample: Sample, sampling: Sampling) -> Tensor | None:
    """One picture per image [images, 3, side, side] uint8, or None without media. Raises BadSample."""
    if not sample.media:
        return None
    return images.stack([images.picture(images.read(item), p.images) for item in sample.media])


def blank(p: Processor) -> Encoded:
    """One black picture, no text, no responses."""
    return black(p, p.tokens, pictures=1)


def black(p: Processor, tokens: int, *, pictures: int, grid: tuple[int, ...] | None = None) -> Encoded:
    """An image of black pictures alone."""
    shape = pictures, 3, p.images.side, p.images.side
    return images.black(p.image_token_id, tokens, shape, patches=pictures * p.patches**2, grid=grid)


def vision(model: Any, p: Processor, pixels: Tensor, grid: Tensor, apply: Apply = at_once) -> Tensor:
    """[F, 3, side, side] uint8 -> [F * tokens, H]."""
    return apply(lambda x: project(model, images.normalized(x, p.images.mean, p.images.std)).flatten(0, 1), pixels)


def project(model: Any, pixels: Tensor) -> Tensor:
    """Tower and projector: [F, 3, side, side] normalized -> [F, tokens, H], the class token dropped as configured."""
    tower, config = model.model.vision_tower, model.config
    layers = config.vision_feature_layer
    out = tower(pixels.to(tower.dtype), output_hidden_states=layers if CAPTURES_ONE else True, return_dict=True)
    states = [out.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        states = [x[:, 1:] for x in states]
    return model.model.multi_modal_projector(torch.cat(states, dim=-1))


def hidden(model: Any, batch: MicroBatch, features: Tensor | None, cache: Any = None) -> Tensor:
    """See Family. features: [visual tokens, H] in row order."""
    return last_hidden(model, batch, {} if features is None else {"image": [features]}, cache)


def last_hidden(model: Any, batch: MicroBatch, visual: dict[str, Any], cache: Any) -> Tensor:
    """[T, H] of the language model. visual: features [visual tokens, H] of "image" and "video", or parts of them.

    They are put in here: `mm_encoder_outputs`, which transformers 5.23 has for it, is ignored silently by earlier ones.
    """
    text, ids = model.model.language_model, batch.ids
    embeds = text.get_input_embeddings()(ids)
    for kind, parts in visual.items():
        features = parts if isinstance(parts, Tensor) else torch.cat(parts)
        place = (ids == getattr(model.config, f"{kind}_token_id"))[:, None].expand_as(embeds)
        assert int(place.sum()) == features.numel()
        embeds = embeds.masked_scatter(place, features.to(embeds.dtype))
    return text(
        inputs_embeds=embeds[None],
        position_ids=batch.positions[None],
        past_key_values=cache,
        use_cache=cache is not None,
        tree=batch.tree if cache is None else None,
    ).last_hidden_state[0]
