"""Heads that are split over ranks: gathered before use (FSDP2), or a vocabulary that stays split (tensor parallel)."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """The rows of a head that one rank of a tensor-parallel group holds: ceil(V / ranks) each, fewer at the end.

    That is how DTensor's Shard(0) and torch.chunk split. With it weight, ref_weight and bias are local, and every rank
    of the group has the same hidden, ref_hidden, target and rows, and computes the same loss of the statistics.
    """

    group: dist.ProcessGroup
    vocabulary: int  # V, of all ranks together

    @property
    def columns(self) -> int:
        """Of the first rank, which has the most."""
        return -(-self.vocabulary // self.group.size())

    @property
    def first(self) -> int:
        return self.group.rank() * self.columns

    @property
    def size(self) -> int:
        """Rows of this rank; possibly 0 where there are more ranks than rows."""
        return max(0, min(self.columns, self.vocabulary - self.first))


def gathered(weight: Tensor) -> Tensor:
    """[V, H] the whole of a weight that FSDP2 has sharded, for token_stats; a plain tensor is returned as it is.

    The gradient is summed over the ranks and comes back in the placements of weight: each rank's gradient is one of its
    own rows of the batch. FSDP2's own reduction takes the mean: divide the loss by the number of ranks for that.
    """
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def copied(hidden: Tensor, shard: Shard) -> Tensor:
    """hidden; its gradient is summed over the ranks, each of which has the share of its columns."""
    return _Copied.apply(hidden, shard)  # pyright: ignore[reportReturnType]


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return total(grad.contiguous().clone(), ctx.shard), None


def total(x: Tensor, shard: Shard) -> Tensor:
    """Sum over the ranks, written over x."""
    dist.all_reduce(x, group=shard.group)
    return x


def highest(x: Tensor, shard: Shard) -> Tensor:
    """Maximum over the ranks, written over x."""
    dist.all_reduce(x, dist.ReduceOp.MAX, group=shard.group)
    return x
