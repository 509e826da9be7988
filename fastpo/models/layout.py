"""LLaVA-NeXT's checkpoint layout beside transformers': names of weights, configurations, chat templates.

Facts: names of the original layout from pritamqu/RRPO a905573 (llava/model: llava_arch.py, multimodal_encoder,
multimodal_projector/builder.py); names of the published llava-hf folders, token placement and padding to 64 rows from
huggingface/transformers (models/llava*/convert_llava*_weights_to_hf.py); the module tree as of transformers 5.23.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from fastpo.models.files import read_json

# Prefixes: original, published llava-hf folders (every version of transformers reads them), module tree (peft's names).
ROWS = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline", "model.image_newline"),
    ("model.embed_tokens.", "language_model.model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "language_model.model.layers.", "model.language_model.layers."),
    ("model.norm.", "language_model.model.norm.", "model.language_model.norm."),
    ("lm_head.", "language_model.lm_head.", "lm_head."),
)
ORIGINAL, HF, MODULES = range(3)

# What transformers' save_pretrained writes of the same modules (5.x: either prefix, towers without vision_model; after
# ZeRO-3 5.23 writes language_model.model.model).
_SPELLINGS = (
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline|language_model\.)", ""),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!lm_head\.)(model\.)*", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)

# Buffers that older transformers stored; both sides compute them from the configuration.
DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")

EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
TOWER = "vision_tower."
TEXTS = MappingProxyType({"LlavaQwenForCausalLM": Qwen2Config, "LlavaLlamaForCausalLM": LlamaConfig})
PLACEHOLDERS = MappingProxyType({"llava_onevision": ("<image>", "<video>"), "llava": ("<image>",)})

# The towers of the published checkpoints, whose own configuration only names them: google/..., openai/...
TOWERS: Mapping[str, PretrainedConfig] = MappingProxyType(
    {
        "siglip-so400m-patch14-384": SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
            image_size=384, patch_size=14,
        ),
        "clip-vit-large-patch14-336": CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=336, patch_size=14, projection_dim=768,
        ),
    }
)  # fmt: skip

# As llava/conversation.py conv_qwen and conv_vicuna_v1 write a conversation. Content: a string, or typed items.
_CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] != 'text' %}{{ '<' + c['type'] + '>\n' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '%s' }}{% endif %}{% for m in messages %}"
TEMPLATES = MappingProxyType(
    {
        "llava_onevision": (
            _SYSTEM.replace("%s", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
            + "{{ '<|im_start|>' + m['role'] + '\n' }}"
            + _CONTENT
            + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
        "llava": (
            _SYSTEM.replace(
                "%s",
                "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                "detailed, and polite answers to the user\\'s questions. ",
            )
            + "{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
            + _CONTENT
            + "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
            + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
        ),
    }
)


def renamed(name: str, source: int, target: int) -> str | None:
    """The name of a weight or module in another layout, None where the source layout has no such name."""
    for row in ROWS:
        if name.startswith(row[source]) and (name == row[source] or row[source].endswith(".")):
            return row[target] + name[len(row[source]) :]
    return None


def spelled(key: str) -> str:
    """A weight's name in the published llava-hf folders, from any of transformers' spellings of it."""
    for pattern, replacement in _SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key


def hf_config(original: dict[str, Any], where: Path, tower: Path | None) -> LlavaConfig | LlavaOnevisionConfig:
    """transformers' configuration of an original config.json; token ids are still to be filled in.

    tower: a folder with the vision tower's own configuration, for towers that are not in TOWERS. Raises ValueError for
    what transformers' modules do not do.
    """
    text = TEXTS.get((original.get("architectures") or ["none"])[0])
    if text is None:
        raise ValueError(f"{where}: architectures {original.get('architectures')}, not one of {', '.join(TEXTS)}")
    vision: Any = _vision_config(original, where, tower)
    kinds = (text.model_type, vision.model_type)
    _only(original, where, "mm_projector_type", "mlp2x_gelu")
    _only(original, where, "mm_use_im_start_end", False, None)
    fields: dict[str, Any] = dict(
        text_config=text.from_dict(_known(original, text)).to_dict(),
        vision_config=vision.to_dict(),
        tie_word_embeddings=bool(original.get("tie_word_embeddings", False)),
        dtype=original.get("torch_dtype", original.get("dtype")),
    )
    if kinds == ("llama", "clip_vision_model"):
        _only(original, where, "mm_patch_merge_type", "flat", None)
        whole = original.get("mm_vision_select_feature", "patch") == "cls_patch"
        return LlavaConfig(
            **fields,
            vision_feature_layer=original.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy="full" if whole else "default",
            image_seq_length=(vision.image_size // vision.patch_size) ** 2 + whole,
            architectures=["LlavaForConditionalGeneration"],
        )
    if kinds != ("qwen2", "siglip_vision_model"):
        raise ValueError(f"{where}: {kinds[0]} with a {kinds[1]} has no counterpart among transformers' LLaVA models")
    _only(original, where, "mm_patch_merge_type", "spatial_unpad")
    ratio = original.get("image_aspect_ratio", "")
    if not re.fullmatch(r"anyres_max_\d+", ratio):
        raise ValueError(f"{where}: image_aspect_ratio is {ratio!r}, transformers' llava_onevision needs anyres_max_N")
    return LlavaOnevisionConfig(
        **fields,
        vision_feature_layer=-1,  # SigLipVisionTower does not ask mm_vision_select_layer
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ratio,
        image_grid_pinpoints=_pinpoints(original, where, vision.image_size),
        architectures=["LlavaOnevisionForConditionalGeneration"],
    )


def image_settings(config: LlavaConfig | LlavaOnevisionConfig, original: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of a converted folder: what the original code does to images."""
    vision: Any = config.vision_config
    side = vision.image_size
    square = dict(height=side, width=side)
    common = dict(do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True)
    common |= dict(resample=3, rescale_factor=1 / 255)  # bicubic
    if config.model_type == "llava_onevision":
        return common | dict(
            image_processor_type="LlavaOnevisionImageProcessor",
            size=square,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            image_grid_pinpoints=config.image_grid_pinpoints,
        )
    return common | dict(
        image_processor_type="LlavaImageProcessor",
        do_pad=original.get("image_aspect_ratio") == "pad",
        do_center_crop=True,
        size=dict(shortest_edge=side),
        crop_size=square,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )


