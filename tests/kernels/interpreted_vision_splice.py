"""Checks of vision_splice's Triton kernels on the CPU, run by test_vision_splice.py where TRITON_INTERPRET is set."""

import sys

import torch
from torch import Tensor

from fastpo_kernels.testing import max_error, nan_scratch
from fastpo_kernels.vision_splice import launch, vision_splice
from fastpo_kernels.vision_splice.reference import Grid

SIZE = 11  # no multiple of a block
FLOATS = ("embeddings", "features", "newline")
OFF = 2e-6  # of fp32 values of a few units


def problem(g: int, pooling: str, dtype: torch.dtype, *, frames: int, newline: bool) -> dict[str, Tensor | None]:
    """Frames in reverse order, with text before, between and after them."""
    generator = torch.Generator().manual_seed(g)
    n = Grid.of(g, pooling, newline).tokens
    shapes = {"embeddings": (frames * (n + 1) + 2, SIZE), "features": (frames, g * g, SIZE), "newline": (SIZE,)}
    made = {k: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}
    at = (n + 1) * torch.arange(frames - 1, -1, -1) + 1
    return {**made, "newline": made["newline"] if newline else None, "at": at}


def gradients(x: dict[str, Tensor | None], pooling: str, backend: str, trained: tuple[str, ...]) -> dict[str, Tensor]:
    """The result, and the gradients of what is trained."""
    leaves = {k: x[k].clone().requires_grad_() for k in trained if x[k] is not None}
    out = vision_splice(**{**x, **leaves}, pooling=pooling, backend=backend)
    if leaves:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(upstream.half().to(out.dtype))  # exact in every dtype
    return {"result": out.detach()} | {f"d {k}": leaf.grad for k, leaf in leaves.items()}


def compare(g: int, pooling: str, dtype: torch.dtype, *, frames: int, newline: bool, trained: tuple[str, ...]) -> None:
    x = problem(g, pooling, dtype, frames=frames, newline=newline)
    exact = {k: v.double() if v is not None and k in FLOATS else v for k, v in x.items()}
    with nan_scratch():
        got = gradients(x, pooling, "triton", trained)
    want = gradients(exact, pooling, "reference", trained)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == dtype
        bound = OFF if dtype == torch.float32 else torch.finfo(dtype).eps / 2  # rounded once
        error = max_error(got[name], value)
        assert error <= 1.01 * bound * value.abs().max().item(), f"{g} {pooling} {dtype} {name}: error {error:.3g}"


def check_every_pooling() -> None:
    compare(5, "bilinear", torch.float32, frames=1, newline=True, trained=FLOATS)
    compare(3, "average", torch.float32, frames=1, newline=True, trained=FLOATS)
    compare(2, "none", torch.float32, frames=2, newline=True, trained=FLOATS)


def check_small_grids_without_newline() -> None:
    for g, pooling in ((2, "bilinear"), (1, "bilinear"), (1, "none"), (2, "average")):
        compare(g, pooling, torch.float32, frames=1, newline=False, trained=FLOATS)


def check_half_and_several_blocks() -> None:
    launch.BLOCK = 8  # 2 of them, the last of which is not full
    compare(3, "bilinear", torch.float16, frames=1, newline=True, trained=FLOATS)
    launch.BLOCK = 1024


def check_what_is_not_trained() -> None:
    for trained in ((), ("features",), ("newline",), ("embeddings", "newline")):
        compare(2, "bilinear", torch.float32, frames=1, newline=True, trained=trained)


def check_siglip_grid() -> None:
    """The first rows of 27 x 27 patches and 14 x 15 tokens: all places and weights along an axis."""
    x = problem(27, "bilinear", torch.float32, frames=1, newline=True)
    want = gradients(x, "bilinear", "reference", ("features",))
    grid, at = Grid.of(27, "bilinear", True), torch.arange(14 * 15)
    out, d_features = torch.zeros(15, SIZE), torch.zeros(1, 729, SIZE)
    head = launch.splice(out, x["embeddings"], x["features"], x["newline"], at.int(), grid)
    launch.run(head._replace(grid=(15, 1)))
    upstream = torch.randn(212, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).half().float()
    tail = launch.unsplice(upstream, at + 1, at.int(), grid, None, d_features, None)
    launch.run(tail._replace(grid=(27, 1)))
    assert max_error(out, want["result"][1:16]) < OFF
    assert max_error(d_features[:, :27], want["d features"][:, :27]) < OFF


def check_each_its_own_dtype() -> None:
    x = problem(2, "bilinear", torch.float32, frames=1, newline=True)
    x["embeddings"] = x["embeddings"].half()
    got, want = (gradients(x, "bilinear", backend, FLOATS) for backend in ("triton", "reference"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-3)  # compares dtypes too


def check_not_finite_only_where_it_has_weight() -> None:
    """Patch (2, 2) of 5 x 5 is read by the middle token alone, with weight 1; text rows that go are not read."""
    x = problem(5, "bilinear", torch.float32, frames=1, newline=True)
    x["embeddings"][1:13] = torch.inf
    x["features"][0, 12] = torch.inf
    out = vision_splice(**x, backend="triton")
    assert out.isinf().nonzero()[:, 0].unique().tolist() == [1 + 4 + 1] and not out.isnan().any()


def check_no_frames() -> None:
    x = problem(3, "bilinear", torch.float32, frames=1, newline=True)
    x |= {"features": x["features"][:0], "at": x["at"][:0]}
    got = gradients(x, "bilinear", "triton", FLOATS)
    assert torch.equal(got["result"], x["embeddings"])
    assert got["d features"].shape == (0, 9, SIZE) and not got["d newline"].any()


def check_other_strides() -> None:
    x = problem(2, "bilinear", torch.float32, frames=2, newline=True)
    strided = {**x, "features": x["features"].mT.contiguous().mT, "embeddings": x["embeddings"].t().contiguous().t()}
    got, want = (gradients(y, "bilinear", "triton", FLOATS) for y in (strided, x))
    assert all(torch.equal(got[name], want[name]) for name in want)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # once exported, the attribute of that name is the function
    sys.modules["fastpo_kernels.vision_splice"].RUNS["triton"] = lambda embeddings: True
    launch.LINES = 2  # several partial sums, the last of which is not full
    for name in sys.argv[1:] or [name for name in globals() if name.startswith("check_")]:
        globals()[name]()
        print(name, flush=True)
