"""Triton kernels of token_stats. `launch` says what is launched how; nothing here allocates.

A running state of each row takes in blocks of logits, left to right, all in fp32 and relative to the largest logit m so
far: s = sum e^(z-m) and e = sum e^(z-m) (z-m) of the policy p, the same s of the reference q, and for the KL

    t = sum e^(zq-mq) d + e^(zp-mp) - e^(zq-mq),  d = (zq - mq) - (zp - mp),  KL(q || p) = t / sq - x + log(1 + x),
    x = sp / sq - 1.

No term of t is negative and all are of second order in the distance of the models. The usual online sum of q (zq - zp),
less the difference of two log-sum-exps, is of first order: its error of about 1e-6 is 1 % of a KL of 1e-4.

KL(p || q) is the same with p and q exchanged. Its gradient at zp is p (-d - KL(p || q) - log(sp / sq)).
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # the logit of a column that does not exist; finite, since 0 * inf is NaN


@triton.jit
def _tanh(x):
    """Within 1e-7: the error of a capped logit is that of fp32 at the cap."""
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def expm1(x):
    series = 1 + x * (1 / 5) * (1 + x * (1 / 6) * (1 + x * (1 / 7) * (1 + x * (1 / 8))))
    series = x * (1 + x * (1 / 2) * (1 + x * (1 / 3) * (1 + x * (1 / 4) * series)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def gap(w, e, d):
    """w d + e - w where e = w exp(-d): w (d^2/2 - d^3/6 + ...), without cancellation for small d."""
    series = d * d * (1 / 2) * (1 - d * (1 / 3) * (1 - d * (1 / 4) * (1 - d * (1 / 5) * (1 - d * (1 / 6)))))
    return tl.where(tl.abs(d) < 0.25, w * series, w * d + e - w)


@triton.jit
def log_gap(x):
    """x - log(1 + x), without cancellation for small x."""
    series = 1 / 5 - x * (1 / 6 - x * (1 / 7 - x * (1 / 8 - x * (1 / 9))))
    series = x * x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * series)))
    return tl.where(tl.abs(x) < 0.1, series, x - tl.log(1 + x))


@triton.jit
def _logits(z, bias_ptr, cols, V, softcap, sharpness):
    """Logits of z = h W^T, and their derivative there."""
    slope = sharpness
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        bent = _tanh(z * (1 / softcap))
        z = bent * softcap
        slope = (1 - bent * bent) * slope
    return tl.where((cols < V)[None, :], z * sharpness, LOWEST), slope


@triton.jit
def _raise_entropy(e, s, rise):
    """e under a larger maximum."""
    return tl.exp(-rise) * (e - rise * s)


@triton.jit
def _raise_gap(t, sp, sq, rise_p, rise_q):
    """t under larger maxima of p and q."""
    wp, wq, shift = tl.exp(-rise_p), tl.exp(-rise_q), rise_q - rise_p
    return wq * t + sp * gap(wq, wp, -shift) + wq * shift * (sp - sq)


@triton.jit
def _take_in(m, s, z):
    """The maximum and s after a block z [rows, columns]."""
    top = tl.maximum(m, tl.max(z, 1))
    return top, tl.exp(m - top) * s + tl.sum(tl.exp(z - top[:, None]), 1)


@triton.jit
def _take_in_entropy(e, m, s, z):
    """e after a block z, from the state before it."""
    top = tl.maximum(m, tl.max(z, 1))
    z -= top[:, None]
    return _raise_entropy(e, s, top - m) + tl.sum(tl.exp(z) * z, 1)


@triton.jit
def _take_in_gap(t, mp, sp, mq, sq, zp, zq):
    """t after the blocks zp and zq, from the states before them."""
    top_p, top_q = tl.maximum(mp, tl.max(zp, 1)), tl.maximum(mq, tl.max(zq, 1))
    t = _raise_gap(t, sp, sq, top_p - mp, top_q - mq)
    zp -= top_p[:, None]
    zq -= top_q[:, None]
    return t + tl.sum(gap(tl.exp(zq), tl.exp(zp), zq - zp), 1)


@triton.jit
def _at(z, cols, target):
    """z [rows, columns] at each row's target; 0 where it is in another block."""
    return tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)


