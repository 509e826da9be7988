"""Tiny random models and samples that the tests share."""

from types import SimpleNamespace

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from fastpo.models import attention, llava_video
from fastpo.sample import Encoded

VIDEO, IMAGE, VOCABULARY, SIZE, PATCH = 501, 500, 512, 28, 4  # 7 x 7 patches, pooled to 4 x 4: 20 tokens a frame


def model(*, packed: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaOnevisionForConditionalGeneration:
    """A LLaVA-Video-type model; packed: with tree attention, else the plain one. Equal weights for equal seeds."""
    torch.manual_seed(seed)
    text = dict(
        model_type="qwen2", vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    sight = dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, image_size=SIZE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=sight, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    name = attention.register("auto") if packed else "sdpa"
    made = LlavaOnevisionForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": name, "vision_config": "sdpa"}, dtype=dtype
    )
    with torch.no_grad():  # initial biases are 0 and norms 1: move them, or a missing one would pass
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def processor(pooling: str = "bilinear") -> SimpleNamespace:
    """What llava_video needs of a Processor beyond the tokenizer."""
    side = 4 if pooling == "bilinear" else 3
    return SimpleNamespace(
        video_token_id=VIDEO, size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), patches=SIZE // PATCH,
        pooling=pooling, tokens_per_frame=side * (side + 1),
    )  # fmt: skip


def sample(
    key: str, generator: torch.Generator, *, before: int, after: int, frames: int, responses: list[int]
) -> Encoded:
    """Random text around one video of `frames` random frames (0: text only), and responses of these lengths."""

    def text(n: int) -> torch.Tensor:
        return torch.randint(3, 400, (n,), generator=generator)

    p = processor()
    return Encoded(
        key=key,
        prompt=torch.cat([text(before), torch.full((frames * p.tokens_per_frame,), VIDEO), text(after)]),
        responses=tuple(text(n) for n in responses),
        weights=tuple((torch.rand(n, generator=generator) < 0.5).float() for n in responses),
        scores=tuple(float(-i) for i in range(len(responses))),
        patches=frames * (SIZE // PATCH) ** 2,
        pixels=torch.randint(0, 256, (frames, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        if frames
        else None,
    )


def blank() -> Encoded:
    return llava_video.blank(processor())
