"""Fused losses in one call, for code that has padded batches: hidden states, a head and labels in, (loss, metrics) out.

Every function compacts the supervised rows, reduces the vocabulary axis with token_stats, and averages a pure loss of
fastpo_kernels.losses; nothing of the size [rows, T, V] exists. Common to all of them:

hidden: [rows, T, H], the states before the head, contiguous at best. weight: [V, H]. labels: [rows, T] int64 as Hugging
Face has them: -100 is ignored, and the shift happens inside, hidden at t predicts labels at t + 1. Per-token arguments
[rows, T - 1] are shifted already: column t belongs to labels at t + 1; values at ignored labels are not read.
**head: bias [V], softcap, temperature of token_stats.
Returns the loss, a scalar in fp32 (float64 for float64 inputs) with a gradient to hidden, weight and bias, and
detached scalar metrics. Without a supervised token the loss and its gradients are 0. Labels, phrase_mask and scores are
copied to the host, which on CUDA is the only sync.
backend: of token_stats. "triton" (CUDA) also makes the loss in one launch, loss_kernel; "auto" keeps to plain PyTorch
until that has been timed on a device. Raises ValueError for shapes and options that do not fit, as token_stats does.

Axes: B pairs, prompts or completions; N responses of a prompt; T positions; n supervised tokens.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastpo_kernels import loss_kernel, losses
from fastpo_kernels.token_stats import token_stats
from fastpo_kernels.types import LossOut, Segments, TokenStats

Fused = tuple[Tensor, dict[str, Tensor]]


def fused_dpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    backend: str = "auto",
    **head: Any,
) -> Fused:
    """losses.dpo, the mean over B pairs.

    hidden: [2B, T, H], chosen rows, then rejected rows. The reference is ref_hidden [2B, T, H] with ref_weight [V, H]
    (None: the same head), or ref_logp: [2B, T - 1] per token, or [2B] summed over the response; with neither, the loss
    is reference-free. A pair without a supervised token on either side has loss 0 in place of log 2.
    Metrics: accuracy, margin, chosen_reward, rejected_reward.
    """
    rows = _rows(hidden, labels, _chosen_rejected(hidden))
    seg = _pairs(rows)
    stats = _stats(rows, seg, hidden, weight, ref_hidden, ref_weight, ref_logp, backend=backend, **head)
    options: dict[str, Any] = {"beta": beta, "label_smoothing": label_smoothing}
    if backend == "triton":
        return loss_kernel.pairs(stats.logp, stats.ref_logp, seg, **options)
    return _mean(losses.dpo(stats.logp, stats.ref_logp, seg.to(hidden.device), **options), len(seg.groups))


def fused_rrpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    phrase_mask: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.01,
    backend: str = "auto",
    **head: Any,
) -> Fused:
    """losses.rrpo, the mean over B pairs.

    hidden, ref_hidden: [2B, T, H], chosen rows, then rejected rows. phrase_mask: [2B, T], not shifted, true or positive
    (a phrase number, say) at the tokens of phrases; read at supervised labels only. ref_weight None: the same head.
    A pair without a supervised token on either side has loss 0 in place of log 2. Metrics: fused_dpo's, and kl.
    """
    rows = _rows(hidden, labels, _chosen_rejected(hidden))
    _shape("phrase_mask", phrase_mask, labels.shape)
    phrases = (phrase_mask > 0).flatten().cpu()[rows.at + 1]
    seg = _pairs(rows, phrases)
    stats = _stats(rows, seg, hidden, weight, ref_hidden, ref_weight, None, kl_rows=seg.better, backend=backend, **head)
    assert stats.ref_logp is not None and stats.kl is not None
    options: dict[str, Any] = {"beta": beta, "alpha": alpha}
    if backend == "triton":
        return loss_kernel.pairs(stats.logp, stats.ref_logp, seg, kl=stats.kl, **options)
    out = losses.rrpo(stats.logp, stats.ref_logp, stats.kl, seg.to(hidden.device), **options)
    return _mean(out, len(seg.groups))


def fused_perpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scores: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.1,
    gamma: float = 0.5,
    length_normalized: bool = False,
    backend: str = "auto",
    **head: Any,
) -> Fused:
    """losses.perpo, the mean over B prompts.

    hidden: [B * N, T, H], prompt-major: the N responses of the first prompt, then of the second. scores: [B, N],
    higher is better, in any order. The reference as in fused_dpo. A prompt whose scores are all equal, or without a
    supervised token, counts with loss 0. Metrics: fused_dpo's, the mean over all pairs of different scores.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [B, N], got {list(scores.shape)}")
    prompts, size = scores.shape
    rows = _rows(hidden, labels, torch.arange(prompts * size))
    scores = scores.detach().cpu()
    supervised = rows.tokens.reshape(prompts, size).sum(1, keepdim=True) > 0
    score = scores.where(supervised, 0.0).flatten()  # equal scores: no pairs
    seg = Segments.build(tokens=rows.tokens, groups=[size] * prompts, score=score)
    stats = _stats(rows, seg, hidden, weight, ref_hidden, ref_weight, ref_logp, backend=backend, **head)
    options: dict[str, Any] = {"beta": beta, "gamma": gamma, "length_normalized": length_normalized}
    if backend == "triton":
        return loss_kernel.pairs(stats.logp, stats.ref_logp, seg, **options)
    return _mean(losses.perpo(stats.logp, stats.ref_logp, seg.to(hidden.device), **options), prompts)


