"""Tiny random models of the LLaVA families as ordinary Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 20, 4  # 5 x 5 patches
SPECIALS = ["<pad>", "<s>", "</s>", "<image>", "<video>", "<|im_start|>", "<|im_end|>"]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]

# Both take a message's content as a list of images and texts, as the llava-hf folders' templates do.
_ITEMS = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() }}: " + _ITEMS + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} " + _ITEMS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*, starts: bool, template: str) -> PreTrainedTokenizerFast:
    """Bytes and the special tokens; starts: puts <s> before every text, as Llama's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in SPECIALS])
    if starts:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>" if starts else None, eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def _model(family: str, ids: dict[str, int]) -> PreTrainedModel:
    text: dict[str, Any] = dict(
        vocab_size=len(ids), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"],
    )  # fmt: skip
    sight: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    clip: dict[str, Any] = dict(
        vision_config=sight | dict(model_type="clip_vision_model", projection_dim=32),
        text_config=text | dict(model_type="llama"),
        image_token_index=ids["<image>"], tie_word_embeddings=False,
    )  # fmt: skip
    if family == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(**clip))
    if family == "llava_next":
        return LlavaNextForConditionalGeneration(LlavaNextConfig(**clip, image_grid_pinpoints=pinpoints(family)))
    config = LlavaOnevisionConfig(
        vision_config=sight | dict(model_type="siglip_vision_model", vision_use_head=False),
        text_config=text | dict(model_type="qwen2"),
        image_token_index=ids["<image>"], video_token_index=ids["<video>"], tie_word_embeddings=False,
        vision_feature_layer=-1, image_grid_pinpoints=pinpoints(family),
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def pinpoints(family: str) -> list[list[int]]:
    """Up to 2 x 2 tiles, or 1 x 3, for LLaVA-NeXT; up to 4 x 4 for LLaVA-OneVision."""
    if family == "llava_next":
        return [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
    return [[SIDE * h, SIDE * w] for h in range(1, 5) for w in range(1, 5)]


def write(folder: Path, family: str, **image_settings: object) -> Path:
    """Weights, configuration, tokenizer and image settings of llava, llava_next or llava_onevision."""
    torch.manual_seed(0)
    onevision = family == "llava_onevision"
    talk = tokenizer(starts=not onevision, template=CHATML if onevision else VICUNA)
    model = _model(family, talk.get_vocab())
    with torch.no_grad():  # initial biases are 0 and norms 1: move them, or a missing one would pass
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    talk.save_pretrained(folder)
    settings: dict[str, Any] = dict(image_mean=MEAN, image_std=STD, resample=3)
    if onevision:
        settings |= dict(image_processor_type="LlavaOnevisionImageProcessor", size=dict(height=SIDE, width=SIDE))
    else:
        kind = {"llava": "CLIPImageProcessor", "llava_next": "LlavaNextImageProcessor"}[family]
        crop = dict(height=SIDE, width=SIDE)
        settings |= dict(image_processor_type=kind, size=dict(shortest_edge=SIDE), crop_size=crop)
    if family != "llava":
        settings |= dict(image_grid_pinpoints=pinpoints(family))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | image_settings))
    return folder
