"""Triton kernels of the losses. `launch` says what is launched how; nothing here allocates.

One program owns a prompt (a pair is one of two responses) or a response, and all of its tokens: it sums them up in a
fixed order, without atomics, makes the loss, and walks over them once more to write the gradient of each. All in fp32.
"""

import triton
import triton.language as tl

from fastpo_kernels.token_stats.kernel import expm1, gap, log_gap


@triton.jit
def _difference(a_ptr, b_ptr, at, inside):
    """a - b at some tokens, 0 outside; b_ptr None counts as 0."""
    x = tl.load(a_ptr + at, mask=inside, other=0.0)
    if b_ptr is not None:
        x -= tl.load(b_ptr + at, mask=inside, other=0.0)
    return x


@triton.jit
def _k3(log_ratio):
    """exp(d) - d - 1, d = -log_ratio, without cancellation."""
    return gap(tl.full(log_ratio.shape, 1.0, tl.float32), tl.exp(-log_ratio), log_ratio)


@triton.jit
def _segment_sum(a_ptr, b_ptr, mask_ptr, start, stop, K3: tl.constexpr, BLOCK: tl.constexpr):
    """[R] sums of (a - b) mask, or with K3 of k3, over the tokens start:stop [R] of each response."""
    total = tl.zeros(start.shape, tl.float32)
    for first in range(0, tl.max(stop - start, 0), BLOCK):
        at = start[:, None] + first + tl.arange(0, BLOCK)[None, :]
        inside = at < stop[:, None]
        x = _difference(a_ptr, b_ptr, at, inside)
        if K3:
            x = _k3(x)
        if mask_ptr is not None:
            x *= tl.load(mask_ptr + at, mask=inside, other=0).to(tl.float32)
        total += tl.sum(x, 1)
    return total


@triton.jit
def pairs(
    logp_ptr,  # [N]
    ref_ptr,  # [N] or None
    kl_ptr,  # [N] or None
    mask_ptr,  # [N] bool, the phrases, or None
    score_ptr,  # [S] float64
    cu_ptr,  # [S + 1] int32, cu_seqlens of the responses
    sums_ptr,  # [5, P] loss, then sums over pairs of accuracy, margin, better and worse reward; with kl [6, P]
    d_logp_ptr,  # [N] gradient of scale * the sum of all losses
    d_kl_ptr,  # [N] likewise, or None
    size,  # responses of a prompt
    beta,
    gamma,
    alpha,
    smoothing,
    scale,
    MEAN: tl.constexpr,  # rewards are of the mean, not the sum, over tokens
    R: tl.constexpr,  # a power of two, at least size
    BLOCK: tl.constexpr,
):
    """One program per prompt: rewards [R] and pairs [R better, R worse], their shares of the loss as gap^gamma."""
    prompt = tl.program_id(0)
    r = tl.arange(0, R)
    here = r < size
    cu_ptr += prompt * size + r
    start = tl.load(cu_ptr, mask=here, other=0)
    stop = tl.load(cu_ptr + 1, mask=here, other=0)
    rate = tl.full([R], 1.0, tl.float32) * beta
    if MEAN:
        rate /= tl.maximum(stop - start, 1).to(tl.float32)
    reward = rate * _segment_sum(logp_ptr, ref_ptr, mask_ptr, start, stop, False, BLOCK)
    score = tl.load(score_ptr + prompt * size + r, mask=here, other=0.0)
    lead = score[:, None] - score[None, :]
    paired = (lead > 0) & here[:, None] & here[None, :]
    lead = tl.where(paired, lead, 1.0).to(tl.float32)
    power = tl.where(paired, gamma * tl.log(lead), -float("inf"))
    share = tl.where(paired, tl.exp(power - tl.maximum(tl.max(power), -1e30)), 0.0)
    share /= tl.maximum(tl.sum(share), 1.0)  # the largest is 1, but for no pairs
    u = reward[:, None] - reward[None, :]
    e = tl.exp(-tl.abs(u))
    loss = e - log_gap(e) + (1 - smoothing) * tl.maximum(-u, 0.0) + smoothing * tl.maximum(u, 0.0)
    slope = share * (smoothing - tl.where(u > 0, e, 1.0) / (1 + e))
    accuracy = tl.where(u > 0, 1.0, tl.where(u == 0, 0.5, 0.0))
    zero = tl.zeros_like(u)
    at, step = sums_ptr + prompt, tl.num_programs(0)
    tl.store(at + step, tl.sum(tl.where(paired, accuracy, 0.0)))
    tl.store(at + 2 * step, tl.sum(tl.where(paired, u, 0.0)))
    tl.store(at + 3 * step, tl.sum(tl.where(paired, reward[:, None] + zero, 0.0)))
    tl.store(at + 4 * step, tl.sum(tl.where(paired, reward[None, :] + zero, 0.0)))
    d_kl = tl.zeros([R], tl.float32)
    if kl_ptr is not None:
        kl = _segment_sum(kl_ptr, None, None, start, stop, False, BLOCK)[:, None] + zero
        tl.store(at + 5 * step, tl.sum(tl.where(paired, kl, 0.0)))
        loss += alpha * kl
        d_kl = scale * alpha * tl.sum(share, 1)
    tl.store(at, tl.sum(tl.where(paired, share * loss, 0.0)))
    d_logp = scale * rate * (tl.sum(slope, 1) - tl.sum(slope, 0))
    for first in range(0, tl.max(stop - start, 0), BLOCK):
        n = start[:, None] + first + tl.arange(0, BLOCK)[None, :]
        inside = n < stop[:, None]
        d = tl.zeros(n.shape, tl.float32) + d_logp[:, None]
        if mask_ptr is not None:
            d *= tl.load(mask_ptr + n, mask=inside, other=0).to(tl.float32)
        tl.store(d_logp_ptr + n, d, mask=inside)
        if kl_ptr is not None:
            tl.store(d_kl_ptr + n, tl.zeros(n.shape, tl.float32) + d_kl[:, None], mask=inside)


