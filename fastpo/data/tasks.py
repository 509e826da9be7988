"""One built-in data set for each objective, in its authors' own format, and the model that learns from them.

Clips come in quads, two colours by two shapes, and each quad makes the same rows about each of its clips. So every
answer is the better one as often as the worse one, whatever the text around it: a predictor that sees no picture is at
chance.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from fastpo.data.synthetic import (
    COLOURS,
    DIRECTIONS,
    QUESTIONS,
    SHAPES,
    Event,
    describe,
    encode,
    render,
    whole,
    write_model,
)  # fmt: skip

Row = dict[str, Any]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2

COLOUR = QUESTIONS["colour"]
CAPTION = "What is in the picture?"
CLASSIFY = "What colour is the shape? Answer with one word."
SEVERAL = "Image 1: <image>\nImage 2: <image>\nWhat colour is the shape in image 2?"
LOOK, SEEN = "What happens in the video?", "A shape moves."
ABOUT, SEE = "Where is the {} shape?", "I see a {} shape."
FEW = 4  # quads in llava's files: rows to be learned by heart
MOVES = "And how does it move?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """clip: the video; still: its first frame; both relative to the folder. other: what the rest of the quad shows."""

    event: Event
    other: Event  # of another colour and another shape
    clip: str
    still: str
    box: Box  # of the shape in the still


Quad = tuple[Clip, Clip, Clip, Clip]  # colours by shapes: clips 0 and 2 differ in the colour alone, and so do 1 and 3
Rows = Callable[[Quad, random.Random], Iterator[Row]]


def write(folder: Path, seed: int, *, train: int = 80, test: int = 16) -> None:
    """Writes folder/model/, clips/, stills/ and <name>_train.json, <name>_test.json for each name of ROWS.

    train, test: quads, four clips each, of which llava takes FEW. Everything follows from the seed and the two numbers.
    Media paths are relative to the folder, which appears whole or not at all. Raises ValueError where it is there.
    """
    with whole(folder, seed=seed, train=train, test=test) as unfinished:
        write_tables(unfinished, ROWS, seed, train=train, test=test)
        write_model(unfinished / "model", seed, sentences())


def write_tables(folder: Path, tables: Mapping[str, Rows], seed: int, *, train: int, test: int) -> None:
    """clips/, stills/ and both files of each name of `tables`, see write."""
    for name in ("clips", "stills"):
        (folder / name).mkdir()
    for split, count in (("train", train), ("test", test)):
        rng = random.Random(f"tasks {split} {seed}")
        quads = [_quad(folder, rng, f"{split}{number:03d}") for number in range(count)]
        for name, rows in tables.items():
            used = quads[:FEW] if rows is llava else quads
            table = [row for quad in used for row in rows(quad, rng)]
            (folder / f"{name}_{split}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _quad(folder: Path, rng: random.Random, name: str) -> Quad:
    colours, shapes = rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2)
    direction = rng.choice(list(DIRECTIONS))
    made = []
    for number, (c, s) in enumerate(product((0, 1), repeat=2)):
        event = Event(colour=colours[c], shape=shapes[s], direction=direction)
        other = Event(colour=colours[1 - c], shape=shapes[1 - s], direction=direction)
        clip, still = f"clips/{name}{number}.mp4", f"stills/{name}{number}.png"
        frames = render((event,), rng)
        encode(folder / clip, frames)
        Image.fromarray(frames[0]).save(folder / still)
        made.append(Clip(event=event, other=other, clip=clip, still=still, box=_box(frames[0])))
    return tuple(made)  # pyright: ignore[reportReturnType]


def _box(frame: np.ndarray) -> Box:
    """Around the shape in [h, w, 3] uint8. The background is nearly grey."""
    y, x = np.nonzero(np.ptp(frame.astype(int), axis=-1) > 60)
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def caption(colour: str, shape: str) -> str:
    return f"A {colour} {shape}."


def _graded(clip: Clip) -> dict[str, float]:
    """Four captions with the share that is right of them: two thirds for the colour, one for the shape."""
    mine, other = clip.event, clip.other
    return {
        caption(mine.colour, mine.shape): 1.0,
        caption(mine.colour, other.shape): 0.67,
        caption(other.colour, mine.shape): 0.33,
        caption(other.colour, other.shape): 0.0,
    }


def colour_said(event: Event, colour: str) -> str:
    """The answer to QUESTIONS["colour"] about a clip, right or not."""
    return describe("colour", (event,)).replace(f"<MASK> {event.colour} </MASK>", colour)


def dpo(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """Pairs about a video: its colour, or the other one."""
    for c in quad:
        yield {
            "video": c.clip,
            "prompt": f"<video>\n{COLOUR}",
            "chosen": colour_said(c.event, c.event.colour),
            "rejected": colour_said(c.event, c.other.colour),
        }


def rrpo(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """The same with the phrases that differ marked."""
    for c, row in zip(quad, dpo(quad, rng), strict=True):
        answer, pred = row["chosen"], row["rejected"]
        yield {
            "media_path": c.clip,
            "question": f"<image>\n{COLOUR}",
            "answer": answer,
            "pred": pred,
            "answer_masked": answer.replace(f" {c.event.colour}.", f" <MASK> {c.event.colour} </MASK>."),
            "pred_masked": pred.replace(f" {c.other.colour}.", f" <MASK> {c.other.colour} </MASK>."),
        }


def perpo(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """Four captions of a picture in any order, and how right each is."""
    for c in quad:
        graded = rng.sample(list(_graded(c).items()), 4)
        yield {
            "image_path": c.still,
            "question": f"<image>\n{CAPTION}",
            "answers_gen": [text for text, _ in graded],
            "iou_scores": [score for _, score in graded],
        }


def ranked(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """The same captions, best first."""
    for c in quad:
        said = [{"from": "human", "value": f"<image>\n{CAPTION}"}, {"from": "gpt", "value": list(_graded(c))}]
        yield {"image": c.still, "conversations": said}


def spo(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """A better question is about the shape in the video, a worse one about one that is not there."""
    for c in quad:
        mine, other = c.event.colour, c.other.colour
        answers = {"a_w": SEE.format(mine), "a_l": SEE.format(other)}
        yield {
            "video": c.clip,
            "sampler": [f"<image>\n{LOOK}", SEEN],
            "c_pref": {"q": ABOUT.format(mine)} | answers,
            "c_rej": {"q": ABOUT.format(other)} | answers,
        }


def mia(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """Two pictures that differ in the colour, in either order; the worse answer is right about the wrong one."""
    for place in range(4):
        first, second = quad[place], quad[place - 2]
        yield {
            "image": [first.still, second.still],
            "prompt": SEVERAL,
            "chosen": second.event.colour,
            "rejected": first.event.colour,
        }


def words(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """Pairs of one-word answers, for the reward model of PPO."""
    for c in quad:
        prompt = f"<image>\n{CLASSIFY}"
        yield {"image": c.still, "prompt": prompt, "chosen": c.event.colour, "rejected": c.other.colour}


def visual_rft(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """Prompts with the class that is to be named."""
    for c in quad:
        yield {"image": c.still, "problem": CLASSIFY, "solution": f"<answer>{c.event.colour}</answer>"}


def llava(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """Conversations of two turns about a video."""
    for c in quad:
        answer = f"It moves {c.event.direction}."
        texts = [COLOUR, colour_said(c.event, c.event.colour), MOVES, answer]
        yield {"video": c.clip, "conversations": conversation(*texts)}


def warmup(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """What the other rows ask, so that the model has words for what it sees. Where they ask for one word the label is
    random: an answer is one of the colours and right by chance.
    """
    for c, several in zip(quad, mia(quad, rng), strict=True):
        still, video = {"image": c.still}, {"video": c.clip}
        asked, seen = ABOUT.format(rng.choice((c.event, c.other)).colour), SEE.format(c.event.colour)
        for media, *said in (
            (still, CAPTION, caption(c.event.colour, c.event.shape)),
            (video, COLOUR, colour_said(c.event, c.event.colour)),
            (video, LOOK, SEEN, asked, seen),
            (still, CLASSIFY, rng.choice(list(COLOURS))),
            ({"image": several["image"]}, several["prompt"], several["chosen"]),
        ):
            yield media | {"conversations": conversation(*said)}


def conversation(*texts: str) -> list[dict[str, str]]:
    """A question without placeholders has them put first by the reader."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


ROWS = MappingProxyType(
    {
        "warmup": warmup,
        "llava": llava,
        "dpo": dpo,
        "rrpo": rrpo,
        "perpo": perpo,
        "ranked": ranked,
        "spo": spo,
        "mia": mia,
        "words": words,
        "visual_rft": visual_rft,
    }
)


def sentences() -> list[str]:
    """Every sentence of the rows above, for the tokenizer."""
    found = [CAPTION, CLASSIFY, SEVERAL, LOOK, SEEN, MOVES, *COLOURS]
    found += [caption(*pair) for pair in product(COLOURS, SHAPES)]
    found += [text.format(colour) for text in (ABOUT, SEE) for colour in COLOURS]
    return found + [f"It moves {direction}." for direction in DIRECTIONS]
