"""What the backward of a trainable head owes to going over the vocabulary: its precision, its memory."""

import pytest
import torch

from fastpo_kernels import token_stats
from fastpo_kernels.token_stats import chunked, trained
from tests.memory import peak_bytes


def rounded(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("direction", ["kl", "reverse_kl"])
def test_near_the_reference_the_normaliser_is_not_rounded_to_the_digits_of_the_logits(direction):
    """At a KL of 1e-4 and logits about 64, one log-sum-exp in place of two numbers makes d hidden twice as wrong."""
    rows, vocabulary, size = 32, 8001, 64
    hidden, weight = rounded(0, rows, size), rounded(1, vocabulary, size, scale=0.35)
    bias, ref_hidden = torch.full((vocabulary,), 64.0), hidden + 5e-3 * rounded(2, rows, size)

    def gradients(of, dtype):
        leaves = hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()
        value = of(*leaves)
        value.sum().backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    def ours(h, w):
        asked = {f"{direction}_rows": True}
        given = {"ref_hidden": ref_hidden, "ref_weight": weight, "bias": bias}
        return getattr(token_stats(h, w, torch.arange(rows), backend="chunked", **given, **asked), direction)

    def plain(h, w):
        log_p, log_q = ((x @ w.t() + bias.to(x.dtype)).log_softmax(-1) for x in (h, ref_hidden.to(h.dtype)))
        log_q = log_q.detach()
        of, to = (log_q, log_p) if direction == "kl" else (log_p, log_q)
        return (of.exp() * (of - to)).sum(-1)

    exact, got, eager = gradients(plain, torch.float64), gradients(ours, torch.float32), gradients(plain, torch.float32)
    assert 3e-5 < exact[0].mean() < 3e-4
    for name, mine, theirs, want in zip(("value", "d hidden", "d weight"), got, eager, exact, strict=True):
        mine, theirs = ((x - want).norm() / want.norm() for x in (mine, theirs))
        assert mine <= 1.3 * theirs, f"{name}: {mine:.2g}, plain code {theirs:.2g}"


def test_the_gradient_of_the_head_is_made_in_its_dtype(monkeypatch):
    """Beside it and the operands there are a few slices, no fp32 [V, H]."""
    monkeypatch.setattr(chunked, "TILE_BYTES", 64 * 256 * 4)
    rows, vocabulary, size = 64, 8001, 48
    hidden, weight = (rounded(i, n, size).bfloat16().requires_grad_() for i, n in ((0, rows), (1, vocabulary)))
    loss = token_stats(hidden, weight, torch.arange(rows), backend="chunked").logp.sum()
    peak = peak_bytes(loss.backward)
    bf16, fp32 = 2 * weight.numel(), 4 * weight.numel()
    assert bf16 < peak < bf16 + fp32 / 2, f"{peak} bytes"


def test_slices_are_aligned_whatever_the_number_of_rows(monkeypatch):
    """Odd ones would keep a GPU's GEMMs of bf16 tiles from their fast kernels, and its loads from 16 bytes."""
    widths, plain = [], trained.d_logits

    def d_logits(z, *args):
        widths.append(z.shape[1])
        return plain(z, *args)

    monkeypatch.setattr(trained, "d_logits", d_logits)
    monkeypatch.setattr(chunked, "TILE_BYTES", 1001 * 300 * 4)
    weight = rounded(1, 2001, 5).requires_grad_()
    token_stats(rounded(0, 300, 5), weight, torch.arange(300), backend="chunked").logp.sum().backward()
    assert widths == [960, 960, 81]