def fused_grpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    kl_ratio: bool = False,
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo"] = "grpo",
    max_completion_length: int | None = None,
    backend: str = "auto",
    **head: Any,
) -> Fused:
    """losses.grpo over B completions: the mean over completions, for "dapo" over all tokens.

    hidden: [B, T, H]. advantages: [B]. old_logp, ref_logp: [B, T - 1] nats, of the sampling policy and the reference,
    as fused_logp gives them; old_logp None: the policy itself. max_completion_length: the divisor of "dr_grpo", which
    needs it. A completion without a supervised token counts with loss 0. Metrics: clip_low, clip_high, and kl where
    ref_logp is given.
    """
    rows = _rows(hidden, labels, torch.arange(len(hidden)))
    _shape("advantages", advantages, hidden.shape[:1])
    seg = Segments.build(tokens=rows.tokens, groups=[1] * len(hidden), score=torch.zeros(len(hidden)))
    stats = _stats(rows, seg, hidden, weight, None, None, ref_logp, backend=backend, **head)
    given = (
        stats.logp,
        stats.ref_logp,
        _pick("old_logp", old_logp, rows, stats.logp),
        advantages.detach().to(stats.logp),
    )
    options: dict[str, Any] = {
        "epsilon_low": epsilon_low,
        "epsilon_high": epsilon_high,
        "beta": beta,
        "kl_ratio": kl_ratio,
        "loss_type": loss_type,
        "max_completion_length": max_completion_length,
    }
    if backend == "triton":
        return loss_kernel.grpo(*given, seg, **options)
    out = losses.grpo(*given, seg.to(hidden.device), **options)
    return _mean(out, len(out.losses))


def fused_logp(hidden: Tensor, weight: Tensor, labels: Tensor, *, backend: str = "auto", **head: Any) -> Tensor:
    """[rows, T - 1] log-probability of each label in nats, 0 at ignored ones, with gradient: old_logp, ref_logp."""
    rows = _rows(hidden, labels, torch.arange(len(hidden)))
    at = rows.at.to(hidden.device)
    logp = token_stats(_take(hidden, at), weight, rows.target, backend=backend, **head).logp
    return logp.new_zeros(labels.numel()).index_copy(0, at, logp).reshape(labels.shape)[:, :-1]


