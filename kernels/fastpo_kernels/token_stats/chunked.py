"""token_stats from GEMM tiles over rows, on any device: the logits of all rows never exist at once.

GEMM passes, one being 2 N H V floating-point operations:
    forward                   policy logits 1, reference logits 1 where there is a reference
    frozen head, forward      unit gradient 1, and 1 for the rows that ask for KL; the backward is elementwise
    trainable head, backward  logits 1, reference logits 1 for the rows with KL, d hidden 1, d weight 1
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo_kernels.token_stats.reference import Inputs, accumulator
from fastpo_kernels.types import TokenStats

# fp32 logits of one model in one chunk: 441 rows at V = 152k. A GEMM needs about 266 rows before it stops waiting for
# the weight (H100: 798 TFLOP/s over 3.0 TB/s), and up to six such tiles are alive at once.
TILE_BYTES = 256 << 20
MIN_CUDA_ROWS = 256
HALF = (torch.float16, torch.bfloat16)


class UnitGradient(NamedTuple):
    """d logp_i / d h_i and d kl_i / d h_i: under a frozen head any loss's gradient is a multiple of these rows."""

    logp: Tensor  # [N, H] (onehot(target) - p) W
    kl: Tensor | None = None  # [n, H] (p - q) W
    kl_at: Tensor | None = None  # [n] int64, the rows of kl


Chunk = Callable[[Inputs, torch.dtype | None], tuple[TokenStats, tuple[Tensor | None, Tensor | None]]]
DLogits = Callable[[Inputs, Tensor, Tensor], Tensor]


def forward(x: Inputs, unit_gradient: bool, chunk: Chunk | None = None) -> tuple[TokenStats, UnitGradient | None]:
    """Statistics and, where asked for, the unit gradient: all that the backward of a frozen head needs.

    It is kept in bf16 for bf16 operands, as large as hidden itself, but in fp32 for fp16: u of a confident token (about
    1e-3 x 2e-2) is subnormal there, and the loss scale is multiplied in only later.
    chunk: what computes some rows; None: eager PyTorch.
    """
    chunk = chunk or _chunk
    whole = _operands(x)
    wide = accumulator(x.hidden.dtype)
    keep = (torch.bfloat16 if x.hidden.dtype == torch.bfloat16 else wide) if unit_gradient else None
    chunks = [chunk(_take(whole, at), keep) for at in _split(torch.arange(len(x.hidden)), x)]
    stats, units = zip(*chunks, strict=True)
    joined = TokenStats(*map(_cat, zip(*stats, strict=True)))  # pyright: ignore[reportArgumentType]  # logp is a Tensor
    u, k = map(_cat, zip(*units, strict=True))
    if u is None:
        return joined, None
    return joined, UnitGradient(u, k, None if x.kl_rows is None else _index(x.kl_rows, x.hidden.device))


def unit_backward(unit: UnitGradient, g_logp: Tensor | None, g_kl: Tensor | None) -> Tensor:
    """[N, H] d hidden in fp32 (float64 for float64). g_logp, g_kl: [N] d loss / d logp, d loss / d kl, or None."""
    d_hidden = torch.zeros_like(unit.logp) if g_logp is None else g_logp[:, None] * unit.logp
    if g_kl is None or unit.kl is None or unit.kl_at is None:
        return d_hidden
    d_kl = g_kl[unit.kl_at, None] * unit.kl
    return d_hidden.to(d_kl.dtype).index_add_(0, unit.kl_at, d_kl)


