"""Losses of a reward model: one value for each response, read by a value head at its last supervised token."""

import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.losses.pairs import ranking, rewards
from fastpo_kernels.types import LossOut, Segments


def reward_pair(reward: Tensor, seg: Segments) -> LossOut:
    """Bradley-Terry: -log sigmoid(reward_better - reward_worse).

    reward: [S], the value head's output for each response. Unit "pair": losses [K], over seg.pairs: of a list all
    its pairs, each of which counts the same; InstructGPT takes the mean of a prompt's pairs first, which is the same
    for lists of one length. Metrics: dpo's, with the values for rewards.

    Source: Ouyang et al. 2022 (arXiv 2203.02155) eq. 1.
    """
    better, worse = reward[seg.pairs]
    return LossOut(losses=-F.logsigmoid(better - worse), unit="pair", metrics=rewards(better, worse))


def reward_list(reward: Tensor, seg: Segments) -> LossOut:
    """Plackett-Luce: -log of the probability of the ranking, sum over i of log(sum over j no better of e^(r_j - r_i)).

    reward: [S]. Unit "prompt": losses [P]; two responses are reward_pair. Ranks are those of seg.pairs: equal scores do
    not compete. Metrics: dpo's, over pairs [K].

    Source: wangclnlp/Vision-LLM-Alignment @ e966252, training/reward_model_training/rm_training_main.py:594-621. The
    same loss, in log-space here: that code overflows in fp32 at values above 88. There a value is read at the last
    column that is no padding, and padding is attended to (:580-581); here at the last supervised token. It counts equal
    values as wrong in its accuracy, here they are half right.
    """
    steps = ranking(reward, seg)
    losses = steps.new_zeros(len(seg.groups)).index_add(0, seg.prompt, steps)
    return LossOut(losses=losses, unit="prompt", metrics=rewards(*reward[seg.pairs]))
