"""Direct preference optimisation, over pairs and over ranked lists, and the supervised loss."""

from typing import Literal

import torch
from torch import Tensor

from fastpo_kernels.losses.pairs import (
    PairLoss,
    check_pair_options,
    compared,
    not_negative,
    one_of,
    pair_losses,
    ranking,
    rewards,
)
from fastpo_kernels.types import LossOut, Segments


def dpo(
    logp: Tensor,
    ref_logp: Tensor | None,
    seg: Segments,
    *,
    beta: float = 0.1,
    loss_type: PairLoss = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    reference_free: bool = False,
    dpop_lambda: float = 0.0,
    dpo_weight: float = 1.0,
    sft_weight: float = 0.0,
    variant: Literal["paper", "released", "released_spo"] = "paper",
) -> LossOut:
    """Direct preference optimisation: -log sigmoid(beta z), z = s_better - s_worse, s = sum of log p / p_ref.

    logp, ref_logp: [N] nats; ref_logp None is the reference-free form, which counts it as 0. Unit "pair": losses [K],
    over seg.pairs. seg.weight is not used. Metrics: "accuracy", "margin", "chosen_reward", "rejected_reward" (beta s).

        loss_type        "hinge": max(0, 1 - beta z). "ipo": (z - 1 / (2 beta))^2.
                         "kto_pair": half of sigmoid(beta (kl_worse - s_better)) + sigmoid(beta (s_worse - kl_better)),
                         kl = max(0, mean of s over the micro-batch), without gradient.
        label_smoothing  eps of "sigmoid": (1 - eps) (-log sigmoid(u)) - eps log sigmoid(-u), for labels of which a
                         share eps is swapped.
        length_normalized  s is the mean, not the sum, over a response's tokens.
        reference_free   z without p_ref, which then serves dpop_lambda alone. To run no reference give ref_logp None.
        dpop_lambda      z - lambda max(0, -s_better): hold p of the better response. At p == p_ref, where LoRA starts,
                         its gradient is half of lambda.
        dpo_weight, sft_weight   dpo_weight * the above + sft_weight * mean of -logp over the better response's tokens.

    Sources: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; conservative DPO: Mitchell 2023, and TRL's `sigmoid` loss;
    IPO 2310.12036 eq. 17; SLiC hinge 2305.10425; KTO 2402.01306, in the pair form of TRL 0.7; DPO-Positive 2402.13228
    eq. 3; SFT term 2404.19733 eq. 1. Pairs "best_worst" are the list baseline of ningerhhh/PerPO (candidate 0 against
    candidate N - 1), pairs "all" its unweighted LiPO mean; log(1 + exp(-u)) there overflows in fp32 at u < -88.7, here
    it does not.
    variant "released" is what Liuziyu77/MIA-DPO @ a85c51a, LLaVA-Hound-DPO/.../trl/trainer/dpo_trainer.py:845-925
    trains: "ipo" normalises by length, the kl of "kto_pair" has a gradient, and the SFT term is a mean over the tokens
    of the micro-batch, whatever the response. "released_spo" is heliossun/Structure-Policy-Optimization @ c54303c,
    trl/trainer/dpo_trainer.py:810-999: the same, and label_smoothing only scales the loss by 1 - eps.
    wangclnlp/Vision-LLM-Alignment @ e966252, training/dpo_training/dpo_training_main.py:513-530, is "paper".
    Raises ValueError for beta <= 0, label_smoothing outside of [0, 0.5], negative weights, an unknown loss_type, and
    options that the loss_type or a missing reference would leave without effect.
    """
    check_pair_options(beta, loss_type, label_smoothing, dpop_lambda)
    not_negative("dpo_weight", dpo_weight)
    not_negative("sft_weight", sft_weight)
    one_of("variant", variant, ("paper", "released", "released_spo"))
    released, count = variant != "paper", seg.tokens.clamp(min=1)
    mean = length_normalized or (released and loss_type == "ipo")
    value, taken_off = compared(
        logp,
        ref_logp,
        lambda x: seg.sum(x) / count if mean else seg.sum(x),
        reference_free=reference_free,
        dpop_lambda=dpop_lambda,
    )
    i, j = seg.pairs
    losses = dpo_weight * pair_losses(
        value[i],
        value[j],
        taken_off[i],
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        one_sided=variant == "released_spo",
        detach_kl=not released,
    )
    if sft_weight:
        tokens = (seg.tokens[i].sum().to(logp.dtype) / max(1, len(i))).clamp(min=1) if released else count[i]
        losses = losses - sft_weight * seg.sum(logp)[i] / tokens
    return LossOut(losses=losses, unit="pair", metrics=rewards(beta * value[i], beta * value[j]))


def plackett_luce(
    logp: Tensor,
    ref_logp: Tensor | None,
    seg: Segments,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: Literal["paper", "released"] = "paper",
) -> LossOut:
    """DPO over a whole ranking: -log of its Plackett-Luce probability.

        loss = sum over responses i of log(1 + sum over the worse j of exp(u_j - u_i)), u = beta s, s as in dpo

    logp, ref_logp: [N] nats; ref_logp None counts it as 0. Unit "prompt": losses [P]; two responses are dpo. Ranks are
    those of seg.pairs: equal scores do not compete. label_smoothing eps: -(1 - eps) log p - eps log(1 - p), p the
    probability of the ranking; p is held below 1 by the smallest normal number. Metrics: dpo's, over pairs [K].

    Source: Rafailov et al. 2023 (arXiv 2305.18290) eq. 20; wangclnlp/Vision-LLM-Alignment @ e966252,
    training/dpo_training/multi_candidate_dpo_training_main.py:459-492. That code adds 0.01 to every denominator, the
    last response's included: variant "released". It multiplies probabilities, which overflows to NaN (and skips the
    batch); here sums are of logarithms in both variants. It ranks by position: give it descending scores.
    Raises ValueError for beta <= 0 and for label_smoothing outside of [0, 0.5].
    """
    check_pair_options(beta, "sigmoid", label_smoothing, 0.0)
    one_of("variant", variant, ("paper", "released"))
    reward = beta * seg.sum(logp if ref_logp is None else logp - ref_logp)
    steps = ranking(reward, seg, constant=0.01 if variant == "released" else 0.0)
    losses = steps.new_zeros(len(seg.groups)).index_add(0, seg.prompt, steps)
    if label_smoothing:
        compares = losses.new_zeros(len(seg.groups)).index_fill(0, seg.prompt[seg.pairs[0]], 1.0)
        swapped = -(-torch.expm1(-losses.clamp(min=torch.finfo(losses.dtype).tiny))).log()
        losses = (1 - label_smoothing) * losses + label_smoothing * compares * swapped
    return LossOut(losses=losses, unit="prompt", metrics=rewards(*reward[seg.pairs]))


def sft(logp: Tensor, seg: Segments) -> LossOut:
    """Negative log-likelihood of the best responses: the highest score of their prompt, all of them in a tie.

    logp: [N] nats. Unit "token": losses [U], the supervised tokens of those responses, in order. Selecting them syncs
    once on CUDA. No metrics: the loss is the likelihood.
    """
    score = seg.score.to(torch.float64)
    highest = score.new_full((len(seg.groups),), -torch.inf).scatter_reduce(0, seg.prompt, score, "amax")
    best = score == highest[seg.prompt]
    return LossOut(losses=-logp[best[seg.owner]], unit="token", metrics={})
