"""Tiny random folders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

from fastpo.config import Model
from tests import parity

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
LIMITS = {"qwen2_vl": (3000, 20000), "qwen2_5_vl": (3000, 20000), "qwen3_vl": (3000, 50000)}  # pixels


def config(kind: str) -> Any:
    text = dict(
        model_type=f"{kind}_text", vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=256, eos_token_id=257, pad_token_id=257,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
    )  # fmt: skip
    tokens = dict(
        vision_start_token_id=258, vision_end_token_id=259, image_token_id=260, video_token_id=261,
        tie_word_embeddings=False,
    )  # fmt: skip
    sight = dict(depth=3, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    if kind == "qwen2_vl":
        return Qwen2VLConfig(
            text_config=text, vision_config=sight | dict(embed_dim=32, hidden_size=48, mlp_ratio=2), **tokens
        )
    sight |= dict(hidden_size=32, out_hidden_size=48, intermediate_size=40)
    if kind == "qwen2_5_vl":
        sight |= dict(window_size=56, fullatt_block_indexes=[1], tokens_per_second=2)
        return Qwen2_5_VLConfig(text_config=text, vision_config=sight, **tokens)
    text["head_dim"] = 12
    text["rope_parameters"]["mrope_interleaved"] = True
    sight |= dict(patch_size=16, num_position_embeddings=25, deepstack_visual_indexes=[0, 2])
    return Qwen3VLConfig(text_config=text, vision_config=sight, **tokens)


def folder(path: Path, kind: str) -> Model:
    """Writes weights, tokenizer and image settings, and returns the section that points there."""
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(config(kind), dtype=torch.float32)
    parity.perturbed(made).save_pretrained(path)
    parity.tokenizer(SPECIAL).save_pretrained(path)
    low, high = LIMITS[kind]
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": low, "longest_edge": high}, patch_size=config(kind).vision_config.patch_size
    ).save_pretrained(path)
    return Model(path=str(path), family=kind, dtype="float32", lora=None)  # pyright: ignore[reportArgumentType]


def plain(cfg: Model) -> Any:
    return AutoModelForImageTextToText.from_pretrained(cfg.path, dtype=torch.float32, attn_implementation="sdpa")
