"""token_stats from GEMM tiles over rows, on any device: the logits of all rows never exist at once.

GEMM passes, one being 2 N H V floating-point operations:
    forward                   policy logits 1, reference logits 1 where there is a reference
    frozen head, forward      unit gradient 1, and 1 for the rows that ask for KL; the backward is elementwise
    trainable head, backward  `trained`
`folded` does a trainable head in 3 where each row's loss is known from its own log-probability.

Over a vocabulary split between ranks (Inputs.shard) a tile has the columns of this rank, and every sum or maximum along
them is one over the ranks too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo_kernels.token_stats.reference import Inputs, accumulator
from fastpo_kernels.token_stats.sharded import highest, total
from fastpo_kernels.token_stats.ways import HALF
from fastpo_kernels.types import TokenStats

# fp32 logits of one model in one chunk: 441 rows at V = 152k. A GEMM needs about 266 rows before it stops waiting for
# the weight (H100: 798 TFLOP/s over 3.0 TB/s), and up to six such tiles are alive at once.
TILE_BYTES = 256 << 20
MIN_SIDE = 256
CPU_TILE_BYTES = 16 << 20  # on the CPU, where MIN_SIDE allow it, so that a tile stays in the last-level cache (33 MB)


class UnitGradient(NamedTuple):
    """d logp_i / d h_i and d kl_i / d h_i: under a frozen head any loss's gradient is a multiple of these rows."""

    logp: Tensor  # [N, H] (onehot(target) - p) W
    kl: Tensor | None = None  # [n, H] (p - q) W
    kl_at: Tensor | None = None  # [n] int64, the rows of kl
    reverse_kl: Tensor | None = None  # [n, H] p (log p - log q - KL(p || q)) W
    reverse_kl_at: Tensor | None = None  # [n] int64, the rows of reverse_kl


class Coefficients(NamedTuple):
    """d loss / d of each statistic of some rows."""

    logp: Tensor | None  # [N]
    kl: Tensor | None  # [N]
    reverse_kl: Tensor | None  # [N]


class Normalisers(NamedTuple):
    """log p = z - top - log_sum. Not one number, which would round log_sum to the digits of top. None: no reference."""

    top: Tensor  # [N] the largest logit
    log_sum: Tensor  # [N] log sum e^(z - top)
    ref_top: Tensor | None  # [N]
    ref_log_sum: Tensor | None  # [N]


class Forward(NamedTuple):
    """Without a unit gradient there are normalisers, which the backward of a trainable head needs."""

    stats: TokenStats
    unit: UnitGradient | None
    normalisers: Normalisers | None


Made = tuple[Tensor | None, ...]  # of some rows: u, k and r of UnitGradient, or Normalisers
Chunk = Callable[[Inputs, torch.dtype | None], tuple[TokenStats, Made]]


def forward(x: Inputs, unit_gradient: bool, chunk: Chunk | None = None) -> Forward:
    """Statistics and, where asked for, the unit gradient.

    chunk: what computes some rows; None: eager PyTorch.
    """
    chunk = chunk or _chunk
    whole = _operands(x)
    keep = _kept(x.hidden.dtype) if unit_gradient else None
    chunks = [chunk(_take(whole, at), keep) for at in _split(torch.arange(len(x.hidden)), x)]
    parts, made = zip(*chunks, strict=True)
    stats = TokenStats(*map(_cat, zip(*parts, strict=True)))  # pyright: ignore[reportArgumentType]  # logp is a Tensor
    joined = map(_cat, zip(*made, strict=True))
    if keep is None:
        return Forward(stats, None, Normalisers(*joined))  # pyright: ignore[reportArgumentType]  # nor is top None
    u, k, r = joined
    kl_at, reverse_kl_at = (
        None if rows is None else _index(rows, x.hidden.device) for rows in (x.kl_rows, x.reverse_kl_rows)
    )
    return Forward(stats, UnitGradient(u, k, kl_at, r, reverse_kl_at), None)  # pyright: ignore[reportArgumentType]


def unit_backward(unit: UnitGradient, g: Coefficients) -> Tensor:
    """[N, H] d hidden in fp32 (float64 for float64)."""
    d_hidden = torch.zeros_like(unit.logp) if g.logp is None else g.logp[:, None] * unit.logp
    for g_rows, rows, at in ((g.kl, unit.kl, unit.kl_at), (g.reverse_kl, unit.reverse_kl, unit.reverse_kl_at)):
        if g_rows is not None and rows is not None and at is not None:
            d_rows = g_rows[at, None] * rows
            d_hidden = d_hidden.to(d_rows.dtype).index_add_(0, at, d_rows)
    return d_hidden


