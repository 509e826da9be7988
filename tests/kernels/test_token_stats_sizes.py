"""token_stats and folded_logp at the sizes of real heads, with tied embeddings, and their targets on a GPU."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpo_kernels import token_stats
from fastpo_kernels.testing import max_error
from fastpo_kernels.token_stats import chunked, folded_logp, reference


def rounded(seed, *shape, dtype=torch.float32, scale=1.0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).to(dtype)


def likelihood(logp, rows):
    return logp, torch.ones_like(logp)


@pytest.mark.parametrize("vocabulary", [151_936, 152_064, 32_000, 128_256, 50_257, 1])
@pytest.mark.parametrize("train_head", [False, True])
def test_vocabularies(vocabulary, train_head):
    hidden, weight = rounded(0, 3, 4).requires_grad_(), rounded(1, vocabulary, 4).requires_grad_(train_head)
    target = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    ref_hidden, rows = rounded(2, 3, 4), torch.tensor([True, False, True])
    log_p, log_q = ((h @ exact[1].t()).log_softmax(-1) for h in (exact[0], ref_hidden.double()))
    log_q = log_q.detach()
    want = log_p[torch.arange(3), target], (log_q.exp() * (log_q - log_p)).sum(-1) * rows
    (want[0].sum() + want[1].sum()).backward()
    got = token_stats(hidden, weight, target, ref_hidden=ref_hidden, kl_rows=rows)
    (got.logp.sum() + got.kl.sum()).backward()
    assert max_error(got.logp, want[0]) < 1e-5 and max_error(got.kl, want[1]) < 1e-5
    assert max_error(hidden.grad, exact[0].grad) < 1e-5
    assert (weight.grad is not None) == train_head
    if train_head:
        assert max_error(weight.grad, exact[1].grad) < 1e-5


class Largest(TorchDispatchMode):
    """Numel of the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return out


@pytest.mark.parametrize("how", ["frozen", "trained", "folded"])
def test_no_tensor_grows_with_rows_times_vocabulary(how, monkeypatch):
    rows, size, vocabulary, tile = 65_536, 3, 37, 8192
    monkeypatch.setattr(chunked, "TILE_BYTES", tile * vocabulary * 4)
    hidden = rounded(0, rows, size).requires_grad_()
    weight = rounded(1, vocabulary, size).requires_grad_(how != "frozen")
    target = torch.arange(rows) % vocabulary
    with Largest() as largest:
        if how == "folded":
            total, logp = folded_logp(hidden, weight, target, likelihood)
        else:
            logp = token_stats(hidden, weight, target).logp
            total = logp.sum()
        total.backward()
    assert largest.numel == tile * vocabulary  # 8 tiles; hidden has fewer elements
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = (exact[0] @ exact[1].t()).log_softmax(-1)[torch.arange(rows), target]
    want.sum().backward()
    assert max_error(logp, want) < 1e-5 and max_error(hidden.grad, exact[0].grad) < 1e-5
    if how != "frozen":
        assert max_error(weight.grad, exact[1].grad) < 1e-5 * exact[1].grad.abs().max()


def test_rows_of_a_tile():
    """On the CPU 16 MB, but 256 rows where they fit into 256 MB."""

    def rows(vocabulary):
        given = reference.Inputs(
            hidden=torch.empty(5000, 1),
            weight=torch.empty(vocabulary, 1),
            bias=None,
            target=torch.zeros(5000, dtype=torch.int64),
            ref_hidden=None,
            ref_weight=None,
            kl_rows=None,
            softcap=None,
            temperature=1.0,
        )
        return len(next(chunked._split(torch.arange(5000), given)))

    assert [rows(v) for v in (1000, 16_384, 151_936, 1_000_000)] == [4194, 256, 256, 67]


@pytest.mark.parametrize("how", ["token_stats", "reference", "folded"])
def test_tied_embeddings(how):
    """One parameter as embedding and head: its gradient has both parts."""
    ids, vocabulary, size = torch.tensor([3, 5, 3, 0, 6, 5]), 7, 5

    def gradients(dtype, head):
        table = rounded(0, vocabulary, size).to(dtype).requires_grad_()
        body = rounded(1, size, size).to(dtype).requires_grad_()
        head(torch.tanh(table[ids[:-1]] @ body), table).backward()
        return table.grad, body.grad

    def ours(hidden, table):
        if how == "folded":
            return folded_logp(hidden, table, ids[1:], likelihood)[0]
        return token_stats(hidden, table, ids[1:], backend="auto" if how == "token_stats" else how).logp.sum()

    def plain(hidden, table):
        return (hidden @ table.t()).log_softmax(-1)[torch.arange(5), ids[1:]].sum()

    for got, want in zip(gradients(torch.float32, ours), gradients(torch.float64, plain), strict=True):
        assert max_error(got, want) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("how", ["token_stats", "folded"])
def test_errors_by_probability_of_the_target(dtype, bound, how, monkeypatch):
    """logp, d hidden and, of each bucket alone, d weight: no worse than ordinary code in the same dtype."""
    rows, size, vocabulary = 200, 32, 257
    monkeypatch.setattr(chunked, "TILE_BYTES", 64 * vocabulary * 4)
    weight, target = rounded(1, vocabulary, size, dtype=dtype, scale=0.02), torch.arange(rows) % vocabulary
    toward = weight[target].double()
    length = torch.linspace(0.5, 16, rows)[:, None]  # p(target) climbs from almost 0 to 0.9999
    noise = 0.3 * rounded(2, rows, size, dtype=torch.float64)
    hidden = (length * toward / toward.square().sum(-1, keepdim=True) + noise).to(dtype)
    scale = 1.0 if dtype == torch.bfloat16 else 1024.0  # fp16 is trained with a loss scale

    def ours(h, w, y):
        if how == "folded":
            total, logp = folded_logp(h, w, y, likelihood)
            return scale * total, logp
        logp = token_stats(h, w, y).logp
        return scale * logp.sum(), logp

    def plain(h, w, y):
        logits = h @ w.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logp = logits.log_softmax(-1)[torch.arange(len(y)), y]
        return scale * logp.sum(), logp

    def run(of, at, wide):
        leaves = [x.to(wide, copy=True).requires_grad_() for x in (hidden[at], weight)]
        total, logp = of(*leaves, target[at])
        total.backward()
        return [x.detach().double() for x in (logp, leaves[0].grad, leaves[1].grad)]

    p = run(plain, slice(None), torch.float64)[0].exp()
    for low, high in itertools.pairwise([0, 0.5, 0.9, 0.99, 0.999, 1]):
        at = ((p >= low) & (p < high)).nonzero()[:, 0]
        assert len(at) >= 3, f"no tokens with p(y) in [{low}, {high})"
        exact = run(plain, at, torch.float64)
        for name, mine, theirs, want in zip(
            ("logp", "d hidden", "d weight"), run(ours, at, dtype), run(plain, at, dtype), exact, strict=True
        ):
            mine, theirs = ((x - want).norm() / want.norm() for x in (mine, theirs))
            assert mine <= theirs and mine < bound, f"{name}, p(y) in [{low}, {high}): {mine:.2g}, plain {theirs:.2g}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_target_out_of_range_on_a_gpu():
    """In a process of its own, whose CUDA context does not outlive the assertion."""
    script = (
        "import torch; from fastpo_kernels import token_stats\n"
        "hidden, weight = torch.zeros(3, 8, device='cuda'), torch.zeros(5, 8, device='cuda')\n"
        "token_stats(hidden, weight, torch.full((3,), 5, device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "target must lie in [0, 5)" in done.stderr, done.stderr[-2000:]
