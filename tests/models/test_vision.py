import math
from functools import partial

import pytest
import torch

from fastpo.models.vision import chunk_frames
from fastpo_kernels.vision_splice import vision_splice
from tests import tiny
from tests.memory import peak_bytes

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
