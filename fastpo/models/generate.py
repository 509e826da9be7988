"""Sampled answers of a model to one prompt, whose media and text go through it once."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from fastpo.config import Generation
from fastpo.data.pack import pack
from fastpo.models import Family
from fastpo.models.vision import chunk_frames
from fastpo.sample import Encoded, MicroBatch


@torch.no_grad()
def respond(
    model: Any, family: Family, processor: Any, prompt: Encoded, cfg: Generation, *, count: int, seed: int,
    end: int | None = None, cache: DynamicCache | None = None, chunk: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`count` answers as token ids [n_s] int64, each with the token that ends it unless cfg.max_tokens cut it.

    model: the Hugging Face model without wrappers, with all its weights, in eval mode. prompt: decoded; its responses
    are ignored. The prompt is run once and its keys and values are repeated for the answers. seed: of this call alone.
    end: the token that ends an answer, by default the chat template's. cache: `prefilled` of what the prompt begins
    with, all its media included, and not of its last token; it stays as it is. chunk: see `prefilled`.
    """
    device = next(model.parameters()).device
    row = _row(prompt).to(device)
    if cache is None:  # generate runs the last token, for its logits
        cache = prefilled(model, family, processor, _without_last(prompt), chunk=chunk)
    else:
        cache = copy.deepcopy(cache)
    assert cache.get_seq_length() < len(row.ids)
    cache.batch_repeat_interleave(count)
    last: int = processor.chat.end_id if end is None else end
    positions = row.positions[None] if row.positions.ndim == 1 else row.positions[:, None]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        rows = model.generate(
            row.ids.expand(count, -1),
            past_key_values=cache,
            position_ids=positions.expand(*positions.shape[:-2], count, -1),
            attention_mask=torch.ones_like(row.ids).expand(count, -1),
            generation_config=GenerationConfig(
                **_sampling(cfg),
                max_new_tokens=cfg.max_tokens,
                eos_token_id=last,
                pad_token_id=last,
                suppress_tokens=media_tokens(model.config) or None,
            ),
        )
    return tuple(_cut(answer.cpu(), last) for answer in rows[:, len(row.ids) :])


@torch.no_grad()
def prefilled(
    model: Any, family: Family, processor: Any, prompt: Encoded, *, chunk: int | None = None
) -> DynamicCache:  # fmt: skip
    """Keys and values of a decoded prompt, one row. chunk: pictures in one call of the vision tower (of a family of
    config.CHUNKED); None: all."""
    row = _row(prompt).to(next(model.parameters()).device)
    apply = {} if chunk is None else {"apply": partial(chunk_frames, chunk=chunk, recompute=False)}
    features = None if prompt.pixels is None else family.vision(model, processor, row.pixels, row.grid, **apply)
    cache = DynamicCache(config=model.config.get_text_config())
    family.hidden(model, row, features, cache)
    return cache


def extended(prompt: Encoded, ids: Tensor) -> Encoded:
    """The prompt with more text after it. ids: [n] int64."""
    at = prompt.positions
    if at is not None:
        more = int(at[..., -1].max()) + 1 + torch.arange(len(ids))
        at = torch.cat([at, more.expand(*at.shape[:-1], -1)], dim=-1)
    return replace(prompt, prompt=torch.cat([prompt.prompt, ids]), positions=at)


def _without_last(prompt: Encoded) -> Encoded:
    at = prompt.positions
    return replace(prompt, prompt=prompt.prompt[:-1], positions=None if at is None else at[..., :-1])


def _row(prompt: Encoded) -> MicroBatch:
    return pack([replace(prompt, responses=(), weights=None, scores=(), parents=None, trained=None)], None)


def _sampling(cfg: Generation) -> dict[str, Any]:
    if cfg.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k}


def media_tokens(config: Any) -> list[int]:
    """Placeholders of images and videos: in an answer they would stand for pixels that are not there."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return sorted({token for name in names if (token := getattr(config, name, None)) is not None})


def _cut(answer: Tensor, end: int) -> Tensor:
    found = (answer == end).nonzero()
    return answer[: int(found[0, 0]) + 1] if len(found) else answer
