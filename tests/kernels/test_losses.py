import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastpo_kernels import Segments, losses, token_stats
from fastpo_kernels.testing import max_error

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = {family: json.loads((GOLDEN / family / "index.json").read_text()) for family in ("rrpo", "dpo")}
TENSORS = {family: load_file(GOLDEN / family / f"{family}.safetensors") for family in INDEX}
CASES = {(family, case["id"]): case for family in INDEX for case in INDEX[family]["cases"]}
NOT_FINITE_THERE = ("ref_underflow_nan", "multi_phrase_bf16")  # NaN; rounded at every step
EXACT = [key for key, case in CASES.items() if case["quirk"] is None]
QUIRKS = {  # what is asserted about each, or why nothing is; tests/golden/README.md says the same in words
    "sign_on_ignored_label": "equal with the unlabelled signed positions as rows of target 0, weight 1, without KL",
    "no_unsigned_token": "equal with variant released: their first phrase is dropped for want of an unsigned token",
    "prompt_specials_labelled": "equal: whatever the caller labels is supervised",
    "multi_phrase_bf16": "the float64 value of the same numbers, not their bf16 rounding",
    "videochat2_difflib": "equal, given their signs",
    "ref_underflow_nan": "finite, where theirs is NaN",
    "perpo_norm_n4": "equal: perpo with length_normalized, in test_losses_perpo.py",
    "perpo_old_n4": "equal: perpo, in test_losses_perpo.py",
}


def tensors(key):
    family, case = key
    return {k.removeprefix(f"{case}/"): v for k, v in TENSORS[family].items() if k.startswith(f"{case}/")}


def flat_rows(key, extra=None, numbered=False):
    """Supervised positions, prompt-major: row and position of each, the target, the mask M and the segments.

    extra: positions [rows, T - 1] to add without a label, as target 0. numbered: the numbers of the phrases for M.
    """
    case, t = CASES[key], tensors(key)
    labels = (t["targets"] if "targets" in t else t["labels"])[:, 1:]
    signs = t["signs"][:, 1:].clamp(min=0) if "signs" in t else torch.ones_like(labels)
    kept = labels != -100 if extra is None else (labels != -100) | extra
    prompts = case["B"]
    candidates = len(labels) // prompts
    rows = [i * prompts + b for b in range(prompts) for i in range(candidates)]
    positions = [kept[row].nonzero()[:, 0] for row in rows]
    at = torch.cat([torch.full_like(p, row) for row, p in zip(rows, positions, strict=True)]), torch.cat(positions)
    score = t["rewards"].flatten() if "rewards" in t else torch.arange(candidates, 0, -1).repeat(prompts)
    seg = Segments.build(
        tokens=[len(p) for p in positions],
        groups=[candidates] * prompts,
        score=score,
        weight=signs[at].to(t["policy_logits"].dtype) if numbered else (signs[at] != 0).to(t["policy_logits"].dtype),
        pairs="best_worst" if case.get("variant") == "dpo_list" else "all",
    )
    return at, labels[at].clamp(min=0), labels[at] != -100, seg


def head(key, dtype, on_logits=False):
    """hidden, weight and their reference twins; on_logits: the logits themselves under the unit matrix."""
    t = tensors(key)
    if on_logits or "hidden" not in t:
        unit = torch.eye(t["policy_logits"].shape[-1], dtype=dtype)
        return t["policy_logits"].to(dtype), unit, t["ref_logits"].to(dtype), unit
    return tuple(t[name].to(dtype) for name in ("hidden", "weight", "ref_hidden", "ref_weight"))


