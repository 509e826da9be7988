"""What the families' tests share: media files, a tokenizer, and a packed row against the plain model's forwards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastpo.data.pack import pack
from fastpo.models import Family, trainable
from fastpo.models.policy import Policy
from fastpo.sample import Encoded, Media, Response, Sample, Sampling

SAMPLING = Sampling(frames=3)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """Bytes and special tokens, which get the numbers from 256."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", *special])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=TEMPLATE)


def image(folder: Path, width: int, height: int) -> Media:
    """A gradient under noise, in a file."""
    path = folder / f"{width}x{height}.png"
    x = np.indices((height, width)).sum(0)[..., None] * np.array([3, 5, 7])
    noise = np.random.default_rng(width * height).integers(0, 60, (height, width, 3))
    Image.fromarray(((x + noise) % 256).astype(np.uint8)).save(path)
    return Media(kind="image", path=path)


def video(folder: Path, width: int, height: int, frames: int = 12, rate: int = 5) -> Media:
    path = folder / f"{width}x{height}.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(frames):
            x = np.indices((height, width)).sum(0)[..., None] * np.array([2, 3, 4]) + 15 * k
            container.mux(stream.encode(av.VideoFrame.from_ndarray((x % 256).astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return Media(kind="video", path=path)


def sample(key: str, question: str, media: list[Media], *responses: str) -> Sample:
    made = tuple(Response(text=text, score=float(-i)) for i, text in enumerate(responses))
    return Sample(key=key, question=question, media=tuple(media), responses=made)


def decoded(family: Family, processor: Any, samples: list[Sample]) -> list[Encoded]:
    return [
        replace(family.encode(processor, s, SAMPLING), pixels=family.pixels(processor, s, SAMPLING)) for s in samples
    ]


def perturbed(model: Any, *, seed: int = 0) -> Any:
    """Initial biases are 0 and norms 1: move them, or a missing one would pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def separate(plain: Any, samples: list[Encoded], inputs: Callable[[Encoded, Tensor], dict[str, Any]]) -> Tensor:
    """[N] log-probs of all responses, each by a forward of the plain model on prompt and response, media included.

    inputs: what the plain model takes besides the ids [n] of one row.
    """
    found = []
    for s in samples:
        for response in s.responses:
            ids = torch.cat([s.prompt, response])
            logits = plain(input_ids=ids[None], use_cache=False, **inputs(s, ids)).logits[0, len(s.prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
    return torch.cat(found)


def check(
    family: Family,
    processor: Any,
    packed: Any,
    plain: Any,
    samples: list[Encoded],
    inputs: Callable[[Encoded, Tensor], dict[str, Any]],
    *,
    checkpointing: bool = False,
) -> None:
    """Log-probs and gradients of one packed row are those of separate forwards."""
    if checkpointing:
        trainable.enable_checkpointing(packed)
    policy = Policy(packed, family, processor, mode="none", stats=frozenset({"logp"})).train()
    got, want = policy(pack(samples, family.blank(processor))).logp, separate(plain, samples, inputs)
    assert relative(got, want) < 1e-5
    weight = torch.linspace(-1, 2, len(want))
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    ours, checked = dict(packed.named_parameters()), 0
    for name, parameter in plain.named_parameters():
        mine = ours[name].grad
        if parameter.grad is None:  # without media the plain tower never ran; ours ran on the blank image
            assert mine is None or float(mine.abs().max()) == 0, name
            continue
        scale = max(1e-3, float(parameter.grad.abs().max()))
        assert float((mine - parameter.grad).abs().max()) / scale < 1e-5, name
        checked += 1
    assert checked > 15


def check_reference(
    family: Family, processor: Any, adapted: Any, plain: Any, samples: list[Encoded], inputs: Callable[..., Any]
) -> None:
    """A model with adapters (moved from 0): without them it is the plain model."""
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    stats = frozenset({"logp", "ref_logp"})
    found = Policy(adapted, family, processor, mode="adapter_off", stats=stats).train()(
        pack(samples, family.blank(processor))
    )
    assert found.ref_logp is not None and not found.ref_logp.requires_grad
    assert relative(found.ref_logp, separate(plain, samples, inputs)) < 1e-5
    assert relative(found.logp, found.ref_logp) > 1e-3
    found.logp.sum().backward()
    with torch.no_grad():
        assert relative(found.logp, separate(adapted, samples, inputs)) < 1e-5
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)


def relative(got: Tensor, want: Tensor) -> float:
    return float(((got - want).abs().max() / want.abs().max()).detach())
