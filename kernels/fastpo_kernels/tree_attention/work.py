"""What one program of a Triton kernel works on: a block of tokens and the spans of tokens it meets."""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]  # first token, stop


class Work(NamedTuple):
    """Blocks, most work first, with the spans that each meets.

    All tokens of the spans of a block but the last are met by all of its tokens. Its last span lies in its own
    segments: of a query and a key there, the query attends to the key where low[query] <= key <= query.
    """

    blocks: Tensor  # [n, 4] int32: first token, stop, first row of spans, stop
    spans: Tensor  # [m, 2] int32
    low: Tensor  # [T] int32, first token of the segment of each token

    def to(self, device: torch.device) -> "Work":
        return Work(*(x.to(device) for x in self))


@lru_cache(maxsize=8)
def of_queries(spans: tuple[tuple[Span, ...], ...], size: int, device: torch.device) -> Work:
    """Blocks of at most `size` queries and the keys they attend to. spans: those of a Plan.

    A block may hold tokens of several segments that follow each other and have the same ancestors: short responses to
    one prompt share its keys.
    """
    segments = [path[-1] for path in spans if _length(path[-1])]
    ancestors = [_merged(path[:-1]) for path in spans if _length(path[-1])]
    return _work(segments, ancestors, size, descend=False).to(device)


@lru_cache(maxsize=8)
def of_keys(spans: tuple[tuple[Span, ...], ...], size: int, device: torch.device) -> Work:
    """Blocks of at most `size` keys and the queries that attend to them. spans: those of a Plan."""
    below: dict[Span, list[Span]] = {path[-1]: [] for path in spans if _length(path[-1])}
    for path in spans:
        for ancestor in filter(_length, path[:-1]):
            below[ancestor].append(path[-1])
    return _work(list(below), [_merged(tuple(x)) for x in below.values()], size, descend=True).to(device)


def _work(segments: list[Span], beyond: list[tuple[Span, ...]], size: int, descend: bool) -> Work:
    """beyond: what all tokens of a segment meet outside of it. descend: they also meet what follows them inside."""
    found: list[tuple[Span, tuple[Span, ...]]] = []
    for met, run in groupby(zip(segments, beyond, strict=True), key=lambda pair: pair[1]):
        members = [segment for segment, _ in run]
        end = members[-1][1]
        for first in range(members[0][0], end, size):
            stop = min(first + size, end)
            head = next(s for s in members if s[1] > first)
            tail = next(s for s in members if s[1] >= stop)
            if head == tail:
                rest = (stop, tail[1]) if descend else (head[0], first)
                found.append(((first, stop), (*_merged((*met, rest)), (first, stop))))
            else:
                found.append(((first, stop), (*met, (first, tail[1]) if descend else (head[0], stop))))
    found.sort(key=lambda block: -sum(map(_length, block[1])))
    blocks, rows = [], 0
    for block, spans in found:
        blocks.append((*block, rows, rows + len(spans)))
        rows += len(spans)
    lengths = torch.tensor([_length(s) for s in segments], dtype=torch.int64)
    starts = torch.tensor([s[0] for s in segments], dtype=torch.int32)
    return Work(
        blocks=torch.tensor(blocks, dtype=torch.int32).reshape(-1, 4),
        spans=torch.tensor([span for _, spans in found for span in spans], dtype=torch.int32).reshape(-1, 2),
        low=starts.repeat_interleave(lengths),
    )


def _merged(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Spans in ascending order, without empty ones and joined where one begins at the end of another."""
    joined: list[Span] = []
    for first, stop in sorted(filter(_length, spans)):
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((first, stop))
    return tuple(joined)


def _length(span: Span) -> int:
    return span[1] - span[0]