def run(key, dtype, backend, *, train_head=True, on_logits=False, extra=None, variant="paper"):
    """Loss, losses, d hidden [rows, T, H] and d weight of a golden case through token_stats."""
    case, (at, target, labelled, seg) = CASES[key], flat_rows(key, extra, numbered=variant == "released")
    hidden, weight, ref_hidden, ref_weight = head(key, dtype, on_logits)
    hidden, weight = hidden.detach().requires_grad_(), weight.clone().requires_grad_(train_head)
    rrpo = key[0] == "rrpo" or case["variant"] == "rrpo_degenerate"
    stats = token_stats(
        hidden[:, :-1][at],
        weight,
        target,
        ref_hidden=ref_hidden[:, :-1][at],
        ref_weight=ref_weight,
        kl_rows=seg.better & labelled if rrpo else None,
        backend=backend,
    )
    assert stats.logp.dtype == dtype
    if rrpo:
        hyper = {"beta": case["hyper"]["beta"], "alpha": case["hyper"].get("alpha", 0.0), "variant": variant}
        out = losses.rrpo(stats.logp, stats.ref_logp, stats.kl, seg, **hyper)
    else:
        out = losses.dpo(stats.logp, stats.ref_logp, seg, beta=case["hyper"]["beta"])
    per_prompt = out.losses.reshape(case["B"], -1).mean(1)  # LiPO: all pairs of a list
    per_prompt.mean().backward()
    return per_prompt.mean().detach(), per_prompt.detach(), hidden.grad, weight.grad, out


def assert_close(got, want, tolerance, what):
    bound = tolerance * max(1.0, want.abs().max().item())
    assert max_error(got, want) <= bound, f"{what}: off by {max_error(got, want):.3g}"


def assert_golden(key, got, tolerance, on_logits=False):
    t = tensors(key)
    loss, per_sample, d_hidden, d_weight, out = got
    assert_close(loss, t["loss"], tolerance, "loss")
    assert_close(per_sample, t["losses"], tolerance, "losses")
    assert_close(d_hidden, t["grad_policy_logits" if on_logits else "grad_hidden"], tolerance, "d hidden")
    if d_weight is not None and not on_logits:
        assert_close(d_weight, t["grad_weight"], tolerance, "d weight")
    for metric, name in (("chosen_reward", "chosen_rewards"), ("rejected_reward", "rejected_rewards")):
        if name in t and len(out.losses) == len(t[name]):
            assert_close(out.metrics[metric], t[name], tolerance, metric)
    if "kl" in t:
        assert_close(out.metrics["kl"], t["kl"][: len(out.losses)], tolerance, "kl")


@pytest.mark.parametrize("key", EXACT, ids="/".join)
def test_golden_float64(key):
    tolerance = INDEX[key[0]]["tolerance"][CASES[key]["dtype"]]
    assert_golden(key, run(key, torch.float64, "reference"), tolerance)
    assert_golden(key, run(key, torch.float64, "reference", on_logits=True), tolerance, on_logits=True)
    assert_golden(key, run(key, torch.float64, "chunked"), tolerance)
    assert_golden(key, run(key, torch.float64, "chunked", train_head=False), tolerance)


@pytest.mark.parametrize("backend, train_head", [("reference", True), ("chunked", True), ("chunked", False)])
@pytest.mark.parametrize("key", EXACT, ids="/".join)
def test_golden_float32(key, backend, train_head):
    assert_golden(key, run(key, torch.float32, backend, train_head=train_head), 1e-5)


def test_every_quirk_case_is_accounted_for():
    assert {case for (_, case), c in CASES.items() if c["quirk"] is not None} <= set(QUIRKS)


@pytest.mark.parametrize("case", ["prompt_specials_labelled", "videochat2_difflib"])
def test_quirks_that_are_the_caller_s_masks_hold(case):
    for backend in ("reference", "chunked"):
        assert_golden(("rrpo", case), run(("rrpo", case), torch.float64, backend), 1e-9)


def test_quirk_sign_on_ignored_label_holds_with_explicit_rows():
    key = ("rrpo", "sign_on_ignored_label")
    t = tensors(key)
    extra = (t["signs"][:, 1:] > 0) & (t["targets"][:, 1:] == -100)
    assert extra.any()
    assert_golden(key, run(key, torch.float64, "reference", extra=extra), 1e-9)
    without = run(key, torch.float64, "reference")
    assert abs(without[0] - t["loss"]) > 1e-3  # supervised rows alone are something else


@pytest.mark.parametrize("case", [case for family, case in CASES if family == "rrpo" and case not in NOT_FINITE_THERE])
def test_rrpo_as_released(case):
    key = ("rrpo", case)
    t = tensors(key)
    unlabelled = t["targets"][:, 1:] == -100  # all positions, so that unsigned ones stand for themselves
    got = run(key, torch.float64, "reference", variant="released", extra=unlabelled)
    assert_golden(key, got, 1e-9)
    dropped = abs(run(key, torch.float64, "reference")[0] - t["loss"]) > 1e-3
    assert dropped == (case in ("no_unsigned_token", "sign_on_ignored_label"))


