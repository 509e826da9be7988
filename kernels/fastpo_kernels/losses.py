"""Preference losses: pure functions of per-token statistics and the ragged index token -> response -> prompt.

Positional parameters name the statistics of TokenStats that a loss reads, then `seg`; keyword-only ones are options.

Axes: N supervised tokens, K pairs (seg.pairs), U units.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.types import LossOut, Segments, TokenStats


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


LOSSES: dict[str, Callable[..., LossOut]] = {"dpo": dpo, "rrpo": rrpo, "sft": sft}


def needs(loss: Callable[..., LossOut]) -> frozenset[str]:
    """The statistics that a loss reads: its positional parameters but for seg. {"logp", "ref_logp", "kl"} for rrpo.

    Raises ValueError for a positional parameter that is neither seg nor a field of TokenStats.
    """
    parameters = inspect.signature(loss).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)} - {"seg"}
    if unknown := names - set(TokenStats._fields):
        raise ValueError(
            f"loss {getattr(loss, '__name__', loss)!r} asks for {', '.join(sorted(unknown))}; positional parameters "
            f"must be of {', '.join(TokenStats._fields)}, then seg (options are keyword-only)"
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