class Gradients(NamedTuple):
    """Those wanted; of weight and bias in fp32 (float64 for float64), in which the chunks are summed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(cls, x: Inputs, wanted: Sequence[bool], dtype: torch.dtype) -> "Gradients":
        """Of hidden, weight and bias, those `wanted`. dtype: of that of hidden, whose rows are 0 until added."""
        wide, device = accumulator(x.hidden.dtype), x.hidden.device
        hidden = torch.zeros_like(x.hidden, dtype=dtype) if wanted[0] else None
        weight = torch.empty(x.weight.shape, dtype=wide, device=device) if wanted[1] else None
        return cls(hidden, weight, torch.empty(len(x.weight), dtype=wide, device=device) if wanted[2] else None)

    def add(self, tile: Tensor, scale: float, x: Inputs, at: Tensor, *, first: bool) -> None:
        """tile * scale: [n, V] gradient at h W^T + b of the rows `at`, whose operands are x.

        first: the first to be added.
        """
        if self.bias is not None:
            torch.add(tile.sum(0, dtype=self.bias.dtype).mul_(scale), 0 if first else self.bias, out=self.bias)
        tile = tile.to(x.weight.dtype)
        if self.hidden is not None:
            self.hidden[at] = mm(tile, x.weight).mul_(scale).to(self.hidden.dtype)
        if self.weight is not None:
            add_mm(self.weight, tile.t(), x.hidden, beta=0 if first else 1, alpha=scale)


def folded(
    x: Inputs, coefficient: Callable[[Tensor, slice], tuple[Tensor, Tensor]], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Gradients]:
    """The sum of all losses, logp [N], and the gradients `wanted` of that sum, in one sweep. See folded_logp."""
    whole, device = _operands(x), x.hidden.device
    loss, logps = torch.zeros((), dtype=accumulator(x.hidden.dtype), device=device), []
    gradients = Gradients.empty(x, wanted, _kept(x.hidden.dtype))
    stop = 0
    for at in _split(torch.arange(len(x.hidden)), x):
        part, here = _take(whole, at), slice(stop, stop + len(at))
        stop = here.stop
        z = _logits(part.hidden, part.weight, part)
        slope, log_p = slope_of(z, part), _log_softmax(z, part)
        logp = _pick(log_p, part)
        losses, g_logp = coefficient(logp, here)
        if losses.shape != logp.shape or g_logp.shape != logp.shape:
            raise ValueError(f"coefficient must give two [{len(at)}], got {list(losses.shape)}, {list(g_logp.shape)}")
        loss += losses.sum()
        logps.append(logp)
        if any(wanted):
            live = g_logp.nonzero()[:, 0]
            if len(live) < len(at):
                part, slope = _take(part, live), None if slope is None else slope[live]
                log_p, logp, g_logp = log_p[live], logp[live], g_logp[live]
            tile = less_target(log_p.exp_(), logp, *_columns(part))
            scale = _power_of_two(g_logp) if part.weight.dtype == torch.float16 else 1.0  # a sync
            tile.mul_(g_logp.to(logp.dtype)[:, None] / (-x.temperature * scale))
            tile = tile if slope is None else tile.mul_(slope)
            gradients.add(tile, scale, part, live + here.start, first=here.start == 0)
    return loss, torch.cat(logps), gradients


def _power_of_two(g: Tensor) -> float:
    """Just above the largest |g|; 1 where there is none that is finite.

    In an fp16 tile of a mean over 4096 tokens a p below 2^-12 would round to 0, before any loss scale is known.
    """
    return 2.0 ** math.frexp(g.abs().max().item())[1] if len(g) else 1.0


def _chunk(x: Inputs, keep: torch.dtype | None) -> tuple[TokenStats, Made]:
    """Statistics of some rows; with a dtype to keep them in, also their u [n, H], and k and r of those with KL."""
    log_p, log_q, slope, normalisers = _log_probs(x, normalised=keep is None)
    p, logp = log_p.exp(), _pick(log_p, x)
    ref_logp = kl = reverse_kl = u = k = r = None
    if log_q is not None:
        ref_logp = _pick(log_q, x)

        def divergence(rows: Tensor, of: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
            at = _index(rows, p.device)
            values, tile = of(log_p[at], log_q[at], p[at], x)
            values = torch.zeros_like(logp).index_copy_(0, at, values)
            if keep is None:
                return values, None
            return values, _pull_back(tile, None if slope is None else slope[at], x).to(keep)

        if x.kl_rows is not None:
            kl, k = divergence(x.kl_rows, _kl)
        if x.reverse_kl_rows is not None:
            reverse_kl, r = divergence(x.reverse_kl_rows, _reverse_kl)
    entropy = -_total(log_p.mul_(p), x)
    if keep is not None:
        u = _pull_back(less_target(p, logp, *_columns(x)), slope, x).neg_().to(keep)
    return TokenStats(logp, ref_logp, kl, entropy, reverse_kl), normalisers or (u, k, r)


def _kl(log_p: Tensor, log_q: Tensor, p: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    """[n] KL(q || p), and [n, V] p - q, its gradient at the logits of p. Overwrites log_q and p.

    Summed as q (log q - log p) + p - q, no term of which is negative: near the reference the terms of the plain sum
    are of first order and cancel, which leaves the rounding of log-sum-exp (1e-6) in a KL that may be as small.
    """
    q = log_q.exp()
    difference = p.sub_(q)
    return _total(log_q.sub_(log_p).mul_(q).add_(difference), x), difference


def _reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    """[n] KL(p || q), and [n, V] p (log p - log q - KL(p || q)), its gradient at the logits of p. Overwrites all.

    Summed like _kl, with p and q exchanged. In the gradient the mean of log p - log q itself takes the KL's place: what
    is off by the same amount in a whole row, as log-sum-exp is, cancels.
    """
    gap = log_p.sub_(log_q)
    weighted = p * gap
    mean = _total(weighted, x)
    values = _total(weighted.add_(log_q.exp_()).sub_(p), x)
    return values, gap.sub_(mean[:, None]).mul_(p)


def less_target(p: Tensor, logp: Tensor, column: Tensor, here: Tensor | None) -> Tensor:
    """[n, V] p - onehot(target), written over p; -d logp at the logits, to be negated where it is smaller than a tile.

    column, here: see columns. Rounding p to the operand dtype first would lose 1 - p(target).
    """
    at_target = torch.expm1(logp)[:, None]
    return p.scatter_(1, column, at_target if here is None else at_target.where(here, p.gather(1, column)))


def _pull_back(tile: Tensor, slope: Tensor | None, x: Inputs) -> Tensor:
    """[n, V] gradient at the logits, overwritten -> [n, H] gradient at hidden."""
    tile = tile if slope is None else tile.mul_(slope)
    return mm(tile.to(x.weight.dtype), x.weight).div_(x.temperature)


def _log_probs(x: Inputs, *, normalised: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Made | None]:
    """[n, V] log p; log q, with a reference; the slope of the softcap at the policy's logits; where asked for, what
    Normalisers holds. The logits themselves are gone by then.
    """
    if x.ref_hidden is None:
        z, ref_z = _logits(x.hidden, x.weight, x), None
    elif x.ref_weight is None:  # one GEMM, since with one tiling the rounding errors of p and q cancel in p - q
        z, ref_z = _logits(torch.cat([x.hidden, x.ref_hidden]), x.weight, x).tensor_split(2)
    else:
        z, ref_z = _logits(x.hidden, x.weight, x), _logits(x.ref_hidden, x.ref_weight, x)
    log_p, log_q = _log_softmax(z, x), None if ref_z is None else _log_softmax(ref_z, x)
    made = (*_normaliser(z, log_p, x), *_normaliser(ref_z, log_q, x)) if normalised else None
    return log_p, log_q, slope_of(z, x), made


def _logits(hidden: Tensor, weight: Tensor, x: Inputs) -> Tensor:
    """[n, V] fp32 (float64 for float64) softcap * tanh((h W^T + b) / softcap) / temperature."""
    return bend(mm(hidden, weight.t()), x)


def bend(z: Tensor, x: Inputs) -> Tensor:
    """The logits of z = h W^T, written over it."""
    if x.bias is not None:
        z += x.bias
    if x.softcap is not None:
        z = z.div_(x.softcap).tanh_().mul_(x.softcap)
    return z if x.temperature == 1.0 else z.div_(x.temperature)


def _log_softmax(z: Tensor, x: Inputs) -> Tensor:
    """[n, V] over the whole vocabulary."""
    if x.shard is None:
        return z.log_softmax(-1)
    z = z - highest(z.amax(-1), x.shard)[:, None]
    return z.sub_(total(z.exp().sum(-1), x.shard).log_()[:, None])


def _normaliser(z: Tensor | None, log_p: Tensor | None, x: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """top and log_sum of logits z, as _log_softmax took them."""
    if z is None or log_p is None:
        return None, None
    top, log_sum = z.amax(-1), log_p.amax(-1)
    return (top, -log_sum) if x.shard is None else (highest(top, x.shard), -highest(log_sum, x.shard))


def _total(tile: Tensor, x: Inputs) -> Tensor:
    """[n, V] -> [n], the sum over the whole vocabulary."""
    return tile.sum(-1) if x.shard is None else total(tile.sum(-1), x.shard)


def _columns(x: Inputs) -> tuple[Tensor, Tensor | None]:
    """[n, 1] the column of each target, and [n, 1] bool: whether this rank has it; None where it has all."""
    return (x.target[:, None], None) if x.shard is None else columns(x.target[:, None] - x.shard.first, len(x.weight))


def columns(target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The column of each target, which may lie outside of [0, size), and bool: whether it lies there."""
    return target.clamp(0, size - 1), (target >= 0) & (target < size)