@triton.jit
def _kl(t, sp, sq):
    return t / sq - log_gap((sp - sq) / sq)


@triton.jit
def rows(
    z_ptr,  # [n, V] fp32 h W^T of the policy
    ref_ptr,  # [n, V] fp32 of the reference, or None
    u_ptr,  # z_ptr in the operand dtype, whose rows are overwritten with d logp at h W^T, or None
    k_ptr,  # ref_ptr likewise, for the gradient of KL, or None
    r_ptr,  # [reverse_rows, V] for the gradient of the reverse KL, a tile of its own, or None
    bias_ptr,  # [V] or None
    target_ptr,  # [n]
    slot_ptr,  # [n] the row of ref_ptr that belongs to each row
    reverse_slot_ptr,  # [n] the row of r_ptr; >= reverse_rows: no reverse KL; or None for none at all
    stats_ptr,  # [9, n] logp, ref_logp, KL, entropy, reverse KL, m, log s, m and log s of the reference
    V,
    kl_rows,  # slots below it want the KL
    reverse_rows,
    softcap,
    sharpness,  # 1 / temperature
    stride,  # of a row of u_ptr and k_ptr, in their elements
    BLOCK: tl.constexpr,
):
    """One program per row: one sweep for the statistics, and one that overwrites the logits by their gradients."""
    row = tl.program_id(0)
    one = tl.arange(0, 1)
    target = tl.load(target_ptr + row + one)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    z_ptr += row.to(tl.int64) * V
    mp = tl.full([1], LOWEST, tl.float32)
    sp, ep, yp = tl.zeros_like(mp), tl.zeros_like(mp), tl.zeros_like(mp)
    mq, sq, yq, t, back = mp, sp, sp, sp, sp  # back: t with p and q exchanged
    if ref_ptr is not None:
        ref_ptr += slot * V
    if reverse_slot_ptr is not None:
        reverse_slot = tl.load(reverse_slot_ptr + row).to(tl.int64)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zp = tl.load(z_ptr + cols, mask=cols < V, other=0.0)[None, :]
        zp, _ = _logits(zp, bias_ptr, cols, V, softcap, sharpness)
        if ref_ptr is not None:
            zq = tl.load(ref_ptr + cols, mask=cols < V, other=0.0)[None, :]
            zq, _ = _logits(zq, bias_ptr, cols, V, softcap, sharpness)
            if slot < kl_rows:
                t = _take_in_gap(t, mp, sp, mq, sq, zp, zq)
            if reverse_slot_ptr is not None:
                if reverse_slot < reverse_rows:
                    back = _take_in_gap(back, mq, sq, mp, sp, zq, zp)
            mq, sq = _take_in(mq, sq, zq)
            yq += _at(zq, cols, target)
        ep = _take_in_entropy(ep, mp, sp, zp)
        mp, sp = _take_in(mp, sp, zp)
        yp += _at(zp, cols, target)
    # not y - (m + log s): m would round off what log s says about a confident token
    log_sp = tl.log(sp)
    logp = yp - mp - log_sp
    if reverse_slot_ptr is not None:
        reverse_kl = tl.where(reverse_slot < reverse_rows, _kl(back, sq, sp), 0.0)
    n = tl.num_programs(0)
    tl.store(stats_ptr + row + one, logp)
    tl.store(stats_ptr + 3 * n + row + one, log_sp - ep / sp)
    tl.store(stats_ptr + 5 * n + row + one, mp)
    tl.store(stats_ptr + 6 * n + row + one, log_sp)
    if ref_ptr is not None:
        log_sq = tl.log(sq)
        tl.store(stats_ptr + 7 * n + row + one, mq)
        tl.store(stats_ptr + 8 * n + row + one, log_sq)
        tl.store(stats_ptr + n + row + one, yq - mq - log_sq)
        tl.store(stats_ptr + 2 * n + row + one, tl.where(slot < kl_rows, _kl(t, sp, sq), 0.0))
    if reverse_slot_ptr is not None:
        tl.store(stats_ptr + 4 * n + row + one, reverse_kl)
    if u_ptr is not None:
        u_ptr += row.to(tl.int64) * stride
        to_target = -expm1(logp)[:, None]
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            zp = tl.load(z_ptr + cols, mask=cols < V, other=0.0)[None, :]
            zp, slope = _logits(zp, bias_ptr, cols, V, softcap, sharpness)
            p = tl.exp(zp - mp[:, None] - log_sp[:, None])
            u = tl.where(cols[None, :] == target[:, None], to_target, -p)
            if ref_ptr is not None:
                paired = slot < kl_rows
                if reverse_slot_ptr is not None:
                    paired = paired | (reverse_slot < reverse_rows)
                if paired:
                    zq = tl.load(ref_ptr + cols, mask=cols < V, other=0.0)[None, :]
                    zq, _ = _logits(zq, bias_ptr, cols, V, softcap, sharpness)
                    zq -= mq[:, None]
                    if k_ptr is not None:
                        if slot < kl_rows:
                            k = p - tl.exp(zq - log_sq[:, None])
                            # written where threads have just read: half-size rows lie at the head of the fp32 ones
                            tl.debug_barrier()
                            k_row = k_ptr + slot * stride + cols[None, :]
                            tl.store(k_row, (k * slope).to(k_ptr.dtype.element_ty), mask=(cols < V)[None, :])
                    if reverse_slot_ptr is not None:
                        if reverse_slot < reverse_rows:
                            r = p * (zp - mp[:, None] - zq - (reverse_kl + tl.log(sp / sq))[:, None])
                            r_row = r_ptr + reverse_slot * V + cols[None, :]
                            tl.store(r_row, (r * slope).to(r_ptr.dtype.element_ty), mask=(cols < V)[None, :])
            tl.debug_barrier()
            tl.store(u_ptr + cols[None, :], (u * slope).to(u_ptr.dtype.element_ty), mask=(cols < V)[None, :])


