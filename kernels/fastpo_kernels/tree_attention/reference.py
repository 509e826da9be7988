"""tree_attention as masked scaled-dot-product attention, one call per segment or run of siblings, on any device."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.types import Plan

Span = tuple[int, int]  # first token, behind the last
Chain = tuple[Span, ...]


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """See tree_attention. The largest mask is [tokens of one call, tokens of their ancestors and themselves]."""
    grouped = q.shape[1] != k.shape[1]
    out = [q[:0]]
    calls = [(ancestors, own, (own[0][0], own[-1][1])) for ancestors, own in runs(plan)]
    parts = [_parts(x, [(ancestors, whole) for ancestors, _, whole in calls]) for x in (q, k, v)]
    for ancestors, own, whole in calls:
        queries, keys, values = (
            _joined(x, wanted).transpose(0, 1)[None]  # [1, heads, tokens, D]
            for x, wanted in zip(parts, ((whole,), (*ancestors, whole), (*ancestors, whole)), strict=True)
        )
        mask = _mask(own, keys.shape[2], q.device) if ancestors else None
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def _parts(x: Tensor, calls: Sequence[tuple[Chain, Span]]) -> dict[Chain, Tensor]:
    """The tokens of each call, and, without a copy, of a root with the call right behind it that it is the ancestor of.

    By split: the backward of x[a:b] writes a gradient of the whole row for every piece; here it is of the root's.
    """
    pieces: list[list[Span]] = []
    for ancestors, whole in calls:
        if pieces and [*ancestors] == pieces[-1] and ancestors[0][1] == whole[0]:
            pieces[-1].append(whole)
        else:
            pieces.append([whole])
    found: dict[Chain, Tensor] = {}
    for spans, piece in zip(pieces, x.split([spans[-1][1] - spans[0][0] for spans in pieces]), strict=True):
        found[tuple(spans)] = piece
        if len(spans) == 2:
            root = spans[0][1] - spans[0][0]
            found[spans[0],], found[spans[1],] = piece[:root], piece[root:]
    return found


def _joined(parts: Mapping[Chain, Tensor], chain: Chain) -> Tensor:
    return parts[chain] if chain in parts else torch.cat([parts[span,] for span in chain])


def runs(plan: Plan) -> Iterator[tuple[Chain, list[Span]]]:
    """The calls in the row's order, without empty segments: the ancestors, and the segments that share them.

    Neighbouring siblings without children go together, so that their ancestors' keys are copied once, while they are at
    most half as long as these: what is computed and masked, sibling against sibling, stays small beside the rest.
    """
    parents = {span for chain in plan.spans for span in chain[:-1]}
    before: Chain = ()
    run: list[Span] = []
    for chain in plan.spans:
        own, ancestors = chain[-1], tuple((a, b) for a, b in chain[:-1] if a < b)
        if own[0] == own[1]:
            continue
        room = sum(b - a for a, b in ancestors) // 2
        if run and ancestors == before and own[1] - run[0][0] <= room and not {own, run[-1]} & parents:
            run.append(own)
            continue
        if run:
            yield before, run
        before, run = ancestors, [own]
    if run:
        yield before, run


def _mask(own: Sequence[Span], keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: all ancestors, which come first, and of its own segment a token and those before it."""
    queries = own[-1][1] - own[0][0]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    for first, _ in own[1:]:
        at = first - own[0][0]
        mask[at:, keys - queries : keys - queries + at] = False
    return mask
