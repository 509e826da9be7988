"""Rewards that compare boxes: detection with confidences, grounding of one box. A box is x1, y1, x2, y2, any unit."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fastpo.rewards import released
from fastpo.rewards.text import Variant, final_answer

Box = tuple[float, float, float, float]
DetectionVariant = Literal["paper", "released", "released_2025_02"]

_N = r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*"
_ONE_BOX = re.compile(rf"[\[(]{_N},{_N},{_N},{_N}[\])]|[\[(]{_N},{_N}[\])]\s*,?\s*[\[(]{_N},{_N}[\])]")
_POSITION = re.compile(r"position\W*?:\s*\[([^\[\]]*)\]", re.IGNORECASE)
_CONFIDENCE = re.compile(rf"confidence\W*?:\s*[\"']?{_N}", re.IGNORECASE)
_NO_OBJECTS = re.compile(r"\W*no objects?\W*|\s*\[\s*\]\s*", re.IGNORECASE)
_LARGEST = 1e6  # no image is as large, and areas stay finite


class Prediction(NamedTuple):
    """box is None for an object whose position is no box; confidence is in [0, 1], None where it is not given."""

    box: Box | None
    confidence: float | None


def detection_iou(
    answer: str, truth: Any, *, variant: DetectionVariant = "paper", threshold: float = 0.5, shortcut: bool = False
) -> float:
    """Sum of the IoU of matched boxes over the larger number of boxes, in [0, 1] (Visual-RFT, grpo.py:109-192).

    Predictions, most confident first, take the free true box of largest IoU if that is above threshold. A box given
    twice counts once. With nothing to find, 1 for "No Objects" or [], 0 for any box and for no answer at all.
    truth: the solution text, a list of boxes, or a list of {"Position": box}; [] or "No Objects" for none.
    Corrected: an answer over several lines, an answer or list that breaks off (its whole objects count), any quotes,
    a lone object without a list, opposite corners, a missing confidence (last in order), refusals. An object without
    four numbers counts as a miss.
    released: those score 0, and the solution must have <answer> tags. released_2025_02 (a7d8894): refusals count.
    shortcut: 1 if math-verify finds both texts equal, as the released code scores first; for boxes that means the same
    y1 of the first box, whatever the rest. Needs the package math-verify.
    """
    return _detection(answer, truth, variant, threshold, shortcut)[0]


def detection_confidence(
    answer: str, truth: Any, *, variant: DetectionVariant = "paper", threshold: float = 0.5, shortcut: bool = False
) -> float:
    """Mean over predictions of the confidence where matched and 1 - confidence where not, in [0, 1] (grpo.py:194-212).

    Matching, corrections, variants and options as in detection_iou. Corrected besides: a confidence is cut to [0, 1],
    an object without one or without a box earns 0.
    """
    return _detection(answer, truth, variant, threshold, shortcut)[1]


def grounding(answer: str, truth: Any, *, variant: Variant = "paper", shortcut: bool = False) -> float:
    """Generalised IoU + 1 of the answer's first box, in [0, 2]; 0 without a box (Visual-RFT, grpo_lisa.py:54-146).

    truth: one box as text or four numbers. Corrected: signs and decimals, square brackets, several boxes (the first
    counts), opposite corners. released: "(x1,y1),(x2,y2)" with whole numbers only, two boxes give a mixture of both,
    opposite corners of the true box score 2, so do equal texts without a box. shortcut: as in detection_iou.
    """
    if shortcut and released.shortcut(answer, truth):
        return 1.0
    if variant == "released":
        return released.grounding(answer, released.solution(truth))
    box, expected = first_box(final_answer(answer)), _true_box(truth)
    return released.giou(expected, box) + 1.0 if box else 0.0


def box_iou(answer: str, truth: Any) -> float:
    """IoU of the answer's first box with the truth, in [0, 1]; 0 without a box. PerPO's score of a candidate."""
    box, expected = first_box(final_answer(answer)), _true_box(truth)
    return iou(expected, box) if box else 0.0


def first_box(text: str) -> Box | None:
    """The first [x1, y1, x2, y2] or (x1, y1), (x2, y2) of a text, corners sorted; None if there is none."""
    match = _ONE_BOX.search(text)
    return _box([float(n) for n in match.groups() if n is not None]) if match else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where the boxes share no area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def predictions(text: str) -> list[Prediction]:
    """The {"Position": [...], "Confidence": c} objects of a text; the last may break off after its position."""
    found = []
    for piece in text.split("{"):
        position, confidence = _POSITION.search(piece), _CONFIDENCE.search(piece)
        if position is None:
            continue
        try:
            box = _box([float(number) for number in position[1].split(",")])
        except ValueError:
            box = None
        found.append(Prediction(box, min(max(float(confidence[1]), 0.0), 1.0) if confidence else None))
    return found


def _detection(answer: str, truth: Any, variant: str, threshold: float, shortcut: bool) -> tuple[float, float]:
    if shortcut and released.shortcut(answer, truth):
        return 1.0, 1.0
    if variant != "paper":
        return released.detection(answer, released.solution(truth), no_objects=variant == "released_2025_02")
    expected, text = _true_boxes(truth), final_answer(answer)
    unique: dict[Box | int, Prediction] = {}
    for number, item in enumerate(predictions(text)):
        unique.setdefault(item.box or number, item)
    if not unique:
        refused = float(not expected and _NO_OBJECTS.fullmatch(text) is not None)
        return refused, refused
    free, matched, trust = list(expected), 0.0, 0.0
    for box, confidence in sorted(unique.values(), key=lambda item: -(item.confidence or 0.0)):
        ious = [iou(other, box) if box else 0.0 for other in free]
        hit = max(ious, default=0.0) > threshold
        if hit:
            matched += max(ious)
            free.pop(ious.index(max(ious)))
        if box and confidence is not None:
            trust += confidence if hit else 1.0 - confidence
    return matched / max(len(expected), len(unique)), trust / len(unique)


def _true_boxes(truth: Any) -> list[Box]:
    if isinstance(truth, str):
        text = final_answer(truth)
        if _NO_OBJECTS.fullmatch(text):
            return []
        boxes = [item.box for item in predictions(text)]
        if not boxes or len(boxes) != len(re.findall("position", text, re.IGNORECASE)):
            raise ValueError('the ground truth is neither {"Position": [x1, y1, x2, y2]}, ... nor "No Objects"')
    elif isinstance(truth, list | tuple):
        boxes = [_box(item.get("Position") if isinstance(item, Mapping) else item) for item in truth]
    else:
        raise ValueError(f"the ground truth is {type(truth).__name__}, neither a text nor a list of boxes")
    return [_with_area(box) for box in boxes]


def _true_box(truth: Any) -> Box:
    return _with_area(first_box(final_answer(truth)) if isinstance(truth, str) else _box(truth))


def _with_area(box: Box | None) -> Box:
    if box is None or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError("the ground truth has a box without four numbers or without an area")
    return box


def _box(numbers: Any) -> Box | None:
    if not isinstance(numbers, list | tuple) or len(numbers) != 4:
        return None
    if not all(isinstance(n, int | float) and -_LARGEST < n < _LARGEST for n in numbers):
        return None
    (x1, x2), (y1, y2) = sorted((numbers[0], numbers[2])), sorted((numbers[1], numbers[3]))
    return float(x1), float(y1), float(x2), float(y2)
