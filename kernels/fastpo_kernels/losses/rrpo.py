"""Refined regularised preference optimisation."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.losses.pairs import not_negative, one_of, positive, rewards
from fastpo_kernels.types import LossOut, Segments


def rrpo(
    logp: Tensor,
    ref_logp: Tensor,
    kl: Tensor,
    seg: Segments,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
    variant: Literal["paper", "released"] = "paper",
) -> LossOut:
    """Refined regularised preference optimisation: rank the phrases, hold the better response near the reference.

        u = beta (sum of M d over the better response - sum of M d over the worse), d = log p / p_ref
        loss = -log sigmoid(u) + alpha * sum of KL(p_ref || p) over all supervised tokens of the better response

    logp, ref_logp, kl: [N] nats, kl read at seg.better only. seg.weight: [N] phrase mask M. Unit "pair": losses [K].
    Metrics besides dpo's: "kl", the sum in the loss.

    Source: arXiv 2504.12083; pritamqu/RRPO @ a905573, llava/losses.py:86-195. The paper prints the KL with the opposite
    sign; the penalty here is what the released code trains. Where that code differs from this function:
    - it pairs phrases by index, here they are summed: the same number, since every phrase enters the sum once.
    - it drops the first phrase where a batch has no unsigned token (losses.py:86-94, `unique(signs)[1:]`): variant
      "released", in which M is where seg.weight (the mask, or the numbers of the phrases) exceeds its least value in
      the micro-batch. Only the rows given count: add an unsigned one for prompt tokens that were unsigned.
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
    positive("beta", beta)
    not_negative("alpha", alpha)
    one_of("variant", variant, ("paper", "released"))
    if seg.weight is None:
        raise ValueError("rrpo needs the phrase mask Segments.weight: responses with tagged phrases")
    mask = seg.weight
    if variant == "released" and len(mask):
        mask = (mask > mask.min()).to(logp.dtype)
    reward = beta * seg.sum((logp - ref_logp) * mask)
    better, worse = reward[seg.pairs]
    penalty = seg.sum(kl)[seg.pairs[0]]
    losses = alpha * penalty - F.logsigmoid(better - worse)
    return LossOut(losses=losses, unit="pair", metrics=rewards(better, worse) | {"kl": penalty.detach()})
