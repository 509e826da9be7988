"""Other people's heads: log-probabilities of tokens from their hidden states, each library at its best settings."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo_kernels import token_stats

IGNORED = -100
REFERENCED = ("dpo", "rrpo", "perpo")  # losses with a reference
HAS_LCE = hasattr(F, "linear_cross_entropy")
LACKS_LCE = f"not in torch {torch.__version__}"


class Tokens(NamedTuple):
    """The states of n positions, response by response; in pairs all chosen ones come first. Target -100 is ignored."""

    hidden: Tensor  # [n, H]
    weight: Tensor  # [V, H], also the reference's
    target: Tensor  # [n]
    ref_hidden: Tensor  # [n, H]
    old_logp: Tensor  # [n]
    phrase: Tensor  # [n] 0 or 1
    owner: Tensor  # [n] response of each position
    advantages: Tensor  # [S]
    scores: Tensor  # [P, N] of the responses of each prompt, which follow one another
    chosen: int  # positions of chosen responses: [:chosen]


class Stats(NamedTuple):
    logp: Tensor  # [n], anything at ignored positions
    ref_logp: Tensor | None = None  # [n]
    kl: Tensor | None = None  # [chosen]


Logp = Callable[[Tensor, Tensor, Tensor], Tensor]
Provider = Callable[[Tokens, str], Stats]  # the loss says what is needed


def eager_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _pick((hidden @ weight.t()).to(_wide(hidden)).log_softmax(-1), target)


def eager(x: Tokens, loss: str) -> Stats:
    """Whole logits, as a trainer without kernels has them."""
    log_p = (x.hidden @ x.weight.t()).to(_wide(x.hidden)).log_softmax(-1)
    if loss not in REFERENCED:
        return Stats(_pick(log_p, x.target))
    with torch.no_grad():
        log_q = (x.ref_hidden @ x.weight.t()).to(_wide(x.hidden)).log_softmax(-1)
    kl = None
    if loss == "rrpo":
        p, q = log_p[: x.chosen], log_q[: x.chosen]
        kl = (q.exp() * (q - p)).sum(-1)
    return Stats(_pick(log_p, x.target), _pick(log_q, x.target), kl)


def of_logp(logp: Logp) -> Provider:
    def stats(x: Tokens, loss: str) -> Stats:
        if loss not in REFERENCED:
            return Stats(logp(x.hidden, x.weight, x.target))
        with torch.no_grad():
            reference = logp(x.ref_hidden, x.weight, x.target)
        return Stats(logp(x.hidden, x.weight, x.target), reference)

    return stats


def trl_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Without the optional outputs; the vocabulary chunk is that of trl/trainer/utils.py:1506."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, target.clamp(min=0), 1.0, 32768, None, 1.0, ())[0]  # pyright: ignore


def trl(x: Tokens, loss: str) -> Stats:
    """For RRPO its two functions one after the other: that is what TRL has."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    stats = of_logp(trl_logp)(x, loss)
    if loss != "rrpo":
        return stats
    rows = slice(x.chosen)
    kl, _ = ChunkedDivergenceFunction.apply(x.hidden[rows], x.weight, None, x.ref_hidden[rows], x.weight, None, 0.0)  # pyright: ignore
    return stats._replace(kl=kl)


def lce_options(weight: Tensor) -> "torch.nn.LinearCrossEntropyOptions":
    """Chunks of about 256 MB of fp32 logits; its own choice of rows is for N >= H, and up to 25 times slower below."""
    rows = 1 << ((1 << 26) // len(weight)).bit_length() - 1
    return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(rows, 64), chunking_method=None)


def lce_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden, weight, target, reduction="none")


def chunked_lce_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=lce_options(weight))


def liger_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """CuTe kernel on sm_90, PyTorch in chunks elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    out = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)
    return -(out[0] if isinstance(out, tuple) else out)


def cce_logp(impl: str, filter_eps: str | None) -> Logp:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: (
        -linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl, filter_eps=filter_eps)
    )


def providers(loss: str, trains_head: bool, device: torch.device) -> dict[str, Provider | str]:
    """Peers by name, or the reason why one does not run."""
    found: dict[str, Provider | str] = {
        "eager": eager,
        "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }
    found["TRL"] = trl
    heads: dict[str, Logp] = {"Liger scaled cross-entropy": liger_logp}
    if HAS_LCE:
        heads |= {"F.linear_cross_entropy": lce_logp, "F.linear_cross_entropy, chunked": chunked_lce_logp}
    else:
        found["F.linear_cross_entropy"] = LACKS_LCE
    has_cce = find_spec("cut_cross_entropy") is not None
    if has_cce and device.type == "cuda":
        heads |= {"ml-cross-entropy": cce_logp("cce", "high"), "ml-cross-entropy, exact": cce_logp("cce", None)}
    elif has_cce:
        heads["ml-cross-entropy, torch_compile"] = cce_logp("torch_compile", None)
    for name, logp in heads.items():
        found[name] = "has no KL to a reference" if loss == "rrpo" else of_logp(logp)
    if not has_cce:
        found["ml-cross-entropy"] = "not installed: pip install cut-cross-entropy"
    return found


def fastpo(backend: str) -> Provider:
    def stats(x: Tokens, loss: str) -> Stats:
        if loss not in REFERENCED:
            return Stats(token_stats(x.hidden, x.weight, x.target, backend=backend).logp)
        kl_rows = torch.arange(len(x.hidden)) < x.chosen if loss == "rrpo" else None
        out = token_stats(x.hidden, x.weight, x.target, ref_hidden=x.ref_hidden, kl_rows=kl_rows, backend=backend)
        return Stats(out.logp, out.ref_logp, None if out.kl is None else out.kl[: x.chosen])

    return stats


def _pick(log_probs: Tensor, target: Tensor) -> Tensor:
    return log_probs.gather(1, target.clamp(min=0)[:, None])[:, 0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def means(device: torch.device) -> dict[str, Logp | str]:
    """SFT in one call, the mean over labelled positions, which lets a library make its gradients in the forward."""
    liger: Logp | str = _liger_mean if device.type == "cuda" else "Triton only: needs CUDA"
    lce: Logp | str = _lce_mean if HAS_LCE else LACKS_LCE
    return {"F.linear_cross_entropy, chunked mean": lce, "Liger fused linear cross-entropy": liger}


def _lce_mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, options=lce_options(weight))


def _liger_mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target)[0]  # pyright: ignore


def _liger_dpo(x: Tokens, rows: int, beta: float, epsilon: float) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, ref_hidden, target = (t.view(rows, -1, *t.shape[1:]) for t in (x.hidden, x.ref_hidden, x.target))
    return LigerFusedLinearDPOLoss(beta=beta)(x.weight, hidden, target, ref_input=ref_hidden, ref_weight=x.weight)[0]


def _liger_grpo(x: Tokens, rows: int, beta: float, epsilon: float) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, target, old = (t.view(rows, -1, *t.shape[1:]) for t in (x.hidden, x.target, x.old_logp))
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", epsilon_low=epsilon, epsilon_high=epsilon
    )
    mask, ids = target != IGNORED, target.clamp(min=0)
    return loss(hidden, x.weight, ids, mask, x.advantages, old_per_token_logps=old)[0]


LIGER = {"dpo": _liger_dpo, "grpo": _liger_grpo}  # rows, beta of DPO, epsilon of GRPO
