"""Structured preference optimisation of questions and answers."""

from typing import Literal

import torch
from torch import Tensor

from fastpo_kernels.losses.pairs import PairLoss, accuracy, check_pair_options, compared, one_of, pair_losses, positive
from fastpo_kernels.losses.pairs import rewards as pair_metrics
from fastpo_kernels.types import LossOut, Segments

RESPONSES = 6  # of a prompt


def spo(
    logp: Tensor,
    ref_logp: Tensor | None,
    seg: Segments,
    *,
    beta: float = 0.1,
    alpha_q: float = 1.0,
    alpha_a: float = 1.0,
    dpop_lambda: float = 10.0,
    best_worst: float = 0.05,
    loss_type: PairLoss = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    reference_free: bool = False,
    variant: Literal["paper", "pairfix", "released"] = "paper",
) -> LossOut:
    """Structured preference optimisation: the better question, and to each question its better answer.

    A prompt has six responses in this order; the tree is prompt -> question -> answers (parents -1, 0, 0, -1, 3, 3):

        0 better question   1 its better answer   2 its worse answer
        3 worse question    4 its better answer   5 its worse answer

        loss = pair(0, 3; beta / alpha_q) + pair(1, 2; b) + pair(4, 5; b) + best_worst * pair(1, 5; 2 b)
        b = beta / alpha_a

    pair is the loss of dpo with the options of that name, on s = sum of log p / p_ref, with the DPO-Positive term
    dpop_lambda on its better side. logp, ref_logp: [N] nats. Unit "prompt": losses [P]. The order says which is which:
    seg.score and seg.pairs are not read. seg.weight, where given, is the label mask [N], 0 for rows that are no label.
    Metrics, over the four pairs of each prompt: dpo's, chosen_reward being s times the beta of the pair, [4P];
    "question_accuracy" [P].

    Source: heliossun/Structure-Policy-Optimization @ c54303c, trl/trainer/spo_trainer.py:776-867, 1038-1108 (the four
    pairs by its docstring and metric names). Where that code differs from "paper":
    - it reads the better row twice (:1009-1022), so that pair(0, 3) compares 0 with itself, which leaves its
      DPO-Positive term, and all three answer pairs are (1, 2): "released", in which responses 3 to 5 have no gradient.
    - it sums log p without the label mask (:910, 921-923), so that template, image and padding positions count with
      token 0: give such rows with target 0 and weight 0. "released" and "pairfix" add them, "paper" does not.
    - "ipo" divides those sums by the number of labels; so do both. In "paper" it sums, as in dpo.
    - label_smoothing only scales by 1 - eps, and the KL of "kto_pair" has a gradient, in both.
    - the worse answer is read behind the better one, in one sequence; in the tree it follows its question alone.
    - gamma, an SFT weight, is accepted and not used; it is no option here.
    "pairfix" is that code with the right rows in each pair and nothing else changed.
    Scripts: 7B beta 0.3, alpha_a 1.5; 0.5B beta 0.1, alpha_a 1; both alpha_q 1, dpop_lambda 10.

    Raises ValueError unless there are six responses for each prompt, and for options as dpo does.
    """
    check_pair_options(beta, loss_type, label_smoothing, dpop_lambda)
    positive("alpha_q", alpha_q)
    positive("alpha_a", alpha_a)
    one_of("variant", variant, ("paper", "pairfix", "released"))
    prompts = len(seg.groups)
    if len(seg.tokens) != RESPONSES * prompts:
        raise ValueError(
            f"spo needs {RESPONSES} responses for each prompt, got {len(seg.tokens)} for {prompts} prompts"
        )
    mask = seg.weight
    count = (seg.tokens if mask is None else seg.sum(mask.to(logp.dtype))).clamp(min=1)
    if mask is None or variant != "paper":
        mask = logp.new_ones(())
    mean = length_normalized or (variant != "paper" and loss_type == "ipo")
    value, taken_off = compared(
        logp,
        ref_logp,
        lambda x: seg.sum(x * mask) / count if mean else seg.sum(x * mask),
        reference_free=reference_free,
        dpop_lambda=dpop_lambda,
    )
    value, taken_off = value.reshape(prompts, RESPONSES), taken_off.reshape(prompts, RESPONSES)
    worse_of = (0, 2, 2, 2) if variant == "released" else (3, 2, 5, 5)
    better_of = (0, 1, 1, 1) if variant == "released" else (0, 1, 4, 1)
    betas = beta / alpha_q, beta / alpha_a, beta / alpha_a, 2 * beta / alpha_a
    losses, pairs = value.new_zeros(prompts), []
    for i, j, b, weight in zip(better_of, worse_of, betas, (1.0, 1.0, 1.0, best_worst), strict=True):
        pairs.append((b * value[:, i], b * value[:, j]))
        losses = losses + weight * pair_losses(
            value[:, i],
            value[:, j],
            taken_off[:, i],
            beta=b,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            one_sided=variant != "paper",
            detach_kl=variant == "paper",
        )
    metrics = pair_metrics(*(torch.cat(side) for side in zip(*pairs, strict=True)))
    metrics["question_accuracy"] = accuracy((pairs[0][0] - pairs[0][1]).detach())
    return LossOut(losses=losses, unit="prompt", metrics=metrics)
