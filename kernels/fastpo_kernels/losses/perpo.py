"""Perceptual preference optimisation."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.losses.pairs import not_negative, one_of, positive, rewards
from fastpo_kernels.types import LossOut, Segments


def perpo(
    logp: Tensor,
    ref_logp: Tensor | None,
    seg: Segments,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    length_normalized: bool = False,
    variant: Literal["paper", "released"] = "paper",
) -> LossOut:
    """Perceptual preference optimisation: DPO over all pairs of a list, each weighted by its gap in score.

        loss = sum over the prompt's pairs of w log(1 + exp(-u)), u as in dpo, w = gap^gamma / (sum of gap^gamma)

    logp, ref_logp: [N] nats; ref_logp None counts it as 0. Unit "prompt": losses [P]. gamma 0 is the unweighted mean
    over pairs (LiPO); two responses are dpo. length_normalized: mean, not sum, of the log-ratio over a response's
    tokens. A prompt without pairs, or whose scores are all equal, has loss 0. Metrics: dpo's, over pairs [K].

    Source: arXiv 2502.04371; ningerhhh/PerPO @ e39a24a, perpo/trainer/base_perpo_trainer.py:288-374. variant "released"
    trains what that code does, which differs from the above so:
    - the response of the lower index is preferred, whatever the scores; in "paper" the one of the higher score.
    - equal scores at gamma 0 make a pair, ordered by index; in "paper" they never make one.
    - all scores equal is 0 / 0, NaN.
    - its weights also count the scores of candidates that are not trained on (best_of_n), so that they sum to less than
      1: give those as responses without tokens. In "paper" every response given is used.
    - log(1 + exp(-u)) overflows in fp32 at u < -88.7.
    - its weights are rounded to fp32.
    length_normalized exists only in byte code that it ships beside the source. "released" syncs once on CUDA.

    Raises ValueError for beta <= 0 and for gamma < 0.
    """
    positive("beta", beta)
    not_negative("gamma", gamma)
    one_of("variant", variant, ("paper", "released"))
    reward = beta * seg.sum(logp if ref_logp is None else logp - ref_logp)
    if length_normalized:
        reward = reward / seg.tokens.clamp(min=1)
    released = variant == "released"
    pairs, score = (_by_index(seg), seg.score.float()) if released else (seg.pairs, seg.score.to(torch.float64))
    gap, prompt = (score[pairs[0]] - score[pairs[1]]).abs() ** gamma, seg.prompt[pairs[0]]
    weight = (gap / gap.new_zeros(len(seg.groups)).index_add(0, prompt, gap)[prompt]).to(reward.dtype)
    better, worse = reward[pairs]
    if released:
        trained = (seg.tokens > 0)[pairs].all(0)
        each = torch.where(trained, weight * (1 + (worse - better).exp()).log(), 0.0)
    else:
        each = -weight * F.logsigmoid(better - worse)
    losses = reward.new_zeros(len(seg.groups)).index_add(0, prompt, each)
    return LossOut(losses=losses, unit="prompt", metrics=rewards(better, worse))


def _by_index(seg: Segments) -> Tensor:
    """[2, K] all pairs of a prompt, the lower index first."""
    i, j = torch.triu_indices(len(seg.tokens), len(seg.tokens), 1, device=seg.prompt.device)
    same = seg.prompt[i] == seg.prompt[j]
    return torch.stack([i[same], j[same]])
