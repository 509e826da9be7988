"""tree_attention as one masked scaled-dot-product attention per segment, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.types import Plan


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """See tree_attention. The largest mask is [tokens of one child, tokens of its ancestors and itself]."""
    grouped = q.shape[1] != k.shape[1]
    out = [q[:0]]
    own = [spans[-1] for spans in plan.spans]
    # split, not x[a:b], whose backward writes a gradient of the whole row for every segment
    parts = [dict(zip(own, x.split([b - a for a, b in own]), strict=True)) for x in (q, k, v)] if own else []
    for spans in plan.spans:
        first, stop = spans[-1]
        if first == stop:
            continue
        queries, keys, values = (
            torch.cat([x[span] for span in part]).transpose(0, 1)[None]  # [1, heads, tokens, D]
            for x, part in zip(parts, (spans[-1:], spans, spans), strict=True)
        )
        mask = None if len(spans) == 1 else _bottom_right_causal(stop - first, keys.shape[2], q.device)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def _bottom_right_causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: the last query sees every key, the one before it all but the last, ..."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
