"""KL(policy || reference), the option of token_stats."""

import pytest
import torch

from fastpo_kernels import token_stats
from fastpo_kernels.testing import assert_no_worse, gemm_passes, nan_scratch
from fastpo_kernels.token_stats import chunked

N, H, V = 13, 11, 37
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SOME, OTHERS = torch.arange(N) % 3 == 1, torch.arange(N) % 4 > 1  # rows of one, of the other, of both and of none
TARGET = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
OPTIONS = {"softcap": 3.0, "temperature": 0.7}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "TILE_BYTES", 5 * V * 4)


def rounded(seed, *shape, dtype=torch.float64, scale=1.0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).to(dtype)


def problem(dtype, *, own_head):
    given = {"hidden": rounded(0, N, H), "weight": rounded(1, V, H, scale=0.6), "ref_hidden": rounded(3, N, H)}
    given |= {"ref_weight": rounded(4, V, H, scale=0.6)} if own_head else {}
    return {k: v.to(dtype) for k, v in given.items()}


def eager(given, kl_rows, *, softcap=None, temperature=1.0):
    """logp, KL(q || p), KL(p || q) by ordinary code, logits in the dtype of the inputs."""

    def log_softmax(hidden, weight):
        logits = hidden @ weight.t()
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (logits / temperature).log_softmax(-1)

    log_p = log_softmax(given["hidden"], given["weight"])
    log_q = log_softmax(given["ref_hidden"], given.get("ref_weight", given["weight"])).detach()
    kl = (log_q.exp() * (log_q - log_p)).sum(-1) * kl_rows
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1) * OTHERS
    return log_p[torch.arange(N), TARGET], kl, reverse


def ours(given, kl_rows, *, backend, **options):
    given, target = dict(given), TARGET
    with nan_scratch():
        stats = token_stats(
            given.pop("hidden"),
            given.pop("weight"),
            target,
            kl_rows=kl_rows,
            reverse_kl_rows=OTHERS,
            backend=backend,
            **given,
            **options,
        )
    return stats.logp, stats.kl, stats.reverse_kl


def with_gradients(compute, given, trained, dtype):
    leaves = {k: v.to(dtype, copy=True).requires_grad_(k in trained) for k, v in given.items()}
    values = compute(leaves)
    sum((v * rounded(6 + i, N, dtype=v.dtype)).sum() for i, v in enumerate(values)).backward()
    return [v.detach() for v in values] + [leaves[k].grad for k in trained]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids=["frozen", "trained"])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "transformed"])
def test_values_and_gradients_equal_the_definition(backend, dtype, trained, own_head, options):
    given = problem(dtype, own_head=own_head)
    got = with_gradients(lambda x: ours(x, SOME, backend=backend, **options), given, trained, dtype)
    plain = with_gradients(lambda x: eager(x, SOME, **options), given, trained, dtype)
    exact = with_gradients(lambda x: eager(x, SOME, **options), given, trained, torch.float64)
    for name, mine, theirs, want in zip(("logp", "kl", "reverse_kl", *trained), got, plain, exact, strict=True):
        assert_no_worse(mine, theirs, want, eps=EPS[mine.dtype], what=name)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("train_head", [False, True])
def test_gradcheck(backend, train_head):
    given = {k: v[:5, :4].clone() for k, v in problem(torch.float64, own_head=True).items()}
    leaves = given["hidden"].requires_grad_(), given["weight"].requires_grad_(train_head)
    ref = {"ref_hidden": given["ref_hidden"], "ref_weight": given["ref_weight"], "reverse_kl_rows": SOME[:5]}

    def reverse_kl(hidden, weight):
        return token_stats(hidden, weight, TARGET[:5] % 5, backend=backend, **ref, **OPTIONS).reverse_kl

    assert torch.autograd.gradcheck(reverse_kl, leaves)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("own_head", [False, True])
