"""Preference losses: pure functions of per-token statistics and the ragged index token -> response -> prompt.

Positional parameters name what a loss reads (the statistics of TokenStats, a value head's output, then what a rollout
gives), then `seg`; keyword-only ones are options. `variant` "paper" is what a paper means, "released" what its
repository trains.

Axes: N supervised tokens, S responses, P prompts, K pairs (seg.pairs), U units.
"""

import inspect
from collections.abc import Callable

from fastpo_kernels.losses.dpo import dpo, plackett_luce, sft
from fastpo_kernels.losses.grpo import advantages, grpo
from fastpo_kernels.losses.perpo import perpo
from fastpo_kernels.losses.ppo import actor_critic, gae, ppo, shaped_reward, standardise, value_loss, whiten
from fastpo_kernels.losses.reward import reward_list, reward_pair
from fastpo_kernels.losses.rrpo import rrpo
from fastpo_kernels.losses.spo import spo
from fastpo_kernels.types import LossOut, TokenStats

__all__ = [
    "LOSSES",
    "REFERENCE",
    "ROLLOUT",
    "VALUE",
    "actor_critic",
    "advantages",
    "dpo",
    "gae",
    "grpo",
    "needs",
    "perpo",
    "plackett_luce",
    "ppo",
    "reward_list",
    "reward_pair",
    "rrpo",
    "sft",
    "shaped_reward",
    "spo",
    "standardise",
    "value_loss",
    "whiten",
]

REFERENCE = ("ref_logp", "kl", "reverse_kl")  # what takes a second model
VALUE = ("value", "reward")  # of a value head: [N] at the states that predict each token, [S] at responses' last tokens
# what a loss may read of a rollout: [N], but for grpo's advantage [S]
ROLLOUT = ("old_logp", "advantage", "old_value", "returns")

# by the names of YAML; actor_critic and grpo need a rollout
LOSSES: dict[str, Callable[..., LossOut]] = {
    "dpo": dpo,
    "plackett_luce": plackett_luce,
    "rrpo": rrpo,
    "perpo": perpo,
    "spo": spo,
    "sft": sft,
    "reward_pair": reward_pair,
    "reward_list": reward_list,
    "grpo": grpo,
    "ppo": actor_critic,
}


def needs(loss: Callable[..., LossOut]) -> frozenset[str]:
    """What a loss reads: its positional parameters but for seg. {"logp", "ref_logp", "kl"} for rrpo.

    Raises ValueError for a positional parameter that is neither seg nor a field of TokenStats nor of VALUE or ROLLOUT.
    """
    parameters = inspect.signature(loss).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)} - {"seg"}
    known = (*TokenStats._fields, *VALUE, *ROLLOUT)
    if unknown := names - set(known):
        raise ValueError(
            f"loss {getattr(loss, '__name__', loss)!r} asks for {', '.join(sorted(unknown))}; positional parameters "
            f"must be of {', '.join(known)}, then seg (options are keyword-only)"
        )
    return frozenset(names)
