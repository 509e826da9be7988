"""`python -m fastpo.generate CONFIG --out FILE.jsonl`: answers of a model to the prompts of a run's data.

A row holds what the formats `perpo` (after fastpo.score) and `rollout` read, and the keys of the row it came from. With
--questions the model asks, too: rows for `python -m fastpo.score --critic`. The same command goes on where it stopped.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastpo import answers
from fastpo.answers import Row
from fastpo.config import Generation, Run, Source
from fastpo.data.formats.fields import MEDIA_KEYS
from fastpo.data.loader import Feed, Table
from fastpo.fit import make_feed
from fastpo.models.generate import extended, prefilled, respond
from fastpo.models.trained import Opened, open_model
from fastpo.sample import BadSample, Encoded, Sample, Turn

# heliossun/Structure-Policy-Optimization c54303c, llava/eval/visual_qa.py:127-180
SHOTS = 2
QUESTION = {"temperature": 1.2, "top_k": 300, "top_p": 0.95}
ANSWER = {"temperature": 0.75}


def generate(
    run: Run,
    cfg: Generation,
    source: Source | Sequence[Source],
    out: Path,
    *,
    adapter: Path | None,
    count: int,
    questions: bool,
) -> int:
    """Appends a row for each row of source that `out` lacks; returns how many.

    Raises BadSample, ValueError also where `out` was begun with another count.
    """
    feed = make_feed(run, 0, 1)
    table = feed.read(source, keep="all" if questions else "none")
    if questions:
        table = _conversations(feed, table)
    before = answers.finished(out)
    done = answers.keys(before, out)
    for number, row in enumerate(before):
        if row.get("answers_count", count) != count:
            raise ValueError(
                f"--count: {count}, but {out}, row {number}, has {row['answers_count']} answers: take another --out, "
                "or remove the file"
            )
    order = [n for n, sample in enumerate(table.samples) if sample.key not in done]
    if not order:
        return 0
    opened = open_model(run.model, adapter, answers.device())
    prompts = answers.prompts(feed, table, order)
    if questions:
        made = (_explored(opened, sample, prompt, cfg, run) for sample, prompt in prompts)
    else:
        given = answers.source_rows(table.samples[n] for n in order)
        made = (_answered(opened, sample, prompt, given[sample.key], cfg, run, count) for sample, prompt in prompts)
    return answers.append(out, answers.paced(made, len(order), "rows"))


def _answered(
    opened: Opened, sample: Sample, prompt: Encoded, given: Row, cfg: Generation, run: Run, count: int
) -> Row:
    """answers_gen holds the answers that are not empty: no format takes an empty one. answers_count: the others too."""
    if sample.turns:
        raise BadSample(f"{sample.key}: has several turns, which a row of answers cannot hold")
    found = answers.texts(opened, prompt, cfg, count=count, seed=run.seed)
    left_out = {*MEDIA_KEYS, "iou_scores"}
    return {
        **{key: value for key, value in given.items() if value is not None and key not in left_out},
        "key": sample.key,
        "question": sample.question,
        "prompt": sample.question,
        **answers.media_row(sample, run.data.media_root),
        **({} if sample.truth is None else {"truth": sample.truth}),
        "answers_gen": [text for text in found if text.strip()],
        "answers_count": count,
    }


def _conversations(feed: Feed, table: Table) -> Table:
    """Each prompt with its answer as context: that of the row's own turns, or else its best response."""
    samples = []
    for sample in table.samples:
        best = max(sample.responses, key=lambda response: response.score)
        first = sample.turns[0] if sample.turns else Turn(role="assistant", text=best.text)
        samples.append(replace(sample, turns=(first,), responses=()))
    return replace(table, samples=samples, encoded=[feed.encode(sample) for sample in samples])


def _explored(opened: Opened, sample: Sample, prompt: Encoded, cfg: Generation, run: Run) -> Row:
    """Two questions of the model after a conversation, two answers to each: sampler, c1, c2.

    The conversation's keys and values, media included, are computed once.
    """
    model, family, processor = opened.core, opened.family, opened.processor
    chat = processor.chat
    header, mark, between = (
        torch.tensor(chat.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
        for text in (chat.asks_itself, chat.asked, chat.answers)
    )
    if not len(mark):
        raise ValueError(f"model.path: {run.model.path}: its chat template does not mark where a question ends")
    end, seed = int(mark[0]), answers.row_seed(run.seed, sample.key)
    cache = prefilled(model, family, processor, prompt, chunk=opened.chunk)
    asking = extended(prompt, header)
    free = cfg.model_copy(update=QUESTION)
    calm = cfg.model_copy(update={"top_k": 0, "top_p": 1.0, **ANSWER})
    asked = respond(model, family, processor, asking, free, count=SHOTS, seed=seed, end=end, cache=cache)
    pairs = []
    for n, question in enumerate(asked):
        body = question[question != end]
        told = extended(asking, torch.cat([body, mark, between]))
        given = respond(model, family, processor, told, calm, count=SHOTS, seed=seed + n, cache=cache)
        first, second = (answers.decoded(opened, ids).strip() for ids in given)
        pairs.append({"q": answers.decoded(opened, body).strip(), "a1": first, "a2": second})
    return {
        "key": sample.key,
        **answers.media_row(sample, run.data.media_root),
        "sampler": [sample.question, sample.turns[0].text],
        "c1": pairs[0],
        "c2": pairs[1],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.generate", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="also generation.temperature=0 and so on"
    )
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--adapter", type=Path, help="a checkpoint, or an adapter's or a whole model's folder")
    parser.add_argument("--count", type=int, default=1, help="answers to a prompt")
    parser.add_argument("--eval", action="store_true", help="prompts of data.eval instead of data.train")
    parser.add_argument(
        "--questions", action="store_true", help="two questions of the model, two answers to each (SPO)"
    )
    args = parser.parse_intermixed_args(argv)
    try:
        if args.count < 1:
            raise ValueError(f"--count: {args.count}, expected 1 or more")
        run, cfg = answers.configured(args.config, args.overrides)
        source = run.data.eval if args.eval else run.data.train
        if source is None:
            raise ValueError("data.eval: not given")
        made = generate(
            run, cfg, source, args.out, adapter=args.adapter, count=args.count, questions=args.questions
        )  # fmt: skip
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.out}: {made} new rows")


if __name__ == "__main__":
    main()
