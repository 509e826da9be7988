"""`python -m fastpo.score ROWS OUT --reward NAME | --critic FOLDER_OR_URL`: scores for what fastpo.generate sampled.

--reward fills iou_scores of rows with answers_gen and a ground truth, for the format `perpo`. --critic lets another
model rate the questions and answers of --questions, for the format `spo`; a pair that it does not tell apart, or rates
in a way that cannot be read, decides nothing: its row goes to OUT's .dropped.jsonl with the reason. The same command
goes on where it stopped. Names of models are folders of a supported family, or an OpenAI-compatible endpoint's.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpo import answers, endpoint, rewards
from fastpo.answers import Row
from fastpo.config import Generation, Model
from fastpo.data import formats
from fastpo.data.formats import fields
from fastpo.data.phrases import TAG
from fastpo.models.trained import open_model
from fastpo.sample import Sample, Sampling

Critic = Callable[[Sample], str]
HIGHEST = 10.0
_RATINGS = re.compile(r"[\s\[(]*(\d+(?:\.\d+)?)(?:\s*[,;]\s*|\s+)(\d+(?:\.\d+)?)[\s\]).]*")

QUESTIONS = """Somebody looked at what is shown above and asked: {q0}
The answer was: {a0}
Here are two questions that could come next. Rate each from 0 to 10: it should be clear, be about what is shown, and
need a close look or some thought.
Question 1: {first}
Question 2: {second}
Reply with one line that holds both ratings, first that of question 1, then that of question 2, and nothing else."""
ANSWERS = """Here are two answers to a question about what is shown above. Rate each from 0 to 10: it should be true to
what is shown, answer the question, and leave out nothing that matters.
Question: {q}
Answer 1: {first}
Answer 2: {second}
Reply with one line that holds both ratings, first that of answer 1, then that of answer 2, and nothing else."""


def scored(rows: Sequence[Any], path: str, terms: Sequence[rewards.Term], truth: str) -> Iterator[Row]:
    """The rows with iou_scores: for each text of answers_gen, whatever it holds, the rewards' weighted sum against
    row[truth].

    Raises BadSample with file, row and key for a row that lacks either, or that a reward cannot read.
    """
    for number, row in enumerate(rows):
        where = f"{path}:{number}"
        if row.get(truth) is None:
            raise fields.bad(where, truth, "missing, and the scores are measured against it")
        texts = fields.any_texts(row, where, "answers_gen")
        scores = [rewards.total(terms, text, row[truth], where=where, key=truth)[0] for text in texts]
        yield {**{key: value for key, value in row.items() if value is not None}, "iou_scores": scores}


def ranked(row: Row, where: str, media_root: Path, critic: Critic) -> Row | str:
    """c_pref, c_rej and score of a row with sampler, c1 and c2; or why the critic decides nothing.

    Raises BadSample for a row without them.
    """
    media = fields.media_list(row, where, media_root)
    said = fields.texts({"sampler": [_bare(text) for text in row.get("sampler") or ()]}, where, "sampler")
    if len(said) != 2:
        raise fields.bad(where, "sampler", f"expected a question and its answer, got {len(said)} texts")

    def rate(text: str) -> tuple[float, float] | None:
        question = fields.question(text, media, where, "sampler")
        return ratings(critic(Sample(key=where, question=question, media=media, responses=())))

    pairs = []
    for name in ("c1", "c2"):
        given = fields.inner(row, where, name)
        pairs.append({key: _bare(fields.text(given, where, key)) for key in ("q", "a1", "a2")})
    if pairs[0]["q"] == pairs[1]["q"] or not all(pair["q"] for pair in pairs):
        return "questions: equal or empty"
    asked = rate(QUESTIONS.format(q0=said[0], a0=said[1], first=pairs[0]["q"], second=pairs[1]["q"]))
    if asked is None or asked[0] == asked[1]:
        return "questions: " + ("unreadable" if asked is None else "tie")
    if asked[0] < asked[1]:
        pairs, asked = pairs[::-1], asked[::-1]
    better, scores = [], [list(asked)]
    for pair, name in zip(pairs, ("better", "worse"), strict=True):
        if pair["a1"] == pair["a2"] or not pair["a1"] or not pair["a2"]:
            return f"answers to the {name} question: equal or empty"
        found = rate(ANSWERS.format(q=pair["q"], first=pair["a1"], second=pair["a2"]))
        if found is None or found[0] == found[1]:
            return f"answers to the {name} question: " + ("unreadable" if found is None else "tie")
        order = ("a1", "a2") if found[0] > found[1] else ("a2", "a1")
        better.append({"q": pair["q"], "a_w": pair[order[0]], "a_l": pair[order[1]]})
        scores.append(sorted(found, reverse=True))
    kept = {key: row[key] for key in ("key", "media_path", "sampler") if row.get(key) is not None}
    return {**kept, "c_pref": better[0], "c_rej": better[1], "score": scores}


def ratings(reply: str) -> tuple[float, float] | None:
    """The two numbers of a reply's first line, each from 0 to 10; None where it holds anything else."""
    found = _RATINGS.fullmatch(reply.lstrip().partition("\n")[0])
    if found is None or max(map(float, found.groups())) > HIGHEST:
        return None
    return float(found[1]), float(found[2])


