"""What each recipe of configs/ reads, in small: its data format and a model of its family."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from fastpo.data import tasks
from fastpo.data.synthetic import COLOURS, SIZE, Family, whole, write_model
from fastpo.data.tasks import CAPTION, COLOUR, SEVERAL, Box, Quad, Row, Rows, caption, colour_said, conversation
from fastpo.rewards.boxes import iou
from fastpo.rewards.text import ocr

WHERE = "Where is the {} {}? Answer with its box."
THINK = "Think in <think> </think>, then answer in <answer> </answer>."
NAME, DETECT, GROUND = (f"{task} {THINK}" for task in ("Name the colour.", "Detect the {}.", "Find the {}."))
THOUGHT = "<think> I look at the shape. </think>\n<answer>{}</answer>"


def write(folder: Path, seed: int, *, train: int = 8, test: int = 4) -> None:
    """As tasks.write, with the tables of ROWS, and a model of each family of TAUGHT in a folder of its name."""
    with whole(folder, seed=seed, train=train, test=test) as unfinished:
        tasks.write_tables(unfinished, ROWS, seed, train=train, test=test)
        box = (0, 0, 0, 0)
        texts = [*tasks.sentences(), WHERE, NAME, DETECT, GROUND, THOUGHT, _objects(box), _corners(box)]
        for family in TAUGHT:
            write_model(unfinished / family, seed, texts, family)


def boxes(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """PerPO on RefCOCO: twenty boxes for a shape, and their overlap with the true one."""
    for c in quad:
        found = {str([*box]): round(iou(box, c.box), 4) for box in (c.box, *(_near(c.box, rng) for _ in range(60)))}
        graded = rng.sample(list(found.items())[:20], 20)
        yield {
            "image_path": c.still,
            "question": f"<image>\n{WHERE.format(c.event.colour, c.event.shape)}",
            "answers_gen": [text for text, _ in graded],
            "iou_scores": [score for _, score in graded],
        }


def misread(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """PerPO on OCR: five captions of a picture, and how near each is to the right one, letter by letter."""
    for c in quad:
        captions = [caption(a.colour, b.shape) for a in (c.event, c.other) for b in (c.event, c.other)] + ["A shape."]
        yield {
            "image_path": c.still,
            "question": f"<image>\n{CAPTION}",
            "answers_gen": captions,
            "iou_scores": [round(ocr(text, captions[0]), 4) for text in captions],
        }


def stills(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """Conversations of two turns about a picture."""
    for c in quad:
        told = [COLOUR, colour_said(c.event, c.event.colour), CAPTION, caption(c.event.colour, c.event.shape)]
        yield {"image": c.still, "conversations": conversation(*told)}


def prompts(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """Prompts for sampled answers that a learned reward judges; the truth is only looked at."""
    for c in quad:
        yield {"image": c.still, "prompt": CAPTION, "truth": caption(c.event.colour, c.event.shape)}


def classes(quad: Quad, rng: random.Random) -> Iterator[Row]:
    for c in quad:
        yield {"image": c.still, "problem": NAME, "solution": f"<answer>{c.event.colour}</answer>"}


def detection(quad: Quad, rng: random.Random) -> Iterator[Row]:
    for c in quad:
        solution = f"<answer>{_objects(c.box)}</answer>"
        yield {"image": c.still, "problem": DETECT.format(c.event.shape), "solution": solution}


def grounding(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """LISA's rows, as Visual-RFT keeps them."""
    for c in quad:
        question = f"<img>{c.still}</img>\n{GROUND.format(c.event.shape)}"
        yield {"conversations": conversation(question, _corners(c.box))}


def taught_llava(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """What the recipes on LLaVA-1.5 ask. The answers are guesses, which leaves something to prefer."""
    for c, several in zip(quad, tasks.mia(quad, rng), strict=True):
        guess = rng.choice((c.event, c.other))
        for pictures, *told in (
            (c.still, CAPTION, caption(guess.colour, guess.shape)),
            (c.still, WHERE.format(c.event.colour, c.event.shape), str([*_near(c.box, rng)])),
            (several["image"], SEVERAL, rng.choice(list(COLOURS))),
        ):
            yield {"image": pictures, "conversations": conversation(*told)}


def taught_qwen(quad: Quad, rng: random.Random) -> Iterator[Row]:
    """The form of Visual-RFT's answers; what they say is a guess."""
    for c in quad:
        for question, answer in (
            (NAME, rng.choice((c.event, c.other)).colour),
            (DETECT.format(c.event.shape), _objects(_near(c.box, rng))),
            (GROUND.format(c.event.shape), _corners(_near(c.box, rng))),
        ):
            yield {"image": c.still, "conversations": conversation(question, THOUGHT.format(answer))}


def _near(box: Box, rng: random.Random) -> Box:
    """The box moved and stretched by up to a third of its sides."""
    width, height = box[2] - box[0], box[3] - box[1]
    x1, y1, x2, y2 = (n + rng.randint(-side // 3, side // 3) for n, side in zip(box, (width, height) * 2, strict=True))
    return max(x1, 0), max(y1, 0), min(x2, SIZE), min(y2, SIZE)


def _objects(box: Box) -> str:
    return f"[{{'Position': {[*box]}, 'Confidence': 0.9}}]"


def _corners(box: Box) -> str:
    return "({},{}),({},{})".format(*box)


TAUGHT: Mapping[Family, str] = {"llava": "taught_llava", "llava_onevision": "warmup", "qwen2_vl": "taught_qwen"}
ROWS: Mapping[str, Rows] = MappingProxyType(
    {
        "warmup": tasks.warmup,
        "taught_llava": taught_llava,
        "taught_qwen": taught_qwen,
        "rrpo": tasks.rrpo,
        "misread": misread,
        "boxes": boxes,
        "mia": tasks.mia,
        "spo": tasks.spo,
        "llava": tasks.llava,
        "stills": stills,
        "ranked": tasks.ranked,
        "prompts": prompts,
        "classes": classes,
        "detection": detection,
        "grounding": grounding,
    }
)
