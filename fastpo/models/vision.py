"""The vision tower over many frames without the memory of many frames."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Apply = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # how an encoder is run over all of a row's pictures


def at_once(encode: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    return encode(pixels)


def chunk_frames(
    encode: Callable[[Tensor], Tensor], pixels: Tensor, chunk: int, *, recompute: bool, calls: int = 1
) -> Tensor:
    """encode(pixels) in calls of at most `chunk` frames, so that what encode needs beside its result stays bounded.

    pixels: [F, ...] with F > 0. encode: [f, ...] -> [f * n, ...], frame by frame, without an effect of one frame on
    another. Returns [F * n, ...].
    recompute: False, where nothing in encode is trained, runs it without gradient and writes each part into the result;
    True keeps the parts' pixels alone and runs encode once more in the backward, part by part.
    calls: at least this many, the spare ones on the first frame and without effect. ZeRO-3 needs as many on every rank:
    the largest ceil(F / chunk) of them all.
    """
    assert chunk > 0 and len(pixels) > 0
    wanted = max(calls, math.ceil(len(pixels) / chunk))
    parts = pixels.tensor_split(min(wanted, len(pixels)))
    spare = [pixels[:1]] * (wanted - len(parts))
    if recompute:
        made = [checkpoint(encode, part, use_reentrant=False) for part in (*parts, *spare)]
        rows = [rows if i < len(parts) else rows[:0] for i, rows in enumerate(made) if isinstance(rows, Tensor)]
        return torch.cat(rows)
    with torch.no_grad():
        return _joined(encode, parts, spare, len(pixels))


def _joined(
    encode: Callable[[Tensor], Tensor], parts: Sequence[Tensor], spare: Sequence[Tensor], frames: int
) -> Tensor:
    """The rows of all parts, written where they belong as they are made."""
    out, at = None, 0
    for part in parts:
        rows = encode(part)
        if out is None:
            out = rows.new_empty(frames * (len(rows) // len(part)), *rows.shape[1:])
        out[at : at + len(rows)] = rows
        at += len(rows)
        del rows  # before the next part needs the room
    for part in spare:
        encode(part)
    assert out is not None and at == len(out)
    return out
