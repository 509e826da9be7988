"""Triton kernels of vision_splice. `launch` says what is launched how; nothing here allocates.

Token i along an axis samples the patches at (i + 1/2) extent / side - 1/2 (reference.Grid). As extent / side lies in
[1, 2], it has weight in two neighbouring patches, and a patch has weight in at most two neighbouring tokens. Places and
weights come from integers, so that no rounding puts a sample on the wrong side of a patch. Addresses are a 64-bit
scalar for a row and 32-bit offsets in it.
"""

import triton
import triton.language as tl


@triton.jit
def _patch(i, extent, side):
    """The patch before the place that token i samples, and the weight of the one behind it."""
    place = (2 * i + 1) * extent - side  # in 1 / (2 side)
    return place // (2 * side), (place % (2 * side)) / (2.0 * side)


@triton.jit
def _token(p, extent, side):
    """The first token that patch p can have weight in, and the weights of p in it and in the next one."""
    i = ((2 * p - 1) * side + extent) // (2 * extent)
    gap = (2 * i + 1) * extent - (2 * p + 1) * side
    weight = tl.maximum(1 - tl.abs(gap) / (2.0 * side), 0.0)
    next_weight = tl.maximum(1 - tl.abs(gap + 2 * extent) / (2.0 * side), 0.0)
    return i, tl.where(i < side, weight, 0.0), tl.where(i + 1 < side, next_weight, 0.0)


@triton.jit
def _row(ptr, row, cols, wanted, H):
    """[BLOCK] fp32 of a row of H; 0, and nothing read, unless wanted."""
    return tl.load(ptr + row.to(tl.int64) * H + cols, mask=cols < tl.where(wanted, H, 0), other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, row, cols, value, H):
    tl.store(ptr + row.to(tl.int64) * H + cols, value.to(ptr.dtype.element_ty), mask=cols < H)


@triton.jit
def forward(
    out_ptr,  # [T, H]
    embeddings_ptr,  # [T, H]
    features_ptr,  # [F, g * g, H]
    newline_ptr,  # [H] or None
    slot_ptr,  # [T] int32, the visual token that replaces a row, or -1
    H,
    g,
    extent,
    side,
    width,
    BLOCK: tl.constexpr,
):
    """One program per row of the result and block of its columns."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(slot_ptr + row)
    line, j = token // width, token % width
    x = tl.zeros([BLOCK], tl.float32)
    if token < 0:
        x = _row(embeddings_ptr, row, cols, True, H)
    else:
        if j < side:
            p, below = _patch(line % side, extent, side)
            q, right = _patch(j, extent, side)
            patch = (line // side * g + p) * g + q
            for tap in tl.static_range(4):
                weight = (below if tap // 2 else 1 - below) * (right if tap % 2 else 1 - right)
                x += weight * _row(features_ptr, patch + tap // 2 * g + tap % 2, cols, weight > 0, H)
        else:
            if newline_ptr is not None:
                x = _row(newline_ptr, line * 0, cols, True, H)
    _store(out_ptr, row, cols, x, H)


@triton.jit
def backward(
    grad_ptr,  # [T, H] of the result
    at_ptr,  # [F * tokens] int64, the row of each visual token
    slot_ptr,  # see forward
    d_features_ptr,  # [F, g * g, H] or None
    d_embeddings_ptr,  # [T, H] or None
    part_ptr,  # [parts, H] fp32 sums of newline's gradient, or None
    patches,  # F * g * g, or 0 without d_features
    rows,  # T, or 0 without d_embeddings
    lines,  # F * side
    H,
    g,
    extent,
    side,
    width,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per patch, then per row of the embeddings, then per LINES newlines, and block of columns."""
    pid = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if pid < patches:
        if d_features_ptr is not None:
            frame, p, q = pid // (g * g), pid // g % g, pid % g
            i, above, below = _token(p, extent, side)
            j, left, right = _token(q, extent, side)
            token = (frame * side + i) * width + j
            x = tl.zeros([BLOCK], tl.float32)
            for tap in tl.static_range(4):
                weight = (below if tap // 2 else above) * (right if tap % 2 else left)
                row = tl.load(at_ptr + token + tap // 2 * width + tap % 2, mask=weight > 0, other=0)
                x += weight * _row(grad_ptr, row, cols, weight > 0, H)
            _store(d_features_ptr, pid, cols, x, H)
    elif pid < patches + rows:
        if d_embeddings_ptr is not None:
            row = pid - patches
            _store(d_embeddings_ptr, row, cols, _row(grad_ptr, row, cols, tl.load(slot_ptr + row) < 0, H), H)
    else:
        if part_ptr is not None:
            part = pid - patches - rows
            x = tl.zeros([BLOCK], tl.float32)
            for line in range(part * LINES, tl.minimum(part * LINES + LINES, lines)):
                x += _row(grad_ptr, tl.load(at_ptr + line * width + side), cols, True, H)
            _store(part_ptr, part, cols, x, H)
