"""Triton kernels of tree_attention. `launch` says what is launched how; `work` what one program works on.

All three are flash attention with a state in fp32 and powers of two: z = q k scale log2(e), lse = log2 sum 2^z. A
program loads its own block once and meets the spans of its work tile by tile; only a tile at the end of a span, and
those of the last span, look at a mask. Rows past the end of a block or span are its last row again. Offsets inside a
tile have 32 bits, the addresses of tiles 64.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # z where a query does not attend; finite, since inf - inf is NaN


@triton.jit
def _base(x_ptr, token, head, heads, D: tl.constexpr):
    """Address of one head of a token in x [T, heads, D]."""
    return x_ptr + (tl.cast(token, tl.int64) * heads + head) * D


@triton.jit
def _load(base, rows, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head, 0 past D."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    at = base + rows[:, None] * (heads * D) + cols
    if D == BLOCK_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=cols < D, other=0.0)
    return x


@triton.jit
def _store(base, rows, size, x, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)[None, :]
    at = base + rows[:, None] * (heads * D) + cols
    tl.store(at, x.to(base.dtype.element_ty), mask=(rows < size)[:, None] & (cols < D))


@triton.jit
def _span(spans_ptr, span):
    """First token and stop."""
    return tl.load(spans_ptr + 2 * span), tl.load(spans_ptr + 2 * span + 1)


@triton.jit
def _take_in(acc, m, s, q, k, v, partial, low, queries, keys, scale):
    """The weighted sum of values, the largest z and the sum of 2^(z - m) after a tile of keys.

    partial: whether some queries do not attend to some keys of the tile. They do where low <= keys <= queries.
    A row that has seen no key yet has m = LOWEST and sums up what it must not; its first key, which comes at the latest
    with the query itself, multiplies that by 2^(LOWEST - z) = 0.
    """
    z = tl.dot(q, k.T, input_precision="ieee") * scale
    if partial:
        z = tl.where((low <= keys) & (keys <= queries), z, LOWEST)
    top = tl.maximum(m, tl.max(z, 1))
    p = tl.exp2(z - top[:, None])
    shrink = tl.exp2(m - top)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, s * shrink + tl.sum(p, 1)


@triton.jit
def forward(
    q_ptr,  # [T, heads, D]
    k_ptr,  # [T, kv_heads, D]
    v_ptr,
    out_ptr,  # [T, heads, D]
    lse_ptr,  # [heads, T] fp32
    blocks_ptr,  # Work.of_queries
    spans_ptr,
    low_ptr,
    tokens,
    heads,
    kv_heads,
    scale,  # times log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per head and block of queries."""
    head = tl.program_id(0)
    kv_head = head // (heads // kv_heads)
    blocks_ptr += 4 * tl.program_id(1)
    first = tl.load(blocks_ptr)
    size = tl.load(blocks_ptr + 1) - first
    first_span = tl.load(blocks_ptr + 2)
    last_span = tl.load(blocks_ptr + 3) - 1
    at, step = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    rows = tl.minimum(at, size - 1)
    q = _load(_base(q_ptr, first, head, heads, D), rows, heads, D, BLOCK_D)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    s = tl.zeros_like(m)
    queries = first + rows
    low = tl.load(low_ptr + queries)
    for span in range(first_span, last_span + 1):
        start, stop = _span(spans_ptr, span)
        for key in range(start, stop, BLOCK_K):
            k_rows = tl.minimum(step, stop - 1 - key)
            k = _load(_base(k_ptr, key, kv_head, kv_heads, D), k_rows, kv_heads, D, BLOCK_D)
            v = _load(_base(v_ptr, key, kv_head, kv_heads, D), k_rows, kv_heads, D, BLOCK_D)
            keys = tl.where(key + step < stop, key + step, tokens)
            partial = (span == last_span) | (key + BLOCK_K > stop)
            seen_from = tl.where(span == last_span, low, 0)
            acc, m, s = _take_in(
                acc, m, s, q, k, v, partial, seen_from[:, None], queries[:, None], keys[None, :], scale
            )
    _store(_base(out_ptr, first, head, heads, D), at, size, acc / s[:, None], heads, D, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * tokens + first + at, m + tl.log2(s), mask=at < size)


@triton.jit
def _d_scores(q, k, v, g, lse, delta, partial, low, queries, keys, scale):
    """p and p (dp - delta), the gradient at the scaled scores, of operands either way round."""
    p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse)
    if partial:
        p = tl.where((low <= keys) & (keys <= queries), p, 0.0)
    return p, p * (tl.dot(g, v.T, input_precision="ieee") - delta)