def backward(
    x: Inputs,
    g_logp: Tensor | None,
    g_kl: Tensor | None,
    wanted: Sequence[bool],
    d_logits: DLogits | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias (those `wanted`), the latter two in fp32, by recomputing the logits.

    g_logp, g_kl: [N] or None. A row whose coefficients are exactly 0 enters no GEMM; finding them costs one sync.
    d_logits: what computes the gradient of some rows at h W^T + b; None: eager PyTorch.
    """
    d_logits = d_logits or _d_logits
    whole, wide, device = _operands(x), accumulator(x.hidden.dtype), x.hidden.device
    zeros = torch.zeros(len(x.hidden), dtype=wide, device=device)
    g_logp, g_kl = (zeros if g is None else g for g in (g_logp, g_kl))
    has_logp, has_kl = torch.stack([g_logp != 0, g_kl != 0]).cpu()
    if x.kl_rows is not None:
        whole = whole._replace(kl_rows=x.kl_rows & has_kl)
        has_logp = has_logp | (x.kl_rows & has_kl)
    d_hidden = torch.zeros_like(x.hidden) if wanted[0] else None
    d_weight = torch.zeros(x.weight.shape, dtype=wide, device=device) if wanted[1] else None
    d_bias = torch.zeros(len(x.weight), dtype=wide, device=device) if wanted[2] else None
    for at in _split(has_logp.nonzero()[:, 0], x):
        part, here = _take(whole, at), at.to(device)
        tile = d_logits(part, g_logp[here], g_kl[here])
        if d_bias is not None:
            d_bias += tile.sum(0, dtype=wide)
        tile = tile.to(whole.weight.dtype)
        if d_hidden is not None:
            d_hidden[here] = mm(tile, whole.weight).to(d_hidden.dtype)
        if d_weight is not None:
            _add_mm(d_weight, tile.t(), part.hidden)
    return d_hidden, d_weight, d_bias


def _chunk(x: Inputs, keep: torch.dtype | None) -> tuple[TokenStats, tuple[Tensor | None, Tensor | None]]:
    """Statistics of some rows; with a dtype to keep them in, also their u [n, H] and the k of those with KL."""
    log_p, log_q, slope = _log_probs(x)
    p = log_p.exp()
    logp, entropy = _pick(log_p, x.target), -(p * log_p).sum(-1)
    ref_logp = kl = u = k = None
    if log_q is not None:
        ref_logp = _pick(log_q, x.target)
        if x.kl_rows is not None:
            at = _index(x.kl_rows, p.device)
            log_q = log_q[at]
            values, difference = _kl(log_p[at], log_q, p[at])
            kl = torch.zeros_like(logp).index_copy_(0, at, values)
            if keep is not None:
                k = _pull_back(difference, None if slope is None else slope[at], x).to(keep)
    if keep is not None:
        u = _pull_back(_d_logp(p, logp, x.target), slope, x).to(keep)
    return TokenStats(logp, ref_logp, kl, entropy), (u, k)


def _kl(log_p: Tensor, log_q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """[n] KL(q || p), and [n, V] p - q, its gradient at the logits of p. Overwrites log_q and p.

    Summed as q (log q - log p) + p - q, no term of which is negative: near the reference the terms of the plain sum
    are of first order and cancel, which leaves the rounding of log-sum-exp (1e-6) in a KL that may be as small.
    """
    q = log_q.exp()
    difference = p.sub_(q)
    return log_q.sub_(log_p).mul_(q).add_(difference).sum(-1), difference


def _d_logp(p: Tensor, logp: Tensor, target: Tensor) -> Tensor:
    """[n, V] onehot(target) - p, written over p. Rounding p to the operand dtype first would lose 1 - p(target)."""
    return p.neg_().scatter_(1, target[:, None], -torch.expm1(logp)[:, None])


def _d_logits(x: Inputs, g_logp: Tensor, g_kl: Tensor) -> Tensor:
    """[n, V] gradient of sum(g_logp logp + g_kl kl) at h W^T + b."""
    g_logp, g_kl = g_logp / x.temperature, g_kl / x.temperature
    z = _logits(x.hidden, x.weight, x)
    slope, log_p = _slope(z, x), z.log_softmax(-1)
    p = log_p.exp()
    at = None if x.kl_rows is None else _index(x.kl_rows, p.device)
    p_kl = None if at is None else p[at]
    tile = _d_logp(p, _pick(log_p, x.target), x.target).mul_(g_logp[:, None])
    if at is not None and p_kl is not None and x.ref_hidden is not None:
        q = _logits(x.ref_hidden[at], x.weight if x.ref_weight is None else x.ref_weight, x).softmax(-1)
        tile.index_add_(0, at, p_kl.sub_(q).mul_(g_kl[at, None]))
    return tile if slope is None else tile.mul_(slope)


def _pull_back(tile: Tensor, slope: Tensor | None, x: Inputs) -> Tensor:
    """[n, V] gradient at the logits, overwritten -> [n, H] gradient at hidden."""
    tile = tile if slope is None else tile.mul_(slope)
    return mm(tile.to(x.weight.dtype), x.weight).div_(x.temperature)


def _log_probs(x: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[n, V] log p; log q, with a reference; and the slope of the softcap at the policy's logits."""
    if x.ref_hidden is None:
        z, ref_z = _logits(x.hidden, x.weight, x), None
    elif x.ref_weight is None:  # one GEMM, since with one tiling the rounding errors of p and q cancel in p - q
        z, ref_z = _logits(torch.cat([x.hidden, x.ref_hidden]), x.weight, x).tensor_split(2)
    else:
        z, ref_z = _logits(x.hidden, x.weight, x), _logits(x.ref_hidden, x.ref_weight, x)
    return z.log_softmax(-1), None if ref_z is None else ref_z.log_softmax(-1), _slope(z, x)


def _logits(hidden: Tensor, weight: Tensor, x: Inputs) -> Tensor:
    """[n, V] fp32 (float64 for float64) softcap * tanh((h W^T + b) / softcap) / temperature."""
    z = mm(hidden, weight.t())
    if x.bias is not None:
        z += x.bias
    if x.softcap is not None:
        z = z.div_(x.softcap).tanh_().mul_(x.softcap)
    return z if x.temperature == 1.0 else z.div_(x.temperature)


def _slope(logits: Tensor, x: Inputs) -> Tensor | None:
    """[n, V] 1 - tanh^2, the derivative of the softcap; None without one."""
    return None if x.softcap is None else 1 - (logits * (x.temperature / x.softcap)).square_()


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in fp32 from half operands, which only CUDA multiplies (elsewhere _operand has made them fp32)."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype in HALF else torch.mm(a, b)


def _add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in the fp32 of out."""
    if a.dtype in HALF:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a, b, out=out)


def _operand(x: Tensor) -> Tensor:
    return x if x.is_cuda else x.to(accumulator(x.dtype))


def _operands(x: Inputs) -> Inputs:
    """The heads as GEMM operands: off CUDA a half head is made fp32 once, not once per chunk."""
    return x._replace(
        weight=_operand(x.weight),
        ref_weight=None if x.ref_weight is None else _operand(x.ref_weight),
        bias=None if x.bias is None else x.bias.to(accumulator(x.bias.dtype)),
    )


def _split(rows: Tensor, x: Inputs) -> Iterator[Tensor]:
    """Chunks of a host index of rows; of no rows, one empty chunk."""
    size = TILE_BYTES // (len(x.weight) * accumulator(x.hidden.dtype).itemsize)
    yield from rows.split(max(MIN_CUDA_ROWS if x.hidden.is_cuda else 1, size))


def _take(x: Inputs, at: Tensor) -> Inputs:
    """The rows of a host index, as GEMM operands."""
    here = at.to(x.hidden.device)
    return x._replace(
        hidden=_operand(x.hidden[here]),
        target=x.target[here],
        ref_hidden=None if x.ref_hidden is None else _operand(x.ref_hidden[here]),
        kl_rows=None if x.kl_rows is None else x.kl_rows[at],
    )


def _index(host_mask: Tensor, device: torch.device) -> Tensor:
    return host_mask.nonzero()[:, 0].to(device)


def _pick(log_probs: Tensor, target: Tensor) -> Tensor:
    return log_probs.gather(1, target[:, None])[:, 0]


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None
