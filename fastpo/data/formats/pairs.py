"""Formats of scored answers to one question: RRPO, DPO, MIA-DPO, PerPO."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fastpo.data.formats import fields
from fastpo.data.formats.fields import PLACEHOLDER, Row, bad
from fastpo.data.phrases import strip_tags
from fastpo.sample import BadSample, Response, Sample


def rrpo(row: Row, where: str, media_root: Path, *, require_phrases: bool = True) -> Sample:
    """RRPO's own rows: question, answer, pred, answer_masked, pred_masked, media_path (or video, as in their docs).

    The answer scores 1, pred 0. require_phrases: both sides need a <MASK> phrase (the authors leave other rows out);
    without it the two masked keys may be missing. Facts: pritamqu/RRPO a905573, train_llavavideo.py:1141-1178, 1348.
    """
    key = "video" if row.get("media_path") is None and row.get("video") is not None else "media_path"
    media = (fields.media(fields.text(row, where, key), where, key, media_root),)
    question = fields.text(row, where, "question")
    if len(PLACEHOLDER.findall(question)) == 1 and not PLACEHOLDER.match(question):
        # a lone placeholder goes first, as in preprocess_multimodal, train_llavavideo.py:414-417
        question = f"<video>\n{PLACEHOLDER.sub('', question).strip()}"
    question = fields.question(question, media, where, "question")
    answer = fields.response(fields.text(row, where, "answer"), where, "answer", score=1.0)
    pred = fields.response(fields.text(row, where, "pred"), where, "pred", score=0.0)
    responses = (
        replace(answer, tagged=_tagged(answer.text, row, where, "answer_masked", required=require_phrases)),
        replace(pred, tagged=_tagged(pred.text, row, where, "pred_masked", required=require_phrases)),
    )
    fields.differ(answer, pred, where, "pred")
    return Sample(key=where, question=question, media=media, responses=responses)


def videochat2(row: Row, where: str, media_root: Path) -> Sample:
    """RRPO's rows for VideoChat2: video, QA (preferred) and QA_NEG, each a list of one {"i", "q", "a"}.

    i, an instruction, comes before the question q; both sides have the same. Phrases are the tokens in which the
    answers differ. Lists of several turns are refused: the authors shuffle each side on its own, so that the sides
    share no prompt. "start" and "end" are not read, as in their training. Facts: pritamqu/RRPO a905573,
    videochat2/data.py:75-150, videochat2/dataset/it_dataset_mistral.py:74-104.
    """
    media = fields.media_list(row, where, media_root)
    asked, answers = [], []
    for key, score in (("QA", 1.0), ("QA_NEG", 0.0)):
        turns = row.get(key)
        if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], Mapping):
            raise bad(where, key, f"expected a list of one turn, got {turns!r:.80}")
        turn = {"i": "", **turns[0]}
        asked.append(" ".join(filter(None, (fields.text(turn, where, name).strip() for name in ("i", "q")))))
        answers.append(fields.response(fields.text(turn, where, "a"), where, f"{key}.a", score=score))
    if asked[0] != asked[1]:
        raise bad(where, "QA_NEG", f"asks {asked[1]!r:.80}, QA {asked[0]!r:.80}")
    question = fields.question(asked[0], media, where, "QA.q")
    fields.differ(answers[0], answers[1], where, "QA_NEG.a")
    return Sample(key=where, question=question, media=media, responses=tuple(answers), phrases="different")


def dpo(row: Row, where: str, media_root: Path) -> Sample:
    """Pairs: prompt (or question), chosen, rejected, and media_path, video(s) or image(s): one path or a list.

    prompt, chosen and rejected are texts, or TRL's conversations: one user message, one assistant message, with a text
    or a list of parts ({"type": "text" | "image" | "video"}) as content.
    """
    key = "question" if row.get("prompt") is None and row.get("question") is not None else "prompt"
    media = fields.media_list(row, where, media_root)
    question = fields.question(fields.spoken(row, where, key, "user"), media, where, key)
    chosen = fields.response(fields.spoken(row, where, "chosen", "assistant"), where, "chosen", score=1.0)
    rejected = fields.response(fields.spoken(row, where, "rejected", "assistant"), where, "rejected", score=0.0)
    fields.differ(chosen, rejected, where, "rejected")
    return Sample(key=where, question=question, media=media, responses=(chosen, rejected))


def _tagged(plain: str, row: Row, where: str, key: str, *, required: bool) -> str | None:
    if row.get(key) is None and not required:
        return None
    tagged = fields.text(row, where, key)
    try:
        text, phrases = strip_tags(tagged)
    except BadSample as error:
        raise bad(where, key, str(error)) from None
    if "".join(text.split()) != "".join(plain.split()):
        raise bad(where, key, f"differs from {key.removesuffix('_masked')} in more than tags and white space")
    if required and not phrases:
        raise bad(where, key, "no <MASK> phrase")
    return tagged


def mia(row: Row, where: str, media_root: Path) -> Sample:
    """MIA-DPO's rows: image (a path or a list), prompt, chosen, rejected.

    Placeholders are <image> or <image-placeholder>, as its mining scripts save them. A lone path puts the image
    first, a list keeps the places (Liuziyu77/MIA-DPO a85c51a, run_dpo.py:543).
    """
    prompt = fields.text(row, where, "prompt").replace("<image-placeholder>", "<image>")
    if isinstance(row.get("image"), str) and len(PLACEHOLDER.findall(prompt)) == 1:
        prompt = f"<image>\n{PLACEHOLDER.sub('', prompt).strip()}"
    return dpo({**row, "prompt": prompt}, where, media_root)


def perpo(
    row: Row,
    where: str,
    media_root: Path,
    *,
    first: Annotated[int, Field(ge=2)] | None = None,
    scores: str = "iou_scores",
) -> Sample:
    """PerPO's rows: question, answers_gen (N texts), iou_scores (N numbers), image_path or another media key.

    first: read so many candidates only (the authors' best_of_n: 20 for boxes, 5 for OCR), of rows that may have more.
    scores: the key that holds them. Any order; equal scores are kept, and the loss gives such pairs no weight. A
    candidate's "</s>" is left out. Raises BadSample for lists of different length, fewer than two candidates, scores
    that are not finite. Facts: ningerhhh/PerPO e39a24a, train_perpo_lora.py:307-350, whose loop reads the scores of row
    best_of_n - 1 for every row; here each row has its own.
    """
    media = fields.media_list(row, where, media_root)
    question = fields.question(fields.text(row, where, "question"), media, where, "question")
    given = row.get("answers_gen")
    if isinstance(given, list):
        given = [text.replace("</s>", "") if isinstance(text, str) else text for text in given]
    answers = fields.texts({"answers_gen": given}, where, "answers_gen")
    values = fields.numbers(row, where, scores)
    if len(answers) != len(values):
        raise bad(where, scores, f"{len(values)} scores for {len(answers)} answers_gen")
    if len(answers) < 2:
        raise bad(where, "answers_gen", f"{len(answers)} candidates, a preference needs two")
    if first is not None and len(answers) < first:
        raise bad(where, "answers_gen", f"{len(answers)} candidates, fewer than first: {first}")
    kept = [Response(text=t, score=s) for t, s in zip(answers, values, strict=True)][:first]
    return Sample(key=where, question=question, media=media, responses=tuple(kept))
