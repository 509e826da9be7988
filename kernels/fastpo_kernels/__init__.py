"""Fused preference losses: a language-model head reduced to per-token numbers, and pure losses of those numbers."""

from fastpo_kernels.types import LossOut, Segments, TokenStats, Tree

__all__ = ["LossOut", "Segments", "TokenStats", "Tree"]
