"""Proximal policy optimisation: rewards of tokens, advantages, the losses of policy and critic. All pure.

Order of a rollout: standardise (optional), shaped_reward, gae, whiten (optional), then several steps of ppo and
value_loss with the log-probabilities and values of the rollout kept, so that the clips act.
Where wangclnlp/Vision-LLM-Alignment @ e966252, training/ppo_training/ (ppo_training_utils.py, rlhf_engine.py), differs:
- it recomputes old_logp with the actor of the moment from the second epoch on (ppo_main.py:743-778), so that its ratio
  is 1 and its policy clip never acts; to reproduce it give ppo old_logp None.
- with padding on the right its reward lies one column behind the last token (compute_kl_reward_scores, `ends`), where
  also a value is read and nothing is trained: give gae such a row, and leave it out of the losses.
- with padding on the left shorter answers move to the right, so that the ends of their prompts are trained: that is a
  choice of rows, the caller's.
- its critic starts from a fresh value head, by its comment from the reward model: the caller's weights.
"""

import torch
from torch import Tensor

from fastpo_kernels.losses.grpo import clipped, k3
from fastpo_kernels.losses.pairs import not_negative
from fastpo_kernels.types import LossOut, Segments


def ppo(
    logp: Tensor,
    ref_logp: Tensor | None,
    old_logp: Tensor | None,
    advantage: Tensor,
    seg: Segments,
    *,
    clip: float = 0.2,
    beta: float = 0.0,
) -> LossOut:
    """The clipped policy gradient, token by token: -min(r A, clip(r, 1 - clip, 1 + clip) A) + beta k3, r = p / p_old.

    logp, ref_logp, old_logp: [N] nats; advantage: [N], of gae. old_logp None: the policy itself, r = 1. beta: the KL in
    the loss (k3 of grpo); leave it 0 where shaped_reward has it. Unit "token": losses [N]. Metrics [N]: "clip_low",
    "clip_high", and "kl" with a reference.

    Source: Schulman et al. 2017 (arXiv 1707.06347) eq. 7; ppo_training_utils.py, actor_loss_fn.
    Raises ValueError for a negative clip or beta, and for beta without ref_logp.
    """
    not_negative("clip", clip)
    not_negative("beta", beta)
    if beta and ref_logp is None:
        raise ValueError(f"beta {beta} needs ref_logp")
    ratio = (logp - (logp.detach() if old_logp is None else old_logp)).exp()
    losses, metrics = clipped(ratio, advantage, clip, clip)
    if ref_logp is not None:
        kl = k3(logp, ref_logp)
        losses = losses + beta * kl if beta else losses
        metrics["kl"] = kl.detach()
    return LossOut(losses=losses, unit="token", metrics=metrics)


def value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, seg: Segments, *, clip: float | None = 0.2
) -> LossOut:
    """Half of max((v - R)^2, (w - R)^2), w = v held within clip of the rollout's value; clip None: (v - R)^2 / 2.

    value: [N] of the critic; old_value, returns: [N] of the rollout. Unit "token": losses [N]. Metrics [N]:
    "value_clip", where the second term is the larger.

    Source: openai/baselines, ppo2/model.py; ppo_training_utils.py, critic_loss_fn. Raises ValueError for a clip < 0.
    """
    plain = (value - returns) ** 2
    if clip is None:
        return LossOut(losses=plain / 2, unit="token", metrics={"value_clip": torch.zeros_like(plain).detach()})
    not_negative("clip", clip)
    held = (value.clamp(old_value - clip, old_value + clip) - returns) ** 2
    return LossOut(
        losses=torch.maximum(plain, held) / 2,
        unit="token",
        metrics={"value_clip": (held > plain).to(value.dtype)},
    )


def actor_critic(
    logp: Tensor,
    ref_logp: Tensor | None,
    value: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    old_value: Tensor,
    returns: Tensor,
    seg: Segments,
    *,
    clip: float = 0.2,
    beta: float = 0.0,
    value_clip: float | None = 0.2,
    value_weight: float = 0.5,
) -> LossOut:
    """ppo + value_weight * value_loss, for a critic that shares the policy's body. Unit "token": losses [N].

    Arguments as those of the two; metrics of both, and "value_loss" [N]. Vision-LLM-Alignment trains its critic apart,
    with an optimizer of its own. Raises ValueError as they do, and for a negative value_weight.
    """
    not_negative("value_weight", value_weight)
    actor = ppo(logp, ref_logp, old_logp, advantage, seg, clip=clip, beta=beta)
    critic = value_loss(value, old_value, returns, seg, clip=value_clip)
    metrics = actor.metrics | critic.metrics | {"value_loss": critic.losses.detach()}
    return LossOut(losses=actor.losses + value_weight * critic.losses, unit="token", metrics=metrics)


