"""PerPO against golden cases and the formula in plain Python."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpo_kernels import Segments, losses
from fastpo_kernels.testing import max_error

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = json.loads((GOLDEN / "perpo/index.json").read_text())
CASES = {("perpo", case["id"]): case for case in INDEX["cases"]} | {
    ("dpo", case["id"]): case
    for case in json.loads((GOLDEN / "dpo/index.json").read_text())["cases"]
    if case["variant"].startswith("perpo")
}
TENSORS = {family: load_file(GOLDEN / family / f"{family}.safetensors") for family in ("perpo", "dpo")}
QUIRKS = {  # tests/golden/README.md says the same in words
    "n3_ties_gamma0": "equal as released; in the paper variant equal scores never make a pair",
    "n4_unsorted": "equal as released; in the paper variant the higher score is preferred, not the lower index",
    "n3_of_6_scores": "equal as released, with the three unused candidates as responses without tokens",
}
EXACT = [key for key, case in CASES.items() if key[1] not in QUIRKS and case["dtype"] != "bfloat16"]


def tensors(key):
    family, case = key
    return {k.removeprefix(f"{case}/"): v for k, v in TENSORS[family].items() if k.startswith(f"{case}/")}


def run(key, dtype, variant="paper"):
    """Loss, losses [B] and d logits [rows, T, V] of a golden case, from plain log-softmax."""
    case, t = CASES[key], tensors(key)
    labels, prompts = t["labels"][:, 1:], case["B"]
    order = torch.arange(len(labels)).reshape(-1, prompts).T.flatten()  # candidate-major -> prompt-major
    row, position = (labels[order] != -100).nonzero(as_tuple=True)
    at = order[row], position
    logits = t["policy_logits"].to(dtype, copy=True).requires_grad_()
    ref_logits = t["ref_logits"].to(dtype)
    logp, ref_logp = (z[:, :-1].log_softmax(-1)[at].gather(1, labels[at][:, None])[:, 0] for z in (logits, ref_logits))
    tokens, score = torch.bincount(row, minlength=len(order)).reshape(prompts, -1), t["rewards"]
    if variant == "released":  # all scores, of candidates without tokens where they are not used
        tokens = torch.nn.functional.pad(tokens, (0, score.shape[1] - case["N"]))
    score = score[:, : tokens.shape[1]]
    seg = Segments.build(tokens=tokens.flatten(), groups=[tokens.shape[1]] * prompts, score=score.flatten())
    hyper = {"beta": case["hyper"]["beta"], "gamma": case["hyper"]["gamma"], "variant": variant}
    out = losses.perpo(logp, ref_logp, seg, length_normalized=key[1] == "perpo_norm_n4", **hyper)
    out.losses.mean().backward()
    return out.losses.mean().detach(), out.losses.detach(), logits.grad


def assert_golden(key, got, tolerance, tolerance_of_gradient=None):
    t = tensors(key)
    for what, value, bound in zip(
        ("loss", "losses", "grad_policy_logits"),
        got,
        (tolerance, tolerance, tolerance_of_gradient or tolerance),
        strict=True,
    ):
        assert max_error(value, t[what]) <= bound * max(1.0, t[what].abs().max().item()), what


@pytest.mark.parametrize("key", EXACT, ids="/".join)
def test_golden(key):
    assert_golden(key, run(key, torch.float64), INDEX["tolerance"][CASES[key]["dtype"]])
    assert_golden(key, run(key, torch.float32), 1e-5)


def test_golden_bf16_gradients_are_exact_up_to_their_rounding():
    key = ("perpo", "n5_bf16_logits")
    assert_golden(key, run(key, torch.float64), 1e-6, tolerance_of_gradient=2e-3)


def test_every_quirk_is_accounted_for():
    assert {case for (family, case), c in CASES.items() if family == "perpo" and c["quirk"]} == set(QUIRKS)


@pytest.mark.parametrize("case", ["n3_ties_gamma0", "n4_unsorted"])
def test_quirks_that_only_the_released_variant_has(case):
    key = ("perpo", case)
    assert max_error(run(key, torch.float64)[0], tensors(key)["loss"]) > 1e-3


@pytest.mark.parametrize("key", CASES, ids="/".join)
def test_as_released(key):
    gradient = 2e-3 if CASES[key]["dtype"] == "bfloat16" else None  # rounded to bf16 there
    tolerance = 1e-7 if CASES[key]["dtype"] == "float64" else 1e-6  # the weights are fp32: one rounding of them
    assert_golden(key, run(key, torch.float64, "released"), tolerance, gradient)
    assert_golden(key, run(key, torch.float32, "released"), 1e-5, gradient)


def test_released_is_not_finite_where_the_released_code_is_not():
    seg = Segments.build(tokens=[1, 1], groups=[2], score=[1.0, 1.0])
    assert losses.perpo(torch.zeros(2), None, seg, variant="released").losses.isnan().all()
    far = torch.tensor([-1000.0, 0.0])
    seg = Segments.build(tokens=[1, 1], groups=[2], score=[1.0, 0.0])
    assert losses.perpo(far, None, seg, variant="released").losses.isinf().all()
    assert losses.perpo(far, None, seg).losses.item() == pytest.approx(100.0)


SCORE = [0.25, 1.0, 0.5, 0.5, 0.0, 3.0, 3.0, 7.0]  # unsorted, a tie; two responses all tied; one alone
TOKENS, GROUPS = [3, 0, 2, 1, 4, 2, 1, 2], [5, 2, 1]


def numbers():
    torch.manual_seed(0)
    return torch.randn(15, dtype=torch.float64), torch.randn(15, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("length_normalized", [False, True])
def test_formula(gamma, length_normalized):
    logp, ref_logp = numbers()
    seg = Segments.build(tokens=TOKENS, groups=GROUPS, score=SCORE)
    out = losses.perpo(logp, ref_logp, seg, beta=0.3, gamma=gamma, length_normalized=length_normalized)
    ends = list(itertools.accumulate(TOKENS))
    s = [(logp - ref_logp)[end - n : end].sum().item() for n, end in zip(TOKENS, ends, strict=True)]
    if length_normalized:
        s = [x / max(1, n) for x, n in zip(s, TOKENS, strict=True)]
    pairs = [(i, j) for i in range(5) for j in range(5) if SCORE[i] > SCORE[j]]
    total = sum((SCORE[i] - SCORE[j]) ** gamma for i, j in pairs)
    want = sum((SCORE[i] - SCORE[j]) ** gamma / total * math.log1p(math.exp(-0.3 * (s[i] - s[j]))) for i, j in pairs)
    assert out.unit == "prompt" and out.losses.tolist() == pytest.approx([want, 0, 0], rel=1e-12)
    assert {name: len(values) for name, values in out.metrics.items()} == dict.fromkeys(
        ("accuracy", "margin", "chosen_reward", "rejected_reward"), len(pairs)
    )


def test_the_order_of_candidates_does_not_matter():
    logp, ref_logp = numbers()
    one, other = (
        losses.perpo(x, y, Segments.build(tokens=[1] * 15, groups=[15], score=score)).losses
        for x, y, score in (
            (logp, ref_logp, torch.arange(15) * 0.1),
            (logp.flip(0), ref_logp.flip(0), torch.arange(15).flip(0) * 0.1),
        )
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_limits_are_dpo_and_lipo():
    logp, ref_logp = numbers()
    two = Segments.build(tokens=[8, 7], groups=[2], score=[0.0, 1.0])
    torch.testing.assert_close(losses.perpo(logp, ref_logp, two).losses, losses.dpo(logp, ref_logp, two).losses)
    list_of_five = Segments.build(tokens=[3] * 5, groups=[5], score=[4.0, 3.0, 2.0, 1.0, 0.0])
    got, want = (loss(logp, None, list_of_five).losses.mean() for loss in (lipo, losses.dpo))
    torch.testing.assert_close(got, want)


def lipo(logp, ref_logp, seg):
    return losses.perpo(logp, ref_logp, seg, gamma=0.0)


def test_gradcheck():
    logp, ref_logp = numbers()
    seg = Segments.build(tokens=TOKENS, groups=GROUPS, score=SCORE)
    assert torch.autograd.gradcheck(lambda x: losses.perpo(x, ref_logp, seg, beta=0.7).losses, logp.requires_grad_())


@pytest.mark.parametrize("u", [-1e4, 1e4])
def test_finite_in_fp32_at_any_margin(u):
    logp = torch.tensor([u, 0.0, 1.0], requires_grad=True)
    seg = Segments.build(tokens=[1, 1, 1], groups=[3], score=[2.0, 1.0, 1.0 - 1e-6])
    out = losses.perpo(logp, None, seg, beta=1.0, gamma=8.0)
    out.losses.sum().backward()
    assert out.losses.isfinite().all() and logp.grad.isfinite().all()


@pytest.mark.parametrize("scores", [[1.0, 1.0], [1.0]])
def test_without_pairs_the_loss_is_zero(scores):
    logp = torch.randn(len(scores), requires_grad=True)
    out = losses.perpo(logp, None, Segments.build(tokens=[1] * len(scores), groups=[len(scores)], score=scores))
    out.losses.sum().backward()
    assert out.losses.tolist() == [0.0] and logp.grad.abs().sum() == 0


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"gamma": -0.1}, {"gamma": math.nan}])
def test_refuses_bad_options(options):
    with pytest.raises(ValueError, match="must"):
        losses.perpo(torch.zeros(1), None, Segments.build(tokens=[1], groups=[1], score=[1.0]), **options)
