"""tree_attention as masked scaled-dot-product attention, one call per segment or run of siblings, on any device."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.types import Plan

Span = tuple[int, int]  # first token, behind the last


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """See tree_attention. The largest mask is [tokens of one call, tokens of their ancestors and themselves]."""
    grouped = q.shape[1] != k.shape[1]
    out = [q[:0]]
    calls = list(runs(plan))
    whole = [(own[0][0], own[-1][1]) for _, own in calls]
    # split, not x[a:b], whose backward writes a gradient of the whole row for every segment
    parts = [dict(zip(whole, x.split([b - a for a, b in whole]), strict=True)) for x in (q, k, v)] if whole else []
    for (ancestors, own), span in zip(calls, whole, strict=True):
        queries, keys, values = (
            torch.cat([x[part] for part in wanted]).transpose(0, 1)[None]  # [1, heads, tokens, D]
            for x, wanted in zip(parts, ((span,), (*ancestors, span), (*ancestors, span)), strict=True)
        )
        mask = _mask(own, keys.shape[2], q.device) if ancestors else None
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def runs(plan: Plan) -> Iterator[tuple[tuple[Span, ...], list[Span]]]:
    """The calls in the row's order, without empty segments: the ancestors, and the segments that share them.

    Neighbouring siblings without children go together, so that their ancestors' keys are copied once, while they are at
    most half as long as these: what is computed and masked, sibling against sibling, stays small beside the rest.
    """
    parents = {span for chain in plan.spans for span in chain[:-1]}
    before: tuple[Span, ...] = ()
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