def local_critic(cfg: Model, sampling: Sampling) -> Critic:
    """A critic that answers with its likeliest tokens."""
    opened = open_model(cfg, None, answers.device())
    encode, pixels = opened.family.encode, opened.family.pixels

    def ask(sample: Sample) -> str:
        prompt = encode(opened.processor, sample, sampling)
        prompt = replace(prompt, pixels=pixels(opened.processor, sample, sampling))
        greedy = Generation(temperature=0, max_tokens=32)
        return answers.texts(opened, prompt, greedy, count=1, seed=0)[0]

    return ask


def rank(path: str, out: Path, media_root: Path, critic: Critic) -> Counter[str]:
    """Appends what the critic decides of rows that `out` and its .dropped.jsonl lack; counts of "kept" and reasons."""
    dropped = out.with_suffix(".dropped.jsonl")
    before = answers.finished(dropped)
    kept = answers.finished(out)
    done = answers.keys(kept, out) | answers.keys(before, dropped)
    given = formats.rows(path)
    answers.keys(given, Path(path))
    order = [n for n, row in enumerate(given) if row["key"] not in done]
    counts = Counter(row["reason"] for row in before)
    counts["kept"] = len(kept)
    for n in answers.paced(order, len(order), "rows"):
        found = ranked(given[n], f"{path}:{n}", media_root, critic)
        if isinstance(found, str):
            answers.append(dropped, [{"key": given[n]["key"], "reason": found}])
        else:
            answers.append(out, [found])
        counts[found if isinstance(found, str) else "kept"] += 1
    return counts


def _bare(text: str) -> str:
    return TAG.sub("", fields.PLACEHOLDER.sub("", text)).strip()


def _critic(args: argparse.Namespace) -> Critic:
    sampling = Sampling(frames=args.frames)
    if args.critic.startswith(("http://", "https://")):
        if args.model is None:
            raise ValueError("--model: an endpoint needs the name of a model")
        key = args.api_key_file.read_text().strip() if args.api_key_file else None
        return endpoint.critic(args.critic, args.model, key, sampling)
    cfg = {"path": args.critic, "family": args.family, "dtype": args.dtype, "lora": None}
    return local_critic(Model.model_validate(cfg), sampling)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.score", description=__doc__)
    parser.add_argument("rows", help="what fastpo.generate wrote")
    parser.add_argument("out", type=Path, help="a .jsonl file")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--reward", nargs="+", help="rewards, or '{name: ocr, ignore_case: true, weight: 2}'; they add up")
    how.add_argument("--critic", metavar="FOLDER_OR_URL", help="a model folder, or an endpoint such as http://host/v1")
    parser.add_argument("--truth", default="truth", help="the key that holds the ground truth, for --reward")
    parser.add_argument("--media-root", type=Path, default=Path("."), help="where media paths start, for --critic")
    parser.add_argument("--frames", type=int, default=16, help="that the critic sees of a video")
    parser.add_argument("--family", default="llava_onevision", help="of the critic's folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the critic's folder")
    parser.add_argument("--model", help="the model's name, at an endpoint")
    parser.add_argument("--api-key-file", type=Path, help="a file that holds the endpoint's key")
    args = parser.parse_args(argv)
    try:
        if args.reward:
            terms = rewards.terms(answers.plugins(args.reward, "--reward"), key="--reward")
            made = list(scored(formats.rows(args.rows), args.rows, terms, args.truth))
            args.out.unlink(missing_ok=True)  # all or nothing: scoring takes seconds
            print(f"{args.out}: {answers.append(args.out, made)} rows")
            return
        critic = _critic(args)
        counts = rank(args.rows, args.out, args.media_root, critic)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.out}: " + ", ".join(f"{n} {reason}" for reason, n in counts.most_common()))


if __name__ == "__main__":
    main()