class _Rows(NamedTuple):
    """The supervised rows, response by response."""

    at: Tensor  # [n] on the CPU: row * T + position in hidden
    target: Tensor  # [n] on the device of hidden
    tokens: Tensor  # [S] on the CPU: how many of them each response has
    order: Tensor  # [S] on the CPU: the row of hidden that is each response
    shape: torch.Size  # of labels


def _rows(hidden: Tensor, labels: Tensor, order: Tensor) -> _Rows:
    """order: [S] the rows of hidden in the order of Segments: prompt-major."""
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [rows, T, H], got {list(hidden.shape)}")
    if len(hidden) != len(order):
        raise ValueError(f"hidden has {len(hidden)} rows, scores are for {len(order)}")
    _shape("labels", labels, hidden.shape[:2])
    labels = labels.cpu()
    here = labels[order, 1:]
    row, position = (here != -100).nonzero(as_tuple=True)
    return _Rows(
        at=order[row] * labels.shape[1] + position,
        target=here[row, position].to(hidden.device),
        tokens=torch.bincount(row, minlength=len(order)),
        order=order,
        shape=labels.shape,
    )


def _chosen_rejected(hidden: Tensor) -> Tensor:
    """[2B] row of each response, pair by pair, where rows are all chosen, then all rejected."""
    if len(hidden) % 2:
        raise ValueError(f"rows are chosen, then rejected: there must be an even number, got {len(hidden)}")
    return torch.arange(len(hidden)).reshape(2, -1).T.flatten()


def _pairs(rows: _Rows, phrases: Tensor | None = None) -> Segments:
    """Chosen over rejected; equal scores, and so no pair, where neither has a token."""
    supervised = rows.tokens.reshape(-1, 2).sum(1) > 0
    score = torch.stack([supervised, torch.zeros_like(supervised)], 1).flatten().float()
    return Segments.build(tokens=rows.tokens, groups=[2] * len(supervised), score=score, weight=phrases)


def _stats(
    rows: _Rows,
    seg: Segments,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_logp: Tensor | None,
    **options: Any,
) -> TokenStats:
    """token_stats of the supervised rows; its ref_logp may be given instead of computed."""
    if ref_hidden is not None and ref_logp is not None:
        raise ValueError("give ref_hidden or ref_logp, not both")
    at = rows.at.to(hidden.device)
    if ref_hidden is not None:
        _shape("ref_hidden", ref_hidden, hidden.shape)
        ref_hidden = _take(ref_hidden, at)
    stats = token_stats(_take(hidden, at), weight, rows.target, ref_hidden=ref_hidden, ref_weight=ref_weight, **options)
    if ref_logp is None:
        return stats
    if ref_logp.shape == rows.shape[:1]:  # summed: an equal share to each token
        mean = ref_logp.detach().to(stats.logp)[rows.order.to(hidden.device)] / rows.tokens.to(hidden.device)
        return stats._replace(ref_logp=mean[seg.owner.to(hidden.device)])
    return stats._replace(ref_logp=_pick("ref_logp", ref_logp, rows, stats.logp))


def _pick(name: str, x: Tensor | None, rows: _Rows, like: Tensor) -> Tensor | None:
    """[rows, T - 1] -> [n] in the dtype of the statistics, without gradient."""
    if x is None:
        return None
    length = rows.shape[1]
    _shape(name, x, (rows.shape[0], length - 1))
    at = rows.at.to(like.device)
    return x.detach()[at // length, at % length].to(like)


def _take(x: Tensor, at: Tensor) -> Tensor:
    """[rows, T, H] -> [n, H]. index_select, since the backward of an advanced index sorts."""
    return x.flatten(0, 1).index_select(0, at)


def _mean(out: LossOut, units: int) -> Fused:
    """Losses over `units`, metrics over what they have; nothing counts as 0."""
    metrics = {name: values.sum() / max(1, len(values)) for name, values in out.metrics.items()}
    return out.losses.sum() / max(1, units), metrics


def _shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)} beside this hidden, got {list(x.shape)}")
