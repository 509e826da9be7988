"""The backward of a trainable head, on any device: the logits again, some columns of all rows at a time.

So every slice of the head's gradient comes whole out of one GEMM, is rounded once from its fp32, and needs no fp32
[V, H] that chunks of rows would each read and write. What is summed over slices is the gradient of hidden, [n, H].

GEMM passes: logits 1, reference logits 1 for the rows with KL, d hidden 1, d weight 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo_kernels.token_stats.chunked import (
    Coefficients,
    Normalisers,
    add_mm,
    bend,
    columns,
    less_target,
    mm,
    operand,
    slope_of,
    tile_size,
)
from fastpo_kernels.token_stats.reference import Inputs, accumulator
from fastpo_kernels.types import TokenStats

ALIGNED = 64  # columns: rows of a tile then begin where tensor cores and 16-byte loads want them, whatever n is


class Live(NamedTuple):
    """What the gradient of n rows needs beside their logits; the first m of them have a KL."""

    target: Tensor  # [n] as a column of the slice; it may lie outside
    logp: Tensor  # [n]
    top: Tensor  # [n] see Normalisers
    log_sum: Tensor  # [n]
    g_logp: Tensor  # [n] coefficient of logp
    ref_top: Tensor | None  # [m]; this and what follows is None where no row has it
    ref_log_sum: Tensor | None  # [m]
    g_kl: Tensor | None  # [m]
    g_reverse_kl: Tensor | None  # [m]
    reverse_kl: Tensor | None  # [m]


DLogits = Callable[[Tensor, Tensor | None, Inputs, Live], Tensor]


def backward(
    x: Inputs,
    stats: TokenStats,
    normalisers: Normalisers,
    g: Coefficients,
    wanted: Sequence[bool],
    d_logits: DLogits,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, those `wanted`, in their dtypes. stats, normalisers: of the forward.

    A row whose coefficients are exactly 0 enters no GEMM; finding them costs one sync.
    d_logits: the function of that name here, or one that does the same.
    """
    wide, device = accumulator(x.hidden.dtype), x.hidden.device
    at, paired = _order(x, g)
    here = x._replace(
        hidden=x.hidden[at],
        target=x.target[at] - (0 if x.shard is None else x.shard.first),
        ref_hidden=None if x.ref_hidden is None or not paired else x.ref_hidden[at[:paired]],
    )
    live = _live(here, stats, normalisers, g, at, paired)
    hidden, ref_hidden = _operands(here)
    d_hidden = torch.zeros(len(at), hidden.shape[1], dtype=wide, device=device) if wanted[0] else None
    d_weight = torch.empty_like(x.weight) if wanted[1] else None
    d_bias = torch.empty_like(x.bias) if wanted[2] and x.bias is not None else None
    size = tile_size(max(len(at) + paired, x.hidden.shape[1]), x.hidden)  # of logits, and of d weight in fp32
    size -= size % ALIGNED if size > ALIGNED else 0
    for start in range(0, len(x.weight), size):
        part = _slice(here, slice(start, start + size))
        z, ref_z = _products(hidden, ref_hidden, part, len(at))
        tile = d_logits(z, ref_z, part, live._replace(target=live.target - start))
        if d_bias is not None:
            d_bias[start : start + size] = tile.sum(0, dtype=wide)
        tile = tile.to(part.weight.dtype)
        if d_hidden is not None:
            add_mm(d_hidden, tile, part.weight)
        if d_weight is not None and d_weight.dtype == wide:
            add_mm(d_weight[start : start + size], tile.t(), hidden[: len(at)], beta=0)
        elif d_weight is not None:
            d_weight[start : start + size] = mm(tile.t(), hidden[: len(at)])
    if d_hidden is not None:
        d_hidden = torch.zeros_like(x.hidden).index_copy_(0, at, d_hidden.to(x.hidden.dtype))
    return d_hidden, d_weight, d_bias


