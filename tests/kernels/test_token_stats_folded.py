"""folded_logp: losses of single tokens under a trainable head, in three GEMM passes."""

import pytest
import torch
import torch.nn.functional as F

from fastpo_kernels.testing import assert_no_worse, gemm_passes, max_error, nan_scratch
from fastpo_kernels.token_stats import chunked, folded_logp

N, H, V = 13, 11, 37
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TARGET = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
SIGN = torch.where(torch.arange(N) < 6, 1.0, -1.0)  # six chosen tokens, the others rejected
NAMES = ("hidden", "weight", "bias")
OPTIONS = {"plain": {}, "transformed": {"softcap": 3.0, "temperature": 0.7}}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "TILE_BYTES", 5 * V * 4)


def rounded(seed, *shape, dtype=torch.float64, scale=1.0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).to(dtype)


def problem(dtype):
    return rounded(0, N, H, dtype=dtype), rounded(1, V, H, dtype=dtype, scale=0.6), rounded(2, V, dtype=dtype)


OLD_LOGP = -3.5 + 1.5 * rounded(3, N)
ADVANTAGE = rounded(4, N) * (torch.arange(N) % 4 > 0)  # every fourth group has none


def ppo(logp, rows=slice(None)):
    """-min(r A, clip(r) A) and its derivative; epsilon 0.2."""
    old, a = OLD_LOGP[rows].to(logp.dtype), ADVANTAGE[rows].to(logp.dtype)
    ratio = (logp - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return -torch.minimum(ratio * a, clipped * a), -(ratio * a).where(ratio * a <= clipped * a, 0.0)


def sft(logp, rows=slice(None)):
    return -logp / N, torch.full_like(logp, -1 / N)


def dpo_pair(logp, rows=slice(None)):
    sign = SIGN[rows].to(logp.dtype)
    return sign * logp, sign


AFTER = {sft: lambda x: 0.5 * x, ppo: lambda x: x, dpo_pair: lambda margin: -F.logsigmoid(0.1 * (margin - 0.3))}


def eager(hidden, weight, bias, of, *, softcap=None, temperature=1.0):
    logits = F.linear(hidden, weight, bias)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)[torch.arange(N), TARGET]
    return AFTER[of](of(logp)[0].sum()), logp.detach()


def ours(hidden, weight, bias, of, **options):
    with nan_scratch():
        total, logp = folded_logp(hidden, weight, TARGET, of, bias=bias, **options)
    assert not logp.requires_grad
    return AFTER[of](total), logp


