"""Tree attention behind transformers' attention interface.

A registered name without a mask function makes transformers build no L x L mask. The tree travels as a keyword argument
through every layer, so that the recomputation of gradient checkpointing, in another thread on CUDA, sees it too.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from fastpo_kernels import Tree, tree_attention

BACKENDS = ("auto", "reference", "varlen")


def _attention(backend: str):
    def attend(
        module: nn.Module,
        query: Tensor,  # [1, heads, T, D]
        key: Tensor,  # [1, kv_heads, T, D]
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        tree: Tree,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None and query.shape[0] == 1 and not dropout
        if sliding_window is not None:
            raise ValueError(
                "sliding-window attention is not supported in packed rows: set use_sliding_window to false"
            )
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return tree_attention(q, k, v, tree, scale=scaling, backend=backend)[None], None

    return attend


def register(backend: str) -> str:
    """Registers tree attention with this backend and returns the name for attn_implementation."""
    name = f"fastpo_{backend}"
    AttentionInterface.register(name, _attention(backend))
    return name
