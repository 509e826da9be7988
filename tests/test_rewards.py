"""Rewards: the recorded values of the released code, weighted sums, and truths that cannot be read."""

import builtins
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo.config import Plugin
from fastpo.rewards import REWARDS, Term, terms, total
from fastpo.rewards.boxes import iou
from fastpo.rewards.released import giou
from fastpo.sample import BadSample

GROUPS = json.loads((Path(__file__).parent / "golden/rewards/index.json").read_text())["groups"]
RECORDED = {  # group -> reward and the options that make it the released code
    "det_iou": ("detection_iou", {"variant": "released"}),
    "det_confidence": ("detection_confidence", {"variant": "released"}),
    "det_iou_feb2025": ("detection_iou", {"variant": "released_2025_02"}),
    "det_confidence_feb2025": ("detection_confidence", {"variant": "released_2025_02"}),
    "cls_accuracy": ("classification", {"variant": "released"}),
    "lisa_accuracy": ("grounding", {"variant": "released"}),
    "arft_search_accuracy": ("token_f1", {"variant": "released"}),
    "arft_code_accuracy": ("agent_code", {"variant": "released"}),
    "format": ("format", {"variant": "released"}),
    "arft_search_format": ("format", {"variant": "released", "kind": "search"}),
    "arft_code_format": ("format", {"variant": "released", "kind": "code"}),
}
SHORT = ["det_confidence", "cls_accuracy", "lisa_accuracy"]

BOX, OTHER = [100, 200, 300, 400], [500, 600, 700, 900]


def thought(answer: str) -> str:
    return f"<think>look</think>\n<answer>{answer}</answer>"


def objects(*boxes: tuple[list, float]) -> str:
    return str([{"Position": box, "Confidence": confidence} for box, confidence in boxes])


def test_every_group_of_records_is_held():
    assert set(GROUPS) == {*RECORDED, "numeric_iou"}
    assert sum(map(len, GROUPS.values())) == 280


@pytest.mark.parametrize("group", RECORDED)
def test_released_is_what_the_released_code_scored(group):
    name, options = RECORDED[group]
    for record in GROUPS[group]:
        value = REWARDS[name](record["completion"], record.get("solution", ""), **options)
        assert value == pytest.approx(record.get("reward_nosym", record["reward"]), rel=0, abs=1e-12), record


@pytest.mark.parametrize("group", SHORT)
def test_the_symbolic_shortcut_is_an_option(group):
    name, options = RECORDED[group]
    hits = 0
    for record in GROUPS[group]:
        value = REWARDS[name](record["completion"], record["solution"], shortcut=True, **options)
        assert value == pytest.approx(record["reward_mv090"], rel=0, abs=1e-12), record
        hits += record["symbolic_hit"]
    assert hits > 0


def test_iou_and_giou_are_the_recorded_numbers():
    for record in GROUPS["numeric_iou"]:
        assert iou(record["a"], record["b"]) == pytest.approx(record["iou"], rel=0, abs=1e-15)
        assert giou(record["a"], record["b"]) + 1 == pytest.approx(record["giou_plus1"], rel=0, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        *[
            (name, truth)
            for name in ("exact", "classification", "token_f1", "ocr")
            for truth in ("", None, [], ["a", " "])
        ],
        *[("numeric", truth) for truth in ("seven", None, True, float("nan"), "")],
        *[("multiple_choice", truth) for truth in ("red car", "", None, 2)],
        *[
            (n, t)
            for n in ("detection_iou", "detection_confidence")
            for t in ("prose", None, 3, [[1, 2, 3]], [[0, 0, 0, 5]])
        ],
        ("detection_iou", "<answer>" + objects((BOX, 1.0), (OTHER, 1.0))[:-40]),
        ("detection_iou", objects((BOX, 1.0), ([1, 2, 3], 1.0))),
        *[(name, truth) for name in ("grounding", "box_iou") for truth in ("prose", None, [1, 2, 3], "(5,5),(5,5)")],
        *[("agent_code", truth) for truth in ("plain", None, "<problem> dark </problem>")],
        ("symbolic", "no mathematics here"),
    ],
)
def test_a_truth_that_cannot_be_read_raises(name, truth):
    for answer in ("<answer>x</answer>", "<problem>{'a'}</problem>", ""):
        if (name, answer) in {("agent_code", "<answer>x</answer>"), ("agent_code", "")} and "problem" in str(truth):
            continue  # answers of another kind are 0 before the truth is parsed
        with pytest.raises(ValueError, match="ground truth"):
            REWARDS[name](answer, truth)