@triton.jit
def grpo(
    logp_ptr,  # [N]
    ref_ptr,  # [N] or None
    old_ptr,  # [N] or None: the policy itself
    advantage_ptr,  # [S]
    cu_ptr,  # [S + 1] int32, cu_seqlens of the responses
    sums_ptr,  # [4, S] loss, ratios held from below and from above, k3
    d_logp_ptr,  # [N] gradient of scale * the sum of all losses
    lowest,  # ratio that is not clipped
    highest,
    beta,  # None: no penalty
    length,  # divides the sum over a response's tokens; None: their number
    scale,
    SEQUENCE: tl.constexpr,  # one ratio for a response (gspo)
    KL_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per response."""
    response = tl.program_id(0)
    one = tl.arange(0, 1)
    start = tl.load(cu_ptr + response + one)
    stop = tl.load(cu_ptr + response + 1 + one)
    advantage = tl.load(advantage_ptr + response + one)[:, None]
    count = tl.maximum(tl.sum(stop - start), 1).to(tl.float32)
    mean_log_ratio = 0.0
    mean_k3 = 0.0
    if SEQUENCE:
        if old_ptr is not None:
            mean_log_ratio = tl.sum(_segment_sum(logp_ptr, old_ptr, None, start, stop, False, BLOCK)) / count
        if KL_RATIO and ref_ptr is not None:
            mean_k3 = tl.sum(_segment_sum(logp_ptr, ref_ptr, None, start, stop, True, BLOCK)) / count
    divisor = count
    if length is not None:
        divisor = length * 1.0
    loss = tl.zeros([1, BLOCK], tl.float32)
    low, high, penalty = loss, loss, loss
    for first in range(tl.sum(start), tl.sum(stop), BLOCK):
        at = first + tl.arange(0, BLOCK)[None, :]
        inside = at < stop[:, None]
        log_ratio = tl.zeros([1, BLOCK], tl.float32) + mean_log_ratio
        if not SEQUENCE and old_ptr is not None:
            log_ratio = _difference(logp_ptr, old_ptr, at, inside)
        ratio = tl.exp(log_ratio)
        held = tl.minimum(tl.maximum(ratio, lowest), highest)
        below, above = (ratio < lowest) & (advantage < 0), (ratio > highest) & (advantage > 0)
        each = -tl.minimum(ratio * advantage, held * advantage)
        slope = tl.where(below | above, 0.0, -ratio * advantage)
        if ref_ptr is not None:
            to_ref = _difference(logp_ptr, ref_ptr, at, inside)
            k3 = _k3(to_ref)
            d_k3 = -expm1(-to_ref)
            if KL_RATIO:
                pulled = k3
                if SEQUENCE:
                    pulled = tl.zeros_like(k3) + mean_k3
                d_k3 = ratio * (d_k3 + pulled)
                k3 *= ratio
            penalty += tl.where(inside, k3, 0.0)
            if beta is not None:
                each += beta * k3
                slope += beta * d_k3
        tl.store(d_logp_ptr + at, scale / divisor * slope, mask=inside)
        loss += tl.where(inside, each, 0.0)
        low += tl.where(inside & below, 1.0, 0.0)
        high += tl.where(inside & above, 1.0, 0.0)
    if SEQUENCE:
        low, high = low / count, high / count
    at, step = sums_ptr + response, tl.num_programs(0)
    tl.store(at, tl.sum(loss) / divisor)
    tl.store(at + step, tl.sum(low))
    tl.store(at + 2 * step, tl.sum(high))
    tl.store(at + 3 * step, tl.sum(penalty))
