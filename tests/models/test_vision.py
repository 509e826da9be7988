import math
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch

from fastpo.config import Batch, Data, Model, Source
from fastpo.data.loader import Feed
from fastpo.data.pack import pack
from fastpo.models import FAMILIES, llava_video
from fastpo.models.vision import chunk_frames
from fastpo_kernels.vision_splice import vision_splice
from tests import parity, tiny, tiny_families
from tests.memory import peak_bytes
from tests.test_fit import RECIPE, options, rows
from tests.test_fit import run as fit_rows

FRAMES = (16, 64, 256)


def encoder(model):
    """Tower, projector, and the pooled frames, 20 tokens each, spliced into a row of their own."""

    def encode(pixels):
        sight = model.model
        x = (pixels / 255 - 0.5).to(sight.image_newline.dtype)
        features = sight.multi_modal_projector(sight.vision_tower(x).last_hidden_state)
        row = features.new_empty(20 * len(pixels), features.shape[2])
        return vision_splice(row, features, sight.image_newline, 20 * torch.arange(len(pixels)))

    return encode


def some_pixels(frames):
    shape = (frames, 3, tiny.SIZE, tiny.SIZE)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def trained_sight(model):
    return {k: p for k, p in model.named_parameters() if "language_model" not in k and "lm_head" not in k}


def loss(features):
    return (features * torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view(features.shape)).sum()


@pytest.mark.parametrize("frames, chunk, calls", [(5, 2, 1), (5, 8, 1), (5, 1, 1), (5, 2, 4), (2, 2, 5)])
def test_values_and_gradients_equal_one_call(frames, chunk, calls):
    """(2, 2, 5): more calls than frames, as a rank beside one with a longer video has."""
    model = tiny.model(packed=True, dtype=torch.float64)
    pixels, counted = some_pixels(frames), []

    def encode(part):
        counted.append(len(part))
        return encoder(model)(part)

    want = encoder(model)(pixels)
    loss(want).backward()
    gradients = {k: p.grad for k, p in trained_sight(model).items()}
    for recompute in (False, True):
        model.zero_grad()
        counted.clear()
        got = chunk_frames(encode, pixels, chunk, recompute=recompute, calls=calls)
        assert len(counted) == max(calls, math.ceil(frames / chunk)) and max(counted) <= chunk
        assert got.requires_grad == recompute
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    once = len(counted)
    loss(got).backward()
    assert len(counted) == 2 * once
    for name, parameter in trained_sight(model).items():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=name)


def test_randomness_of_the_tower_is_repeated():
    """The backward sees the mask that the forward drew: d(sum of kept) / dw = sum of the inputs that were kept."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    pixels = torch.arange(1.0, 65.0, dtype=torch.float64)[:, None]
    torch.manual_seed(0)
    out = chunk_frames(lambda part: torch.dropout(part * w, 0.5, True), pixels, 8, recompute=True)
    out.sum().backward()
    torch.testing.assert_close(w.grad, out.detach().sum())


def curve(run, times):
    """Peak bytes beside the pixels and `times` the result, by number of frames."""
    found = {}
    for frames in FRAMES:
        pixels = some_pixels(frames)
        found[frames] = peak_bytes(partial(run, pixels)) - times * frames * 20 * 48 * 4
    return found


def test_memory_without_gradient_is_flat_in_frames():
    model = tiny.model(packed=True).requires_grad_(False)
    made = curve(lambda pixels: chunk_frames(encoder(model), pixels, 8, recompute=False), 1)
    whole = curve(encoder(model), 1)
    print(f"bytes beside the result: {made}, in one call {whole}")
    assert made[256] == made[64] == made[16]
    assert whole[256] > 10 * whole[16]


def test_memory_with_gradient_is_flat_in_frames():
    """Twice the result is there: with its parts as they are joined, and with its gradient."""
    model = tiny.model(packed=True)

    def step(features):
        features.backward(torch.ones_like(features))
        model.zero_grad()

    made = curve(lambda pixels: step(chunk_frames(encoder(model), pixels, 8, recompute=True)), 2)
    print(f"bytes beside twice the result: {made}")
    assert made[256] == made[64] == made[16]
    assert peak_bytes(lambda: step(encoder(model)(some_pixels(64)))) > 5 * made[64]


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_families_in_chunks_of_pictures(tmp_path, name):
    cfg = Model(path=str(tiny_families.write(tmp_path / "model", name)), family=name, dtype="float32")
    family: Any = FAMILIES[name]
    p, model = family.processor(cfg), family.load(cfg)
    items = [parity.image(tmp_path, width, height) for width, height in [(50, 20), (20, 44)]]
    if name == "llava_onevision":
        items.append(parity.video(tmp_path, 40, 24))
    question = " ".join(f"<{item.kind}>" for item in items)
    samples = [parity.sample("a", question, items, "yes"), parity.sample("b", "<image>", items[:1], "no")]
    row = pack(parity.decoded(family, p, samples), family.blank(p))
    chunked = partial(chunk_frames, chunk=2, recompute=False)
    with torch.no_grad():
        want = family.vision(model, p, row.pixels, row.grid)
        got = family.vision(model, p, row.pixels, row.grid, apply=chunked)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_llava_video_in_chunks_of_frames():
    model, pixels, p = tiny.model(packed=True), some_pixels(5), cast(Any, tiny.processor())
    want = llava_video.vision(model, p, pixels, torch.zeros(0))
    chunked = partial(chunk_frames, chunk=2, recompute=True)
    got = llava_video.vision(model, p, pixels, torch.zeros(0), apply=chunked)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_ranks_agree_on_the_calls_of_the_tower(demo, tmp_path, two_ranks):
    """Three videos of four frames in a step on two ranks, the projector trained, ZeRO-3: 3 calls for 8 frames, and as
    many on the rank with 4."""
    more = ["batch.prompts=3", "optim.steps=2", "optim.warmup=0", "reference.mode=copy", "model.train_projector=true"]
    found = fit_rows(demo, tmp_path / "whole", *more)
    chunks = ["model.frames_per_chunk=3", "model.mlp_tile=64"]
    two_ranks(str(RECIPE), *options(demo, tmp_path / "chunked", *more, *chunks))
    for one, two in zip(found, rows(tmp_path / "chunked"), strict=True):
        for name in ("loss", "kl", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-9)


def test_calls_of_a_row_follow_from_its_patches():
    """The blank image of llava_video is one frame; here it is three pictures, as of a family with tiles."""
    batch = Batch(prompts=1, tokens=100)
    data = Data(train=Source(name="rrpo", path="a.json"))
    feed = Feed(
        data=data, encode=lambda _: tiny.blank(), pixels=lambda _: None, blank=tiny.blank(), batch=batch, rank=0,
        ranks=1, frames_per_chunk=3,
    )  # fmt: skip
    assert [feed.calls(49 * frames) for frames in (0, 1, 3, 4, 7)] == [1, 1, 1, 2, 3]
    assert replace(feed, frames_per_chunk=None).calls(49 * 7) == 1
    three = replace(feed.blank, pixels=some_pixels(3), patches=3 * 49)
    assert [replace(feed, blank=three, frames_per_chunk=2).calls(49 * f) for f in (0, 1, 4, 5)] == [2, 2, 2, 3]
