"""The definition of token_stats: whole logits, plain differentiable PyTorch, float64 stays float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.token_stats.sharded import Shard
from fastpo_kernels.types import TokenStats


class Inputs(NamedTuple):
    """The checked arguments of token_stats, as its backends take them."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    target: Tensor  # [N] int64
    ref_hidden: Tensor | None  # [N, H]
    ref_weight: Tensor | None  # [V, H]; None: the reference uses weight
    kl_rows: Tensor | None  # [N] bool, possibly on the CPU beside CUDA tensors; None: no KL
    softcap: float | None
    temperature: float
    reverse_kl_rows: Tensor | None = None  # [N] bool like kl_rows, of KL(policy || reference)
    shard: Shard | None = None  # of a vocabulary split over ranks, of which weight, ref_weight and bias hold some rows


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and statistics: float64 for float64 operands, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats(x: Inputs) -> TokenStats:
    """See token_stats."""
    policy = _log_probs(x.hidden, x.weight, x.bias, x)
    logp = policy.gather(1, x.target[:, None])[:, 0]
    entropy = -(policy.exp() * policy).sum(-1).detach()
    if x.ref_hidden is None:
        return TokenStats(logp, entropy=entropy)
    with torch.no_grad():
        reference = _log_probs(x.ref_hidden, x.weight if x.ref_weight is None else x.ref_weight, x.bias, x)
    ref_logp = reference.gather(1, x.target[:, None])[:, 0]
    kl = _kl(reference, policy, x.kl_rows)
    return TokenStats(logp, ref_logp, kl, entropy, _kl(policy, reference, x.reverse_kl_rows))


def _kl(log_a: Tensor, log_b: Tensor, rows: Tensor | None) -> Tensor | None:
    """[n] KL(a || b), 0 outside of rows; None without them."""
    return None if rows is None else (log_a.exp() * (log_a - log_b)).sum(-1).where(rows.to(log_a.device), 0.0)


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, x: Inputs) -> Tensor:
    """[n, V] log-softmax of softcap * tanh((h W^T + b) / softcap) / temperature."""
    wide = accumulator(hidden.dtype)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if x.softcap is not None:
        logits = x.softcap * torch.tanh(logits / x.softcap)
    return (logits / x.temperature).log_softmax(-1)
