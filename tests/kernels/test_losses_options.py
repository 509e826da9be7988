"""What the paper variants mean where no golden case shows it: options of dpo, rankings, SPO. Against plain Python."""

import itertools
import math
from functools import partial

import pytest
import torch

from fastpo_kernels import Segments, losses

TOKENS, GROUPS, SCORE = [3, 1, 2, 1, 4], [3, 2], [0.5, 1.0, 0.0, 0.0, 2.0]
BOUNDS = [(0, 3), (3, 4), (4, 6), (6, 7), (7, 11)]
PAIRS = [(1, 0), (0, 2), (1, 2), (4, 3)]


def ragged(score=SCORE):
    return Segments.build(tokens=TOKENS, groups=GROUPS, score=score)


def numbers(seed=0):
    torch.manual_seed(seed)
    logp = torch.randn(11, dtype=torch.float64) - 1
    return logp, logp + 0.5 * torch.randn(11, dtype=torch.float64)


def sums(x, mean=False):
    return [sum(x[a:b].tolist()) / (b - a if mean else 1) for a, b in BOUNDS]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pair(kind, better, worse, beta, batch=()):
    """The loss of one pair of log-ratios; batch: all (better, worse) of the micro-batch, for kto_pair."""
    z = better - worse
    if kind == "hinge":
        return max(0.0, 1 - beta * z)
    if kind == "ipo":
        return (z - 1 / (2 * beta)) ** 2
    if kind == "kto_pair":
        kl_better, kl_worse = (max(0.0, sum(x) / len(x)) for x in zip(*batch, strict=True))
        return (1 - sigmoid(beta * (better - kl_worse)) + 1 - sigmoid(beta * (kl_better - worse))) / 2
    return -math.log(sigmoid(beta * z))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "kto_pair"])
def test_loss_types(kind, mean):
    logp, ref_logp = numbers()
    s = sums(logp - ref_logp, mean)
    batch = [(s[i], s[j]) for i, j in PAIRS]
    got = losses.dpo(logp, ref_logp, ragged(), beta=0.7, loss_type=kind, length_normalized=mean)
    assert got.losses.tolist() == pytest.approx([pair(kind, *p, 0.7, batch) for p in batch], rel=1e-12)
    assert got.metrics["margin"].tolist() == pytest.approx([0.7 * (a - b) for a, b in batch], rel=1e-9)


def test_terms_beside_the_margin():
    logp, ref_logp = numbers()
    s, plain, likelihood = sums(logp - ref_logp), sums(logp), sums(logp, mean=True)
    assert any(s[i] < 0 for i, _ in PAIRS) and any(s[i] > 0 for i, _ in PAIRS)
    got = losses.dpo(logp, ref_logp, ragged(), beta=0.7, dpop_lambda=3.0, dpo_weight=0.5, sft_weight=0.2)
    want = [0.5 * pair("sigmoid", s[i] - 3 * max(0.0, -s[i]), s[j], 0.7) - 0.2 * likelihood[i] for i, j in PAIRS]
    assert got.losses.tolist() == pytest.approx(want, rel=1e-12)
    free = losses.dpo(logp, ref_logp, ragged(), beta=0.7, dpop_lambda=3.0, reference_free=True)
    want = [pair("sigmoid", plain[i] - 3 * max(0.0, -s[i]), plain[j], 0.7) for i, j in PAIRS]
    assert free.losses.tolist() == pytest.approx(want, rel=1e-12)
    three = ragged([1.0, 0.0, 0.0, 0.0, 2.0])  # 10 better tokens in 3 pairs, which fp32 cannot divide
    released = losses.dpo(logp, ref_logp, three, dpo_weight=0.0, sft_weight=1.0, variant="released")
    assert released.losses.mean().item() == pytest.approx(-(2 * plain[0] + plain[4]) / 10, rel=1e-12)
    smoothed = [
        losses.dpo(logp, ref_logp, ragged(), label_smoothing=0.2, variant=v).losses
        for v in ("paper", "released", "released_spo")
    ]
    assert smoothed[0].equal(smoothed[1])
    torch.testing.assert_close(smoothed[2], 0.8 * losses.dpo(logp, ref_logp, ragged()).losses)


