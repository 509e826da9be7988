"""SPO, the DPO forms of three repositories, Plackett-Luce and reward models against the code they come from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpo_kernels import Segments, losses
from fastpo_kernels.testing import max_error

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("spo", "spo_dpo", "mia_dpo", "vla_dpo", "rm")
TENSORS = {family: load_file(GOLDEN / family / f"{family}.safetensors") for family in FAMILIES}
CASES = {
    (family, case["id"]): case
    for family in FAMILIES
    for case in json.loads((GOLDEN / family / "index.json").read_text())["cases"]
}
IM_START = 96


def tensors(key, dtype):
    family, case = key
    found = {k.removeprefix(f"{case}/"): v for k, v in TENSORS[family].items() if k.startswith(f"{case}/")}
    leaves = ("hidden", "hidden_chosen", "hidden_rejected", "lm_head", "v_head")
    floats = {k: v.to(dtype, copy=True) for k, v in found.items() if v.is_floating_point()}
    return found | floats | {k: v.requires_grad_() for k, v in floats.items() if k in leaves}


def of(family):
    return [key for key in CASES if key[0] == family]


def logp_at(hidden, head, at, target):
    """[n] log-probabilities of target at (row, position) pairs of unshifted columns."""
    return (hidden[at] @ head.T).log_softmax(-1).gather(1, target[:, None])[:, 0]


def rows(labels, order, score, **build):
    """Labelled positions of the rows of labels, in the order of responses: where, what, Segments."""
    row, position = (labels[order, 1:] != -100).nonzero(as_tuple=True)
    at = torch.as_tensor(order)[row], position
    tokens = torch.bincount(row, minlength=len(order))
    return at, labels[at[0], position + 1], Segments.build(tokens=tokens, score=score, **build)


def assert_golden(t, loss, tolerance, expected="expected_loss"):
    loss.backward()
    assert max_error(loss.detach(), t[expected][0]) <= tolerance * max(1.0, t[expected].abs().item())
    for name in [name for name in t if name.startswith("grad_")]:
        want = t[name]
        leaf = t[name.removeprefix("grad_")]
        got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert max_error(got, want) <= tolerance * max(1.0, want.abs().max().item()), name


def spo_rows(t, labelled_only):
    """Where each of the six spans of each prompt is read, in the order of losses.spo."""
    sides, tokens, at, target = ("chosen", "rejected"), [], {"chosen": [], "rejected": []}, []
    prompts = len(t["labels_chosen"])
    for b in range(prompts):
        for side in sides:
            labels = t[f"labels_{side}"][b]
            starts = (labels == IM_START).nonzero()[:, 0].tolist()
            for first, stop in ((0, starts[4]), (starts[4], starts[5]), (starts[6], len(labels) - 1)):
                span = torch.arange(first, stop)
                span = span[labels[span + 1] != -100] if labelled_only else span
                tokens.append(len(span))
                at[side].append((b, span))
                target.append((side, labels[span + 1]))
    stats = []
    for model in ("", "ref_"):
        parts = {
            side: [
                logp_at(
                    t[f"{model}hidden_{side}"][b],
                    t[f"{model}lm_head"],
                    span,
                    t[f"labels_{side}"][b][span + 1].clamp(min=0),
                )
                for b, span in at[side]
            ]
            for side in sides
        }
        stats.append(torch.cat([x for b in range(prompts) for s in sides for x in parts[s][3 * b : 3 * b + 3]]))
    weight = torch.cat([labels != -100 for _, labels in target]).double()
    groups, score = [6] * prompts, torch.zeros(6 * prompts)
    return *stats, Segments.build(tokens=tokens, groups=groups, score=score, weight=weight)


def spo_options(case):
    options = {name: case[name] for name in ("beta", "loss_type", "label_smoothing", "reference_free")}
    dpop = 0.0 if case["loss_type"] == "kto_pair" else case["lamda"]  # it has no margin: theirs has no effect there
    return options | {"alpha_q": case["spo_alpha_q"], "alpha_a": case["spo_alpha_a"], "dpop_lambda": dpop}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_spo(dtype, tolerance):
    for key in of("spo"):
        case = CASES[key]
        masked = case["variant"] == "pairfix_masked"
        # their masked cases keep the batch KL of kto_pair in the gradient, which is "pairfix" on labelled rows
        variant = case["variant"].removesuffix("_masked")
        variant = "paper" if masked and case["loss_type"] != "kto_pair" else variant
        for labelled_only in (False, True) if variant == "paper" else (masked,):
            t = tensors(key, dtype)
            out = losses.spo(*spo_rows(t, labelled_only), variant=variant, **spo_options(case))
            assert_golden(t, out.losses.mean(), tolerance)
            if key[1] == "021_masked_step0_ref_is_policy":
                assert out.metrics["accuracy"].eq(0.5).all()


def test_spo_released_leaves_the_worse_question_untrained():
    t = tensors(("spo", "000_defaults_0p5b"), torch.float64)
    assert t["grad_hidden_rejected"].abs().max() == 0 < t["grad_hidden_chosen"].abs().max()
    out = losses.spo(*spo_rows(t, True))
    out.losses.mean().backward()
    assert t["hidden_rejected"].grad.abs().max() > 0


def dpo_like(key, dtype):
    """One of the chosen-then-rejected cases: tensors, statistics and segments."""
    t, prompts = tensors(key, dtype), CASES[key]["B"]
    order = [row for b in range(prompts) for row in (b, prompts + b)]
    at, target, seg = rows(t["labels"], order, torch.tensor([1.0, 0.0]).repeat(prompts), groups=[2] * prompts)
    return t, *(logp_at(t[m + "hidden"], t[m + "lm_head"], at, target) for m in ("", "ref_")), seg


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family, variant", [("spo_dpo", "released_spo"), ("mia_dpo", "released")])
def test_dpo_of_spo_and_mia(family, variant, dtype, tolerance):
    for key in of(family):
        case = CASES[key]
        t, logp, ref_logp, seg = dpo_like(key, dtype)
        options = {name: case[name] for name in ("beta", "loss_type", "label_smoothing")}
        options |= {"dpop_lambda": case["lamda"], "sft_weight": case["gamma"], "dpo_weight": case["dpo_alpha"]}
        out = losses.dpo(logp, None if case["reference_free"] else ref_logp, seg, variant=variant, **options)
        assert_golden(t, out.losses.mean(), tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_pairs_and_rankings_of_vision_llm_alignment(dtype, tolerance):
    kinds = set()
    for key in of("vla_dpo"):
        case, t = CASES[key], tensors(key, dtype)
        n, k = case["samples"], case["candidates"]
        score = torch.arange(k, 0, -1).repeat(n)
        at, target, seg = rows(t["labels"], list(range(n * k)), score, groups=[k] * n)
        stats = [logp_at(t[m + "hidden"], t[m + "lm_head"], at, target) for m in ("", "ref_")]
        options = {name: case[name] for name in ("beta", "label_smoothing")}
        kinds.add(case["loss_kind"])
        if case["loss_kind"] == "pairwise":
            paper = losses.plackett_luce(*stats, seg, **options).losses
            out = losses.dpo(*stats, seg, **options)
            assert max_error(paper, out.losses) <= tolerance  # two responses: the same
        else:
            out = losses.plackett_luce(*stats, seg, variant="released", **options)
            assert (losses.plackett_luce(*stats, seg, **options).losses - out.losses).abs().min() > 1e-3
        assert_golden(t, out.losses.mean(), tolerance)
    assert kinds == {"pairwise", "plackett_luce_prob"}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_reward_models(dtype, tolerance):
    for key in of("rm"):
        case, t = CASES[key], tensors(key, dtype)
        n, k = case["samples"], case["candidates"]
        value = t["hidden"][torch.arange(n * k), t["end_index"]] @ t["v_head"][0]
        assert max_error(value, t["scores"]) <= tolerance
        score = torch.arange(k, 0, -1).repeat(n)
        seg = Segments.build(tokens=[1] * (n * k), groups=[k] * n, score=score)
        out = losses.reward_list(value, seg)
        if k == 2:
            assert max_error(losses.reward_pair(value, seg).losses, out.losses) <= tolerance
        if case["name"] == "tied":
            assert out.metrics["accuracy"].eq(0.5).all()  # theirs: 0
        else:
            assert out.metrics["accuracy"].mean().item() == pytest.approx(case["accuracy"])
        assert_golden(t, out.losses.mean(), tolerance)