def _vision_config(original: Mapping[str, Any], where: Path, folder: Path | None) -> PretrainedConfig:
    """Of the tower as LLaVA uses it: SigLIP without its last layer and its head."""
    name = str(original["mm_vision_tower"])
    if folder is not None:
        stored = read_json(folder / "config.json")
        kind = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}.get(
            stored.get("model_type", "").removesuffix("_vision_model")
        )
        if kind is None:
            raise ValueError(f"{folder}: a {stored.get('model_type')} is no vision tower of LLaVA's (clip, siglip)")
        config = kind.from_dict(_known(stored.get("vision_config", stored), kind))
    elif Path(name).name in TOWERS:
        config = TOWERS[Path(name).name]
    else:
        raise ValueError(f"{where}: mm_vision_tower {name} is not known here; name its folder with --vision-tower")
    if config.model_type == "clip_vision_model":
        return config
    fields = config.to_dict() | dict(num_hidden_layers=config.num_hidden_layers - 1, vision_use_head=False)
    return SiglipVisionConfig.from_dict(fields)


def _known(fields: Mapping[str, Any], kind: type[PretrainedConfig]) -> dict[str, Any]:
    """The fields that this configuration has, without what names the class or the file."""
    names = (kind().to_dict().keys() | {"rope_theta", "rope_scaling"}) - {
        "architectures", "model_type", "transformers_version", "dtype", "_name_or_path",
    }  # fmt: skip
    return {name: fields[name] for name in names if name in fields}


def _only(original: Mapping[str, Any], where: Path, key: str, *values: object) -> None:
    if original.get(key) not in values:
        raise ValueError(f"{where}: {key} is {original.get(key)!r}, only {values[0]!r} can be converted")


def _pinpoints(original: Mapping[str, Any], where: Path, side: int) -> list[list[int]]:
    """[height, width] in transformers; LLaVA's are [width, height], or a text such as "(1x1),...,(6x6)" in tiles."""
    stored = original.get("image_grid_pinpoints")
    pairs = re.findall(r"\((\d+)x(\d+)\)", stored) if isinstance(stored, str) else stored or []
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{where}: image_grid_pinpoints is {stored!r}, not a list of sizes")
    if isinstance(stored, str):
        (low_w, low_h), (high_w, high_h) = (map(int, pairs[i]) for i in (0, -1))
        tiles = [(w, h) for w in range(low_w, high_w + 1) for h in range(low_h, high_h + 1)]
        pairs = [(w * side, h * side) for w, h in tiles]
    return [[h, w] for w, h in pairs]
