"""Formats of prompts with a ground truth, for answers that are sampled from the policy and scored by rewards."""

import re
from pathlib import Path

from fastpo.data.formats import fields
from fastpo.data.formats.fields import Row, bad
from fastpo.sample import Sample

_IMG = re.compile(r"<img>(.*?)</img>\s*", re.DOTALL)


def rollout(row: Row, where: str, media_root: Path, *, prompt: str = "prompt", truth: str = "truth") -> Sample:
    """A prompt, its ground truth (anything that the rewards read) and media as in dpo. The sample has no responses.

    prompt, truth: the keys that hold them. A prompt is a text or a conversation of one user message. A row without a
    truth is BadSample: a learned reward alone needs none, then set truth to "".
    """
    media = fields.media_list(row, where, media_root)
    question = fields.question(fields.spoken(row, where, prompt, "user"), media, where, prompt)
    found = row.get(truth) if truth else None
    if truth and (found is None or found == ""):
        raise bad(where, truth, "missing")
    return Sample(key=where, question=question, media=media, responses=(), truth=found)


def visual_rft(row: Row, where: str, media_root: Path) -> Sample:
    """Visual-RFT's rows: image, problem, solution; or LISA's: conversations with <img>path</img> in the question.

    The solution becomes truth as it is, tags and all; LISA's box as "<answer> box </answer>" (grpo_lisa.py of
    Liuziyu77/Visual-RFT 9486633). image is a path; data sets of the hub that hold pictures need them written to files.
    """
    if row.get("conversations") is None:
        return rollout(row, where, media_root, prompt="problem", truth="solution")
    said = row["conversations"]
    texts = [turn.get("value") or turn.get("content") for turn in said] if isinstance(said, list) else []
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise bad(where, "conversations", "expected a question and its answer")
    paths = _IMG.findall(texts[0])
    bare = {"images": [*paths], "problem": _IMG.sub("<image>\n", texts[0])}
    return rollout(
        bare | {"solution": f"<answer> {texts[1]} </answer>"}, where, media_root, prompt="problem", truth="solution"
    )