@triton.jit
def columns(
    z_ptr,  # [n, v] fp32 h W^T of the policy, some columns of the vocabulary
    ref_ptr,  # [m, v] of the reference for the first m rows, or None
    u_ptr,  # z_ptr in the operand dtype, whose rows are overwritten with the loss's gradient at h W^T
    bias_ptr,  # [v] or None
    target_ptr,  # [n] column; outside of [0, v): not here
    logp_ptr,  # [n]
    top_ptr,  # [n] m
    log_sum_ptr,  # [n] log s
    g_logp_ptr,  # [n] coefficient of logp
    ref_top_ptr,  # [m] or None
    ref_log_sum_ptr,  # [m] or None
    g_kl_ptr,  # [m] coefficient of KL, or None for 0
    g_reverse_ptr,  # [m] coefficient of the reverse KL, or None for 0
    reverse_kl_ptr,  # [m] or None
    v,
    m,
    softcap,
    sharpness,  # 1 / temperature
    stride,  # of a row of u_ptr, in its elements
    BLOCK: tl.constexpr,
):
    """One program per row, in one sweep."""
    row = tl.program_id(0)
    far = row.to(tl.int64)
    z_ptr += far * v
    u_ptr += far * stride
    target = tl.load(target_ptr + row)
    top = tl.load(top_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    g = tl.load(g_logp_ptr + row)
    to_target = -expm1(tl.load(logp_ptr + row))
    if ref_ptr is not None:
        ref_ptr += far * v
    for start in range(0, v, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, mask=cols < v, other=0.0)[None, :]
        z, slope = _logits(z, bias_ptr, cols, v, softcap, sharpness)
        z = z - top - log_sum
        p = tl.exp(z)
        u = g * tl.where((cols == target)[None, :], to_target, -p)
        if ref_ptr is not None:
            if row < m:
                zq = tl.load(ref_ptr + cols, mask=cols < v, other=0.0)[None, :]
                zq, _ = _logits(zq, bias_ptr, cols, v, softcap, sharpness)
                zq = zq - tl.load(ref_top_ptr + row) - tl.load(ref_log_sum_ptr + row)
                if g_kl_ptr is not None:
                    u += tl.load(g_kl_ptr + row) * (p - tl.exp(zq))
                if g_reverse_ptr is not None:
                    u += tl.load(g_reverse_ptr + row) * (p * (z - zq - tl.load(reverse_kl_ptr + row)))
        tl.debug_barrier()  # written where threads have just read: half-size rows lie at the head of the fp32 ones
        tl.store(u_ptr + cols[None, :], (u * slope).to(u_ptr.dtype.element_ty), mask=(cols < v)[None, :])


@triton.jit
def _tile(x, row0, k, offsets, TMA: tl.constexpr):
    """A tile of a row-major operand: from a descriptor, or by 32-bit offsets from a pointer to its first row."""
    if TMA:
        tile = x.load([row0, k])
    else:
        tile = tl.load(x + k + offsets)
    return tile


@triton.jit
def head(
    x,  # [N, H] hidden: a descriptor of tiles [BLOCK_N, BLOCK_H], or a pointer; so are the next three
    w,  # [V, H] tiles [BLOCK_V, BLOCK_H]
    ref_x,  # like x, or None
    ref_w,  # like w, or None: the reference uses w
    bias_ptr,  # [V] or None
    target_ptr,  # [N]
    part_ptr,  # [8 or 4, splits, N] fp32 states: m, s, e, target logit of the policy; with ref_x m, s, target logit, t
    N,
    H,
    V,
    softcap,
    sharpness,  # 1 / temperature
    tiles,  # of the vocabulary, per split
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program per block of rows and split of the vocabulary: logits live and die in registers.

    H is a multiple of BLOCK_H; rows past the end of an operand are its last row again (0 with TMA).
    """
    row0 = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    at = tl.arange(0, BLOCK_N)
    x_rows = tl.minimum(at, N - 1 - row0)
    x_at = x_rows[:, None] * H + tl.arange(0, BLOCK_H)[None, :]
    target = tl.load(target_ptr + row0 + x_rows)
    if not TMA:
        far = tl.program_id(0).to(tl.int64) * BLOCK_N * H
        x += far
        if ref_x is not None:
            ref_x += far
        far = split.to(tl.int64) * tiles * BLOCK_V * H
        w += far
        if ref_w is not None:
            ref_w += far
    mp = tl.full([BLOCK_N], LOWEST, tl.float32)
    sp, ep, yp = tl.zeros_like(mp), tl.zeros_like(mp), tl.zeros_like(mp)
    mq, sq, yq, t = mp, sp, sp, sp
    for v0 in range(split * tiles * BLOCK_V, tl.minimum((split + 1) * tiles * BLOCK_V, V), BLOCK_V):
        w_at = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - v0)[:, None] * H + tl.arange(0, BLOCK_H)[None, :]
        zp = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        zq = zp
        for k in range(0, H, BLOCK_H):
            right = _tile(w, v0, k, w_at, TMA).T
            zp = tl.dot(_tile(x, row0, k, x_at, TMA), right, zp, input_precision="ieee")
            if ref_x is not None:
                if ref_w is not None:
                    right = _tile(ref_w, v0, k, w_at, TMA).T
                zq = tl.dot(_tile(ref_x, row0, k, x_at, TMA), right, zq, input_precision="ieee")
        cols = v0 + tl.arange(0, BLOCK_V)
        zp, _ = _logits(zp, bias_ptr, cols, V, softcap, sharpness)
        if ref_x is not None:
            zq, _ = _logits(zq, bias_ptr, cols, V, softcap, sharpness)
            t = _take_in_gap(t, mp, sp, mq, sq, zp, zq)
            mq, sq = _take_in(mq, sq, zq)
            yq += _at(zq, cols, target)
        ep = _take_in_entropy(ep, mp, sp, zp)
        mp, sp = _take_in(mp, sp, zp)
        yp += _at(zp, cols, target)
        if not TMA:
            w += BLOCK_V * H
            if ref_w is not None:
                ref_w += BLOCK_V * H
    inside = row0 + at < N
    part_ptr += split * N + row0
    step = tl.num_programs(1) * N
    tl.store(part_ptr + at, mp, mask=inside)
    tl.store(part_ptr + step + at, sp, mask=inside)
    tl.store(part_ptr + 2 * step + at, ep, mask=inside)
    tl.store(part_ptr + 3 * step + at, yp, mask=inside)
    if ref_x is not None:
        tl.store(part_ptr + 4 * step + at, mq, mask=inside)
        tl.store(part_ptr + 5 * step + at, sq, mask=inside)
        tl.store(part_ptr + 6 * step + at, yq, mask=inside)
        tl.store(part_ptr + 7 * step + at, t, mask=inside)


@triton.jit
def merge(part_ptr, stats_ptr, N, splits, REF: tl.constexpr, BLOCK: tl.constexpr):
    """The states of all splits -> stats [9, N] as in `rows` but for the reverse KL, and without REF for its rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    step = splits * N
    mp = tl.full([BLOCK], LOWEST, tl.float32)
    sp, ep, yp = tl.zeros_like(mp), tl.zeros_like(mp), tl.zeros_like(mp)
    mq, sq, yq, t = mp, sp, sp, sp
    for split in range(0, splits):
        here = part_ptr + split * N + at
        m = tl.load(here, mask=inside, other=0.0)
        s = tl.load(here + step, mask=inside, other=1.0)
        e = tl.load(here + 2 * step, mask=inside, other=0.0)
        yp += tl.load(here + 3 * step, mask=inside, other=0.0)
        top = tl.maximum(mp, m)
        if REF:
            m2 = tl.load(here + 4 * step, mask=inside, other=0.0)
            s2 = tl.load(here + 5 * step, mask=inside, other=1.0)
            yq += tl.load(here + 6 * step, mask=inside, other=0.0)
            t2 = tl.load(here + 7 * step, mask=inside, other=0.0)
            top2 = tl.maximum(mq, m2)
            t = _raise_gap(t, sp, sq, top - mp, top2 - mq) + _raise_gap(t2, s, s2, top - m, top2 - m2)
            sq = tl.exp(mq - top2) * sq + tl.exp(m2 - top2) * s2
            mq = top2
        ep = _raise_entropy(ep, sp, top - mp) + _raise_entropy(e, s, top - m)
        sp = tl.exp(mp - top) * sp + tl.exp(m - top) * s
        mp = top
    log_sp = tl.log(sp)
    tl.store(stats_ptr + at, yp - mp - log_sp, mask=inside)
    tl.store(stats_ptr + 3 * N + at, log_sp - ep / sp, mask=inside)
    tl.store(stats_ptr + 5 * N + at, mp, mask=inside)
    tl.store(stats_ptr + 6 * N + at, log_sp, mask=inside)
    if REF:
        log_sq = tl.log(sq)
        tl.store(stats_ptr + 7 * N + at, mq, mask=inside)
        tl.store(stats_ptr + 8 * N + at, log_sq, mask=inside)
        tl.store(stats_ptr + N + at, yq - mq - log_sq, mask=inside)
        tl.store(stats_ptr + 2 * N + at, _kl(t, sp, sq), mask=inside)
