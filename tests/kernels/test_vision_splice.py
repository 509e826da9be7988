import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpo.models import llava_video
from fastpo_kernels.testing import assert_no_worse
from fastpo_kernels.vision_splice import vision_splice

CHECKS = Path(__file__).parent / "interpreted_vision_splice.py"
KERNELS = Path(__file__).parents[2] / "kernels"
LEAVES = ("embeddings", "features", "newline")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def definition(embeddings, features, newline, starts, pooling):
    """Cell by cell in plain indexing."""
    g = math.isqrt(features.shape[1])
    side = {"bilinear": (g + 1) // 2, "average": g // 2, "none": g}[pooling]
    rows = list(embeddings)

    def taps(i):
        """[(patch, weight)] of cell i along one axis."""
        if pooling == "none":
            return [(i, 1.0)]
        if pooling == "average":
            return [(2 * i, 0.5), (2 * i + 1, 0.5)]
        place = max((i + 0.5) * g / side - 0.5, 0.0)
        low = int(place)
        return [(low, 1 - (place - low)), (min(low + 1, g - 1), place - low)]

    for frame, start in zip(features, starts.tolist(), strict=True):
        where = itertools.count(start)
        for y in range(side):
            for x in range(side):
                rows[next(where)] = sum(
                    a * b * frame[p * g + q] for (p, a), (q, b) in itertools.product(taps(y), taps(x))
                )
            if newline is not None:
                rows[next(where)] = newline
    return torch.stack(rows)


def problem(g, pooling, size, *, frames=2, newline=True, dtype=torch.float64, seed=0):
    """Frames in reverse order with text around each."""
    generator = torch.Generator().manual_seed(seed)
    side = {"bilinear": (g + 1) // 2, "average": g // 2, "none": g}[pooling]
    n = side * (side + newline)
    shapes = ((frames * (n + 1) + 3, size), (frames, g * g, size), (size,))
    made = [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    starts = (n + 1) * torch.arange(frames - 1, -1, -1) + 2
    return *made[:2], made[2] if newline else None, starts


def with_gradients(run, embeddings, features, newline):
    """The result of run and the gradients of a fixed sum of it."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (embeddings, features, newline)]
    out = run(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(upstream.bfloat16().to(out.dtype))  # as bf16, but for tails, exact in fp16
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


GRIDS = [
    (7, "bilinear"), (4, "bilinear"), (1, "bilinear"), (5, "bilinear"),
    (7, "average"), (4, "average"), (3, "none"), (1, "none"),
]  # fmt: skip


@pytest.mark.parametrize("newline", [True, False])
@pytest.mark.parametrize("g, pooling", GRIDS)
def test_equals_the_definition(g, pooling, newline):
    *tensors, starts = problem(g, pooling, 3, newline=newline)
    got = with_gradients(lambda *t: vision_splice(*t, starts, pooling=pooling), *tensors)
    want = with_gradients(lambda *t: definition(*t, starts, pooling), *tensors)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


def plain(embeddings, features, newline, starts, pooling):
    """The model's own frame tokens, assigned to their rows."""
    tokens = llava_video.grid_tokens(features, newline, pooling=pooling)
    n = len(tokens) // len(starts)
    row = embeddings.clone()
    row[torch.cat([torch.arange(s, s + n) for s in starts.tolist()])] = tokens.to(row.dtype)
    return row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g, pooling", [(7, "bilinear"), (27, "bilinear"), (27, "average")])
def test_no_less_exact_than_the_frame_tokens_of_the_model(g, pooling, dtype):
    *tensors, starts = problem(g, pooling, 5, dtype=dtype)
    got = with_gradients(lambda *t: vision_splice(*t, starts, pooling=pooling), *tensors)
    eager = with_gradients(lambda *t: plain(*t, starts, pooling), *tensors)
    doubles = [t.double() for t in tensors]
    exact = with_gradients(lambda *t: plain(*t, starts, pooling), *doubles)
    for name, mine, theirs, want in zip(("result", *LEAVES), got, eager, exact, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(mine, theirs, want, eps=torch.finfo(dtype).eps, what=f"{g} {pooling} {dtype} {name}")


@pytest.mark.parametrize("g, pooling", [(5, "bilinear"), (4, "average"), (2, "none")])
def test_gradcheck(g, pooling):
    *tensors, starts = problem(g, pooling, 2)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: vision_splice(*t, starts, pooling=pooling), leaves)


def test_places_of_tokens_say_the_same_as_starts_of_frames():
    *tensors, starts = problem(7, "bilinear", 4)
    places = torch.cat([torch.arange(s, s + 20) for s in starts.tolist()])
    assert torch.equal(vision_splice(*tensors, places), vision_splice(*tensors, starts))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))  # anywhere, so not only in a run
    moved = vision_splice(*tensors, places.view(2, 20)[:, order].flatten())
    want = vision_splice(*tensors, starts)
    want[places.view(2, 20)[:, order]] = want[places.view(2, 20)]
    assert torch.equal(moved, want)


def test_several_calls_make_the_same_row_and_leave_the_given_one():
    *tensors, starts = problem(7, "bilinear", 4, frames=3)
    whole = with_gradients(lambda *t: vision_splice(*t, starts), *tensors)

    def in_turn(row, features, newline):
        for frame, start in zip(features.split(2), starts.split(2), strict=True):
            row = vision_splice(row, frame, newline, start)
        return row

    before = tensors[0].clone()
    for mine, want in zip(with_gradients(in_turn, *tensors), whole, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-14, atol=1e-14)
    assert torch.equal(tensors[0], before)


def test_result_has_the_dtype_of_the_embeddings_and_gradients_their_own():
    embeddings, features, newline, starts = problem(7, "bilinear", 4, dtype=torch.float32)
    mixed = embeddings.bfloat16(), features, newline.half()
    got = with_gradients(lambda *t: vision_splice(*t, starts), *mixed)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    torch.testing.assert_close(got[0], vision_splice(embeddings, features, newline.half(), starts).bfloat16())


@pytest.mark.parametrize("pooling", ["bilinear", "average", "none"])
def test_no_frames(pooling):
    embeddings, features, newline, starts = problem(7, pooling, 4)
    got = with_gradients(lambda *t: vision_splice(*t, starts[:0], pooling=pooling), embeddings, features[:0], newline)
    assert torch.equal(got[0], embeddings) and not got[3].any()


WRONG = {
    "embeddings": (dict(embeddings=torch.zeros(50, 3)), r"expected embeddings \[T, H\]"),
    "square": (dict(features=torch.zeros(2, 48, 4)), "square grid, got 48 patches"),
    "newline": (dict(newline=torch.zeros(5)), r"newline must be \[4\], got \[5\]"),
    "dtype": (dict(features=torch.zeros(2, 49, 4, dtype=torch.int32)), "features must be of"),
    "pooling": (dict(pooling="max"), "pooling must be one of bilinear, average, none, got 'max'"),
    "too small": (dict(features=torch.zeros(2, 1, 4), pooling="average"), "nothing to pool in a grid of 1 x 1"),
    "count": (dict(at=torch.arange(39)), r"at must be int64 of \[40\] visual tokens or \[2\] frames, got \[39\]"),
    "at's dtype": (dict(at=torch.arange(2).int()), "torch.int32"),
    "outside": (dict(at=torch.tensor([0, 31])), r"at must lie in \[0, 50\)"),
    "negative": (dict(at=torch.tensor([-1, 25])), r"at must lie in \[0, 50\)"),
    "overlap": (dict(at=torch.tensor([0, 19])), "must not name a row twice"),
    "backend": (dict(backend="cuda"), "backend 'cuda' is unknown"),
    "nowhere": (dict(backend="triton"), "cannot run on a cpu tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case):
    change, message = WRONG[case]
    given = dict(
        embeddings=torch.zeros(50, 4), features=torch.zeros(2, 49, 4), newline=torch.zeros(4), at=torch.tensor([0, 21])
    )
    vision_splice(**given)
    with pytest.raises(ValueError, match=message):
        vision_splice(**{**given, **change})


def test_interpreted_kernels_equal_the_definition():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, str(CHECKS)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == CHECKS.read_text().count("\ndef check_")
