"""Rewards that compare texts: classification, exact, token F1, numbers, multiple choice, OCR, symbolic mathematics."""

import math
import re
import string
import unicodedata
from collections import Counter
from typing import Any, Literal

import numpy as np

from fastpo.rewards import released

Variant = Literal["paper", "released"]
_NUMBER = re.compile(r"[+-]?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d[\d,]*\.?\d*)?")
_CHOICE = (
    re.compile(r"^\W*([A-Za-z])\W*$"),  # the letter alone: "B", "(b)", "B."
    re.compile(r"^\W*([A-Z])\s*[).:]"),  # "B. because ...", "(B) because ..."
    re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Z])\b(?!')"),
    re.compile(r"\(([A-Z])\)|\\boxed\{\s*\(?([A-Z])\b"),
)


def final_answer(completion: str) -> str:
    """What a completion gives as its answer, stripped: the first <answer> block after the thoughts, or else all of it.

    Thoughts (<think> blocks, also one whose opening tag stood in the prompt) never count, a block may span lines, and
    one that is not closed goes on to the end. Thoughts that are never closed leave nothing but a later <answer>.
    """
    text = re.sub(r"<think>.*?</think>", "", completion, flags=re.DOTALL)
    text = re.sub(r"<think>.*?(?=<answer>|\Z)", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    block = re.search(r"<answer>(.*?)(?:</answer>|\Z)", text, flags=re.DOTALL)
    return (block[1] if block else text).strip()


def truths(truth: Any) -> list[str]:
    """The accepted answers: a text, a number, or a list of them, without tags. Raises ValueError if any is empty."""
    found = ["" if x is None else final_answer(str(x)) for x in (truth if isinstance(truth, list | tuple) else [truth])]
    if not found or not all(found):
        raise ValueError("the ground truth is empty")
    return found


def classification(answer: str, truth: Any, *, variant: Variant = "paper", shortcut: bool = False) -> float:
    """1 if the class named is the true one, else 0; case, white space and punctuation aside (Visual-RFT, section 3.3).

    truth: the class, or a list of its names. released (grpo_classification.py:55-107): 1 if either text contains the
    other, so that an empty answer, "A32" for "A320" and a list of all classes win; hyphens count. shortcut: as in
    detection_iou.
    """
    if shortcut and released.shortcut(answer, truth):
        return 1.0
    if variant == "released":
        return released.classification(answer, released.solution(truth))
    return float(_letters(final_answer(answer)) in set(map(_letters, truths(truth))))


def exact(answer: str, truth: Any) -> float:
    """1 if the answer is (one of) the truth; case, white space, punctuation and a, an, the aside (as SQuAD 1.1)."""
    return float(_words(final_answer(answer)) in [_words(item) for item in truths(truth)])


def token_f1(answer: str, truth: Any, *, variant: Variant = "paper", shortcut: bool = False) -> float:
    """F1 of the words that answer and truth share, counted as often as they occur, in [0, 1] (SQuAD 1.1).

    truth: a text, or a list of which the best counts. released (Visual-ARFT, grpo_agent_search.py:60-125): a word
    counts once in the overlap but fully in the lengths, an answer block with a line break in it is not found, and 0 if
    the completion holds <search>; a solution without <answer> gives 0, one <search> for another raises ValueError, as
    their embedding similarity is a model's work. shortcut: as in detection_iou.
    """
    if shortcut and released.shortcut(answer, truth):
        return 1.0
    if variant == "released":
        return released.search(answer, released.solution(truth))
    given = _words(final_answer(answer))
    return max(_f1(given, _words(item)) for item in truths(truth))


def numeric(answer: str, truth: Any, *, rel_tol: float = 1e-6, abs_tol: float = 0.0) -> float:
    """1 if the last number of the answer is the truth, within abs_tol or rel_tol times the larger of both, else 0.

    Reads 1,234.5, -.5 and 3/4; a percent sign or a unit does not count. truth: a number, or a text that holds one.
    """
    given, expected = _number(final_answer(answer)), [_number(item) for item in truths(truth)]
    wanted = [value for value in expected if value is not None]
    if isinstance(truth, bool) or len(wanted) < len(expected):
        raise ValueError("the ground truth is not a number")
    return float(given is not None and any(math.isclose(given, x, rel_tol=rel_tol, abs_tol=abs_tol) for x in wanted))


def multiple_choice(answer: str, truth: Any) -> float:
    """1 if the answer picks the letter of the truth, else 0, also where it names several letters or none.

    Reads "B", "(b)", "B. text", "the answer is B", "... (B)" and "\\boxed{B}". truth: a letter, also as "B. text".
    """
    letters = [_letter(item) for item in truths(truth)]
    if None in letters:
        raise ValueError("the ground truth is not the letter of a choice")
    return float(_letter(final_answer(answer)) in letters)


def ocr(answer: str, truth: Any, *, ignore_case: bool = False) -> float:
    """1 - edit distance / length of the longer text, in [0, 1], with each run of white space as one space.

    PerPO rewards dense OCR by an edit-distance similarity whose recipe is not published; this is the usual one.
    """
    given = " ".join(final_answer(answer).split())
    best = 0.0
    for item in truths(truth):
        pair = (given, " ".join(item.split()))
        if ignore_case:
            pair = (pair[0].casefold(), pair[1].casefold())
        best = max(best, 1.0 - edit_distance(*pair) / max(map(len, pair)))
    return best


def symbolic(answer: str, truth: Any) -> float:
    """1 if the answer is mathematically equal to (one of) the truth, else 0. Needs the package math-verify.

    Only on the main thread of a process, since math-verify limits its time by a signal.
    """
    parse, verify = released.math_verify()
    expected = [parse(item) for item in truths(truth)]
    if not all(expected):
        raise ValueError("the ground truth holds no mathematical expression")
    given = parse(final_answer(answer))
    return float(bool(given) and any(verify(item, given) for item in expected))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements of one character that make a into b."""
    codes = np.array([ord(c) for c in b], dtype=np.int64)
    steps = np.arange(len(b) + 1)
    row = steps
    for count, char in enumerate(a, start=1):
        kept = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(char)))  # delete, or keep and replace
        row = np.minimum.accumulate(np.concatenate(([count], kept)) - steps) + steps  # then insert
    return int(row[-1])


def _letters(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum()) or text.strip()


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.casefold() if c not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split() or text.casefold().split()


def _f1(given: list[str], expected: list[str]) -> float:
    same = sum((Counter(given) & Counter(expected)).values())
    return 2 * same / (len(given) + len(expected)) if same else 0.0


def _number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    top, _, bottom = found[-1].replace(",", "").partition("/")
    try:
        value = float(top) / float(bottom) if bottom else float(top)
    except ZeroDivisionError:
        return None
    return value if math.isfinite(value) else None


def _letter(text: str) -> str | None:
    for pattern in _CHOICE:
        found = {next(filter(None, match.groups())).upper() for match in pattern.finditer(text)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None
