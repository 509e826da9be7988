"""Checks of token_stats' Triton kernels on the CPU, run by test_triton_token_stats.py where TRITON_INTERPRET is set.

Triton reads that variable as it defines kernels, so that a process has either interpreted or compiled ones.
"""

import itertools
import sys

import torch
from torch import Tensor

from fastpo_kernels import token_stats
from fastpo_kernels.testing import max_error, nan_scratch
from fastpo_kernels.token_stats import chunked, launch
from fastpo_kernels.token_stats.reference import Inputs, stats
from fastpo_kernels.token_stats.trained import Live

N, V = 5, 531  # no multiple of a block
EPS = 2e-6  # of fp32 logits of a few units
FLOATS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight")
SOME, OTHERS = torch.arange(N) % 3 == 1, torch.arange(N) % 2 == 0  # rows of one, of the other, and of both


def rounded(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).to(dtype)


def problem(
    size: int, dtype: torch.dtype, *, own: bool, extras: bool, kl_rows: Tensor | None, reverse: Tensor | None = None
) -> Inputs:
    return Inputs(
        hidden=rounded(0, N, size, dtype=dtype),
        weight=rounded(1, V, size, dtype=dtype, scale=2 / size**0.5),
        bias=rounded(2, 2 * V, dtype=dtype)[::2] if extras else None,  # not contiguous
        target=torch.tensor([0, V - 1, 511, 512, 256]),  # both sides of the edges of blocks
        ref_hidden=rounded(3, N, size, dtype=dtype),
        ref_weight=rounded(4, V, size, dtype=dtype, scale=2 / size**0.5) if own else None,
        kl_rows=kl_rows,
        softcap=3.0 if extras else None,
        temperature=0.7 if extras else 1.0,
        reverse_kl_rows=reverse,
    )


def exact(x: Inputs) -> Inputs:
    return x._replace(**{k: None if getattr(x, k) is None else getattr(x, k).double() for k in FLOATS})


def check(got: object, want: object, bound: float, what: str) -> None:
    assert isinstance(got, Tensor) == isinstance(want, Tensor), f"{what}: {got} for {want}"
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        error = max_error(got, want)
        assert error <= bound * (1 + want.abs().max().item()), f"{what}: error {error:.3g}"


def check_registers() -> None:
    """Values where logits stay in registers, with and without TMA descriptors."""
    cases = itertools.product((torch.float32, torch.float16), (False, True), (None, SOME))
    for at, (dtype, tma, kl_rows) in enumerate(cases):
        own = tma == (dtype == torch.float32)
        x = problem(launch.BLOCK_H * (1 + at % 2), dtype, own=own, extras=at % 3 > 0, kl_rows=kl_rows)
        with nan_scratch():
            got = launch.register_stats(x, tma, processors=1).stats
        for name, mine, want in zip(got._fields, got, stats(exact(x)), strict=True):
            check(mine, want, EPS, f"registers {dtype} tma={tma} own={own} kl={kl_rows is not None}: {name}")


def gradients(x: Inputs, trained: tuple[str, ...], backend: str) -> dict[str, Tensor]:
    leaves = {k: getattr(x, k).clone().requires_grad_() for k in trained}
    given = x._replace(**leaves)._asdict()
    with nan_scratch():
        out = token_stats(given.pop("hidden"), given.pop("weight"), given.pop("target"), backend=backend, **given)
        loss = (out.logp * rounded(6, N, dtype=out.logp.dtype)).sum()
        for seed, divergence in ((7, out.kl), (9, out.reverse_kl)):
            loss = loss if divergence is None else loss + (divergence * rounded(seed, N, dtype=out.logp.dtype)).sum()
        loss.backward()
    made = {k: v.detach() for k, v in out._asdict().items() if v is not None}
    return made | {f"d {k}": leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}


def check_tiles() -> None:
    """Values and gradients of the public function over fp32 tiles, frozen and trainable head, in several chunks."""
    wishes = ((None, None), (SOME, None), (None, OTHERS), (SOME, OTHERS))
    for at, (trained, (kl_rows, reverse)) in enumerate(itertools.product((("hidden",), ("hidden", "weight")), wishes)):
        extras, own = at % 3 > 0, at in (1, 2, 4, 7)
        x = problem(11, torch.float32, own=own, extras=extras, kl_rows=kl_rows, reverse=reverse)
        trained = (*trained, "bias") if extras and len(trained) > 1 else trained
        got, want = gradients(x, trained, "triton"), gradients(exact(x), trained, "reference")
        assert got.keys() == want.keys()
        for name, value in want.items():
            check(got[name], value, EPS, f"tiles {trained} {own=} {kl_rows=} {reverse=}: {name}")


def trained_tile(x: Inputs, dtype: torch.dtype) -> Tensor:
    """[N, V] of the kernel of a trained head, every row with every coefficient."""
    z, ref_z, ones = x.hidden @ x.weight.t(), x.ref_hidden @ x.ref_weight.t(), torch.ones(N)
    policy, reference = (-0.5 * ones, 2.5 * ones, 0.6 * ones, 0.7 * ones), (2.0 * ones, ones, 0.6 * ones, -0.9 * ones)
    live = Live(x.target, *policy, *reference, reverse_kl=0.2 * ones)
    u = launch.in_place(z, dtype)
    launch.run(launch.columns(z, ref_z, x, live, u))
    return u


