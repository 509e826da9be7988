"""Head and loss, forward and backward: DPO, RRPO, PerPO with a shared frozen head, GRPO, and SFT with a trained head.

Every provider gets the states of all positions ("raw") and of the supervised ones alone ("compact"). The loss on N
numbers is the same plain code for all but the fused functions (fastpo raw, Liger DPO and GRPO), which bring their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness, peers
from bench.harness import CUDA, DEVICE, Outputs, Variant
from bench.peers import IGNORED, Provider, Stats, Tokens
from fastpo_kernels import folded_logp, fused_dpo, fused_grpo, fused_logp, fused_perpo, fused_rrpo

BETA, ALPHA, EPSILON, GAMMA = 0.1, 0.01, 0.2, 0.5
LIST = 4  # responses of a prompt in PerPO


class Case(NamedTuple):
    loss: str
    rows: int  # responses
    positions: int  # of each response with its prompt
    share: float  # of the positions that are labelled
    H: int
    V: int
    dtype: torch.dtype = torch.float32
    compiled: bool = True  # whether torch.compile takes part: its compilation is slow

    @property
    def trains_head(self) -> bool:
        return self.loss == "sft"


QWEN = ((896, 151936), (2048, 151936), (3584, 152064), (8192, 152064))  # 0.5B, 3B, 7B, 72B
BF16 = torch.bfloat16
GPU = [
    *(Case("dpo", 4, 4096, 0.1, *size, BF16, size[0] == 3584) for size in QWEN),
    *(Case("rrpo", 4, 4096, 0.1, *size, BF16, size[0] == 3584) for size in QWEN),
    *(Case("dpo", 4, 1024, 1.0, *size, BF16, False) for size in QWEN),
    *(Case("sft", 4, 4096, share, *size, BF16, False) for size in QWEN[:3:2] for share in (0.1, 1.0)),
    *(Case(loss, 8, 2048, 0.1, *size, BF16, False) for size in QWEN[:3] for loss in ("grpo", "perpo")),
    *(Case("dpo", 4, 4096, 1.0, *size, BF16, False) for size in QWEN),
    *(Case("rrpo", 4, 4096, 1.0, *size, BF16, False) for size in QWEN[:3:2]),
    *(Case("dpo", 4, 16384, 0.01, *size, BF16, False) for size in QWEN[:3]),
    Case("dpo", 4, 16384, 1.0, *QWEN[0], BF16, False),
    Case("dpo", 4, 1024, 1.0, *QWEN[0], torch.float32, False),
]
CPU = [
    *(Case(loss, 4, 64, 1 / 3, 256, 16384) for loss in ("dpo", "rrpo")),
    *(Case(loss, 4, 64, 1 / 3, 256, 16384, compiled=False) for loss in ("grpo", "sft")),
    Case("perpo", 8, 32, 1 / 3, 256, 16384),
    Case("dpo", 4, 32, 1 / 3, 128, 16384, BF16, False),
]


def name(case: Case) -> str:
    return f"{case.loss}-{case.H}-{case.rows * case.positions}-{case.share:.2g}-{str(case.dtype)[6:]}"


@pytest.mark.parametrize("case", GPU if CUDA else CPU, ids=name)
def bench_head(case, benchmark, results):
    small = case._replace(positions=min(case.positions, 512), share=min(case.share, 0.25)) if CUDA else case
    exact, checked = _exact(small), variants(small)
    big = checked if small == case else variants(case)
    labelled = int((batch(case).target != IGNORED).sum())
    hidden, weight = (torch.randn(n, case.H, device=DEVICE, dtype=case.dtype) for n in (labelled, case.V))
    harness.compare(
        benchmark,
        results,
        "head and loss",
        {
            "loss": case.loss,
            "head": "trained" if case.trains_head else "frozen",
            "H": case.H,
            "V": case.V,
            "positions": case.rows * case.positions,
            "labelled": labelled,
            "dtype": str(case.dtype).removeprefix("torch."),
        },
        big,
        exact=exact,
        plain="eager, compact",
        tokens=labelled,
        checked=None if small == case else checked,
        floor=lambda: hidden @ weight.t(),
        gemm=(labelled, case.H, case.V),
    )


def batch(case: Case) -> Tokens:
    """All positions. Answers are contiguous, of different lengths, and begin together, as in a padded batch."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    rows, length = case.rows, case.positions
    longest = min(int(case.share * length * 1.2), length - 1)
    answers = [longest - i * longest // (3 * rows) for i in range(rows)]  # down to two thirds
    target = torch.full((rows, length), IGNORED)
    phrase = torch.zeros(rows, length)
    for i, n in enumerate(answers):
        first = length - 1 - longest
        target[i, first : first + n] = torch.randint(case.V, (n,), generator=torch.Generator().manual_seed(i))
        phrase[i, first + n // 4 : first + n // 2] = 1
    hidden = randn(rows * length, case.H).to(case.dtype)
    x = Tokens(
        hidden=hidden,
        weight=(randn(case.V, case.H) * 2 / case.H**0.5).to(case.dtype),
        target=target.flatten().to(DEVICE),
        ref_hidden=(hidden + 0.1 * randn(rows * length, case.H)).to(case.dtype),
        old_logp=hidden.new_zeros(rows * length, dtype=torch.float32),
        phrase=phrase.flatten().to(DEVICE),
        owner=torch.arange(rows, device=DEVICE).repeat_interleave(length),
        advantages=torch.linspace(-0.5, 1.0, rows, device=DEVICE),
        scores=randn(rows).view(-1, min(LIST, rows)),
        chosen=rows // 2 * length,
    )
    if case.loss != "grpo":
        return x
    with torch.no_grad():  # ratios near 1, and every eighth far outside of the clip: rounding flips no decision
        logp = fused_logp(hidden.view(rows, length, -1), x.weight, _labels(x, rows))
    old = logp.new_zeros(rows, length)
    old[:, :-1] = logp
    turn = torch.arange(old.numel(), device=DEVICE)
    away = torch.where(turn % 8 == 0, 0.5, 0.05) * torch.where(turn % 16 < 8, 1.0, -1.0)
    return x._replace(old_logp=old.flatten().float() + away)


def _labels(x: Tokens, rows: int) -> Tensor:
    """[rows, T] as Hugging Face has them: not shifted."""
    shifted = x.target.view(rows, -1)
    return torch.cat([torch.full_like(shifted[:, :1], IGNORED), shifted[:, :-1]], 1)


def _compact(x: Tokens) -> Tokens:
    at = (x.target != IGNORED).nonzero()[:, 0]
    picked = {key: getattr(x, key)[at] for key in ("hidden", "target", "ref_hidden", "old_logp", "phrase", "owner")}
    return x._replace(**picked, chosen=int((at < x.chosen).sum()))


def _sums(values: Tensor, x: Tokens) -> Tensor:
    """[n] -> [S], over labelled positions."""
    labelled = values.where(x.target != IGNORED, 0.0)
    return labelled.new_zeros(len(x.advantages)).index_add(0, x.owner, labelled)


def dpo(s: Stats, x: Tokens) -> Tensor:
    assert s.ref_logp is not None
    better, worse = _sums(s.logp - s.ref_logp, x).chunk(2)
    return -F.logsigmoid(BETA * (better - worse)).mean()


def rrpo(s: Stats, x: Tokens) -> Tensor:
    assert s.ref_logp is not None and s.kl is not None
    better, worse = _sums((s.logp - s.ref_logp) * x.phrase, x).chunk(2)
    penalty = s.kl.where(x.target[: x.chosen] != IGNORED, 0.0).sum() / len(better)
    return ALPHA * penalty - F.logsigmoid(BETA * (better - worse)).mean()


def perpo(s: Stats, x: Tokens) -> Tensor:
    """All ordered pairs of a prompt at once; those whose first response is not the better one weigh nothing."""
    assert s.ref_logp is not None
    reward = BETA * _sums(s.logp - s.ref_logp, x).view(x.scores.shape)
    gap = (x.scores[:, :, None] - x.scores[:, None]).clamp(min=0.0) ** GAMMA
    losses = -F.logsigmoid(reward[:, :, None] - reward[:, None])
    return ((gap * losses).sum((1, 2)) / gap.sum((1, 2))).mean()


def grpo(s: Stats, x: Tokens) -> Tensor:
    ratio, a = (s.logp - x.old_logp).exp(), x.advantages[x.owner]
    value = -torch.minimum(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a)
    return (_sums(value, x) / _sums(torch.ones_like(value), x)).mean()


def sft(s: Stats, x: Tokens) -> Tensor:
    return -_sums(s.logp, x).sum() / (x.target != IGNORED).sum()


Loss = Callable[[Stats, Tokens], Tensor]
LOSSES: dict[str, Loss] = {"dpo": dpo, "rrpo": rrpo, "perpo": perpo, "grpo": grpo, "sft": sft}


def _exact(case: Case) -> Outputs:
    x = _compact(batch(case))
    x = x._replace(
        **{
            key: value.double()
            for key, value in x._asdict().items()
            if torch.is_tensor(value) and value.is_floating_point()
        }
    )
    return _step(case, _leaf(case, x), lambda x: LOSSES[case.loss](peers.eager(x, case.loss), x))


def variants(case: Case) -> dict[str, Variant | str]:
    """By name, "raw" and "compact" of each provider; a peer that does not run is there once, with the reason."""
    raw = batch(case)
    compact = _leaf(case, _compact(raw))
    raw = _leaf(case, raw)
    at = (raw.target != IGNORED).nonzero()[:, 0]
    found: dict[str, Variant | str] = {}
    for ours, backend in {"fastpo": "auto", **({"fastpo triton": "triton"} if CUDA else {})}.items():
        found[f"{ours}, raw"] = _variant(case, raw, lambda x, backend=backend: _fused(case, x, backend), at)
        found[f"{ours}, compact"] = _variant(case, compact, _with(case, peers.fastpo(backend)))
    if case.loss == "sft":
        found["fastpo folded, compact"] = _variant(case, compact, _folded)
    for peer, provider in peers.providers(case.loss, case.trains_head, DEVICE).items():
        if isinstance(provider, str):
            found[peer] = provider
        elif peer != "torch.compile" or case.compiled:
            if case.share < 1:  # else raw is nearly compact
                found[f"{peer}, raw"] = _variant(case, raw, _with(case, provider), at)
            found[f"{peer}, compact"] = _variant(case, compact, _with(case, provider))
    if case.trains_head:
        for peer, mean in peers.means(DEVICE).items():
            if isinstance(mean, str):
                found[peer] = mean
            else:
                step = lambda x, mean=mean: mean(x.hidden, x.weight, x.target)  # noqa: E731
                found |= {
                    f"{peer}, raw": _variant(case, raw, step, at),
                    f"{peer}, compact": _variant(case, compact, step),
                }
    return found | _liger(case, raw, at)


def _with(case: Case, provider: Provider) -> Callable[[Tokens], Tensor]:
    return lambda x: LOSSES[case.loss](provider(x, case.loss), x)


def _fused(case: Case, x: Tokens, backend: str) -> Tensor:
    """Our functions for padded batches, which compact inside."""
    rows = case.rows
    hidden, ref_hidden = (h.view(rows, case.positions, -1) for h in (x.hidden, x.ref_hidden))
    labels = _labels(x, rows)
    if case.loss == "dpo":
        return fused_dpo(hidden, x.weight, labels, ref_hidden=ref_hidden, beta=BETA, backend=backend)[0]
    if case.loss == "rrpo":
        mask = F.pad(x.phrase.view(rows, -1)[:, :-1], (1, 0))
        options = {"phrase_mask": mask, "ref_hidden": ref_hidden, "beta": BETA, "alpha": ALPHA, "backend": backend}
        return fused_rrpo(hidden, x.weight, labels, **options)[0]
    if case.loss == "perpo":
        options = {"scores": x.scores, "ref_hidden": ref_hidden, "beta": BETA, "gamma": GAMMA, "backend": backend}
        return fused_perpo(hidden, x.weight, labels, **options)[0]
    if case.loss == "grpo":
        old = x.old_logp.view(rows, -1)[:, :-1]
        options = {"epsilon_low": EPSILON, "epsilon_high": EPSILON, "backend": backend}
        return fused_grpo(hidden, x.weight, labels, x.advantages, old_logp=old, **options)[0]
    return -fused_logp(hidden, x.weight, labels, backend=backend).sum() / (labels != IGNORED).sum()


def _folded(x: Tokens) -> Tensor:
    """SFT in one sweep: every loss needs its own token's log-probability only."""
    n = len(x.target)
    return folded_logp(x.hidden, x.weight, x.target, lambda logp, rows: (-logp / n, torch.full_like(logp, -1 / n)))[0]


def _liger(case: Case, raw: Tokens, at: Tensor) -> dict[str, Variant | str]:
    """Liger's chunked losses take padded batches: raw, and with the columns before the answers cut off."""
    if case.loss == "sft":
        return {}
    if case.loss not in peers.LIGER:
        lacks = {"rrpo": "with phrases and a KL to a reference", "perpo": "of lists with scores"}
        return {"Liger": f"has no loss {lacks[case.loss]}; its DPO is a row of dpo"}
    rows, length, labelled = case.rows, case.positions, (raw.target != IGNORED).view(case.rows, -1)
    columns = labelled.any(0).nonzero()[:, 0]
    first, last = int(columns[0]), int(columns[-1]) + 1

    def cut(value: Tensor) -> Tensor:
        return value.view(rows, length, *value.shape[1:])[:, first:last].flatten(0, 1)

    keys = ("hidden", "target", "ref_hidden", "old_logp", "phrase", "owner")
    short = _leaf(case, raw._replace(**{key: cut(getattr(raw, key).detach()) for key in keys}))
    inside = (short.target != IGNORED).nonzero()[:, 0]
    step = lambda x: peers.LIGER[case.loss](x, rows, BETA, EPSILON)  # noqa: E731
    found = {"Liger, raw": _variant(case, raw, step, at), "Liger, compact": _variant(case, short, step, inside)}
    return dict(found)


def _leaf(case: Case, x: Tokens) -> Tokens:
    weight = x.weight.detach().requires_grad_(case.trains_head)
    return x._replace(hidden=x.hidden.detach().clone().requires_grad_(), weight=weight)


def _step(case: Case, x: Tokens, loss: Callable[[Tokens], Tensor]) -> Outputs:
    value = loss(x)
    wanted = [x.hidden, x.weight][: 1 + case.trains_head]
    grads = torch.autograd.grad(value, wanted)
    return {"loss": value.detach(), **dict(zip(("d hidden", "d weight"), grads, strict=False))}


def _variant(case: Case, x: Tokens, loss: Callable[[Tokens], Tensor], at: Tensor | None = None) -> Variant:
    """at: the labelled rows of x.hidden; None: all of them."""

    def read(out: Outputs) -> Outputs:
        d_hidden = out["d hidden"]
        return out | {"d hidden": d_hidden if at is None else d_hidden[at]}

    return Variant(lambda: _step(case, x, loss), read)
