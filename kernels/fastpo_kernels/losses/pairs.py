"""What the preference losses share: the quantity that is compared, the loss of a pair, the metrics of a pair."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels.types import Segments

PairLoss = Literal["sigmoid", "hinge", "ipo", "kto_pair"]


def compared(
    logp: Tensor,
    ref_logp: Tensor | None,
    reduce: Callable[[Tensor], Tensor],
    *,
    reference_free: bool = False,
    dpop_lambda: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """[S] what a pair compares, and [S] what DPO-Positive takes off the better side: lambda max(0, log p_ref / p).

    reduce: [N] -> [S]. Where p == p_ref the gradient of the second is half of lambda, as torch.maximum has it.
    """
    log_ratio = reduce(logp if ref_logp is None else logp - ref_logp)  # exactly 0 at the reference, in any order
    if dpop_lambda and ref_logp is None:
        raise ValueError(f"dpop_lambda {dpop_lambda} needs ref_logp")
    behind = torch.maximum(-log_ratio, log_ratio.new_zeros(()))
    return reduce(logp) if reference_free else log_ratio, dpop_lambda * behind


def pair_losses(
    better: Tensor,
    worse: Tensor,
    taken_off: Tensor,
    *,
    beta: float,
    loss_type: PairLoss,
    label_smoothing: float = 0.0,
    one_sided: bool = False,
    detach_kl: bool = True,
) -> Tensor:
    """[K] each -> [K], with the margin z = better - worse - taken_off.

    sigmoid: -log sigmoid(beta z), smoothed towards -log sigmoid(-beta z), or one_sided only scaled by 1 - eps;
    hinge: max(0, 1 - beta z); ipo: (z - 1 / (2 beta))^2; kto_pair: each side against the batch mean of the other.
    """
    if loss_type == "kto_pair":
        mean_better, mean_worse = ((x.sum() / max(1, len(x))).clamp(min=0) for x in (better, worse))
        if detach_kl:
            mean_better, mean_worse = mean_better.detach(), mean_worse.detach()
        return (torch.sigmoid(beta * (mean_worse - better)) + torch.sigmoid(beta * (worse - mean_better))) / 2
    z = better - worse - taken_off
    if loss_type == "hinge":
        return torch.relu(1 - beta * z)
    if loss_type == "ipo":
        return (z - 1 / (2 * beta)) ** 2
    other = 0.0 if one_sided else label_smoothing * F.logsigmoid(-beta * z)
    return -(1 - label_smoothing) * F.logsigmoid(beta * z) - other


def check_pair_options(beta: float, loss_type: str, label_smoothing: float, dpop_lambda: float) -> None:
    positive("beta", beta)
    if loss_type not in ("sigmoid", "hinge", "ipo", "kto_pair"):
        raise ValueError(f"loss_type must be sigmoid, hinge, ipo or kto_pair, got {loss_type!r}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5], got {label_smoothing}")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing belongs to loss_type sigmoid, got {label_smoothing} with {loss_type}")
    not_negative("dpop_lambda", dpop_lambda)
    if dpop_lambda and loss_type == "kto_pair":
        raise ValueError(f"kto_pair has no margin: dpop_lambda must be 0, got {dpop_lambda}")


def ranking(value: Tensor, seg: Segments, *, constant: float = 0.0) -> Tensor:
    """[S] -> [S]: -log of the chance that a response is drawn before those that seg.pairs has it better than.

    log((exp(value_i) + sum over the worse j of exp(value_j) + constant) / exp(value_i)), in log-space; 0 for a response
    that is better than none (constant 0). Equal scores are no pair, so that they do not compete.
    """
    i, j = seg.pairs
    least = torch.full_like(value, constant).log()
    high = least.scatter_reduce(0, i, value.detach()[j], "amax")
    shift = high.where(high.isfinite(), 0.0)
    total = (least - shift).exp().index_add(0, i, (value[j] - shift[i]).exp())
    alone = total == 0
    rest = shift + total.masked_fill(alone, 1.0).log()
    return torch.where(alone, 0.0, -F.logsigmoid(value - rest))


def rewards(better: Tensor, worse: Tensor) -> dict[str, Tensor]:
    """[K] each, detached. A margin of exactly 0 (policy == reference) counts as half right."""
    better, worse = better.detach(), worse.detach()
    margin = better - worse
    return {"accuracy": accuracy(margin), "margin": margin, "chosen_reward": better, "rejected_reward": worse}


def accuracy(margin: Tensor) -> Tensor:
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
