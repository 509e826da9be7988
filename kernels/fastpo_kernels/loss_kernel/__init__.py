"""What lies between the head's forward and its backward, in one Triton launch: the losses of the fused functions.

The launch sums up each response, makes the losses and metrics, and leaves the gradient of every token, by which the
backward is one multiplication. It is losses.* in another order of summation: same arguments, options and errors, but
that Segments may still be on the CPU, and losses are averaged. CUDA, fp32. It has not been timed on a device, so that
only backend "triton" takes it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo_kernels.losses.grpo import check_grpo
from fastpo_kernels.losses.pairs import check_pair_options, not_negative
from fastpo_kernels.triton_launch import run
from fastpo_kernels.types import Segments

MAX_RESPONSES = 32  # of a prompt: all their pairs are held in registers
METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "kl")


def pairs(
    logp: Tensor,
    ref_logp: Tensor | None,
    seg: Segments,
    *,
    kl: Tensor | None = None,
    beta: float = 0.1,
    gamma: float = 0.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over prompts of losses.perpo, with two responses losses.dpo, and with kl [N] and seg.weight losses.rrpo.

    logp, ref_logp: [N] nats. seg: prompts of equally many responses, at most 32; seg.weight: [N] bool. Pairs are all
    those of different scores; label_smoothing as in losses.dpo. Raises ValueError as those do, and for more responses.
    """
    from fastpo_kernels.loss_kernel import launch  # Triton is imported on first use

    check_pair_options(beta, "sigmoid", label_smoothing, 0.0)
    not_negative("gamma", gamma)
    not_negative("alpha", alpha)
    prompts = max(1, len(seg.groups))
    size = len(seg.tokens) // prompts
    if size > MAX_RESPONSES:
        raise ValueError(f"backend 'triton' takes at most {MAX_RESPONSES} responses of a prompt, got {size}")
    assert len(seg.tokens) == size * len(seg.groups), "prompts of different sizes"
    options = launch.PairOptions(
        size=size,
        beta=float(beta),
        gamma=float(gamma),
        alpha=float(alpha),
        smoothing=float(label_smoothing),
        scale=1 / prompts,
        MEAN=length_normalized,
    )
    made, sums, slopes = launch.pairs(logp.detach(), ref_logp, None if kl is None else kl.detach(), seg, options)
    run(made)
    loss, *rest = sums.sum(1)
    found = max(1, seg.pairs.shape[1])
    metrics = {name: x / found for name, x in zip(METRICS, rest, strict=False)}
    return _loss(loss / prompts, slopes, (logp,) if kl is None else (logp, kl)), metrics


def grpo(
    logp: Tensor,
    ref_logp: Tensor | None,
    old_logp: Tensor | None,
    advantage: Tensor,
    seg: Segments,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    kl_ratio: bool = False,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of losses.grpo: over responses, for "dapo" over tokens."""
    from fastpo_kernels.loss_kernel import launch

    check_grpo(ref_logp, epsilon_low, epsilon_high, beta, loss_type, max_completion_length)
    tokens, responses = max(1, len(logp)), max(1, len(seg.tokens))
    units = tokens if loss_type == "dapo" else responses
    options = launch.GrpoOptions(
        lowest=1.0 - epsilon_low,
        highest=1.0 + epsilon_high,
        beta=float(beta) if beta else None,
        length={"dapo": 1, "dr_grpo": max_completion_length}.get(loss_type),
        scale=1 / units,
        SEQUENCE=loss_type == "gspo",
        KL_RATIO=kl_ratio,
    )
    made, sums, slopes = launch.grpo(logp.detach(), ref_logp, old_logp, advantage, seg, options)
    run(made)
    loss, low, high, kl = sums.sum(1)
    ratios = responses if loss_type == "gspo" else tokens
    metrics = {"clip_low": low / ratios, "clip_high": high / ratios}
    metrics |= {} if ref_logp is None else {"kl": kl / tokens}
    return _loss(loss / units, slopes, (logp,)), metrics


def _loss(loss: Tensor, slopes: list[Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    return _Loss.apply(loss, len(slopes), *slopes, *inputs)  # pyright: ignore[reportReturnType]


class _Loss(torch.autograd.Function):
    """A loss whose gradient at each input is known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *slopes_and_inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*slopes_and_inputs[:count])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slopes = ctx.saved_tensors
        return None, None, *(None for _ in slopes), *(grad * slope for slope in slopes)