@torch.no_grad()
def shaped_reward(
    old_logp: Tensor, ref_logp: Tensor, reward: Tensor, seg: Segments, *, beta: float = 0.1, clip: float = 10.0
) -> Tensor:
    """[N] reward of each token: -beta log p_old / p_ref, and at the last of a response its reward within [-clip, clip].

    old_logp, ref_logp: [N] nats; reward: [S]. beta 0: no KL in the reward. A response without tokens drops its reward.

    Source: Ziegler et al. 2019 (arXiv 1909.08593) eq. 2; ppo_training_utils.py, compute_kl_reward_scores (beta 0.1,
    clip 10). Its logged "KL distance" is the mean size of this reward, not a KL. Raises ValueError for options < 0.
    """
    not_negative("beta", beta)
    not_negative("clip", clip)
    last = seg.tokens.cumsum(0)[seg.owner] - 1 == torch.arange(len(seg.owner), device=seg.owner.device)
    return -beta * (old_logp - ref_logp) + torch.where(last, reward.clamp(-clip, clip)[seg.owner], 0.0)


@torch.no_grad()
def gae(
    reward: Tensor, value: Tensor, seg: Segments, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: [N] advantages and [N] returns (advantage + value).

        A_t = sum over l of (gamma lam)^l d_(t + l), d_t = r_t + gamma v_(t + 1) - v_t, v = 0 behind the last token

    reward, value: [N], of shaped_reward and of the critic at the rollout. Syncs once on CUDA.

    Source: Schulman et al. 2016 (arXiv 1506.02438) eq. 16. InstructGPT has gamma 1, lam 0.95; Vision-LLM-Alignment
    (get_advantages_and_returns) gamma 0.99, lam 0.95. Raises ValueError for gamma or lam outside of [0, 1].
    """
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {x}")
    if not len(value):
        return torch.zeros_like(value), torch.zeros_like(value)
    longest = int(seg.tokens.max())
    place = torch.arange(len(value), device=value.device) - (seg.tokens.cumsum(0) - seg.tokens)[seg.owner]
    padded = value.new_zeros(3, len(seg.tokens), longest + 1)  # rewards, values, advantages; 0 behind the last token
    padded[0][seg.owner, place], padded[1][seg.owner, place] = reward, value
    delta = padded[0] - padded[1]
    delta[:, :-1] += gamma * padded[1][:, 1:]
    for t in reversed(range(longest)):
        padded[2][:, t] = delta[:, t] + gamma * lam * padded[2][:, t + 1]
    advantage = padded[2][seg.owner, place]
    return advantage, advantage + value


def whiten(x: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """[N] -> [N] of variance 1 (with bias 1 / (N - 1) removed) and, with shift_mean, of mean 0, as in TRL's PPO.

    Vision-LLM-Alignment does not whiten. Over several ranks whiten what all of them gathered.
    """
    mean = x.mean()
    scaled = (x - mean) / ((x - mean).square().sum() / max(1, x.numel() - 1) + eps).sqrt()
    return scaled if shift_mean else scaled + mean


def standardise(reward: Tensor, recent: Tensor, *, size: int = 1000, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale (r - mean) / std over the last `size` rewards, these included: [S], and the rewards to pass the next time.

    reward: [S]; recent: [<= size], empty at first. std without bias; where it is 0 or of one reward, the result is 0.

    Source: Vision-LLM-Alignment, rlhf_engine.py:57-67, with scale 10, in fp16 and with NaN for one reward.
    Raises ValueError for a reward that is not finite.
    """
    if not reward.isfinite().all():
        raise ValueError(f"rewards must be finite, got {reward.tolist()}")
    recent = torch.cat([recent, reward])[-size:]
    mean = recent.mean()
    std = ((recent - mean).square().sum() / max(1, len(recent) - 1)).sqrt()
    return torch.where(std > 0, scale * (reward - mean) / std, torch.zeros_like(reward)), recent
