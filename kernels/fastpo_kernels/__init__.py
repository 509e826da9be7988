"""Fused preference losses: a language-model head reduced to per-token numbers, and pure losses of those numbers."""

from fastpo_kernels import losses
from fastpo_kernels.fused import fused_dpo, fused_grpo, fused_logp, fused_perpo, fused_rrpo
from fastpo_kernels.token_stats import Shard, folded_logp, gathered, token_stats
from fastpo_kernels.tree_attention import tree_attention
from fastpo_kernels.types import LossOut, Segments, TokenStats, Tree
from fastpo_kernels.vision_splice import vision_splice

__all__ = [
    "LossOut",
    "Segments",
    "Shard",
    "TokenStats",
    "Tree",
    "folded_logp",
    "fused_dpo",
    "fused_grpo",
    "fused_logp",
    "fused_perpo",
    "fused_rrpo",
    "gathered",
    "losses",
    "token_stats",
    "tree_attention",
    "vision_splice",
]
