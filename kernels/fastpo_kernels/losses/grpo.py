"""Group-relative policy optimisation, its relatives and their advantages."""

from typing import Literal

import torch
from torch import Tensor

from fastpo_kernels.losses.pairs import one_of
from fastpo_kernels.types import LossOut, Segments


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
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo"] = "grpo",
    max_completion_length: int | None = None,
) -> LossOut:
    """Group-relative policy optimisation: the clipped policy gradient, with a penalty for leaving the reference.

        token = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta (exp(d) - d - 1)
        r = p / p_old, d = log p_ref / p (k3, an unbiased estimate of KL(p || p_ref))

    logp, ref_logp, old_logp: [N] nats; advantage: [S]. old_logp None is the policy itself, r = 1; ref_logp None: no
    penalty, which beta 0 also says. kl_ratio: the penalty times r, which makes its gradient that of the KL, also where
    p moved away from p_old (DeepSeek-V3.2; TRL 1.16 does so unless told not to). loss_type:
    - "grpo": losses [S], unit "response", the mean over the tokens of each.
    - "gspo": the same, with one ratio for a response: exp of the mean of log p / p_old over its tokens.
    - "dr_grpo": losses [S], unit "response", the sum over its tokens / max_completion_length.
    - "dapo": losses [N], unit "token".
    Metrics: "clip_low", "clip_high", the share of ratios that the clip holds, [N] ([S] for gspo); "kl" [N], the k3
    estimate, with a reference. A response without tokens has loss 0.

    Sources: Shao et al. 2024 (arXiv 2402.03300) eq. 3-4; DAPO 2503.14476; Dr. GRPO 2503.20783; GSPO 2507.18071;
    aggregation as huggingface/trl 1.16, trl/trainer/grpo_trainer.py:3083-3176; there gspo is
    importance_sampling_level="sequence". Visual-RFT (src/virft/src/open_r1/trainer/grpo_trainer.py:355-488) is "grpo"
    without old_logp; its prompt truncation, which trains the tail of a cut prompt, is the caller's mask.
    Raises ValueError for a negative epsilon or beta, beta without ref_logp, an unknown loss_type, and "dr_grpo" without
    a positive max_completion_length.
    """
    check_grpo(ref_logp, epsilon_low, epsilon_high, beta, loss_type, max_completion_length)
    count = seg.tokens.clamp(min=1)
    log_ratio = logp - (logp.detach() if old_logp is None else old_logp)
    if loss_type == "gspo":
        ratio, a = (seg.sum(log_ratio) / count).exp(), advantage
    else:
        ratio, a = log_ratio.exp(), advantage[seg.owner]
    policy, metrics = clipped(ratio, a, epsilon_low, epsilon_high)
    per_token = policy[seg.owner] if loss_type == "gspo" else policy
    if ref_logp is not None:
        kl = k3(logp, ref_logp)
        if kl_ratio:
            kl = kl * (ratio[seg.owner] if loss_type == "gspo" else ratio)
        per_token = per_token + beta * kl if beta else per_token
        metrics["kl"] = kl.detach()
    if loss_type == "dapo":
        return LossOut(losses=per_token, unit="token", metrics=metrics)
    length = max_completion_length if max_completion_length and loss_type == "dr_grpo" else count
    return LossOut(losses=seg.sum(per_token) / length, unit="response", metrics=metrics)


def check_grpo(
    ref_logp: Tensor | None, low: float, high: float, beta: float, loss_type: str, max_completion_length: int | None
) -> None:
    if not (low >= 0 and high >= 0 and beta >= 0):
        raise ValueError(f"epsilon and beta must not be negative, got {low}, {high} and {beta}")
    if beta and ref_logp is None:
        raise ValueError(f"beta {beta} needs ref_logp")
    one_of("loss_type", loss_type, ("grpo", "dapo", "dr_grpo", "gspo"))
    if loss_type == "dr_grpo" and not (max_completion_length or 0) > 0:
        raise ValueError(f"dr_grpo needs a positive max_completion_length, got {max_completion_length}")


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and where the clip holds the ratio."""
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return loss, {
        "clip_low": ((ratio < 1 - low) & (advantage < 0)).to(ratio.dtype),
        "clip_high": ((ratio > 1 + high) & (advantage > 0)).to(ratio.dtype),
    }


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """[N] exp(d) - d - 1, d = ref_logp - logp: an estimate of KL(p || p_ref) that is never negative."""
    d = ref_logp - logp
    return torch.expm1(d) - d  # not exp(d) - d - 1, which near the reference is the rounding of 1


def advantages(
    reward: Tensor, seg: Segments, *, kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo", eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """How much better a response did than the others of its prompt: [S], and [P] bool, the groups with a signal.

    reward: [S]. kind: "grpo": (r - mean) / (std + eps), std without bias (n - 1), as Visual-RFT (grpo_trainer.py:
    456-462, eps 1e-4) and TRL have it; "dr_grpo": r - mean; "rloo": r - mean of the other responses (arXiv 2402.14740).
    A group whose rewards are all equal, or of one response, has advantages 0 and no signal: drop it, or its KL alone is
    trained. Visual-RFT and GRPO's paper keep it. Raises ValueError for a reward that is not finite.
    """
    one_of("kind", kind, ("grpo", "dr_grpo", "rloo"))
    if not reward.isfinite().all():
        raise ValueError(f"rewards must be finite, got {reward.tolist()}")
    empty = reward.new_zeros(len(seg.groups))
    n = seg.groups.to(reward.dtype)
    centred = reward - (empty.index_add(0, seg.prompt, reward) / n)[seg.prompt]
    if kind == "grpo":
        variance = empty.index_add(0, seg.prompt, centred**2) / (n - 1).clamp(min=1)
        found = centred / (variance.sqrt() + eps)[seg.prompt]
    else:
        found = centred * (n / (n - 1).clamp(min=1))[seg.prompt] if kind == "rloo" else centred
    highest = empty.scatter_reduce(0, seg.prompt, reward, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, seg.prompt, reward, "amin", include_self=False)
    signal = highest > lowest
    return torch.where(signal[seg.prompt], found, 0.0), signal
