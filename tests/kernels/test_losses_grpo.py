"""GRPO and its relatives against golden cases, gradients by finite differences, and the formulas in plain Python."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpo_kernels import Segments, losses
from fastpo_kernels.testing import max_error

GOLDEN = Path(__file__).parents[1] / "golden/grpo"
CASES = {case["id"]: case for case in json.loads((GOLDEN / "index.json").read_text())["cases"]}
TENSORS = load_file(GOLDEN / "grpo.safetensors")
TYPES = ("grpo", "gspo", "dr_grpo", "dapo")
TOKENS = [3, 0, 4, 1]


def segments(tokens=TOKENS):
    return Segments.build(tokens=tokens, groups=[1] * len(tokens), score=torch.zeros(len(tokens)))


def numbers(spread=0.3):
    torch.manual_seed(1)
    logp = torch.randn(8, dtype=torch.float64)
    ref_logp, old_logp = (logp + spread * torch.randn(8, dtype=torch.float64) for _ in range(2))
    return logp, ref_logp, old_logp, torch.tensor([1.5, 2.0, -0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden(case, dtype, tolerance):
    t = {k.removeprefix(f"{case}/"): v for k, v in TENSORS.items() if k.startswith(f"{case}/")}
    mask = t["completion_mask"].bool()
    logp = t["per_token_logps"].to(dtype)[mask].requires_grad_()
    seg = segments(mask.sum(1))
    out = losses.grpo(
        logp, t["ref_per_token_logps"].to(dtype)[mask], None, t["advantages"].to(dtype), seg, beta=CASES[case]["beta"]
    )
    out.losses.mean().backward()
    assert max_error(out.losses.mean(), t["expected_loss"][0]) <= tolerance
    assert max_error(out.metrics["kl"], t["per_token_kl"][mask]) <= tolerance * 10
    # the ratio is 1 everywhere: d loss / d logp = (-A + beta (1 - e^d)) / (tokens of the response) / responses
    d = (t["ref_per_token_logps"] - t["per_token_logps"])[mask]
    owner = seg.owner
    want = (-t["advantages"][owner] + CASES[case]["beta"] * (1 - d.exp())) / seg.tokens[owner] / len(mask)
    assert max_error(logp.grad, want) <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_golden_advantages(case):
    t = {k.removeprefix(f"{case}/"): v for k, v in TENSORS.items() if k.startswith(f"{case}/")}
    reward = t["rewards_per_func"].double().sum(1)
    size = CASES[case]["G"]
    seg = Segments.build(tokens=[1] * len(reward), groups=[size] * (len(reward) // size), score=reward)
    got, signal = losses.advantages(reward, seg)
    assert max_error(got, t["advantages"]) <= 1e-9
    assert signal.tolist() == (t["group_std"][::size] > 0).tolist()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_advantages_formula(kind):
    groups = [[0.1, 0.1, 0.1], [1.0, 0.25], [3.0], [0.5, -1.0, 2.0, 0.5, 0.5]]
    reward = torch.tensor(sum(groups, []))
    seg = Segments.build(tokens=[1] * 11, groups=[3, 2, 1, 5], score=reward)
    got, signal = losses.advantages(reward, seg, kind=kind)
    want = [0.0, 0.0, 0.0]
    for g in groups[1:]:
        centre, n = statistics.fmean(g), len(g)
        for r in g:
            if n == 1:
                want.append(0.0)
            elif kind == "grpo":
                want.append((r - centre) / (statistics.stdev(g) + 1e-4))
            else:
                want.append(r - (centre if kind == "dr_grpo" else (sum(g) - r) / (n - 1)))
    assert got.tolist() == pytest.approx(want, abs=1e-6)
    assert signal.tolist() == [False, True, False, True]


def test_equal_rewards_whose_mean_rounds_have_no_advantage():
    reward = torch.full((7,), 0.7)  # in fp32 their mean is 6e-8 away
    seg = Segments.build(tokens=[1] * 7, groups=[7], score=reward)
    for kind in ("grpo", "dr_grpo", "rloo"):
        got, signal = losses.advantages(reward, seg, kind=kind)
        assert got.tolist() == [0.0] * 7 and signal.tolist() == [False]


def test_advantages_refuse_what_would_become_a_silent_zero():
    seg = Segments.build(tokens=[1, 1], groups=[2], score=[0.0, 0.0])
    with pytest.raises(ValueError, match="must be finite"):
        losses.advantages(torch.tensor([1.0, math.nan]), seg)
    with pytest.raises(ValueError, match="kind must be"):
        losses.advantages(torch.zeros(2), seg, kind="gae")


def formula(logp, ref_logp, old_logp, advantage, *, low, high, beta, kl_ratio, loss_type, length):
    """Losses in plain Python, one response after the other."""
    found, first = [], 0
    for n, a in zip(TOKENS, advantage.tolist(), strict=True):
        p, q, old = (x[first : first + n].tolist() for x in (logp, ref_logp, old_logp))
        first += n
        ratio = [math.exp(x - y) for x, y in zip(p, old, strict=True)]
        if loss_type == "gspo" and n:
            ratio = [math.exp(sum(x - y for x, y in zip(p, old, strict=True)) / n)] * n
        token = [-min(r * a, min(max(r, 1 - low), 1 + high) * a) for r in ratio]
        k3 = [math.exp(y - x) - (y - x) - 1 for x, y in zip(p, q, strict=True)]
        token = [t + beta * k * (r if kl_ratio else 1) for t, k, r in zip(token, k3, ratio, strict=True)]
        if loss_type == "dapo":
            found += token
        else:
            found.append(sum(token) / (length if loss_type == "dr_grpo" else max(1, n)))
    return found


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("beta, kl_ratio", [(0.0, False), (0.4, False), (0.4, True)])
def test_formula(loss_type, beta, kl_ratio):
    given, options = numbers(), {"beta": beta, "kl_ratio": kl_ratio, "loss_type": loss_type}
    got = losses.grpo(*given, segments(), epsilon_low=0.1, epsilon_high=0.25, max_completion_length=9, **options)
    want = formula(*given, low=0.1, high=0.25, length=9, **options)
    assert got.unit == ("token" if loss_type == "dapo" else "response")
    assert got.losses.tolist() == pytest.approx(want, rel=1e-12, abs=1e-15)
    assert got.metrics["kl"].shape == (8,)


@pytest.mark.parametrize("loss_type", TYPES)
def test_gradcheck_away_from_the_edges_of_the_clip(loss_type):
    logp, *rest = numbers()

    def compute(x):
        options = {"beta": 0.4, "kl_ratio": True, "max_completion_length": 9}
        return losses.grpo(x, *rest, segments(), loss_type=loss_type, **options).losses

    assert torch.autograd.gradcheck(compute, logp.requires_grad_())


def test_clipped_tokens_have_no_gradient_and_are_counted():
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    out = losses.grpo(logp, None, torch.zeros(5), advantage, segments([1] * 5), epsilon_low=0.3)
    out.losses.sum().backward()
    assert (logp.grad == 0).tolist() == [True, False, False, True, False]
    assert out.metrics["clip_high"].tolist() == [1, 0, 0, 0, 0]
    assert out.metrics["clip_low"].tolist() == [0, 0, 0, 1, 0]
    assert set(out.metrics) == {"clip_low", "clip_high"}


@pytest.mark.parametrize("loss_type", TYPES)
def test_without_an_old_policy_the_gradient_is_that_of_reinforce(loss_type):
    logp, _, _, advantage = numbers()
    logp.requires_grad_()
    seg = segments()
    out = losses.grpo(logp, None, None, advantage, seg, loss_type=loss_type, max_completion_length=9)
    out.losses.sum().backward()
    divisor = {"dr_grpo": 9, "dapo": 1}.get(loss_type, seg.tokens[seg.owner])
    torch.testing.assert_close(logp.grad, -advantage[seg.owner] / divisor)


def test_kl_near_the_reference_keeps_its_digits_in_fp32():
    logp = torch.zeros(4)
    d = torch.tensor([1e-3, -1e-3, 1e-2, -1e-2])
    kl = losses.grpo(logp, d, None, torch.zeros(4), segments([1] * 4)).metrics["kl"]
    exact = d.double().exp() - 1 - d.double()
    plain = d.exp() - d - 1
    assert ((kl - exact) / exact).abs().max() < 2e-4 < ((plain - exact) / exact).abs().max()


@pytest.mark.parametrize("loss_type", TYPES)
def test_no_tokens(loss_type):
    logp = torch.zeros(0, requires_grad=True)
    out = losses.grpo(
        logp, logp.detach(), None, torch.ones(2), segments([0, 0]), loss_type=loss_type, max_completion_length=9
    )
    out.losses.sum().backward()
    assert out.losses.tolist() == ([] if loss_type == "dapo" else [0.0, 0.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.1}, "needs ref_logp"),
        ({"beta": -0.1}, "must not be negative"),
        ({"epsilon_low": -0.1}, "must not be negative"),
        ({"epsilon_high": math.nan}, "must not be negative"),
        ({"loss_type": "bnpo"}, "loss_type must be"),
        ({"loss_type": "dr_grpo"}, "needs a positive max_completion_length"),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, "needs a positive max_completion_length"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        losses.grpo(torch.zeros(8), None, None, torch.zeros(4), segments(), **options)
