"""Rewards of a generated answer against the ground truth: pure functions, listed in REWARDS.

A reward is `reward(answer, truth, *, options) -> float`. answer is the whole completion, truth what the row says. It is
finite for every answer, however malformed; it raises ValueError for a truth that it cannot read. `variant: released`
computes what the code of Liuziyu77/Visual-RFT (9486633) computes, its accidents included.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from fastpo.config import Plugin
from fastpo.data.formats import bad
from fastpo.plugins import resolve
from fastpo.rewards.boxes import box_iou, detection_confidence, detection_iou, grounding
from fastpo.rewards.tags import agent_code, format_tags
from fastpo.rewards.text import classification, exact, multiple_choice, numeric, ocr, symbolic, token_f1

Reward = Callable[[str, Any], float]
REWARDS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        "agent_code": agent_code,
        "box_iou": box_iou,
        "classification": classification,
        "detection_confidence": detection_confidence,
        "detection_iou": detection_iou,
        "exact": exact,
        "format": format_tags,
        "grounding": grounding,
        "multiple_choice": multiple_choice,
        "numeric": numeric,
        "ocr": ocr,
        "symbolic": symbolic,
        "token_f1": token_f1,
    }
)


class Term(NamedTuple):
    """One summand of a total reward."""

    name: str
    reward: Reward
    weight: float = 1.0


def terms(plugins: Sequence[Plugin], *, key: str = "rewards") -> tuple[Term, ...]:
    """Resolves [{name, weight: 1.0, the reward's options}, ...]; a reward of one's own is "package.module:function".

    Raises ValueError naming the key for an unknown reward or option, or a weight that is no finite number.
    """
    found = []
    for number, plugin in enumerate(plugins):
        where, options = f"{key}.{number}", plugin.options
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"{where}.weight: expected a finite number, got {weight!r}")
        plain = Plugin.model_validate({"name": plugin.name, **options})
        found.append(Term(plugin.name, resolve(REWARDS, plain, key=where), float(weight)))
    return tuple(found)


def total(
    summands: Sequence[Term], answer: str, truth: Any, *, where: str, key: str = "truth"
) -> tuple[float, dict[str, float]]:
    """The weighted sum, and each reward by name before its weight (of equal names, the sum). where: "file:row".

    Raises BadSample with the row and key, that of the truth, if a reward raises (a package that is missing: as it is)
    or is not finite: scoring 0 instead would train the model on the mistake.
    """
    values: dict[str, float] = {}
    score = 0.0
    for name, reward, weight in summands:
        try:
            value = float(reward(answer, truth))
        except ImportError:
            raise
        except Exception as error:  # a reward of one's own may raise anything
            raise bad(where, key, f"reward {name}: {error or type(error).__name__} (truth: {truth!r:.80})") from error
        if not math.isfinite(value):
            raise bad(where, key, f"reward {name} is {value} for the answer {answer!r:.80}")
        values[name] = values.get(name, 0.0) + value
        score += weight * value
    return score, values
