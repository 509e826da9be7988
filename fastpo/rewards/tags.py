"""Rewards for the shape of a completion: <think> ... </think> and then one block."""

import re
from typing import Any, Literal

from fastpo.rewards import released
from fastpo.rewards.text import Variant, token_f1

_TAGS = ("think", "answer", "search", "code", "problem")


def format_tags(
    answer: str, truth: Any, *, kind: Literal["answer", "search", "code"] = "answer", variant: Variant = "paper"
) -> float:
    """1 for one <think> block and one other block, neither empty, nothing else but white space around them, else 0.

    kind: answer wants <answer>; search takes <answer> or <search>; code wants the block of the truth, one of <answer>,
    <code> with a Python fence and <problem> {'a', ...} (the two agents of Visual-ARFT), and only then reads the
    truth. released: no white space before or after; empty blocks pass, and for answer repeated ones too.
    """
    if variant == "released":
        return released.format_tags(answer, released.solution(truth) if kind == "code" else "", kind)
    wanted = _kinds(truth) if kind == "code" else {"answer": ["answer"], "search": ["answer", "search"]}[kind]
    found = re.fullmatch(r"\s*<think>(.*)</think>\s*<(\w+)>(.*)</\2>\s*", answer, re.DOTALL)
    if not found or found[2] not in wanted or not found[1].strip() or not found[3].strip():
        return 0.0
    if any(answer.count(f"<{tag}>") + answer.count(f"</{tag}>") > 2 * (tag in ("think", found[2])) for tag in _TAGS):
        return 0.0
    body = {"code": r"\s*```python\b.*```\s*", "problem": r"\s*\{\s*'[^']+'\s*(?:,\s*'[^']+'\s*)*\}\s*"}
    return float(re.fullmatch(body.get(found[2], ".*"), found[3], re.DOTALL) is not None)


def agent_code(answer: str, truth: Any, *, variant: Variant = "paper") -> float:
    """One step of Visual-ARFT's coding agent, in [0, 1]: the block must be of the truth's kind.

    <answer>: token F1. <problem>: 1 for the same set, 0.5 for the rotation alone of two. <code>: 0.9 for any code,
    which is not run. released (grpo_agent_code.py:76-160): 0.9 also without a <code> block, an <answer> that spans
    lines is not found, and a solution without a block gives 0 where this raises ValueError.
    """
    if variant == "released":
        return released.agent_code(answer, released.solution(truth))
    (kind,) = _kinds(truth)
    if f"<{kind}>" not in answer or any(f"<{tag}>" in answer for tag in ("answer", "code", "problem") if tag != kind):
        return 0.0
    if kind == "answer":
        return token_f1(answer, truth)
    if kind == "code":
        return 0.9
    expected = released.problems(truth)
    if not expected:
        raise ValueError("the ground truth has no <problem> {'name', ...}")
    return released.problems_score(released.problems(answer), expected)


def _kinds(truth: Any) -> list[str]:
    found = [tag for tag in ("answer", "code", "problem") if isinstance(truth, str) and f"<{tag}>" in truth]
    if len(found) != 1:
        raise ValueError("the ground truth must hold one of <answer>, <code> and <problem>")
    return found
