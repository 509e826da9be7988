"""tree_attention with Triton: shared keys are read where they lie."""

from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo_kernels.tree_attention import kernel, work
from fastpo_kernels.tree_attention.work import Span, Work
from fastpo_kernels.triton_launch import Launch, run
from fastpo_kernels.types import Plan


class Config(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """Of the three kernels."""

    forward: Config
    d_queries: Config
    d_keys: Config


# Of fp16 and bf16, by (capability, head size rounded up to a power of two, at least 64). Chosen by what the compiler
# reports, none of it timed: no spilled bytes, tensor cores, and on sm_80 up to D = 128 at most the 99 KiB of shared
# memory of sm_86 and sm_89.
HALF = {
    (80, 64): Configs(Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(32, 128, 8, 3)),
    (80, 128): Configs(Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)),
    (80, 256): Configs(Config(64, 64, 8, 2), Config(64, 64, 8, 1), Config(32, 64, 8, 1)),
    (90, 64): Configs(Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 128, 8, 3)),
    (90, 128): Configs(Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
    (90, 256): Configs(Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(16, 64, 8, 3)),
}
# Of fp32, whose exact products no tensor core makes: for comparisons, not for speed. d_queries spills 4 to 248
# bytes.
FULL = Configs(Config(16, 16, 4, 1), Config(16, 16, 8, 1), Config(16, 16, 4, 1))


class Inputs(NamedTuple):
    q: Tensor  # [T, heads, D], contiguous like k and v
    k: Tensor  # [T, kv_heads, D]
    v: Tensor
    scale: float


class Saved(NamedTuple):
    out: Tensor  # [T, heads, D]
    lse: Tensor  # [heads, T] fp32, log2 of the sum of 2^z


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """See tree_attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, plan.spans, scale)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: tuple[tuple[Span, ...], ...], scale: float) -> Tensor:
        x = Inputs(q.contiguous(), k.contiguous(), v.contiguous(), scale)
        saved = Saved(torch.empty_like(x.q), torch.empty(q.shape[1], len(q), device=q.device))
        ctx.configs = configs(x, _capability(q.device))
        if len(q):
            met = work.of_queries(spans, ctx.configs.forward.block_q, q.device)
            run(forward(x, saved, met, ctx.configs.forward))
        ctx.save_for_backward(*x[:3], *saved)
        ctx.spans, ctx.scale = spans, scale
        return saved.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *saved = ctx.saved_tensors
        x, saved, g = Inputs(q, k, v, ctx.scale), Saved(*saved), g.contiguous()
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        if len(q):
            _, of_queries, of_keys = ctx.configs
            delta = torch.empty_like(saved.lse)
            met = work.of_queries(ctx.spans, of_queries.block_q, q.device)
            run(d_queries(x, saved, g, delta, dq, met, of_queries))
            met = work.of_keys(ctx.spans, of_keys.block_k, q.device)
            run(d_keys(x, saved.lse, g, delta, dk, dv, met, of_keys))
        return dq, dk, dv, None, None


def configs(x: Inputs, capability: int) -> Configs:
    """capability: 80 or 90."""
    return FULL if x.q.dtype == torch.float32 else HALF[capability, max(64, _padded(x))]


def _capability(device: torch.device) -> int:
    """80 also for Triton's interpreter."""
    return 90 if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else 80


def _padded(x: Inputs) -> int:
    """The head size, rounded up to a power of two."""
    return 1 << (x.q.shape[-1] - 1).bit_length()


def forward(x: Inputs, saved: Saved, met: Work, config: Config) -> Launch:
    """Fills saved. met: of queries."""
    args = {"q_ptr": x.q, "k_ptr": x.k, "v_ptr": x.v, "out_ptr": saved.out, "lse_ptr": saved.lse}
    return _launch(kernel.forward, x, x.q.shape[1], met, config, args)


def d_queries(x: Inputs, saved: Saved, g: Tensor, delta: Tensor, dq: Tensor, met: Work, config: Config) -> Launch:
    """Fills delta, like lse, and dq. g: gradient of the output."""
    args = {"q_ptr": x.q, "k_ptr": x.k, "v_ptr": x.v, "out_ptr": saved.out, "g_ptr": g, "lse_ptr": saved.lse}
    args |= {"delta_ptr": delta, "dq_ptr": dq, "d_scale": x.scale}
    return _launch(kernel.d_queries, x, x.q.shape[1], met, config, args)


def d_keys(
    x: Inputs, lse: Tensor, g: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, met: Work, config: Config
) -> Launch:
    """Fills dk and dv. delta: that of d_queries, so that it runs after it. met: of keys."""
    args = {"q_ptr": x.q, "k_ptr": x.k, "v_ptr": x.v, "g_ptr": g, "lse_ptr": lse, "delta_ptr": delta}
    args |= {"dk_ptr": dk, "dv_ptr": dv, "d_scale": x.scale}
    return _launch(kernel.d_keys, x, x.k.shape[1], met, config, args)


def _launch(function: Any, x: Inputs, heads: int, met: Work, config: Config, args: dict[str, Any]) -> Launch:
    """heads: those that a program is launched for."""
    sizes = {
        "blocks_ptr": met.blocks,
        "spans_ptr": met.spans,
        "low_ptr": met.low,
        "tokens": len(x.q),
        "heads": x.q.shape[1],
        "kv_heads": x.k.shape[1],
        "scale": x.scale / log(2),
        "D": x.q.shape[-1],
        "BLOCK_D": _padded(x),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
    }
    return Launch(function, (heads, len(met.blocks)), args | sizes, config.num_warps, config.num_stages)
