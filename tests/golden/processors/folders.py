"""Tiny model folders without weights, their processors and chat templates made as the published folders' are."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MllamaConfig,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests import tiny_qwen

CLIP = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
SIGLIP = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
SIDE = 28  # pixels of a picture or tile

FOLDERS = (
    "llava", "llava_padded", "llava_next", "llava_onevision", "llava_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "internvl", "mllama",
)  # fmt: skip
VICUNA = ("llava", "llava_padded", "llava_next")
STILL = (*VICUNA, "mllama")  # take no videos
TOGETHER = ("llava_onevision", "qwen3_vl", "internvl")  # written as transformers 5 does: all settings in one file
FIRST = {"llava": "<s>", "llava_padded": "<s>", "llava_next": "<s>", "mllama": "<|begin_of_text|>"}

# What the published templates write for an image and for a video.
MARKS = {
    "internvl": ("<IMG_CONTEXT>\n", "<video>\n"),
    "mllama": ("<|image|>", ""),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), tuple(
        f"<|vision_start|>{pad}<|vision_end|>" for pad in ("<|image_pad|>", "<|video_pad|>")
    )),
    **dict.fromkeys((*VICUNA, "llava_onevision", "llava_video"), ("<image>\n", "<video>\n")),
}  # fmt: skip


def tokenizer(family: str, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """Bytes and special tokens; Llama's put their first token before every text."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", *special])
    if bos := FIRST.get(family):
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=template(family), extra_special_tokens=named,
    )  # fmt: skip


def template(family: str) -> str:
    """Media as MARKS say, first (LLaVA) or where they stand, in turns as the published templates write them."""
    image, video = MARKS[family]
    media = f"{{% if c['type'] == 'image' %}}{image}{{% elif c['type'] == 'video' %}}{video}{{% endif %}}"
    text = "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    loop = "{% for c in m['content'] %}%s{% endfor %}"
    items = loop.replace("%s", media) + loop.replace("%s", text)
    if not family.startswith("llava"):
        items = loop.replace("%s", media + text)
    content = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + items + "{% endif %}"
    if family in VICUNA:
        return (
            "{% for m in messages %}{{ m['role'].upper() }}: " + content + " {% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        )
    first = "{{ bos_token }}" if family == "mllama" else ""
    return (
        first + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + content + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def question(family: str, items: list[str]) -> str:
    """What a fastpo row says for the same conversation."""
    newline = "\n" * MARKS[family][0].endswith("\n")
    marks = {".png": f"<image>{newline}", ".gif": f"<video>{newline}"}
    return "".join(marks.get(item[-4:], item) for item in items)


def made(family: str) -> tuple[Any, Any]:
    """(configuration, processor) of a tiny folder."""
    names = ["<s>", "<|begin_of_text|>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>", "<|image|>"]
    named = {}
    if family == "internvl":
        named = dict(start_image_token="<img>", end_image_token="</img>")
        named |= dict(context_image_token="<IMG_CONTEXT>", video_token="<video>")
    talk = tokenizer(family, [*tiny_qwen.SPECIAL, *names], **named)
    ids = talk.get_vocab()
    square, heads = dict(height=SIDE, width=SIDE), dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    text: dict[str, Any] = heads | dict(vocab_size=300, num_key_value_heads=2)
    tower: dict[str, Any] = heads | dict(image_size=SIDE, patch_size=7)
    clip: dict[str, Any] = dict(
        vision_config=tower | dict(model_type="clip_vision_model"), text_config=text | dict(model_type="llama"),
        image_token_id=ids["<image>"],
    )  # fmt: skip
    crop = dict(size=dict(shortest_edge=SIDE), crop_size=square, **CLIP)
    counted = dict(patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    if family in ("llava", "llava_padded"):  # llava-hf's folders, and the authors' way
        pixel = CLIPImageProcessor(**crop) if family == "llava" else LlavaImageProcessor(do_pad=True, **crop)
        return LlavaConfig(**clip), LlavaProcessor(pixel, talk, chat_template=talk.chat_template, **counted)
    if family == "llava_next":
        shapes = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
        pixel = LlavaNextImageProcessor(image_grid_pinpoints=shapes, **crop)
        config = LlavaNextConfig(**clip, image_grid_pinpoints=shapes)
        return config, LlavaNextProcessor(pixel, talk, chat_template=talk.chat_template, **counted)
    if family in ("llava_onevision", "llava_video"):
        shapes = [[SIDE * h, SIDE * w] for h in range(1, 5) for w in range(1, 5)]
        config = LlavaOnevisionConfig(
            vision_config=tower | dict(model_type="siglip_vision_model"), text_config=text | dict(model_type="qwen2"),
            image_token_id=ids["<image>"], video_token_id=ids["<video>"], image_grid_pinpoints=shapes,
            vision_aspect_ratio="anyres_max_3", vision_feature_select_strategy="full",
        )  # fmt: skip
        return config, LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=shapes, **SIGLIP), talk,
            LlavaOnevisionVideoProcessor(size=square, **SIGLIP), num_image_tokens=16,
            vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_3", chat_template=talk.chat_template,
        )  # fmt: skip
    if family == "internvl":
        config = InternVLConfig(
            vision_config=tower | dict(image_size=[SIDE, SIDE], patch_size=[7, 7]),
            text_config=text | dict(model_type="qwen2"), image_token_id=ids["<IMG_CONTEXT>"], downsample_ratio=0.5,
            image_seq_length=4,
        )  # fmt: skip
        return config, InternVLProcessor(
            GotOcr2ImageProcessor(size=square, max_patches=6, **IMAGENET), talk,
            InternVLVideoProcessor(size=square, **IMAGENET), image_seq_length=4, chat_template=talk.chat_template,
        )  # fmt: skip
    if family == "mllama":
        config = MllamaConfig(
            vision_config=dict(image_size=SIDE, patch_size=14, max_num_tiles=4, hidden_size=8, num_hidden_layers=1),
            text_config=text | dict(model_type="mllama_text_model", bos_token_id=0, eos_token_id=1, pad_token_id=1),
            image_token_index=ids["<|image|>"],
        )  # fmt: skip
        pixel = MllamaImageProcessor(size=square, **SIGLIP)
        return config, MllamaProcessor(pixel, talk, chat_template=talk.chat_template)
    config = tiny_qwen.config(family)
    for mark, key in zip(tiny_qwen.SPECIAL, ("vision_start", "vision_end", "image", "video"), strict=True):
        setattr(config, f"{key}_token_id", ids[mark])
    kind, film = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[family]
    shared: dict[str, Any] = dict(patch_size=config.vision_config.patch_size, **CLIP)
    pixel = Qwen2VLImageProcessor(size=dict(shortest_edge=1600, longest_edge=6000), **shared)
    films = film(size=dict(shortest_edge=3000, longest_edge=5000 if family != "qwen3_vl" else 22000), **shared)
    return config, kind(pixel, talk, films, chat_template=talk.chat_template)


def write_folder(folder: Path, family: str) -> None:
    """The small files of a model folder, as transformers 5 writes them, or in a file each as those before did."""
    config, whole = made(family)
    config.save_pretrained(folder)
    whole.save_pretrained(folder)
    if family not in TOGETHER:
        (folder / "processor_config.json").unlink()
        settings = {k: v for k, v in whole.to_dict().items() if not isinstance(v, dict)}
        (folder / "processor_config.json").write_text(json.dumps(settings, indent=1))
        whole.image_processor.save_pretrained(folder)
        if hasattr(whole, "video_processor"):
            whole.video_processor.save_pretrained(folder)