def test_quirk_reference_underflow_is_finite_here():
    key = ("rrpo", "ref_underflow_nan")
    assert tensors(key)["loss"].isnan()
    for backend in ("reference", "chunked"):
        loss, _, d_hidden, _, _ = run(key, torch.float32, backend)
        assert abs(loss.item() - 0.82624) < 1e-5 and d_hidden.isfinite().all()


def test_quirk_bf16_case_is_their_loss_without_the_rounding():
    key = ("rrpo", "multi_phrase_bf16")
    exact = run(key, torch.float64, "reference")
    for backend in ("reference", "chunked"):
        loss, _, d_hidden, d_weight, _ = run(key, torch.float32, backend)
        assert abs(loss - exact[0]) < 1e-5
        assert_close(d_hidden, exact[2], 1e-5, "d hidden")
        assert_close(d_weight, exact[3], 1e-5, "d weight")
    assert abs(exact[0] - tensors(key)["loss"]) < 1e-2


def test_dpo_is_rrpo_over_the_whole_response_without_kl():
    key = ("dpo", "rrpo_whole_response_beta05")
    at, target, _, seg = flat_rows(key)
    hidden, weight, ref_hidden, ref_weight = head(key, torch.float64)
    stats = token_stats(hidden[:, :-1][at], weight, target, ref_hidden=ref_hidden[:, :-1][at], ref_weight=ref_weight)
    got = losses.dpo(stats.logp, stats.ref_logp, seg, beta=0.5).losses
    assert_close(got, tensors(key)["losses"], 1e-9, "losses")


# two prompts: responses of 3, 0 and 2 tokens with scores 0.5, 1, 0; then 1 and 4 tokens with scores 0, 2
def ragged(weight=None, **score):
    return Segments.build(
        tokens=[3, 0, 2, 1, 4], groups=[3, 2], score=score.get("score", [0.5, 1.0, 0.0, 0.0, 2.0]), weight=weight
    )


def numbers(seed=0):
    torch.manual_seed(seed)
    return torch.randn(10, dtype=torch.float64), torch.randn(10, dtype=torch.float64), torch.rand(10).double()


def test_dpo_and_rrpo_from_the_formula():
    logp, ref_logp, kl = numbers()
    weight = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.float64)
    seg = ragged(weight)
    bounds = [(0, 3), (3, 3), (3, 5), (5, 6), (6, 10)]
    pairs = [(1, 0), (0, 2), (1, 2), (4, 3)]
    assert seg.pairs.T.tolist() == [list(pair) for pair in pairs]
    d = (logp - ref_logp).tolist()
    log_ratio = [sum(d[a:b]) for a, b in bounds]
    phrases = [sum(x * m for x, m in zip(d[a:b], weight[a:b].tolist(), strict=True)) for a, b in bounds]
    out = losses.dpo(logp, ref_logp, seg, beta=0.3)
    for got, (i, j) in zip(out.losses.tolist(), pairs, strict=True):
        assert got == pytest.approx(math.log1p(math.exp(-0.3 * (log_ratio[i] - log_ratio[j]))), rel=1e-12)
    out = losses.rrpo(logp, ref_logp, kl, seg, beta=0.3, alpha=0.7)
    for got, (i, j) in zip(out.losses.tolist(), pairs, strict=True):
        rank = math.log1p(math.exp(-0.3 * (phrases[i] - phrases[j])))
        assert got == pytest.approx(rank + 0.7 * sum(kl[slice(*bounds[i])].tolist()), rel=1e-12)
    assert out.unit == "pair" and out.metrics["kl"][1].item() == pytest.approx(kl[:3].sum().item())


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_label_smoothing_is_cross_entropy_with_soft_labels(eps):
    logp, ref_logp, _ = numbers()
    out = losses.dpo(logp, ref_logp, ragged(), beta=0.3, label_smoothing=eps)
    u = out.metrics["margin"]
    want = F.binary_cross_entropy_with_logits(u, torch.full_like(u, 1 - eps), reduction="none")
    torch.testing.assert_close(out.losses, want, rtol=1e-12, atol=0)