def test_released_variants_read_texts_only():
    for name in ("detection_iou", "classification", "grounding", "token_f1", "agent_code"):
        with pytest.raises(ValueError, match="released needs the solution as text, got list"):
            REWARDS[name]("x", ["y"], variant="released")
    with pytest.raises(ValueError, match="embedding model"):
        REWARDS["token_f1"]("x", "<search>y</search>", variant="released")
    assert REWARDS["token_f1"]("<answer>y</answer>", "<search>y</search>", variant="released") == 0.0


@given(st.text("<>/thinkaswer[]{}'\":,.-0129 \nPositionConfidence()", max_size=60))
def test_every_answer_has_a_finite_reward(text):
    truth = {name: "A 7" for name in REWARDS} | {
        **dict.fromkeys(("detection_iou", "detection_confidence", "grounding", "box_iou"), [[0, 0, 9, 9]]),
        **{"multiple_choice": "A", "agent_code": "<answer>a</answer>"},
        **dict.fromkeys(("grounding", "box_iou"), [0, 0, 9, 9]),
    }
    for name in REWARDS.keys() - {"symbolic"}:
        assert 0 <= REWARDS[name](text, truth[name]) <= 2
        assert 0 <= REWARDS[name](thought(text), truth[name]) <= 2


def test_released_rewards_are_finite_for_numbers_that_are_none():
    long = thought(f"(100,200),(300,{'9' * 320})")  # int / 1000 overflows; of 5000 digits not even int is made
    for answer in (long, long.replace("9" * 320, "9" * 5000)):
        assert REWARDS["grounding"](answer, thought("(100,200),(300,400)"), variant="released") == 0.0
    nan = thought('[{"Position": [100, 200, 300, 400], "Confidence": NaN}]')
    found = [REWARDS[name](nan, nan, variant="released") for name in ("detection_iou", "detection_confidence")]
    assert found == [1.0, 0.0]


def test_terms_and_their_weighted_sum():
    plugins = [
        Plugin.model_validate({"name": "classification", "weight": 2, "variant": "released"}),
        Plugin(name="format"),
        Plugin.model_validate({"name": "tests.test_rewards:own", "weight": 0.5, "value": 3}),
    ]
    summands = terms(plugins)
    assert [(term.name, term.weight) for term in summands] == [
        ("classification", 2.0),
        ("format", 1.0),
        ("tests.test_rewards:own", 0.5),
    ]
    score, values = total(summands, thought("A32"), "A320", where="f.json:3")
    assert score == 2 * 1.0 + 1.0 + 0.5 * 3 and values == {
        "classification": 1,
        "format": 1,
        "tests.test_rewards:own": 3,
    }


def own(answer, truth, *, value: float) -> float:
    return value


@pytest.mark.parametrize("weight", ["heavy", True, math.inf, None])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(ValueError, match=r"rewards.0.weight: expected a finite number"):
        terms([Plugin.model_validate({"name": "format", "weight": weight})])


def test_unknown_rewards_and_options():
    with pytest.raises(ValueError, match=r"rewards.0.name: unknown 'iou', expected one of agent_code, box_iou"):
        terms([Plugin(name="iou")])
    with pytest.raises(ValueError, match=r"rewards.1.kinds: unknown option"):
        terms([Plugin(name="format"), Plugin.model_validate({"name": "format", "kinds": "code"})])


def test_a_reward_that_raises_names_row_and_key():
    def broken(answer, truth):
        raise KeyError(truth)

    cases = [
        (REWARDS["numeric"], "seven", "reward r: the ground truth is not a number (truth: 'seven')"),
        (broken, "x", "reward r: 'x' (truth: 'x')"),
        (lambda answer, truth: math.nan, "x", "reward r is nan for the answer 'a'"),
    ]
    for reward, truth, message in cases:
        with pytest.raises(BadSample, match=re.escape(f"f.json, row 3, key truth: {message}")):
            total([Term("r", reward)], "a", truth, where="f.json:3")


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs the package math-verify: pip install \"fastpo\[math\]\""):
        total([Term("symbolic", REWARDS["symbolic"])], "1", "1", where="f.json:3")
