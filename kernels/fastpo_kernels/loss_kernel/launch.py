"""The losses with Triton: how the two kernels are launched."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.loss_kernel import kernel
from fastpo_kernels.triton_launch import Launch
from fastpo_kernels.types import Segments

BLOCK, WARPS = 1024, 4  # tokens that a program reads at a time; not timed


class PairOptions(NamedTuple):
    """Of `kernel.pairs`."""

    size: int
    beta: float
    gamma: float
    alpha: float
    smoothing: float
    scale: float
    MEAN: bool


class GrpoOptions(NamedTuple):
    """Of `kernel.grpo`."""

    lowest: float
    highest: float
    beta: float | None
    length: int | None
    scale: float
    SEQUENCE: bool
    KL_RATIO: bool


def pairs(
    logp: Tensor, ref_logp: Tensor | None, kl: Tensor | None, seg: Segments, options: PairOptions
) -> tuple[Launch, Tensor, list[Tensor]]:
    """`kernel.pairs` and what it fills: sums [5 or 6, P], slopes [N] of logp and, if given, of kl."""
    sums = torch.empty(5 if kl is None else 6, len(seg.groups), device=logp.device)
    slopes = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (logp, kl) if x is not None]
    responses = max(2, 1 << (options.size - 1).bit_length())
    args = {
        "logp_ptr": logp.contiguous(),
        "ref_ptr": None if ref_logp is None else ref_logp.contiguous(),
        "kl_ptr": None if kl is None else kl.contiguous(),
        "mask_ptr": None if seg.weight is None else seg.weight.to(logp.device),
        "score_ptr": seg.score.double().to(logp.device),
        "cu_ptr": _cu_seqlens(seg, logp.device),
        "sums_ptr": sums,
        "d_logp_ptr": slopes[0],
        "d_kl_ptr": None if kl is None else slopes[1],
        **options._asdict(),
        "R": responses,
        "BLOCK": BLOCK // responses,
    }
    return Launch(kernel.pairs, (len(seg.groups),), args, WARPS), sums, slopes


def grpo(
    logp: Tensor,
    ref_logp: Tensor | None,
    old_logp: Tensor | None,
    advantage: Tensor,
    seg: Segments,
    options: GrpoOptions,
) -> tuple[Launch, Tensor, list[Tensor]]:
    """`kernel.grpo` and what it fills: sums [4, S], the slope [N] of logp."""
    sums = torch.empty(4, len(seg.tokens), device=logp.device)
    slope = torch.empty_like(logp, memory_format=torch.contiguous_format)
    args = {
        "logp_ptr": logp.contiguous(),
        "ref_ptr": None if ref_logp is None else ref_logp.contiguous(),
        "old_ptr": None if old_logp is None else old_logp.contiguous(),
        "advantage_ptr": advantage.contiguous(),
        "cu_ptr": _cu_seqlens(seg, logp.device),
        "sums_ptr": sums,
        "d_logp_ptr": slope,
        **options._asdict(),
        "BLOCK": BLOCK,
    }
    return Launch(kernel.grpo, (len(seg.tokens),), args, WARPS), sums, [slope]


def _cu_seqlens(seg: Segments, device: torch.device) -> Tensor:
    """[S + 1] int32."""
    return F.pad(seg.tokens.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