def d_logits(z: Tensor, ref_z: Tensor | None, x: Inputs, live: Live) -> Tensor:
    """[n, v] gradient of sum(g_logp logp + g_kl kl + g_reverse_kl reverse_kl) at h W^T + b, for the columns of x.

    z: [n, v] h W^T; ref_z: [m, v] of the reference. Both are overwritten.
    """
    z = bend(z, x)
    slope, log_p = slope_of(z, x), _less(z, live.top, live.log_sum)
    divergence = None
    if ref_z is not None and live.ref_top is not None and live.ref_log_sum is not None:
        log_q, log_p_there = _less(bend(ref_z, x), live.ref_top, live.ref_log_sum), log_p[: len(ref_z)]
        p = log_p_there.exp()
        divergence = torch.zeros_like(p)
        if live.g_reverse_kl is not None and live.reverse_kl is not None:
            gap = (log_p_there - log_q).sub_(live.reverse_kl[:, None])
            divergence.addcmul_(gap.mul_(p), live.g_reverse_kl[:, None])
        if live.g_kl is not None:
            divergence.addcmul_(p.sub_(log_q.exp_()), live.g_kl[:, None])
    columns_and_here = columns(live.target[:, None], z.shape[1])
    tile = less_target(log_p.exp_(), live.logp, *columns_and_here).mul_(-live.g_logp[:, None])
    if divergence is not None:
        tile[: len(divergence)] += divergence
    tile = tile if slope is None else tile.mul_(slope)
    return tile if x.temperature == 1.0 else tile.div_(x.temperature)


def _order(x: Inputs, g: Coefficients) -> tuple[Tensor, int]:
    """Index of the rows with a coefficient, those that have one of a KL first, and how many these are."""
    none = torch.zeros(len(x.hidden), dtype=accumulator(x.hidden.dtype), device=x.hidden.device)
    has_logp, has_kl, has_reverse = torch.stack([none if c is None else c for c in g]).ne(0).cpu()
    paired = torch.zeros(len(x.hidden), dtype=torch.bool)
    for has, rows in ((has_kl, x.kl_rows), (has_reverse, x.reverse_kl_rows)):
        paired = paired if rows is None else paired | (has & rows)
    first, rest = paired.nonzero()[:, 0], (has_logp & ~paired).nonzero()[:, 0]
    return torch.cat([first, rest]).to(x.hidden.device), len(first)


def _live(x: Inputs, stats: TokenStats, normalisers: Normalisers, g: Coefficients, at: Tensor, paired: int) -> Live:
    """x: with the rows `at` only, in that order."""
    with_kl = at[:paired]

    def some(values: Tensor | None) -> Tensor | None:
        return None if values is None or not paired else values[with_kl]

    def coefficient(given: Tensor | None, rows: Tensor | None) -> Tensor | None:
        """0 outside of rows, whatever was given there."""
        return None if given is None or rows is None else some(given.where(rows.to(given.device), 0.0))

    return Live(
        target=x.target,
        logp=stats.logp[at],
        top=normalisers.top[at],
        log_sum=normalisers.log_sum[at],
        g_logp=torch.zeros_like(x.target, dtype=stats.logp.dtype) if g.logp is None else g.logp[at],
        ref_top=some(normalisers.ref_top),
        ref_log_sum=some(normalisers.ref_log_sum),
        g_kl=coefficient(g.kl, x.kl_rows),
        g_reverse_kl=coefficient(g.reverse_kl, x.reverse_kl_rows),
        reverse_kl=some(stats.reverse_kl),
    )


def _less(z: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    """[n, v] log-probabilities of logits, written over them."""
    return z.sub_(top[:, None]).sub_(log_sum[:, None])


def _operands(x: Inputs) -> tuple[Tensor, Tensor | None]:
    """hidden, and ref_hidden; with one head hidden holds both, and in one GEMM their errors cancel in p - q."""
    if x.ref_hidden is not None and x.ref_weight is None:
        return operand(torch.cat([x.hidden, x.ref_hidden])), None
    return operand(x.hidden), None if x.ref_hidden is None else operand(x.ref_hidden)


def _slice(x: Inputs, at: slice) -> Inputs:
    """The columns `at` of the heads, as GEMM operands."""
    return x._replace(
        weight=operand(x.weight[at]),
        ref_weight=None if x.ref_weight is None else operand(x.ref_weight[at]),
        bias=None if x.bias is None else x.bias[at].to(accumulator(x.bias.dtype)),
    )


def _products(hidden: Tensor, ref_hidden: Tensor | None, x: Inputs, rows: int) -> tuple[Tensor, Tensor | None]:
    """[n, v] h W^T, and [m, v] of the reference. hidden, ref_hidden: see _operands."""
    z = mm(hidden, x.weight.t())
    if ref_hidden is not None and x.ref_weight is not None:
        return z, mm(ref_hidden, x.ref_weight.t())
    return z[:rows], z[rows:] if len(z) > rows else None
