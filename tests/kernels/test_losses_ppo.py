"""PPO's parts against Vision-LLM-Alignment's, and against their definitions in plain Python."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpo_kernels import Segments, losses
from fastpo_kernels.testing import max_error

GOLDEN = Path(__file__).parents[1] / "golden/ppo"
CASES = {case["id"]: case for case in json.loads((GOLDEN / "index.json").read_text())["cases"]}
TENSORS = load_file(GOLDEN / "ppo.safetensors")
TOKENS = [3, 0, 4, 1]


def segments(tokens=TOKENS):
    return Segments.build(tokens=tokens, groups=[1] * len(tokens), score=torch.zeros(len(tokens)))


def tensors(case, dtype):
    found = {k.removeprefix(f"{case}/"): v for k, v in TENSORS.items() if k.startswith(f"{case}/")}
    leaves = ("hidden", "lm_head", "critic_hidden", "v_head")
    floats = {k: v.to(dtype, copy=True) for k, v in found.items() if v.is_floating_point()}
    return found | floats | {k: floats[k].requires_grad_() for k in leaves}


def logp_at(t, model, at):
    logits = t[f"{model}hidden"][:, :-1][at] @ t[f"{model}lm_head"].T
    return logits.log_softmax(-1).gather(1, t["input_ids"][:, 1:][at][:, None])[:, 0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden(case, dtype, tolerance):
    t, c = tensors(case, dtype), CASES[case]
    start, width = c["start"], t["action_mask"].shape[1]
    reach = t["ends"].clamp(max=width) - start  # columns up to the reward: one more than actions, padded on the right
    row = torch.repeat_interleave(torch.arange(c["B"]), reach)
    column = torch.cat([torch.arange(start, start + n) for n in reach.tolist()])
    seg = segments(reach)
    score = t["raw_reward"].to(dtype)
    if c["standardised"]:
        score, _ = losses.standardise(score, t["reward_queue0"].to(dtype), scale=10.0)
    assert max_error(score, t["reward_scores"]) <= tolerance

    at = row, column
    with torch.no_grad():
        old_logp, ref_logp = logp_at(t, "old_", at), logp_at(t, "ref_", at)
        old_value = (t["old_critic_hidden"] @ t["v_head"][0])[:, :-1][at]
    assert max_error(old_value, t["old_values"][at]) <= tolerance
    reward = losses.shaped_reward(old_logp, ref_logp, score, seg, beta=c["kl_ctl"], clip=c["clip_reward"])
    assert max_error(reward, t["kl_rewards"][at]) <= tolerance
    advantage, returns = losses.gae(reward, old_value, seg, gamma=c["gamma"], lam=c["lam"])
    behind = row, column - start
    assert max_error(advantage, t["advantages"][behind]) <= tolerance
    assert max_error(returns, t["returns"][behind]) <= tolerance

    # trained is their mask: not the column behind an action, but columns behind the reward, where what they keep is 0
    at = t["action_mask"][:, start:].nonzero(as_tuple=True)
    advantage, returns, old_value = (
        torch.zeros(c["B"], width - start, dtype=dtype).index_put(behind, x)[at]
        for x in (advantage, returns, old_value)
    )
    seg = segments(torch.bincount(at[0], minlength=c["B"]))
    at = at[0], at[1] + start
    value = (t["critic_hidden"] @ t["v_head"][0])[:, :-1][at]
    with torch.no_grad():
        old_logp = logp_at(t, "old_", at)
    logp = logp_at(t, "", at)
    actor = losses.ppo(logp, None, old_logp, advantage, seg, clip=c["cliprange"]).losses.mean()
    critic = losses.value_loss(value, old_value, returns, seg, clip=c["cliprange_value"]).losses.mean()
    (actor + critic).backward()
    for got, name in ((actor, "expected_actor_loss"), (critic, "expected_critic_loss")):
        assert max_error(got.detach(), t[name][0]) <= tolerance * max(1.0, t[name].abs().item()), name
    for name in ("hidden", "lm_head", "critic_hidden", "v_head"):
        want = t[f"grad_{name}"]
        assert max_error(t[name].grad, want) <= tolerance * max(1.0, want.abs().max().item()), name


def numbers(spread=0.4):
    torch.manual_seed(3)
    logp = torch.randn(8, dtype=torch.float64)
    ref_logp, old_logp = (logp + spread * torch.randn(8, dtype=torch.float64) for _ in range(2))
    return logp, ref_logp, old_logp, torch.randn(8, dtype=torch.float64)


def test_ppo_is_dapo_with_an_advantage_for_each_token():
    logp, ref_logp, old_logp, _ = numbers()
    per_response = torch.tensor([1.5, 2.0, -0.5, 0.3], dtype=torch.float64)
    seg = segments()
    got = losses.ppo(logp, ref_logp, old_logp, per_response[seg.owner], seg, clip=0.1, beta=0.3)
    want = losses.grpo(
        logp, ref_logp, old_logp, per_response, seg, epsilon_low=0.1, epsilon_high=0.1, beta=0.3, loss_type="dapo"
    )
    assert got.unit == want.unit and got.losses.equal(want.losses)
    assert all(got.metrics[name].equal(want.metrics[name]) for name in want.metrics)


def test_gradients_by_finite_differences():
    logp, ref_logp, old_logp, advantage = numbers()
    seg = segments()
    assert torch.autograd.gradcheck(
        lambda x: losses.ppo(x, ref_logp, old_logp, advantage, seg, beta=0.3).losses, logp.requires_grad_()
    )
    value = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for clip in (0.3, None):
        assert torch.autograd.gradcheck(
            lambda x, clip=clip: losses.value_loss(x, old_logp, advantage, seg, clip=clip).losses, value
        )


def test_gae_is_the_sum_in_its_docstring():
    reward, value, gamma, lam = *(x.tolist() for x in numbers()[:2]), 0.9, 0.7
    got, returns = losses.gae(
        torch.tensor(reward).double(), torch.tensor(value).double(), segments(), gamma=gamma, lam=lam
    )
    want, first = [], 0
    for n in TOKENS:
        r, v = reward[first : first + n], [*value[first : first + n], 0.0]
        d = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        want += [sum((gamma * lam) ** i * d[t + i] for i in range(n - t)) for t in range(n)]
        first += n
    assert got.tolist() == pytest.approx(want, abs=1e-7)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(want, value, strict=True)], abs=1e-7)
    empty = torch.zeros(0)
    assert losses.gae(empty, empty, segments([0]))[0].shape == (0,)


def test_rewards_are_clipped_before_they_meet_the_kl():
    _, ref_logp, old_logp, _ = numbers()
    got = losses.shaped_reward(old_logp, ref_logp, torch.tensor([9.0, 5.0, -9.0, 1.0]), segments(), beta=0.5, clip=2.0)
    want = (-0.5 * (old_logp - ref_logp)).tolist()
    for last, reward in ((2, 2.0), (6, -2.0), (7, 1.0)):  # the response without tokens has nowhere to put its 5
        want[last] += reward
    assert got.tolist() == pytest.approx(want)


def test_standardise_and_whiten():
    first, recent = losses.standardise(torch.tensor([2.0]), torch.zeros(0))
    assert first.tolist() == [0.0]  # one reward has no spread
    got, recent = losses.standardise(torch.tensor([4.0, 9.0]), recent, scale=10.0)
    mean, std = statistics.fmean([2, 4, 9]), statistics.stdev([2, 4, 9])
    assert got.tolist() == pytest.approx([10 * (4 - mean) / std, 10 * (9 - mean) / std])
    assert recent.tolist() == [2.0, 4.0, 9.0]
    _, recent = losses.standardise(torch.tensor([5.0]), recent, size=3)
    assert recent.tolist() == [4.0, 9.0, 5.0]
    x = torch.tensor([1.0, 2.0, 5.0, 6.5])
    white = losses.whiten(x)
    assert white.tolist() == pytest.approx([(v - 3.625) / statistics.stdev(x.tolist()) for v in x.tolist()])
    assert losses.whiten(x, shift_mean=False).tolist() == pytest.approx((white + 3.625).tolist())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, seg: losses.ppo(x, None, x, x, seg, beta=0.1), "needs ref_logp"),
        (lambda x, seg: losses.ppo(x, None, x, x, seg, clip=-0.1), "clip must not be negative"),
        (lambda x, seg: losses.value_loss(x, x, x, seg, clip=math.nan), "clip must not be negative"),
        (lambda x, seg: losses.shaped_reward(x, x, x[:4], seg, beta=-1.0), "beta must not be negative"),
        (lambda x, seg: losses.gae(x, x, seg, gamma=1.1), "gamma must lie in"),
        (lambda x, seg: losses.standardise(x / 0, x), "must be finite"),
    ],
)
def test_refuses_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(8), segments())


def test_actor_critic_is_the_sum_of_its_two_losses():
    seg = Segments.build(tokens=[2, 3], groups=[2], score=[0.0, 1.0])
    draw = torch.Generator().manual_seed(8)
    names = ("logp", "ref_logp", "value", "old_logp", "advantage", "old_value", "returns")
    x = {name: torch.randn(5, generator=draw, dtype=torch.float64) for name in names}
    out = losses.actor_critic(**x, seg=seg, clip=0.1, beta=0.3, value_clip=0.4, value_weight=0.7)
    actor = losses.ppo(*(x[n] for n in ("logp", "ref_logp", "old_logp", "advantage")), seg, clip=0.1, beta=0.3)
    critic = losses.value_loss(*(x[n] for n in ("value", "old_value", "returns")), seg, clip=0.4)
    assert torch.equal(out.losses, actor.losses + 0.7 * critic.losses) and out.unit == "token"
    assert set(out.metrics) == {"clip_low", "clip_high", "kl", "value_clip", "value_loss"}
    with pytest.raises(ValueError, match="value_weight"):
        losses.actor_critic(**x, seg=seg, value_weight=-1)