def test_the_kl_of_kto_pair_has_a_gradient_only_as_released():
    ref_logp, logp = numbers()
    found = {}
    for variant in ("paper", "released"):
        x = logp.clone().requires_grad_()
        losses.dpo(x, ref_logp - 2, ragged(), loss_type="kto_pair", variant=variant).losses.sum().backward()
        found[variant] = x.grad
    assert (found["paper"] - found["released"]).abs().max() > 1e-3
    x = logp.clone().requires_grad_()
    seg = Segments.build(tokens=[6, 5], groups=[2], score=[1.0, 0.0])
    losses.dpo(x, ref_logp, seg, beta=0.3, loss_type="kto_pair").losses.sum().backward()
    assert x.grad[0] < 0 < x.grad[-1]


def test_where_the_policy_is_the_reference_dpo_positive_has_half_its_gradient():
    logp = numbers()[0].requires_grad_()
    seg = Segments.build(tokens=[6, 5], groups=[2], score=[1.0, 0.0])
    losses.dpo(logp, logp.detach(), seg, beta=1.0, dpop_lambda=10.0).losses.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-0.5 * (1 + 10 / 2)] * 6 + [0.5] * 5)


def probability(order, u):
    """Plackett-Luce: draw the responses of `order` one after the other, by exp(u)."""
    return math.prod(math.exp(u[i]) / sum(math.exp(u[j]) for j in order[at:]) for at, i in enumerate(order))


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_plackett_luce_is_the_probability_of_the_ranking(eps):
    logp, ref_logp = numbers()
    u = [0.4 * x for x in sums(logp - ref_logp)]
    assert sum(probability(order, u) for order in itertools.permutations(range(3))) == pytest.approx(1.0)
    got = losses.plackett_luce(logp, ref_logp, ragged(), beta=0.4, label_smoothing=eps)
    p = [probability((1, 0, 2), u), probability((4, 3), u)]
    want = [-(1 - eps) * math.log(x) - eps * math.log(1 - x) for x in p]
    assert (got.unit, got.losses.tolist()) == ("prompt", pytest.approx(want, rel=1e-12))
    pairs = losses.dpo(logp, ref_logp, ragged(), beta=0.4, label_smoothing=eps)
    assert got.losses[1].item() == pytest.approx(pairs.losses[3].item())
    assert all(got.metrics[name].equal(pairs.metrics[name]) for name in pairs.metrics)


def test_rankings_leave_ties_out():
    logp, _ = numbers()
    s = sums(logp)
    tied = losses.plackett_luce(logp, None, ragged([1.0, 1.0, 0.0, 3.0, 3.0]), beta=1.0, label_smoothing=0.1)
    alone = losses.plackett_luce(logp, None, ragged([1.0, 1.0, 0.0, 3.0, 3.0]), beta=1.0)
    assert alone.losses.tolist() == pytest.approx([sum(math.log1p(math.exp(s[2] - s[i])) for i in (0, 1)), 0.0])
    assert tied.losses[1] == 0 and tied.losses.isfinite().all()


def test_reward_losses():
    value = torch.tensor([0.3, 1.1, -0.4, 2.0, 0.5], dtype=torch.float64)
    pairs, ranked = losses.reward_pair(value, ragged()), losses.reward_list(value, ragged())
    v = value.tolist()
    assert pairs.losses.tolist() == pytest.approx([math.log1p(math.exp(v[j] - v[i])) for i, j in PAIRS])
    assert ranked.losses.tolist() == pytest.approx([-math.log(probability(o, v)) for o in ((1, 0, 2), (4, 3))])
    assert (pairs.unit, ranked.unit) == ("pair", "prompt")
    assert pairs.metrics["accuracy"].tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_rankings_are_finite_in_fp32_at_any_margin(scale):
    value = (scale * torch.arange(5.0)).requires_grad_()
    out = losses.reward_list(value, ragged())
    out.losses.sum().backward()
    assert out.losses.isfinite().all() and value.grad.isfinite().all()
    logp = (scale * torch.ones(11)).requires_grad_()
    for variant in ("paper", "released"):
        out = losses.plackett_luce(logp, None, ragged(), beta=1.0, label_smoothing=0.1, variant=variant)
        out.losses.sum().backward()
        assert out.losses.isfinite().all() and logp.grad.isfinite().all()


