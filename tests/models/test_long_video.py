"""A video of 256 frames through the whole policy: what grows with frames is the language model's row alone."""

from typing import Any, cast

import torch

from fastpo.config import Lora, Model
from fastpo.data.pack import pack
from fastpo.models import llava_video, trainable
from fastpo.models.policy import Policy
from tests import tiny
from tests.memory import peak_bytes

FRAMES, TOKENS, WIDTH = (16, 64, 256), 20, 48


def curve(chunk, frames):
    """By frames: (peak bytes of a training forward with a frozen tower, of it beside the row).

    The row is the features, and what the language model takes for the reference and for itself once they are there.
    """
    cfg = Model(path="", lora=Lora(r=4, alpha=8), mlp_tile=64)
    model = trainable.prepare(tiny.model(packed=True), llava_video.parts, cfg)
    p = cast(Any, tiny.processor())
    stats = frozenset({"logp", "ref_logp"})
    policy = Policy(model, cast(Any, llava_video), p, mode="adapter_off", stats=stats, frames_per_chunk=chunk).train()
    return {n: peaks(policy, n) for n in frames}


def peaks(policy, frames):
    sample = tiny.sample("a", torch.Generator().manual_seed(0), before=4, after=3, frames=frames, responses=[9, 7])
    batch = pack([sample], tiny.blank())
    with torch.no_grad():
        features = llava_video.vision(policy.core, policy.processor, batch.pixels, batch.grid)
        language = peak_bytes(lambda: [llava_video.hidden(policy.core, batch, features) for _ in range(2)])
    whole = peak_bytes(lambda: policy(batch))
    return whole, whole - language - frames * TOKENS * WIDTH * 4


def test_memory_is_flat_in_frames_but_for_the_row():
    made, at_once = curve(8, FRAMES), curve(None, FRAMES[:2])
    for frames in FRAMES:
        print(f"{frames} frames: {made[frames]} bytes, beside the row, in one call {at_once.get(frames)}")
    assert made[16][1] == made[64][1] == made[256][1] < 4096
    assert at_once[64][1] > 50 * made[64][1]
    assert made[256][0] < 16 * made[16][0]  # and the row grows no faster than its tokens
