"""token_stats with Triton: which kernel runs where, and how it is launched.

Two ways to the statistics. "tile" is chunked's: cuBLAS writes fp32 logits of some rows, `kernel.rows` reads them once
or twice and leaves their gradient in their place for the next GEMM. "register" is `kernel.head`: the logits never leave
the registers, and so there is nothing to take a gradient from. `ways` says which is taken where. To the gradients of a
trained head there is one, that of `trained`, with `kernel.columns` between its GEMMs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo_kernels.token_stats import chunked, kernel, trained
from fastpo_kernels.token_stats.reference import Inputs
from fastpo_kernels.token_stats.ways import BLOCK_H, capability, choose_way
from fastpo_kernels.triton_launch import Launch, run
from fastpo_kernels.types import TokenStats


class Config(NamedTuple):
    block_n: int
    block_v: int
    num_warps: int
    num_stages: int


# Of `kernel.head`, by (TMA, the reference's head). Chosen by what the compiler reports, none of it timed: no spilled
# bytes and, without TMA, at most the 99 KiB of shared memory of sm_86 and sm_89 (sm_80 has 163, sm_90 227).
HEAD = {
    (True, "none"): Config(128, 256, 8, 3),
    (True, "shared"): Config(64, 128, 8, 4),
    (True, "own"): Config(64, 128, 8, 3),
    (False, "none"): Config(128, 128, 8, 3),
    (False, "shared"): Config(64, 64, 8, 3),
    (False, "own"): Config(64, 64, 8, 3),
}
ROWS_BLOCK, ROWS_WARPS = 2048, 8  # with blocks of 4096 the fp32 backward spills on sm_90
MERGE_BLOCK, MERGE_WARPS = 128, 4


def forward(x: Inputs, unit_gradient: bool) -> chunked.Forward:
    """See chunked.forward. The register way has no reverse KL."""
    way = choose_way(capability(x.hidden.device), x.hidden.shape[1], x.hidden.dtype, unit_gradient)
    if way == "register" and x.reverse_kl_rows is None and _aligned(x):
        return register_stats(x, *_device(x.hidden.device))
    return chunked.forward(x, unit_gradient, chunk)


def chunk(x: Inputs, keep: torch.dtype | None) -> tuple[TokenStats, chunked.Made]:
    """Statistics of some rows; with a dtype to keep them in, also their u [n, H], and k and r of those with KL."""
    num_rows, order = len(x.hidden), _order(x)
    z, ref_z = _products(x, order)
    stats = torch.empty(9, num_rows, device=z.device)
    kl_rows, reverse_rows = (None if mask is None else int(mask.sum()) for mask in (x.kl_rows, x.reverse_kl_rows))
    u = k = r = None
    if keep is not None:
        u = in_place(z, x.weight.dtype)
        k = None if ref_z is None or kl_rows is None else in_place(ref_z, x.weight.dtype)
        r = None if reverse_rows is None else x.weight.new_empty(reverse_rows, z.shape[1])
    run(rows(z, ref_z, x, order, stats, u=u, k=k, r=r))
    logp, ref_logp, kl, entropy, reverse_kl, *normalisers = stats
    joined = TokenStats(
        logp,
        None if ref_z is None else ref_logp,
        None if kl_rows is None else kl,
        entropy,
        None if reverse_rows is None else reverse_kl,
    )
    tiles = (u, None if k is None else k[:kl_rows], r)
    if keep is None:
        return joined, (*normalisers[:2], *([None, None] if ref_z is None else normalisers[2:]))
    return joined, tuple(None if t is None else chunked.mm(t, x.weight).to(keep) for t in tiles)


def d_logits(z: Tensor, ref_z: Tensor | None, x: Inputs, live: trained.Live) -> Tensor:
    """See trained.d_logits; in the operand dtype."""
    u = in_place(z, x.weight.dtype)
    run(columns(z, ref_z, x, live, u))
    return u


def _order(x: Inputs) -> Tensor:
    """Host index of the rows, those with KL first."""
    return torch.arange(len(x.hidden)) if x.kl_rows is None else (~x.kl_rows).to(torch.int8).argsort(stable=True)


def _slots(order: Tensor, num_rows: int) -> Tensor:
    """[num_rows] the place of each row in `order`, len(order) for those that are not in it."""
    slots = torch.full((num_rows,), len(order))
    slots[order] = torch.arange(len(order))
    return slots


def _products(x: Inputs, order: Tensor) -> tuple[Tensor, Tensor | None]:
    """[n, V] h W^T in fp32, and that of the reference's rows in the given order."""
    if x.ref_hidden is None:
        return chunked.mm(x.hidden, x.weight.t()), None
    ref_hidden = x.ref_hidden[order.to(x.hidden.device)]
    if x.ref_weight is not None:
        return chunked.mm(x.hidden, x.weight.t()), chunked.mm(ref_hidden, x.ref_weight.t())
    z = chunked.mm(torch.cat([x.hidden, ref_hidden]), x.weight.t())  # one tiling: see chunked
    return z[: len(x.hidden)], z[len(x.hidden) :]