@triton.jit
def d_queries(
    q_ptr,  # [T, heads, D]
    k_ptr,  # [T, kv_heads, D]
    v_ptr,
    out_ptr,  # [T, heads, D]
    g_ptr,  # its gradient
    lse_ptr,  # [heads, T] fp32
    delta_ptr,  # [heads, T] fp32, written: sum over D of out * g
    dq_ptr,  # [T, heads, D]
    blocks_ptr,  # Work.of_queries
    spans_ptr,
    low_ptr,
    tokens,
    heads,
    kv_heads,
    scale,  # times log2(e)
    d_scale,  # the scale
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per head and block of queries."""
    head = tl.program_id(0)
    kv_head = head // (heads // kv_heads)
    blocks_ptr += 4 * tl.program_id(1)
    first = tl.load(blocks_ptr)
    size = tl.load(blocks_ptr + 1) - first
    first_span = tl.load(blocks_ptr + 2)
    last_span = tl.load(blocks_ptr + 3) - 1
    at, step = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    rows = tl.minimum(at, size - 1)
    q = _load(_base(q_ptr, first, head, heads, D), rows, heads, D, BLOCK_D)
    g = _load(_base(g_ptr, first, head, heads, D), rows, heads, D, BLOCK_D)
    out = _load(_base(out_ptr, first, head, heads, D), rows, heads, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
    far = head.to(tl.int64) * tokens + first
    tl.store(delta_ptr + far + at, delta, mask=at < size)
    lse = tl.load(lse_ptr + far + rows)[:, None]
    delta = delta[:, None]
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    queries = first + rows
    low = tl.load(low_ptr + queries)
    for span in range(first_span, last_span + 1):
        start, stop = _span(spans_ptr, span)
        for key in range(start, stop, BLOCK_K):
            k_rows = tl.minimum(step, stop - 1 - key)
            k = _load(_base(k_ptr, key, kv_head, kv_heads, D), k_rows, kv_heads, D, BLOCK_D)
            v = _load(_base(v_ptr, key, kv_head, kv_heads, D), k_rows, kv_heads, D, BLOCK_D)
            keys = tl.where(key + step < stop, key + step, tokens)
            partial = (span == last_span) | (key + BLOCK_K > stop)
            seen_from = tl.where(span == last_span, low, 0)
            _p, ds = _d_scores(
                q, k, v, g, lse, delta, partial, seen_from[:, None], queries[:, None], keys[None, :], scale
            )
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    _store(_base(dq_ptr, first, head, heads, D), at, size, acc * d_scale, heads, D, BLOCK_D)


@triton.jit
def d_keys(
    q_ptr,  # [T, heads, D]
    k_ptr,  # [T, kv_heads, D]
    v_ptr,
    g_ptr,  # [T, heads, D] gradient of the output
    lse_ptr,  # [heads, T] fp32
    delta_ptr,  # [heads, T] fp32
    dk_ptr,  # [T, kv_heads, D]
    dv_ptr,
    blocks_ptr,  # Work.of_keys
    spans_ptr,
    low_ptr,
    tokens,
    heads,
    kv_heads,
    scale,  # times log2(e)
    d_scale,  # the scale
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per key head and block of keys. It alone sums up over all queries that see them, in one order."""
    kv_head = tl.program_id(0)
    group = heads // kv_heads
    blocks_ptr += 4 * tl.program_id(1)
    first = tl.load(blocks_ptr)
    size = tl.load(blocks_ptr + 1) - first
    first_span = tl.load(blocks_ptr + 2)
    last_span = tl.load(blocks_ptr + 3) - 1
    at, step = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q)
    rows = tl.minimum(at, size - 1)
    k = _load(_base(k_ptr, first, kv_head, kv_heads, D), rows, kv_heads, D, BLOCK_D)
    v = _load(_base(v_ptr, first, kv_head, kv_heads, D), rows, kv_heads, D, BLOCK_D)
    keys = first + rows
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        far = head.to(tl.int64) * tokens
        for span in range(first_span, last_span + 1):
            start, stop = _span(spans_ptr, span)
            for query in range(start, stop, BLOCK_Q):
                q_rows = tl.minimum(step, stop - 1 - query)
                q = _load(_base(q_ptr, query, head, heads, D), q_rows, heads, D, BLOCK_D)
                g = _load(_base(g_ptr, query, head, heads, D), q_rows, heads, D, BLOCK_D)
                lse = tl.load(lse_ptr + far + query + q_rows)[None, :]
                delta = tl.load(delta_ptr + far + query + q_rows)[None, :]
                queries = tl.where(query + step < stop, query + step, -1)
                partial = (span == last_span) | (query + BLOCK_Q > stop)
                seen_from = tl.where(span == last_span, tl.load(low_ptr + query + q_rows), 0)
                p, ds = _d_scores(
                    k, q, g, v, lse, delta, partial, seen_from[None, :], queries[None, :], keys[:, None], scale
                )
                dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(_base(dk_ptr, first, kv_head, kv_heads, D), at, size, dk * d_scale, kv_heads, D, BLOCK_D)
    _store(_base(dv_ptr, first, kv_head, kv_heads, D), at, size, dv, kv_heads, D, BLOCK_D)
