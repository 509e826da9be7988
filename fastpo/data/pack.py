"""Samples to micro-batches: which samples share a row, and the packed forest itself."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.sample import Encoded, MicroBatch, Shown, Size
from fastpo_kernels import Segments, Tree


def spread(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of `costs` for each rank, balanced by longest-processing-time-first."""
    loads, shares = [0.0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[i]
        shares[rank].append(i)
    return shares


def bins(sizes: Sequence[Size], budget: Size) -> list[list[int]]:
    """Indices of `sizes` grouped into rows of at most `budget`, first-fit decreasing by tokens."""
    room: list[Size] = []
    rows: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i].tokens, i)):
        tokens, patches = sizes[i]
        assert tokens <= budget.tokens and patches <= budget.patches
        row = next((r for r, free in enumerate(room) if free.tokens >= tokens and free.patches >= patches), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(i)
        room[row] = Size(room[row].tokens - tokens, room[row].patches - patches)
    return rows


def plan(sizes: Sequence[Size], *, budget: Size, ranks: int, patch_cost: float = 0.0) -> list[list[list[int]]]:
    """One optimizer step: for each rank the same number of micro-batches, each a list of indices (empty to fill up).

    Ranks are balanced by tokens + patch_cost * patches. Every rank has to run the same forwards and backwards, or the
    collectives of ZeRO abort or hang.
    """
    shares = spread([tokens + patch_cost * patches for tokens, patches in sizes], ranks)
    rows = [[[share[i] for i in row] for row in bins([sizes[i] for i in share], budget)] for share in shares]
    most = max(1, max(map(len, rows)))
    return [row + [[]] * (most - len(row)) for row in rows]


def pack(encoded: Sequence[Encoded], blank: Encoded | None, skipped: Sequence[tuple[str, str]] = ()) -> MicroBatch:
    """One row: each prompt is a root segment, a response is a child of it or of another response.

    A segment continues the positions of its parent. The hidden state that predicts its first token is the parent's
    last, shared by all its children. Where no sample has pixels, `blank` is added: a root segment with one image and no
    target, so that the vision tower runs.
    """
    add = [] if blank is None or any(e.pixels is not None or e.file is not None for e in encoded) else [blank]
    trees = [*encoded, *add]
    ids, positions, parents, at, target, last = [], [], [], [], [], []
    offset = 0
    for sample in trees:
        root = len(parents)
        of = sample.parents or (-1,) * len(sample.responses)
        parents += [-1, *[root + 1 + parent for parent in of]]
        first = torch.arange(len(sample.prompt)) if sample.positions is None else sample.positions
        segments = [_Segment(offset, len(sample.prompt), int(first[..., -1].max()) + 1 if first.numel() else 0)]
        ids.append(sample.prompt)
        positions.append(first)
        offset += len(sample.prompt)
        for i, (response, parent) in enumerate(zip(sample.responses, of, strict=True)):
            start = segments[parent + 1]
            tokens = torch.arange(offset, offset + len(response))
            before = torch.cat([torch.tensor([start.first + start.tokens - 1]), tokens[:-1]])
            kept = slice(None) if sample.trained is None else sample.trained[i]
            at.append(before[kept])
            target.append(response[kept])
            ids.append(response)
            positions.append(start.next + torch.arange(len(response)))
            segments.append(_Segment(offset, len(response), start.next + len(response)))
            offset += len(response)
            last.append(offset - 1)
    seg = Segments.build(
        tokens=[len(t) for t in target],
        groups=[len(e.responses) for e in encoded],
        score=torch.tensor([s for e in encoded for s in e.scores], dtype=torch.float32),
        weight=_weight(encoded),
    )
    return MicroBatch(
        ids=torch.cat(ids),
        positions=_joined(positions),
        tree=Tree(torch.tensor([0, *map(len, ids)]).cumsum(0), torch.tensor(parents)),
        pixels=_cat([e.pixels for e in trees if e.pixels is not None and e.file is None]),
        grid=_cat([e.grid for e in trees if e.grid is not None]),
        at=_cat(at),
        target=_cat(target),
        segments=seg,
        better=seg.better,
        last=torch.tensor(last, dtype=torch.int64),
        keys=tuple(e.key for e in encoded),
        skipped=tuple(skipped),
        shown=tuple(Shown(e.file, e.features, e.pixels, e.grid) for e in trees if e.file is not None),
    )


class _Segment(NamedTuple):
    first: int  # place of its first token in the row
    tokens: int
    next: int  # position after its last token


def _weight(encoded: Sequence[Encoded]) -> Tensor | None:
    """[N] phrase weights of the supervised tokens; None where a sample has none."""
    if any(e.weights is None for e in encoded):
        return None
    kept = [w if e.trained is None else w[e.trained[i]] for e in encoded for i, w in enumerate(e.weights or ())]
    return torch.cat(kept) if kept else torch.zeros(0)


def _joined(positions: Sequence[Tensor]) -> Tensor:
    """[T], or [3, T] where a sample has three axes of positions (in text they are equal)."""
    if all(p.ndim == 1 for p in positions):
        return torch.cat(list(positions))
    return torch.cat([p.expand(3, -1) for p in positions], dim=1)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.int64)
