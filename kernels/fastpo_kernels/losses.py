"""Preference losses: pure functions of per-token statistics and the ragged index token -> response -> prompt.

Positional parameters name what a loss reads (the statistics of TokenStats, then what a rollout gives), then `seg`;
keyword-only ones are options.

Axes: N supervised tokens, S responses, P prompts, K pairs (seg.pairs), U units.
"""

import inspect
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.types import LossOut, Segments, TokenStats

ROLLOUT = ("old_logp", "advantage")  # what a loss may read besides TokenStats: [N] and [S], both from the sampler


def dpo(
    logp: Tensor, ref_logp: Tensor | None, seg: Segments, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> LossOut:
    """Direct preference optimisation: -log sigmoid(u), u = beta (s_better - s_worse), s = sum of log p / p_ref.

    logp, ref_logp: [N] nats; ref_logp None is the reference-free form, which counts it as 0. Unit "pair": losses [K],
    over seg.pairs. label_smoothing eps: (1 - eps) (-log sigmoid(u)) - eps log sigmoid(-u), for labels of which a share
    eps is swapped. seg.weight is not used.

    Sources: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; conservative DPO: Mitchell 2023, and TRL's `sigmoid` loss.
    Pairs "best_worst" are the list baseline of ningerhhh/PerPO (candidate 0 against candidate N - 1), pairs "all" its
    unweighted LiPO mean; log(1 + exp(-u)) there overflows in fp32 at u < -88.7, here it does not.
    Raises ValueError for beta <= 0 and for label_smoothing outside of [0, 0.5).
    """
    _positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    reward = beta * seg.sum(logp if ref_logp is None else logp - ref_logp)
    better, worse = reward[seg.pairs]
    u = better - worse
    losses = -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)
    return LossOut(losses=losses, unit="pair", metrics=_rewards(better, worse))


def rrpo(
    logp: Tensor, ref_logp: Tensor, kl: Tensor, seg: Segments, *, beta: float = 0.1, alpha: float = 0.01
) -> LossOut:
    """Refined regularised preference optimisation: rank the phrases, hold the better response near the reference.

        u = beta (sum of M d over the better response - sum of M d over the worse), d = log p / p_ref
        loss = -log sigmoid(u) + alpha * sum of KL(p_ref || p) over all supervised tokens of the better response

    logp, ref_logp, kl: [N] nats, kl read at seg.better only. seg.weight: [N] phrase mask M. Unit "pair": losses [K].
    Metrics besides dpo's: "kl", the sum in the loss.

    Source: arXiv 2504.12083; pritamqu/RRPO @ a905573, llava/losses.py:86-195. The paper prints the KL with the opposite
    sign; the penalty here is what the released code trains. Where that code differs from this function:
    - it pairs phrases by index, here they are summed: the same number, since every phrase enters the sum once.
    - it drops phrase 1 where a batch has no unsigned token (losses.py:86-94, `unique(signs)[1:]`); not reproduced.
    - a signed position without a label adds the log-ratio of token 0 (losses.py:119-123, 183-191); here only supervised
      rows exist. To reproduce it, append such rows with target 0, weight 1 and no KL.
    - its label mask, and so its KL, also covers prompt newlines, chat markers and the assistant header
      (train_llavavideo.py:597-599, 646-647); here it covers the rows that the caller supervises: the response alone is
      what the paper means.
    - it takes softmax().log() of the reference (losses.py:125-128), NaN once a probability underflows; token_stats
      stays finite.
    - a pair without a phrase has the constant rank term log 2, here as there. Its LLaVA-Video and LongVU data sets skip
      a sample with an unsigned side (train_llavavideo.py:1348), VideoChat2's does not; that is the data path's choice.
    - VideoChat2 makes M by a diff of token ids, in which insertions and deletions get no phrase
      (videochat2/losses.py:63-83); M is an input here.
    - its bf16 runs round every step of the loss to bf16; statistics are fp32 here.

    Raises ValueError without seg.weight, and for beta <= 0 or alpha < 0.
    """
    _positive("beta", beta)
    if not alpha >= 0:
        raise ValueError(f"alpha must not be negative, got {alpha}")
    if seg.weight is None:
        raise ValueError("rrpo needs the phrase mask Segments.weight: responses with tagged phrases")
    reward = beta * seg.sum((logp - ref_logp) * seg.weight)
    better, worse = reward[seg.pairs]
    penalty = seg.sum(kl)[seg.pairs[0]]
    losses = alpha * penalty - F.logsigmoid(better - worse)
    return LossOut(losses=losses, unit="pair", metrics=_rewards(better, worse) | {"kl": penalty.detach()})


def sft(logp: Tensor, seg: Segments) -> LossOut:
    """Negative log-likelihood of the best responses: the highest score of their prompt, all of them in a tie.

    logp: [N] nats. Unit "token": losses [U], the supervised tokens of those responses, in order. Selecting them syncs
    once on CUDA. No metrics: the loss is the likelihood.
    """
    score = seg.score.to(torch.float64)
    highest = score.new_full((len(seg.groups),), -torch.inf).scatter_reduce(0, seg.prompt, score, "amax")
    best = score == highest[seg.prompt]
    return LossOut(losses=-logp[best[seg.owner]], unit="token", metrics={})