def with_gradients(compute, of, dtype, options, tensors=None):
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors or problem(dtype)]
    loss, logp = compute(*leaves, of, **options)
    loss.backward()
    return [loss.detach(), logp] + [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("of", AFTER, ids=lambda of: of.__name__)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_equal_the_definition(of, dtype, options):
    got = with_gradients(ours, of, dtype, options)
    plain = with_gradients(eager, of, dtype, options)
    exact = with_gradients(eager, of, torch.float64, options, problem(dtype))
    for name, mine, theirs, want in zip(("loss", "logp", *NAMES), got, plain, exact, strict=True):
        assert_no_worse(mine, theirs, want, eps=EPS[mine.dtype], what=name)
    assert [g.dtype for g in got] == [chunked.accumulator(dtype)] * 2 + [dtype] * 3


def test_gradient_of_the_head_is_summed_in_fp32(monkeypatch):
    """One row per chunk: bf16 sums of 600 terms of one sign would stop to grow at 256 times a term."""
    monkeypatch.setattr(chunked, "TILE_BYTES", 1)
    rows = 600
    hidden, weight = torch.ones(rows, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    weight.requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    folded_logp(hidden, weight, target, lambda logp, _: (logp, torch.ones_like(logp)))[0].backward()
    assert weight.grad.tolist() == [[300.0], [-300.0]]


def test_small_gradients_outlive_fp16():
    """d hidden of 1 / N is subnormal before the loss scale is multiplied in."""
    hidden, weight, _ = problem(torch.float16)
    hidden = hidden.requires_grad_()
    scale = 2.0**16
    small = 2.0**-20
    total = folded_logp(hidden, weight, TARGET, lambda logp, _: (small * logp, torch.full_like(logp, small)))[0]
    (scale * total).backward()
    want = with_gradients(eager, sft, torch.float64, {}, problem(torch.float16)[:2] + (torch.zeros(V),))[2]
    want = want * (-2 * N * scale * small)  # of sft's mean, halved
    assert max_error(hidden.grad, want) < 1e-3 * want.abs().max()


def test_small_gradients_outlive_fp16_operands(monkeypatch):
    """As on CUDA, whose products take half operands: those of 1 / 4096 lie below what fp16 holds of a p of 1e-4."""

    def product(a, b):
        return a.float() @ b.float()

    def add_product(out, a, b, *, beta=1, alpha=1.0):
        torch.addmm(out, a.float(), b.float(), beta=beta, alpha=alpha, out=out)

    for name, of in {"mm": product, "add_mm": add_product, "operand": lambda x: x}.items():
        monkeypatch.setattr(chunked, name, of)
    rows, vocabulary, tokens, loss_scale = 24, 5003, 4096, 2.0**10
    monkeypatch.setattr(chunked, "TILE_BYTES", 7 * vocabulary * 4)
    target = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0))

    def mean(logp, rows):
        return -logp / tokens, torch.full_like(logp, -1 / tokens)

    def gradients(dtype, of):
        hidden, weight = (
            rounded(0, rows, 64, dtype=torch.float16),
            rounded(1, vocabulary, 64, dtype=torch.float16, scale=0.3),
        )
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        (loss_scale * of(*leaves)).backward()
        return [leaf.grad.double() for leaf in leaves]

    def plain(hidden, weight):
        logits = hidden @ weight.t()
        logits = logits.float() if logits.dtype == torch.float16 else logits
        return -logits.log_softmax(-1)[torch.arange(rows), target].sum() / tokens

    got = gradients(torch.float16, lambda hidden, weight: folded_logp(hidden, weight, target, mean)[0])
    for mine, theirs, want in zip(got, gradients(torch.float16, plain), gradients(torch.float64, plain), strict=True):
        mine, theirs = ((x - want).norm() / want.norm() for x in (mine, theirs))
        assert mine <= 1.3 * theirs, f"{mine:.2g}, plain code {theirs:.2g}"


def count(of, *, trained=("hidden", "weight"), rows=12):
    def run():
        tensors = dict(zip(NAMES, problem(torch.float32), strict=True))
        hidden, weight = (tensors[k].clone().requires_grad_(k in trained) for k in ("hidden", "weight"))
        total = folded_logp(hidden[:rows], weight, TARGET[:rows], of)[0]
        if total.requires_grad:
            total.backward()

    return gemm_passes(run, rows, H, V)


def test_gemm_passes():
    def half(logp, rows):
        at = torch.arange(rows.start, rows.stop) % 2
        return at * logp, at.to(logp.dtype)

    assert count(sft) == 3
    assert count(dpo_pair) == 3
    assert count(sft, trained=("weight",)) == 2
    assert count(sft, trained=("hidden",)) == 2
    assert count(sft, trained=()) == 1
    assert count(half) == 2  # no gradient GEMM for the rows with a coefficient of 0
    with torch.no_grad():
        assert count(sft) == 1


def test_no_rows_and_two_backwards():
    hidden, weight, bias = (t.requires_grad_() for t in problem(torch.float32))
    with nan_scratch():
        folded_logp(hidden[:0], weight, TARGET[:0], sft, bias=bias)[0].backward()
    assert bias.grad.equal(torch.zeros_like(bias))
    assert weight.grad.equal(torch.zeros_like(weight)) and hidden.grad.equal(torch.zeros_like(hidden))
    total, _ = folded_logp(hidden, weight, TARGET, sft)
    once, twice = (torch.autograd.grad(c * total, weight, retain_graph=True)[0] for c in (1, 2))
    assert twice.equal(2 * once) and once.abs().max() > 0


def test_head_may_be_empty_in_the_backward():
    hidden, weight, _ = (t.requires_grad_() for t in problem(torch.float32))
    total, _ = folded_logp(hidden, weight, TARGET, sft)
    want = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    weight.data = torch.full_like(weight, torch.nan)
    assert torch.autograd.grad(total, hidden)[0].equal(want)


def test_refuses_what_does_not_fit():
    hidden, weight, _ = problem(torch.float32)
    with pytest.raises(ValueError, match=r"coefficient must give two \[5\], got \[\], \[5\]"):
        folded_logp(hidden, weight, TARGET, lambda logp, _: (logp.sum(), logp))
    with pytest.raises(ValueError, match=r"target must lie in \[0, 37\)"):
        folded_logp(hidden, weight, TARGET + V, sft)
