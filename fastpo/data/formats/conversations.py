"""Formats with several turns: LLaVA's conversations, ranked answers behind one, SPO's questions and answers."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fastpo.data.formats import fields
from fastpo.data.formats.fields import Row, bad
from fastpo.sample import Media, Response, Sample, Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def llava(row: Row, where: str, media_root: Path, *, sq_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0) -> Sample:
    """LLaVA's rows for supervised training: conversations [{from: human | gpt, value}], image or video (or a list).

    The sample has one response: the first answer, with all later turns in Response.turns. Every assistant turn is
    trained and sees all turns before it, as in one sequence; user turns are context. With sq_ratio, a user turn after
    the first is trained as well with that probability, drawn from the row's place in its file (SPO's self-questioning
    stage, train.py:639-724 of c54303c, which draws 0.3 anew each time).
    image may name several files with commas (Vision-LLM-Alignment). Placeholders belong into the first turn. A system
    turn, a last user turn without an answer, or turns out of order are BadSample.
    """
    media = _media(row, where, media_root)
    said = _conversation(row, where)
    if len(said) % 2:
        raise bad(where, "conversations", "the last turn has no answer")
    question = fields.question(_spoken(said[0], where), media, where, "conversations")
    first, *rest = (fields.plain(_spoken(turn, where), where, "conversations") for turn in said[1:])
    draw = random.Random(where.rpartition(":")[2])
    turns = [Turn(role="assistant", text=t, trained=True) for t in rest]
    for place in range(0, len(rest), 2):
        turns[place] = Turn(role="user", text=rest[place], trained=draw.random() < sq_ratio)
    answer = Response(text=first, score=1.0, turns=tuple(turns))
    return Sample(key=where, question=question, media=media, responses=(answer,))


def ranked(row: Row, where: str, media_root: Path) -> Sample:
    """Vision-LLM-Alignment's rows: as llava's, with a list of answers, best first, as the value of the last turn.

    K answers score K - 1 down to 0. Turns before the last question are context, in Sample.turns. Raises BadSample for
    fewer than two answers or equal ones.
    """
    media = _media(row, where, media_root)
    *said, last = _conversation(row, where)
    if not said or len(said) % 2 == 0:
        raise bad(where, "conversations", "expected a question and then the list of its answers")
    question = fields.question(_spoken(said[0], where), media, where, "conversations")
    turns = _context(said[1:], where)
    answers = fields.texts({"conversations": last.get("value")}, where, "conversations")
    if len(answers) < 2:
        raise bad(where, "conversations", f"{len(answers)} answers, a preference needs two")
    if len({text.strip() for text in answers}) < len(answers):
        raise bad(where, "conversations", "two answers are the same, there is no preference")
    responses = tuple(Response(text=t, score=float(len(answers) - 1 - n)) for n, t in enumerate(answers))
    return Sample(key=where, question=question, media=media, responses=responses, turns=turns)


def spo(row: Row, where: str, media_root: Path) -> Sample:
    """SPO's rows: video or image, sampler [Q0, A0], c_pref and c_rej {q, a_w, a_l}, optional score [[s, s]] * 3.

    The prompt is Q0 and A0 (in Sample.turns). Six responses, in the order that the loss spo reads, parents None, 0, 0,
    None, 3, 3: the better question, its better and worse answer, the worse question, its better and worse answer.
    Questions have role "user". The better of each pair scores 1, the worse 0. "<image>" is left out of both questions.
    Raises BadSample for a pair that the critic scored equal (or -1, a score that could not be read): the authors'
    labelling prefers the second item then (heliossun/Structure-Policy-Optimization c54303c, llava-ov-72b.py:171-200).
    """
    media = fields.media_list(row, where, media_root)
    sampler = row.get("sampler")
    if not isinstance(sampler, list) or len(sampler) != 2 or not all(isinstance(text, str) for text in sampler):
        raise bad(where, "sampler", f"expected a question and its answer, got {sampler!r:.80}")
    question = fields.question(sampler[0], media, where, "sampler")
    context = Turn(role="assistant", text=fields.plain(sampler[1], where, "sampler"))
    _no_ties(row, where)
    responses = [
        *_branch(fields.inner(row, where, "c_pref"), where, "c_pref", score=1.0, place=0),
        *_branch(fields.inner(row, where, "c_rej"), where, "c_rej", score=0.0, place=3),
    ]
    fields.differ(responses[0], responses[3], where, "c_rej.q")
    return Sample(key=where, question=question, media=media, responses=tuple(responses), turns=(context,))


def _branch(row: Row, where: str, name: str, *, score: float, place: int) -> list[Response]:
    texts = {key: fields.text({f"{name}.{key}": row.get(key)}, where, f"{name}.{key}") for key in ("q", "a_w", "a_l")}
    texts["q"] = fields.PLACEHOLDER.sub("", texts["q"]).strip()
    plain = {key: fields.plain(text, where, f"{name}.{key}") for key, text in texts.items()}
    asked = Response(text=plain["q"], score=score, role="user")
    better, worse = (Response(text=plain[key], score=s, parent=place) for key, s in (("a_w", 1.0), ("a_l", 0.0)))
    fields.differ(better, worse, where, f"{name}.a_l")
    return [asked, better, worse]


def _no_ties(row: Row, where: str) -> None:
    given = row.get("score")
    if given is None:
        return
    if not isinstance(given, list) or len(given) != 3 or not all(isinstance(p, list) and len(p) == 2 for p in given):
        raise bad(where, "score", f"expected three pairs of numbers, got {given!r:.80}")
    for name, pair in zip(("questions", "answers to the first", "answers to the second"), given, strict=True):
        low, high = sorted(fields.numbers({"score": pair}, where, "score"))
        if low == high or low < 0:
            raise bad(where, "score", f"{name}: {pair} is no preference")


def _media(row: Row, where: str, media_root: Path) -> tuple[Media, ...]:
    image = row.get("image")
    several = [name.strip() for name in image.split(",")] if isinstance(image, str) and "," in image else image
    return fields.media_list({**row, "image": several}, where, media_root)


def _conversation(row: Row, where: str) -> Sequence[Row]:
    said = row.get("conversations")
    if not isinstance(said, list) or len(said) < 2 or not all(isinstance(turn, dict) for turn in said):
        raise bad(where, "conversations", "missing" if said is None else "expected a list of two turns or more")
    for place, turn in enumerate(said):
        wanted = "assistant" if place % 2 else "user"
        if ROLES.get(turn.get("from") or turn.get("role")) != wanted:
            raise bad(where, "conversations", f"turn {place} is from {turn.get('from')!r}, expected {wanted}")
    return said


def _spoken(turn: Row, where: str) -> str:
    value: Any = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if not isinstance(value, str):
        raise bad(where, "conversations", f"expected text, got {type(value).__name__}")
    return value


def _context(said: Sequence[Row], where: str) -> tuple[Turn, ...]:
    texts = (fields.plain(_spoken(turn, where), where, "conversations") for turn in said)
    return tuple(Turn(role="user" if n % 2 else "assistant", text=text) for n, text in enumerate(texts))