def in_place(z: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] of an operand dtype at the head of each fp32 row."""
    return z.view(dtype)[:, : z.shape[1]]


def rows(
    z: Tensor,
    ref_z: Tensor | None,
    x: Inputs,
    order: Tensor,
    stats: Tensor,
    *,
    u: Tensor | None = None,
    k: Tensor | None = None,
    r: Tensor | None = None,
) -> Launch:
    """z: [n, V] fp32; ref_z: [n, V], the rows `order` of the reference. The other names are those of `kernel.rows`."""
    reverse = None if ref_z is None or x.reverse_kl_rows is None else x.reverse_kl_rows.nonzero()[:, 0]
    args = {
        "z_ptr": z,
        "ref_ptr": ref_z,
        "u_ptr": u,
        "k_ptr": k,
        "r_ptr": r,
        "bias_ptr": None if x.bias is None else x.bias.contiguous(),
        "target_ptr": x.target,
        "slot_ptr": _slots(order, len(z)).to(z.device),
        "reverse_slot_ptr": None if reverse is None else _slots(reverse, len(z)).to(z.device),
        "stats_ptr": stats,
        "V": z.shape[1],
        "kl_rows": 0 if x.kl_rows is None else int(x.kl_rows.sum()),
        "reverse_rows": 0 if reverse is None else len(reverse),
        "softcap": x.softcap,
        "sharpness": 1 / x.temperature,
        "stride": 0 if u is None else u.stride(0),
        "BLOCK": ROWS_BLOCK,
    }
    return Launch(kernel.rows, (len(z),), args, ROWS_WARPS)


def columns(z: Tensor, ref_z: Tensor | None, x: Inputs, live: trained.Live, u: Tensor) -> Launch:
    """The arguments of d_logits, and u: [n, v] of the operand dtype, where its result goes."""
    args = {
        "z_ptr": z,
        "ref_ptr": ref_z,
        "u_ptr": u,
        "bias_ptr": None if x.bias is None else x.bias.contiguous(),
        "target_ptr": live.target,
        "logp_ptr": live.logp,
        "top_ptr": live.top,
        "log_sum_ptr": live.log_sum,
        "g_logp_ptr": live.g_logp,
        "ref_top_ptr": live.ref_top,
        "ref_log_sum_ptr": live.ref_log_sum,
        "g_kl_ptr": live.g_kl,
        "g_reverse_ptr": live.g_reverse_kl,
        "reverse_kl_ptr": live.reverse_kl,
        "v": z.shape[1],
        "m": 0 if ref_z is None else len(ref_z),
        "softcap": x.softcap,
        "sharpness": 1 / x.temperature,
        "stride": u.stride(0),
        "BLOCK": ROWS_BLOCK,
    }
    return Launch(kernel.columns, (len(z),), args, ROWS_WARPS)


def register_stats(x: Inputs, tma: bool, processors: int) -> chunked.Forward:
    """See forward. processors: of the GPU; the vocabulary is split so that all have work."""
    num_rows, device = len(x.hidden), x.hidden.device

    def sweep(part: Inputs) -> Tensor:
        """[9, n] as in `kernel.merge`."""
        stats = torch.empty(9, len(part.hidden), device=device)
        for launch in registers(part, stats, tma, processors):
            run(launch)
        return stats

    stats = torch.zeros(9, num_rows, device=device)
    wants_kl = torch.zeros(num_rows, dtype=torch.bool) if x.kl_rows is None else x.kl_rows
    both, rest = (mask.nonzero()[:, 0].to(device) for mask in (wants_kl, ~wants_kl))
    if len(both):
        stats[:, both] = sweep(_rows(x, both))
    if len(rest):
        policy = _rows(x._replace(ref_hidden=None, ref_weight=None), rest)
        ref_hidden = policy.hidden[:0] if x.ref_hidden is None else x.ref_hidden[rest]
        if x.ref_weight is None:  # one launch reads the head once
            policy = policy._replace(
                hidden=torch.cat([policy.hidden, ref_hidden]), target=policy.target.repeat(1 + bool(len(ref_hidden)))
            )
        swept = sweep(policy)
        stats[:, rest] = swept[:, : len(rest)]
        if x.ref_weight is not None:
            swept = sweep(policy._replace(hidden=ref_hidden, weight=x.ref_weight))
        if x.ref_hidden is not None:
            logp, *_, top, log_sum, _, _ = swept[:, -len(rest) :]
            stats[1, rest], stats[2, rest], stats[7, rest], stats[8, rest] = logp, torch.zeros_like(logp), top, log_sum
    logp, ref_logp, kl, entropy, _, top, log_sum, *of_reference = stats
    if x.ref_hidden is None:
        return chunked.Forward(TokenStats(logp, entropy=entropy), None, chunked.Normalisers(top, log_sum, None, None))
    joined = TokenStats(logp, ref_logp, None if x.kl_rows is None else kl, entropy)
    return chunked.Forward(joined, None, chunked.Normalisers(top, log_sum, *of_reference))


def _rows(x: Inputs, at: Tensor) -> Inputs:
    return x._replace(
        hidden=x.hidden[at],
        target=x.target[at],
        ref_hidden=None if x.ref_hidden is None else x.ref_hidden[at],
    )


def registers(x: Inputs, stats: Tensor, tma: bool, processors: int) -> tuple[Launch, Launch]:
    """`kernel.head` and `kernel.merge`, which fill stats [9, N]."""
    from triton import cdiv
    from triton.tools.tensor_descriptor import TensorDescriptor

    (num_rows, size), vocabulary = x.hidden.shape, len(x.weight)
    reference = "none" if x.ref_hidden is None else "shared" if x.ref_weight is None else "own"
    config = HEAD[tma, reference]
    blocks, tiles = cdiv(num_rows, config.block_n), cdiv(vocabulary, config.block_v)
    tiles_per_split = cdiv(tiles, min(tiles, cdiv(2 * processors, blocks)))
    splits = cdiv(tiles, tiles_per_split)
    part = torch.empty(4 if reference == "none" else 8, splits, num_rows, device=stats.device)

    def operand(t: Tensor | None, block: int) -> Any:
        t = None if t is None else t.contiguous()
        return t if t is None or not tma else TensorDescriptor.from_tensor(t, [block, BLOCK_H])

    args = {
        "x": operand(x.hidden, config.block_n),
        "w": operand(x.weight, config.block_v),
        "ref_x": operand(x.ref_hidden, config.block_n),
        "ref_w": operand(x.ref_weight, config.block_v),
        "bias_ptr": None if x.bias is None else x.bias.contiguous(),
        "target_ptr": x.target,
        "part_ptr": part,
        "N": num_rows,
        "H": size,
        "V": vocabulary,
        "softcap": x.softcap,
        "sharpness": 1 / x.temperature,
        "tiles": tiles_per_split,
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_H": BLOCK_H,
        "TMA": tma,
    }
    merge_args = {
        "part_ptr": part,
        "stats_ptr": stats,
        "N": num_rows,
        "splits": splits,
        "REF": reference != "none",
        "BLOCK": MERGE_BLOCK,
    }
    return (
        Launch(kernel.head, (blocks, splits), args, config.num_warps, config.num_stages),
        Launch(kernel.merge, (cdiv(num_rows, MERGE_BLOCK),), merge_args, MERGE_WARPS),
    )


def _aligned(x: Inputs) -> bool:
    """As TMA needs the heads to be; a view into ZeRO's flat buffer may not."""
    return all(w.data_ptr() % 16 == 0 for w in (x.weight, x.ref_weight) if w is not None)


def _device(device: torch.device) -> tuple[bool, int]:
    """Whether it has TMA (sm_90), and its number of processors."""
    if device.type != "cuda":  # Triton's interpreter
        return False, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9, properties.multi_processor_count
