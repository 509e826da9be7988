"""Tree attention behind transformers' attention interface.

A registered name without a mask function makes transformers build no L x L mask. The tree travels as a keyword argument
through every layer, so that the recomputation of gradient checkpointing, in another thread on CUDA, sees it too.
"""

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
