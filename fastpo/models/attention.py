"""Tree attention behind transformers' attention interface.

A registered name without a mask function makes transformers build no L x L mask. The tree travels as a keyword argument
through every layer, so that the recomputation of gradient checkpointing, in another thread on CUDA, sees it too.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fastpo_kernels import Tree, tree_attention

BACKENDS = ("auto", "reference", "varlen", "triton")


def _attention(backend: str):
    def attend(
        module: nn.Module,
        query: Tensor,  # [1, heads, T, D]
        key: Tensor,  # [1, kv_heads, T, D]
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        tree: Tree | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if tree is None:  # generation: whole rows of one length, keys from a cache
            return _causal(query, key, value, scaling), None
        assert attention_mask is None and query.shape[0] == 1 and not dropout
        if sliding_window is not None:
            raise ValueError(
                "sliding-window attention is not supported in packed rows: set use_sliding_window to false"
            )
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return tree_attention(q, k, v, tree, scale=scaling, backend=backend)[None], None

    return attend


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[B, heads, n, D] new tokens against [B, kv_heads, m, D], the last n of them their own -> [B, n, heads, D]."""
    n, m = query.shape[2], key.shape[2]
    mask = None if n in (1, m) else torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=n == m > 1, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def register(backend: str) -> str:
    """Registers tree attention with this backend and returns the name for attn_implementation."""
    name = f"fastpo_{backend}"
    AttentionInterface.register(name, _attention(backend))
    return name


@contextmanager
def watched(module: Any, rows: slice) -> Iterator[list[Tensor]]:
    """Keeps the weights [heads, n, T] float32 that the queries `rows` of this self-attention give to a causal row.

    Every forward in the block appends its own. The other layers, and what this one computes, stay as they are.
    """
    kept: list[Tensor] = []
    plain = module.config
    inner = AttentionInterface()[plain._attn_implementation]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any):
        assert query.shape[0] == 1 and query.shape[2] == key.shape[2]
        kept.append(_causal_weights(query[0], key[0], rows, options.get("scaling")))
        return inner(module, query, key, value, mask, **options)

    AttentionInterface.register("fastpo_watched", attend)
    module.config = copy.copy(plain)
    module.config._attn_implementation = "fastpo_watched"
    try:
        yield kept
    finally:
        module.config = plain


def _causal_weights(query: Tensor, key: Tensor, rows: slice, scale: float | None) -> Tensor:
    """[heads, T, D] and [kv_heads, T, D] -> [heads, n, T], in float32."""
    tokens = query.shape[1]
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    scores = query[:, rows].float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    at = torch.arange(tokens, device=query.device)
    return scores.masked_fill(at > at[rows, None], -torch.inf).softmax(-1)