def perpo(
    logp: Tensor,
    ref_logp: Tensor | None,
    seg: Segments,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    length_normalized: bool = False,
) -> LossOut:
    """Perceptual preference optimisation: DPO over all pairs of a list, each weighted by its gap in score.

        loss = sum over the prompt's pairs of w log(1 + exp(-u)), u as in dpo, w = gap^gamma / (sum of gap^gamma)

    logp, ref_logp: [N] nats; ref_logp None counts it as 0. Unit "prompt": losses [P]. gamma 0 is the unweighted mean
    over pairs (LiPO); two responses are dpo. length_normalized: mean, not sum, of the log-ratio over a response's
    tokens. A prompt without pairs, or whose scores are all equal, has loss 0. Metrics: dpo's, over pairs [K].

    Source: arXiv 2502.04371; ningerhhh/PerPO @ e39a24a, perpo/trainer/base_perpo_trainer.py:288-374. Where that code
    differs from this function:
    - the response of the lower index is preferred, whatever the scores; here the one of the higher score.
    - equal scores at gamma 0 make a pair, ordered by index; here they never make one.
    - all scores equal is 0 / 0 there.
    - its weights also count the scores of candidates that are not trained on (best_of_n), so that they sum to less than
      1; here the candidates used alone.
    - log(1 + exp(-u)) overflows in fp32 at u < -88.7.
    - length_normalized exists only in byte code that it ships beside the source.

    Raises ValueError for beta <= 0 and for gamma < 0.
    """
    _positive("beta", beta)
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    reward = beta * seg.sum(logp if ref_logp is None else logp - ref_logp)
    if length_normalized:
        reward = reward / seg.tokens.clamp(min=1)
    better, worse = reward[seg.pairs]
    high, low = seg.score.to(torch.float64)[seg.pairs]
    share, prompt = (high - low) ** gamma, seg.prompt[seg.pairs[0]]
    total = share.new_zeros(len(seg.groups)).index_add(0, prompt, share)
    weight = (share / total[prompt]).to(reward.dtype)
    losses = reward.new_zeros(len(seg.groups)).index_add(0, prompt, -weight * F.logsigmoid(better - worse))
    return LossOut(losses=losses, unit="prompt", metrics=_rewards(better, worse))


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
    without old_logp.
    Raises ValueError for a negative epsilon or beta, beta without ref_logp, an unknown loss_type, and "dr_grpo" without
    a positive max_completion_length.
    """
    if not (epsilon_low >= 0 and epsilon_high >= 0 and beta >= 0):
        raise ValueError(f"epsilon and beta must not be negative, got {epsilon_low}, {epsilon_high} and {beta}")
    if beta and ref_logp is None:
        raise ValueError(f"beta {beta} needs ref_logp")
    if loss_type not in ("grpo", "gspo", "dr_grpo", "dapo"):
        raise ValueError(f"loss_type must be grpo, dapo, dr_grpo or gspo, got {loss_type!r}")
    if loss_type == "dr_grpo" and not (max_completion_length or 0) > 0:
        raise ValueError(f"dr_grpo needs a positive max_completion_length, got {max_completion_length}")
    count = seg.tokens.clamp(min=1)
    log_ratio = logp - (logp.detach() if old_logp is None else old_logp)
    if loss_type == "gspo":
        ratio, a = (seg.sum(log_ratio) / count).exp(), advantage
    else:
        ratio, a = log_ratio.exp(), advantage[seg.owner]
    policy = -torch.minimum(ratio * a, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * a)
    per_token = policy[seg.owner] if loss_type == "gspo" else policy
    metrics = {
        "clip_low": ((ratio < 1 - epsilon_low) & (a < 0)).to(logp.dtype),
        "clip_high": ((ratio > 1 + epsilon_high) & (a > 0)).to(logp.dtype),
    }
    if ref_logp is not None:
        d = ref_logp - logp
        kl = torch.expm1(d) - d  # not exp(d) - d - 1, which near the reference is the rounding of 1
        if kl_ratio:
            kl = kl * (ratio[seg.owner] if loss_type == "gspo" else ratio)
        per_token = per_token + beta * kl if beta else per_token
        metrics["kl"] = kl.detach()
    if loss_type == "dapo":
        return LossOut(losses=per_token, unit="token", metrics=metrics)
    length = max_completion_length if max_completion_length and loss_type == "dr_grpo" else count
    return LossOut(losses=seg.sum(per_token) / length, unit="response", metrics=metrics)


# by the names of YAML; without grpo, since a data set has no advantages and no old_logp
LOSSES: dict[str, Callable[..., LossOut]] = {"dpo": dpo, "rrpo": rrpo, "perpo": perpo, "sft": sft}


def needs(loss: Callable[..., LossOut]) -> frozenset[str]:
    """What a loss reads: its positional parameters but for seg. {"logp", "ref_logp", "kl"} for rrpo.

    Raises ValueError for a positional parameter that is neither seg nor a field of TokenStats nor of ROLLOUT.
    """
    parameters = inspect.signature(loss).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)} - {"seg"}
    known = (*TokenStats._fields, *ROLLOUT)
    if unknown := names - set(known):
        raise ValueError(
            f"loss {getattr(loss, '__name__', loss)!r} asks for {', '.join(sorted(unknown))}; positional parameters "
            f"must be of {', '.join(known)}, then seg (options are keyword-only)"
        )
    return frozenset(names)


def _rewards(better: Tensor, worse: Tensor) -> dict[str, Tensor]:
    """[K] each, detached. A margin of exactly 0 (policy == reference) counts as half right."""
    better, worse = better.detach(), worse.detach()
    margin = better - worse
    accuracy = (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
    return {"accuracy": accuracy, "margin": margin, "chosen_reward": better, "rejected_reward": worse}


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