def test_gradients_by_finite_differences():
    logp, ref_logp = numbers()
    logp.requires_grad_()
    for function in (
        partial(losses.dpo, dpop_lambda=3.0, sft_weight=0.2),
        partial(losses.dpo, loss_type="ipo"),
        partial(losses.plackett_luce, label_smoothing=0.2),
        partial(losses.plackett_luce, variant="released"),
    ):
        seg = ragged()
        assert torch.autograd.gradcheck(lambda x, f=function, seg=seg: f(x, ref_logp, seg).losses, logp)
    value = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.reward_list(x, ragged()).losses, value)


SPO_TOKENS = [2, 1, 3, 1, 2, 2, 1, 1, 2, 4, 1, 1]  # two prompts


def structured(weight=None):
    return Segments.build(tokens=SPO_TOKENS, groups=[6, 6], score=torch.zeros(12), weight=weight)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "kto_pair"])
def test_spo_is_four_pairs(kind):
    torch.manual_seed(2)
    logp, ref_logp = torch.randn(2, 21, dtype=torch.float64)
    ends = list(itertools.accumulate(SPO_TOKENS))
    s = [sum((logp - ref_logp)[end - n : end].tolist()) for end, n in zip(ends, SPO_TOKENS, strict=True)]
    dpop = 0.0 if kind == "kto_pair" else 2.0
    options = {"beta": 0.3, "alpha_q": 2.0, "alpha_a": 1.5, "dpop_lambda": dpop, "best_worst": 0.1, "loss_type": kind}
    got = losses.spo(logp, ref_logp, structured(), **options)
    want = [0.0, 0.0]
    for i, j, beta, weight in ((0, 3, 0.15, 1), (1, 2, 0.2, 1), (4, 5, 0.2, 1), (1, 5, 0.4, 0.1)):
        batch = [(s[6 * p + i], s[6 * p + j]) for p in range(2)]
        for p, (better, worse) in enumerate(batch):
            want[p] += weight * pair(kind, better - dpop * max(0.0, -better), worse, beta, batch)
    assert (got.unit, got.losses.tolist()) == ("prompt", pytest.approx(want, rel=1e-9))
    assert got.metrics["question_accuracy"].tolist() == [float(s[0] > s[3]), float(s[6] > s[9])]
    assert got.metrics["margin"].tolist()[:2] == pytest.approx([0.15 * (s[0] - s[3]), 0.15 * (s[6] - s[9])])
    assert got.metrics["accuracy"].shape == (8,)


def test_spo_weight_is_a_label_mask_that_the_released_code_forgets():
    torch.manual_seed(4)
    logp, ref_logp = torch.randn(2, 21, dtype=torch.float64)
    mask = (torch.arange(21) % 3 > 0).double()
    seg = structured(mask)
    paper = losses.spo(logp, ref_logp, seg).losses
    assert paper.tolist() == pytest.approx(losses.spo(logp * mask, ref_logp * mask, structured()).losses.tolist())
    unmasked = losses.spo(logp, ref_logp, structured()).losses
    assert losses.spo(logp, ref_logp, seg, variant="pairfix").losses.equal(unmasked)
    assert (paper - unmasked).abs().min() > 1e-3


def bad(name, **options):
    return lambda x, seg: getattr(losses, name)(x, x, seg, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (bad("dpo", loss_type="kto"), "loss_type must be sigmoid"),
        (bad("dpo", loss_type="ipo", label_smoothing=0.1), "label_smoothing belongs to"),
        (bad("dpo", loss_type="kto_pair", dpop_lambda=1.0), "dpop_lambda must be 0"),
        (bad("dpo", dpop_lambda=-1.0), "dpop_lambda must not be negative"),
        (bad("dpo", sft_weight=math.nan), "sft_weight must not be negative"),
        (bad("dpo", variant="theirs"), "variant must be paper, released or released_spo"),
        (lambda x, seg: losses.dpo(x, None, seg, dpop_lambda=1.0), "needs ref_logp"),
        (bad("plackett_luce", variant="pairfix"), "variant must be paper or released"),
        (bad("plackett_luce", beta=0.0), "beta must be positive"),
        (bad("spo"), "spo needs 6 responses for each prompt, got 5 for 2 prompts"),
        (bad("spo", alpha_a=0.0), "alpha_a must be positive"),
    ],
)
def test_refuses_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(11), ragged())
