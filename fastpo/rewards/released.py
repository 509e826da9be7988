"""What the released reward code of Visual-RFT and Visual-ARFT computes (Liuziyu77/Visual-RFT 9486633).

Each function takes the completion and the row's solution, both as texts, and scores 0 where the original's blanket
`except` does. Corrected versions: the public rewards of this package, which dispatch here for variant "released".
"""

import json
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

_CORNERS = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")


def solution(truth: Any) -> str:
    """The released code reads texts only. Raises ValueError for anything else."""
    if not isinstance(truth, str):
        raise ValueError(f"variant released needs the solution as text, got {type(truth).__name__}")
    return truth


def math_verify() -> tuple[Callable, Callable]:
    """math-verify's parse and verify, an optional dependency. Raises ImportError that says how to get it."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError('this reward needs the package math-verify: pip install "fastpo[math]"') from error
    return parse, verify


def shortcut(answer: str, truth: Any) -> bool:
    """Whether math-verify finds the whole texts equal. On boxes it compares y1 of the first box only."""
    parse, verify = math_verify()
    try:
        return float(verify(parse(answer), parse(str(truth)))) > 0
    except Exception:  # as the released code does, grpo.py:222-229
        return False


def detection(answer: str, truth: str, *, no_objects: bool) -> tuple[float, float]:
    """The IoU and the confidence reward (grpo.py:54-212, 231-262, 301-332).

    no_objects: the code of February 2025 (a7d8894), which rewards "No Object" on both sides.
    """
    block = re.search(r"<answer>(.*?)</answer>", answer)
    given = "<answer>" + (block[1] if block else answer).strip() + "</answer>"
    given = given.replace("[[", "[").replace("]]", "]").replace("\n", "")
    scores = (0.0, 0.0)
    try:
        expected, predicted = _bracketed(truth.strip()), _bracketed(given)
        if predicted is not None and type(predicted[0]) is dict:
            pairs = _match(expected, predicted)
            iou = sum(iou for iou, _ in pairs) / max(len(expected), len(pairs))
            confidence = sum(c if iou else 1 - c for iou, c in pairs) / len(pairs)
            scores = (min(iou, 1.0), min(max(confidence, 0.0), 1.0))
    except Exception:  # the blanket except of grpo.py:263, which also skips the rule below
        return 0.0, 0.0
    if math.isnan(scores[1]):  # of "Confidence": NaN; the original passes NaN on to the advantages of the whole group
        scores = (scores[0], 0.0)
    return (1.0, 1.0) if no_objects and "No Object" in given and "No Object" in truth else scores


def classification(answer: str, truth: str) -> float:
    given, expected = (_block(text).replace(" ", "").replace("_", "").lower() for text in (answer, truth))
    return float(given in expected or expected in given)


def grounding(answer: str, truth: str) -> float:
    """grpo_lisa.py:95-146. First corners come before second ones, so two boxes give the first corners of both."""
    block = re.search(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    given, expected = (block[1] if block else answer).strip(), _block(truth)
    if given == expected:
        return 2.0
    corners = []
    for text in (expected, given):
        try:
            boxes = [[int(v) / 1000 for v in match] for match in _CORNERS.findall(text)]
        except (OverflowError, ValueError):  # of hundreds of digits
            return 0.0
        corners.append([box[:2] for box in boxes] + [box[2:] for box in boxes])
    if not all(corners):
        return 0.0
    return giou([*corners[0][0], *corners[0][1]], [*corners[1][0], *corners[1][1]]) + 1


def giou(a: Sequence[float], b: Sequence[float]) -> float:
    """Generalised IoU of x1, y1, x2, y2. Corners are not sorted, so an inverted copy of a box scores 1."""
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = overlap / union if union > 0 else 0.0
    return iou - (hull - union) / hull if hull > 0 else iou


def search(answer: str, truth: str) -> float:
    """grpo_agent_search.py:90-131."""
    if "<answer>" in truth:
        return 0.0 if "<search>" in answer else _f1(_block(answer), _block(truth))
    if "<search>" in truth and "<answer>" not in answer:
        raise ValueError("a <search> solution is scored by an embedding model, which this reward has not")
    return 0.0


def agent_code(answer: str, truth: str) -> float:
    """grpo_agent_code.py:76-160."""
    if "<answer>" in truth:
        return 0.0 if "<code>" in answer or "<problem>" in answer else _f1(_block(answer), _block(truth))
    if "<code>" in truth:
        return 0.0 if "<answer>" in answer or "<problem>" in answer else 0.9
    if "<problem>" not in truth or "<answer>" in answer or "<code>" in answer:
        return 0.0
    return problems_score(problems(answer), problems(truth))


def problems(text: str) -> list[str]:
    """The quoted names of the first <problem> {'a', 'b'} </problem>, sorted."""
    found = re.search(r"<problem>\s*\{(.*?)\}\s*</problem>", text, re.DOTALL)
    return sorted(re.findall(r"'([^']+)'", found[1])) if found else []


def problems_score(given: list[str], expected: list[str]) -> float:
    """1 for the same problems; 0.5 where of two problems the rotation alone is named (90 degrees before 180)."""
    if given == expected:
        return 1.0
    turns = [name for name in ("rotation90", "rotation180") if name in expected]
    return 0.5 if len(expected) == 2 and turns and given == turns[:1] else 0.0


def format_tags(answer: str, truth: str, kind: str) -> float:
    """grpo.py:352-359 (answer), grpo_agent_search.py:146-173 (search), grpo_agent_code.py:177-212 (code)."""
    patterns = {
        "answer": r"<answer>.*?</answer>",
        "search": r"<search>.*?</search>",
        "code": r"<code>\s*```python(.*?)```.*?</code>",
        "problem": r"<problem>\s*\{\s*'[^']+'\s*(?:,\s*'[^']+'\s*)*\}\s*</problem>",
    }
    used = {
        "answer": ["answer"],
        "search": [tag for tag in ("answer", "search") if f"<{tag}>" in answer and f"</{tag}>" in answer][:1],
        "code": [tag for tag in ("answer", "code", "problem") if f"<{tag}>" in truth][:1],
    }[kind]
    counted = {"answer": (), "search": ("answer", "search", "think"), "code": ("answer", "code", "think", "problem")}
    if not used or any(answer.count(f"<{tag}>") > 1 for tag in counted[kind]):
        return 0.0
    whole = {tag: re.fullmatch(rf"<think>.*?</think>\s*{patterns[tag]}", answer, re.DOTALL) for tag in patterns}
    if kind == "search" and whole["answer"] and whole["search"]:
        return 0.0
    return float(whole[used[0]] is not None)


def _block(text: str) -> str:
    found = re.search(r"<answer>(.*?)</answer>", text)  # no DOTALL: a block with a line break is not found
    return (found[1] if found else text).strip()


def _bracketed(text: str) -> Any:
    start, end = text.find("<answer>"), text.find("</answer>")
    if start < 0:
        return None
    content = text[start + len("<answer>") : len(text) if end < 0 else end]
    if not content.endswith("]"):
        content = content.rsplit("},", 1)[0] + "}]"
    try:
        return json.loads(content.replace("'", '"'))
    except json.JSONDecodeError:
        return None


def _match(expected: Any, predicted: Any) -> list[tuple[float, float]]:
    unique = {}
    for box in predicted:
        unique.setdefault(tuple(box["Position"]), box)
    free, found = dict(enumerate(expected)), []
    for box in sorted(unique.values(), key=lambda box: box["Confidence"], reverse=True):
        ious = [(_iou(other["Position"], box["Position"]), -number) for number, other in free.items()]
        best, number = max(ious, default=(0.0, 0))  # of equal ones the first
        found.append((best if best > 0.5 else 0.0, box["Confidence"]))
        if best > 0.5:
            del free[-number]
    return found


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    (ax, ay, ax2, ay2), (bx, by, bx2, by2) = a, b  # four numbers each, or the row scores 0
    width, height = min(ax2, bx2) - max(ax, bx), min(ay2, by2) - max(ay, by)
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((ax2 - ax) * (ay2 - ay) + (bx2 - bx) * (by2 - by) - overlap)


def _f1(given: str, expected: str) -> float:
    a, b = (_normalized(text).split() for text in (given, expected))
    same = len(set(a) & set(b))
    if not same:
        return 0.0
    precision, recall = same / len(a), same / len(b)
    return 2 * precision * recall / (precision + recall)


def _normalized(text: str) -> str:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare)
