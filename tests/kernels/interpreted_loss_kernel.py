"""Checks of the losses' Triton kernels on the CPU, run by test_loss_kernel.py where TRITON_INTERPRET is set."""

import functools
import itertools
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpo_kernels import Segments, fused_dpo, fused_grpo, fused_perpo, fused_rrpo, loss_kernel, losses
from fastpo_kernels.loss_kernel import launch
from fastpo_kernels.testing import max_error, nan_scratch

EPS = 2e-6


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(kernel, plain, units: int, given: dict[str, Any], seg: Segments, what: str) -> None:
    """Loss, metrics and gradients of the kernel in fp32 against those of plain code in fp32 and float64.

    units: what losses are averaged over; 0: their number.
    """

    def run(loss, dtype):
        leaves: dict[str, Any] = {k: None if v is None else v.to(dtype, copy=True) for k, v in given.items()}
        trained = [leaves[k].requires_grad_() for k in ("logp", "kl") if leaves.get(k) is not None]
        value, metrics = loss(**leaves)
        gradients = torch.autograd.grad(1.7 * value, trained)
        return {"loss": value.detach(), **metrics, **{f"gradient {n}": g for n, g in enumerate(gradients)}}

    def reduced(**leaves):
        out = plain(**leaves, seg=replace(seg, score=seg.score.double()))
        metrics = {name: x.sum() / max(1, len(x)) for name, x in out.metrics.items()}
        return out.losses.sum() / max(1, units or len(out.losses)), metrics

    with nan_scratch():
        got = run(functools.partial(kernel, seg=seg), torch.float32)
    fp32, exact = run(reduced, torch.float32), run(reduced, torch.float64)
    assert got.keys() == exact.keys(), f"{what}: {got.keys()}"
    for name, value in exact.items():
        error, plain_error = max_error(got[name], value), max_error(fp32[name], value)
        largest = value.abs().max().item()
        if not name.startswith("gradient"):  # a mean in which larger numbers cancel out
            largest = max(largest, given["logp"].abs().max().item())
        assert error <= 2 * plain_error + EPS * largest, f"{what}: {name}: {error:.3g}, plain {plain_error:.3g}"


def check_dpo() -> None:
    """Odd sizes, an empty response, an empty pair, a policy at the reference and margins of +-2000 nats."""
    tokens = torch.tensor([7, 33, 0, 5, 0, 0, 16, 17, 40, 3, 3, 40])
    seg = Segments.build(tokens=tokens, groups=[2] * 6, score=[1.0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0])
    logp, ref_logp = -normal(0, int(tokens.sum())).abs(), -normal(1, int(tokens.sum())).abs()
    at = tokens.cumsum(0)
    ref_logp[at[5] : at[7]] = logp[at[5] : at[7]]
    logp[at[7] : at[8]] -= 50.0
    logp[at[10] :] -= 50.0
    for ref, beta, eps in ((None, 1.0, 0.0), (ref_logp, 0.1, 0.1)):
        options = {"beta": beta, "label_smoothing": eps}
        kernel, plain = (functools.partial(f, **options) for f in (loss_kernel.pairs, losses.dpo))
        compare(kernel, plain, 6, {"logp": logp, "ref_logp": ref}, seg, f"dpo {options}")


def check_rrpo() -> None:
    tokens = torch.tensor([9, 35, 0, 5, 0, 0, 16, 1])
    seg = Segments.build(tokens=tokens, groups=[2] * 4, score=[1.0, 0, 1, 0, 0, 0, 1, 0])
    n = int(tokens.sum())
    seg = replace(seg, weight=torch.arange(n) % 3 == 1)
    given = {"logp": normal(0, n), "ref_logp": normal(1, n), "kl": normal(2, n).abs() * seg.better}
    options = {"beta": 0.3, "alpha": 0.02}
    kernel, plain = (functools.partial(f, **options) for f in (loss_kernel.pairs, losses.rrpo))
    compare(kernel, plain, 4, given, seg, "rrpo")


def check_perpo() -> None:
    """A list of 5 with a tie, gaps of 1e-9 and 1e3 and an empty response; one of equal scores."""
    scores = torch.tensor([1.0, 1 + 1e-9, 2.0, 1e3, 2.0] + [0.5] * 5, dtype=torch.float64)
    tokens = torch.tensor([3, 17, 1, 0, 5, 2, 2, 2, 2, 2])
    n = int(tokens.sum())
    given = {"logp": normal(0, n), "ref_logp": normal(1, n)}
    for gamma, mean in ((0.5, False), (0.0, True), (2.0, False)):
        seg = Segments.build(tokens=tokens, groups=[5, 5], score=scores)
        options = {"beta": 0.2, "gamma": gamma, "length_normalized": mean}
        kernel, plain = (functools.partial(f, **options) for f in (loss_kernel.pairs, losses.perpo))
        compare(kernel, plain, 2, given, seg, f"perpo {options}")