def _pick(tile: Tensor, x: Inputs) -> Tensor:
    """[n, V] -> [n], at the targets."""
    column, here = _columns(x)
    picked = tile.gather(1, column)
    if x.shard is None or here is None:
        return picked[:, 0]
    return total(picked.where(here, 0.0)[:, 0], x.shard)


def slope_of(logits: Tensor, x: Inputs) -> Tensor | None:
    """[n, V] 1 - tanh^2, the derivative of the softcap; None without one."""
    return None if x.softcap is None else 1 - (logits * (x.temperature / x.softcap)).square_()


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in fp32 from half operands, which only CUDA multiplies (elsewhere _operand has made them fp32)."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype in HALF else torch.mm(a, b)


def add_mm(out: Tensor, a: Tensor, b: Tensor, *, beta: int = 1, alpha: float = 1.0) -> None:
    """out = beta out + alpha a @ b, summed in the fp32 of out; beta 0: what out held, even NaN, is gone."""
    if a.dtype in HALF:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """In which the forward keeps a gradient of hidden: bf16 for bf16, as large as hidden itself, but fp32 for fp16.

    That of a confident token (about 1e-3 x 2e-2) is subnormal there, and the loss scale is multiplied in only later.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else accumulator(dtype)


def operand(x: Tensor) -> Tensor:
    return x if x.is_cuda else x.to(accumulator(x.dtype))


def _operands(x: Inputs) -> Inputs:
    """The heads as GEMM operands: off CUDA a half head is made fp32 once, not once per chunk."""
    return x._replace(
        weight=operand(x.weight),
        ref_weight=None if x.ref_weight is None else operand(x.ref_weight),
        bias=None if x.bias is None else x.bias.to(accumulator(x.bias.dtype)),
    )


def _split(rows: Tensor, x: Inputs) -> Iterator[Tensor]:
    """Chunks of a host index of rows; of no rows, one empty chunk."""
    size = len(x.weight) if x.shard is None else x.shard.columns  # the same chunks on every rank
    yield from rows.split(tile_size(size, x.hidden))


def tile_size(columns: int, like: Tensor) -> int:
    """Rows of a tile of so many columns (or the other way round) of logits from operands like `like`."""
    row = max(1, columns) * accumulator(like.dtype).itemsize
    if like.is_cuda:
        return max(MIN_SIDE, TILE_BYTES // row)
    return max(1, min(TILE_BYTES // row, max(MIN_SIDE, CPU_TILE_BYTES // row)))


def _take(x: Inputs, at: Tensor) -> Inputs:
    """The rows of a host index, as GEMM operands."""
    here = at.to(x.hidden.device)
    return x._replace(
        hidden=operand(x.hidden[here]),
        target=x.target[here],
        ref_hidden=None if x.ref_hidden is None else operand(x.ref_hidden[here]),
        kl_rows=None if x.kl_rows is None else x.kl_rows[at],
        reverse_kl_rows=None if x.reverse_kl_rows is None else x.reverse_kl_rows[at],
    )


def _index(host_mask: Tensor, device: torch.device) -> Tensor:
    return host_mask.nonzero()[:, 0].to(device)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None
