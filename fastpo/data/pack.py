"""Samples to micro-batches: which samples share a row, and the packed forest itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.sample import Encoded, MicroBatch
from fastpo_kernels import Segments, Tree


def spread(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `lengths` for each rank, balanced by longest-processing-time-first."""
    loads, shares = [0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[i]
        shares[rank].append(i)
    return shares


def bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` grouped into rows of at most `budget` tokens, first-fit decreasing."""
    room, rows = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[i] <= budget
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def plan(lengths: Sequence[int], *, budget: int, ranks: int) -> list[list[list[int]]]:
    """One optimizer step: for each rank the same number of micro-batches, each a list of indices (empty to fill up).

    Every rank has to run the same forwards and backwards, or the collectives of ZeRO abort or hang.
    """
    shares = spread(lengths, ranks)
    rows = [[[share[i] for i in row] for row in bins([lengths[i] for i in share], budget)] for share in shares]
    most = max(1, max(map(len, rows)))
    return [row + [[]] * (most - len(row)) for row in rows]


def pack(encoded: Sequence[Encoded], blank: Encoded, skipped: Sequence[tuple[str, str]] = ()) -> MicroBatch:
    """One row: each prompt is a root segment, its responses are children that continue its positions.

    The hidden state that predicts a response's first token is the prompt's last, shared by all its responses. Where no
    sample has pixels, `blank` is added: a root segment with one frame and no target, so that the vision tower runs.
    """
    trees = list(encoded) if any(e.pixels is not None for e in encoded) else [*encoded, blank]
    ids, positions, parents, at, sizes = [], [], [], [], []
    offset = 0
    for sample in trees:
        root, prompt = len(parents), len(sample.prompt)
        last = offset + prompt - 1
        parents += [-1, *[root] * len(sample.responses)]
        ids += [sample.prompt, *sample.responses]
        positions += [torch.arange(prompt), *[prompt + torch.arange(len(r)) for r in sample.responses]]
        offset += prompt
        for response in sample.responses:
            at.append(torch.cat([torch.tensor([last]), torch.arange(offset, offset + len(response) - 1)]))
            offset += len(response)
        sizes += [prompt, *map(len, sample.responses)]
    responses = [r for e in encoded for r in e.responses]
    weights = [w for e in encoded for w in e.weights or ()]
    return MicroBatch(
        ids=torch.cat(ids),
        positions=torch.cat(positions),
        tree=Tree(torch.tensor([0, *sizes]).cumsum(0), torch.tensor(parents)),
        pixels=torch.cat([e.pixels for e in trees if e.pixels is not None]),
        at=_cat(at),
        target=_cat(responses),
        segments=Segments.build(
            tokens=[len(r) for r in responses],
            groups=[len(e.responses) for e in encoded],
            score=torch.tensor([s for e in encoded for s in e.scores], dtype=torch.float32),
            weight=torch.cat(weights) if weights and len(weights) == len(responses) else None,
        ),
        keys=tuple(e.key for e in encoded),
        skipped=tuple(skipped),
    )


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.int64)
