"""A decoder's MLP over many tokens without the memory of many tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def tile_mlp(language_model: Any, tokens: int) -> None:
    """Every `mlp` of language_model.layers runs in tiles of `tokens` tokens, each recomputed in the backward.

    In place. After liger's kernels, which replace the same forward; before or after peft, whose adapters are inside.
    An MLP then holds about [tokens, intermediate size] at a time, forward and backward, at the price of one more
    forward of it, under a checkpointed layer too. A trained weight gets one gradient per backward, the sum over the
    tiles in the weight's dtype, so that hooks of a parameter fire once; hooks of the modules inside an MLP fire per
    tile, those of the MLP once. ZeRO-3 therefore gathers an MLP as a whole (`_z3_leaf` is DeepSpeed's mark for that:
    deepspeed/utils/z3_leaf_module.py), once per forward and backward whatever the number of tiles, which need not be
    the same on all ranks. Raises ValueError unless tokens > 0.
    """
    if tokens <= 0:
        raise ValueError(f"an MLP needs tiles of at least one token, got {tokens}")
    for layer in language_model.layers:
        layer.mlp.forward = partial(_tiled, layer.mlp.forward, tokens)
        layer.mlp._z3_leaf = True


def _tiled(forward: Callable[[Tensor], Tensor], tokens: int, x: Tensor) -> Tensor:
    """x: [..., T, H]."""
    return torch.cat([_part(forward, tile) for tile in x.split(tokens, dim=-2)], dim=-2)


def _part(forward: Callable[[Tensor], Tensor], tile: Tensor) -> Tensor:
    out = checkpoint(forward, tile, use_reentrant=False)
    assert isinstance(out, Tensor), "an MLP that returns more than its output"
    return out