def test_near_the_reference(distance, own_head, train_head, monkeypatch):
    """Relative errors of the value and of d hidden in bf16, as for the other direction in test_token_stats."""
    rows, vocabulary, size = 120, 257, 32
    monkeypatch.setattr(chunked, "TILE_BYTES", 50 * vocabulary * 4)
    hidden, weight = rounded(0, rows, size).bfloat16(), rounded(1, vocabulary, size, scale=0.3).bfloat16()
    shift = (2 * distance / (0.09 * size)) ** 0.5  # KL is about half the variance of the logits' difference
    ref_hidden = (hidden.double() + shift * rounded(8, rows, size)).bfloat16()
    ref = {"ref_hidden": ref_hidden, "ref_weight": weight.clone() if own_head else None}
    weight.requires_grad_(train_head)

    def gradient(of, dtype):
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        value = of(leaf, weight.to(dtype), ref_hidden.to(dtype))
        value.sum().backward()
        return value.detach().double()[:, None], leaf.grad.double()

    def plain(h, w, r):
        log_p, log_q = ((x @ w.t()).to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (h, r))
        return (log_p.exp() * (log_p - log_q.detach())).sum(-1)

    got = gradient(
        lambda h, *_: token_stats(h, weight, TARGET[:1].expand(rows), reverse_kl_rows=True, **ref)[4], hidden.dtype
    )
    theirs, exact = gradient(plain, hidden.dtype), gradient(plain, torch.float64)
    near = (exact[0][:, 0] > distance / 3) & (exact[0][:, 0] < distance * 3)
    assert near.sum() >= 20
    for mine, other, want, bound in zip(got, theirs, exact, (1e-3, 4e-3), strict=True):
        mine, other = (((x - want).norm(dim=-1) / want.norm(dim=-1))[near].mean() for x in (mine, other))
        assert mine <= other and mine < bound, f"{mine:.2g}, plain code {other:.2g}"


def test_equal_models_no_rows_and_no_wish():
    given = problem(torch.float32, own_head=False)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"]
    same = token_stats(hidden, weight, TARGET, ref_hidden=hidden.detach(), reverse_kl_rows=True)
    assert same.kl is None and same.reverse_kl.abs().max() < 1e-9
    assert torch.autograd.grad(same.reverse_kl.sum(), hidden)[0].abs().max() < 1e-6
    none = token_stats(hidden[:0], weight, TARGET[:0], ref_hidden=hidden[:0].detach(), reverse_kl_rows=True)
    assert none.reverse_kl.shape == (0,)
    none.reverse_kl.sum().backward()
    assert token_stats(hidden, weight, TARGET, ref_hidden=hidden, reverse_kl_rows=False).reverse_kl is None


def test_gemm_passes():
    given = {k: v[:12] if k != "weight" else v for k, v in problem(torch.float32, own_head=False).items()}
    half = torch.arange(12) % 2 == 0

    def passes(train_head, **rows):
        def run():
            hidden, weight = (
                given["hidden"].clone().requires_grad_(),
                given["weight"].clone().requires_grad_(train_head),
            )
            stats = token_stats(hidden, weight, TARGET[:12], ref_hidden=given["ref_hidden"], **rows)
            sum(x.sum() for x in (stats.logp, stats.kl, stats.reverse_kl) if x is not None).backward()

        return gemm_passes(run, 12, H, V)

    assert passes(False, reverse_kl_rows=half) == 3.5
    assert passes(False, reverse_kl_rows=half, kl_rows=half) == 4
    assert passes(True, reverse_kl_rows=half) == 5.5
    assert passes(True, reverse_kl_rows=half, kl_rows=half) == 5.5  # the reference's logits once for both


def test_needs_a_reference():
    given = problem(torch.float32, own_head=False)
    args = given["hidden"], given["weight"], TARGET
    with pytest.raises(ValueError, match="reverse_kl_rows need ref_hidden"):
        token_stats(*args, reverse_kl_rows=True)
    with pytest.raises(ValueError, match=r"reverse_kl_rows must be \[13\]"):
        token_stats(*args, ref_hidden=given["ref_hidden"], reverse_kl_rows=SOME[:3])