def check_half_tiles_in_place() -> None:
    """The half rows that replace fp32 ones are those of the fp32 kernel, rounded."""
    x = problem(11, torch.float32, own=True, extras=True, kl_rows=SOME, reverse=OTHERS)
    order = torch.cat([SOME.nonzero()[:, 0], (~SOME).nonzero()[:, 0]])
    made = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        z, ref_z = x.hidden @ x.weight.t(), x.ref_hidden[order] @ x.ref_weight.t()
        u, k = launch.in_place(z, dtype), launch.in_place(ref_z, dtype)
        r = torch.full((int(OTHERS.sum()), V), torch.nan, dtype=dtype)
        launch.run(launch.rows(z, ref_z, x, order, torch.empty(9, N), u=u, k=k, r=r))
        made[dtype] = u, k[: int(SOME.sum())], r, trained_tile(x, dtype)
    for dtype, ulp in ((torch.float16, 0.0), (torch.bfloat16, 2**-7)):  # the interpreter truncates to bf16
        for mine, want in zip(made[dtype], made[torch.float32], strict=True):
            torch.testing.assert_close(mine, want.to(dtype), rtol=ulp, atol=0.0)


def check_near_the_reference() -> None:
    """A KL of 1e-4 keeps three digits in either way and direction, and its gradient; one of equal models is 0."""
    rows = torch.ones(N, dtype=torch.bool)
    x = problem(64, torch.float32, own=False, extras=False, kl_rows=rows, reverse=rows)
    x = x._replace(ref_hidden=x.hidden + 0.01 * rounded(8, N, 64, dtype=torch.float32))
    tile, unit, _ = launch.forward(x, True)
    want, exact_unit, _ = chunked.forward(exact(x), True)
    register = launch.register_stats(x._replace(reverse_kl_rows=None), True, 1).stats.kl
    assert want.kl is not None and unit is not None and exact_unit is not None
    assert 1e-5 < want.kl.min() and want.kl.max() < 1e-3
    for name, got, value in (
        ("tile", tile.kl, want.kl),
        ("tile, reverse", tile.reverse_kl, want.reverse_kl),
        ("registers", register, want.kl),
        ("d KL", unit.kl, exact_unit.kl),
        ("d reverse KL", unit.reverse_kl, exact_unit.reverse_kl),
    ):
        assert got is not None and value is not None
        got, value = (t if t.ndim == 2 else t[:, None] for t in (got, value))
        error = ((got - value).norm(dim=1) / value.norm(dim=1)).max()
        assert error < 1e-3, f"{name}: off by {error:.2g} of itself"
    same = x._replace(ref_hidden=x.hidden)
    for got in (launch.register_stats(same, False, 1).stats.kl, launch.forward(same, False).stats.reverse_kl):
        assert got is not None and got.abs().max() < 1e-9


def check_confident_and_far() -> None:
    """1 - p(target) of confident tokens, a model far from the reference, and logits shifted against it by 200."""
    rows = torch.ones(N, dtype=torch.bool)
    x = problem(33, torch.float32, own=True, extras=False, kl_rows=rows, reverse=rows)
    shifted = {k: getattr(x, k).clone() for k in ("hidden", "weight", "ref_weight")}
    for name, value in {"hidden": 200, "weight": 1, "ref_weight": 1}.items():
        shifted[name][:, 0] = value
    toward = x.weight[x.target] / x.weight[x.target].square().sum(-1, keepdim=True)
    for name, case in {
        "confident": x._replace(hidden=20 * toward + 0.1 * x.hidden),
        "far": x._replace(hidden=6 * x.hidden, ref_hidden=-6 * x.hidden),
        "shifted": x._replace(**shifted),
    }.items():
        got, want = gradients(case, ("hidden",), "triton"), gradients(exact(case), ("hidden",), "reference")
        for key, value in want.items():
            check(got[key], value, 8 * EPS, f"{name}: {key}")  # an fp32 logit of 200 is off by 1e-5
        if name == "confident":
            off = ((got["logp"] - want["logp"]) / want["logp"]).abs().max().item()
            assert want["logp"].max() > -1e-3 and off < 5e-3, f"confident: logp off by {off:.2g} of itself"


def check_no_rows() -> None:
    x = problem(64, torch.float32, own=True, extras=False, kl_rows=SOME[:0])
    x = x._replace(hidden=x.hidden[:0], target=x.target[:0], ref_hidden=rounded(3, 0, 64, dtype=torch.float32))
    assert [t.shape for t in launch.register_stats(x, False, 1).stats[:4]] == [(0,)] * 4
    hidden = x.hidden.clone().requires_grad_()
    token_stats(hidden, x.weight, x.target, backend="triton").logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # the attribute of that name is the function
    sys.modules["fastpo_kernels.token_stats"].RUNS["triton"] = lambda hidden: True
    chunked.TILE_BYTES = 3 * V * 4  # 3 rows of 5
    launch.ROWS_BLOCK = 256  # 3 blocks, the last of which is not full
    for name in sys.argv[1:] or [name for name in globals() if name.startswith("check_")]:
        globals()[name]()
        print(name, flush=True)