def test_dpo_without_a_reference_counts_it_as_zero():
    logp, _, _ = numbers()
    got, want = (losses.dpo(logp, ref, ragged()).losses for ref in (None, torch.zeros_like(logp)))
    assert got.equal(want)


def test_metrics_are_detached_and_a_tie_is_half_right():
    logp = torch.tensor([1.0, 0.0, 1.0, 3.0, 2.0], requires_grad=True)
    seg = Segments.build(tokens=[1, 1, 1, 1, 1], groups=[2, 1, 2], score=[1.0, 0.0, 1.0, 0.0, 1.0])
    out = losses.dpo(logp, torch.ones(5), seg, beta=0.5)
    assert out.metrics["accuracy"].tolist() == [1.0, 0.0]
    assert out.metrics["margin"].tolist() == [0.5, -0.5]
    assert not any(m.requires_grad for m in out.metrics.values()) and out.losses.requires_grad
    same = losses.dpo(logp, logp.detach(), seg)
    assert same.metrics["accuracy"].tolist() == [0.5, 0.5]
    assert same.losses.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("u", [-1e4, 1e4])
def test_losses_and_gradients_are_finite_in_fp32_at_any_margin(u):
    logp = torch.tensor([u, 0.0], requires_grad=True)
    seg = Segments.build(tokens=[1, 1], groups=[2], score=[1.0, 0.0], weight=torch.ones(2))
    for out in (
        losses.dpo(logp, None, seg, beta=1.0, label_smoothing=0.1),
        losses.rrpo(logp, torch.zeros(2), torch.zeros(2), seg, beta=1.0),
    ):
        out.losses.sum().backward()
        assert out.losses.isfinite().all() and logp.grad.isfinite().all()


def test_a_batch_without_pairs_has_no_units_and_a_zero_gradient():
    logp = torch.randn(3, requires_grad=True)
    seg = Segments.build(tokens=[2, 1], groups=[2], score=[1.0, 1.0], weight=torch.ones(3))
    for out in (losses.dpo(logp, None, seg), losses.rrpo(logp, torch.zeros(3), torch.zeros(3), seg)):
        assert out.losses.shape == (0,)
        out.losses.sum().backward()
        assert logp.grad.tolist() == [0.0] * 3


def test_sft_takes_the_best_responses_of_each_prompt():
    logp = -torch.arange(10.0)
    out = losses.sft(logp, ragged())
    assert (out.unit, out.losses.tolist(), out.metrics) == ("token", [6.0, 7.0, 8.0, 9.0], {})  # the best of 3 is empty
    tied = losses.sft(logp, ragged(score=torch.tensor([1, 0, 1, 5, 5])))
    assert tied.losses.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def test_needs_reads_the_signature():
    assert {name: losses.needs(loss) for name, loss in losses.LOSSES.items()} == {
        "dpo": {"logp", "ref_logp"},
        "plackett_luce": {"logp", "ref_logp"},
        "rrpo": {"logp", "ref_logp", "kl"},
        "perpo": {"logp", "ref_logp"},
        "spo": {"logp", "ref_logp"},
        "sft": {"logp"},
        "reward_pair": {"reward"},
        "reward_list": {"reward"},
        "grpo": {"logp", "ref_logp", "old_logp", "advantage"},
        "ppo": {"logp", "ref_logp", "value", "old_logp", "advantage", "old_value", "returns"},
    }
    assert losses.needs(losses.grpo) == {"logp", "ref_logp", "old_logp", "advantage"}
    assert losses.needs(losses.value_loss) == {"value", "old_value", "returns"}

    def mistaken(logp, prize, seg, *, beta=0.1): ...

    with pytest.raises(ValueError, match="'mistaken' asks for prize"):
        losses.needs(mistaken)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, seg: losses.dpo(x, x, seg, beta=0.0), "beta must be positive"),
        (lambda x, seg: losses.dpo(x, x, seg, label_smoothing=0.6), "label_smoothing must lie in"),
        (lambda x, seg: losses.rrpo(x, x, x, seg), "phrase mask"),
        (lambda x, seg: losses.rrpo(x, x, x, seg, beta=math.nan), "beta must be positive"),
        (lambda x, seg: losses.rrpo(x, x, x, seg, alpha=-0.1), "alpha must not be negative"),
    ],
)
def test_refuses_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(10), ragged())