def check_grpo() -> None:
    """Ratios on both sides of the clip, advantages of both signs and 0, an empty response."""
    tokens = torch.tensor([17, 0, 70, 1])
    n = int(tokens.sum())
    seg = Segments.build(tokens=tokens, groups=[1] * 4, score=torch.zeros(4))
    logp, old, ref = normal(0, n), normal(0, n) + normal(1, n, scale=0.4), normal(0, n) + normal(2, n, scale=0.2)
    old[:9] = logp[:9]
    logp[-1], ref[-1] = -60.0, -1.0  # k3 of e^59
    given = {"logp": logp, "advantage": torch.tensor([1.5, 1.0, -0.7, 0.0])}
    cases = [  # loss_type, old_logp, ref_logp, beta, kl_ratio
        *itertools.product(("grpo", "gspo"), (old,), (ref,), (0.04,), (True, False)),
        ("grpo", None, ref, 0.04, True),
        ("dr_grpo", old, None, 0.0, False),
        ("gspo", None, None, 0.0, False),
        ("dapo", old, ref, 0.0, False),
    ]
    for at, (kind, old_logp, ref_logp, beta, kl_ratio) in enumerate(cases):
        options = {"loss_type": kind, "beta": beta, "epsilon_high": 0.28, "kl_ratio": kl_ratio}
        options |= {"max_completion_length": 35}
        kernel, plain = (functools.partial(f, **options) for f in (loss_kernel.grpo, losses.grpo))
        x = given | {"old_logp": old_logp, "ref_logp": ref_logp}
        if ref_logp is not None and at != 2:  # without the token that drowns all others
            x |= {"ref_logp": torch.cat([ref[:-1], logp[-1:]])}
        what = f"{options} old={old_logp is not None} ref={ref_logp is not None}"
        compare(kernel, plain, 0, x, seg, what)


def check_fused() -> None:
    """The same from fused_* with plain losses, through backend "triton"."""
    rows, length, size, vocabulary = 4, 6, 11, 37
    hidden, ref_hidden = normal(0, rows, length, size), normal(1, rows, length, size)
    weight = normal(2, vocabulary, size, scale=0.4)
    labels = torch.arange(rows * length).reshape(rows, length)
    labels[:, :2] = labels[3] = -100
    pair = {"ref_hidden": ref_hidden, "beta": 0.5}
    per_token = {"old_logp": -normal(3, rows, length - 1).abs(), "ref_logp": -normal(4, rows, length - 1).abs()}
    advantages = torch.tensor([1.0, -1, 0.5, 2])
    for name, fused in {
        "dpo": functools.partial(fused_dpo, label_smoothing=0.1, **pair),
        "rrpo": functools.partial(fused_rrpo, phrase_mask=labels % 2, alpha=0.1, **pair),
        "perpo": functools.partial(fused_perpo, scores=torch.tensor([[0.1, 0.9], [1, 0]]), gamma=1.0, **pair),
        "grpo": functools.partial(fused_grpo, advantages=advantages, beta=0.1, loss_type="gspo", **per_token),
    }.items():
        made = {}
        for backend in ("triton", "chunked"):
            leaf = hidden.clone().requires_grad_()
            loss, metrics = fused(leaf, weight, labels, backend=backend)
            loss.backward()
            made[backend] = {"loss": loss.detach(), "d hidden": leaf.grad, **metrics}
        torch.testing.assert_close(made["triton"], made["chunked"], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: n + m)


def check_nothing() -> None:
    """No token and no prompt at all."""
    none = torch.zeros(0, requires_grad=True)
    for groups in ([2], []):
        seg = Segments.build(tokens=[0, 0] * len(groups), groups=groups, score=[0.0, 0.0] * len(groups))
        loss, metrics = loss_kernel.pairs(none, None, seg)
        (grad,) = torch.autograd.grad(loss, none)
        assert loss == 0 and grad.shape == (0,) and not any(x != 0 for x in metrics.values())
        loss, metrics = loss_kernel.grpo(none, None, None, torch.ones(len(seg.tokens)), seg)
        assert loss == 0 and not any(x != 0 for x in metrics.values())


def check_errors() -> None:
    one, seg = torch.zeros(2), Segments.build(tokens=[1, 1], groups=[2], score=[1.0, 0.0])
    many = Segments.build(tokens=[0] * 33, groups=[33], score=torch.arange(33.0))
    for call, message in (
        (lambda: loss_kernel.pairs(one, None, seg, beta=0.0), "beta must be positive"),
        (lambda: loss_kernel.pairs(one, None, seg, gamma=-1.0), "gamma must not be negative"),
        (lambda: loss_kernel.pairs(one, None, seg, alpha=-1.0), "alpha must not be negative"),
        (lambda: loss_kernel.pairs(one, None, seg, label_smoothing=0.6), "label_smoothing must lie"),
        (lambda: loss_kernel.pairs(one[:0], None, many), "at most 32 responses"),
        (lambda: loss_kernel.grpo(one, None, None, one, seg, beta=0.1), "needs ref_logp"),
        (lambda: loss_kernel.grpo(one, None, None, one, seg, loss_type="ppo"), "loss_type must be"),
    ):
        try:
            call()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error where {message}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # the attribute of that name is the function
    sys.modules["fastpo_kernels.token_stats"].RUNS["triton"] = lambda hidden: True
    launch.BLOCK = 64  # several blocks, the last of which is not full
    for name in sys.argv[1:] or [name for name in globals() if name.startswith("check_")]:
        globals()[name]()
        print(name, flush=True)
