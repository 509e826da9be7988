"""MIA-DPO's data: several images from single-image rows, and which answers of the model become the rejected ones.

    python -m fastpo.data.mia rows.json --media-root pictures --out made [--kinds sequence grid pip] [--seed 0]

writes made/mia.json (rows of format "mia", without rejected) and made/images/. `mine` adds the rejected answers, given
a function that runs a model. Facts: Liuziyu77/MIA-DPO a85c51a, gen_data/. Everything follows from the seed and the row.
"""

import argparse
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastpo.config import Source
from fastpo.data import formats
from fastpo.data.formats.fields import PLACEHOLDER
from fastpo.rewards.text import edit_distance
from fastpo.sample import Sample

Kind = Literal["sequence", "grid", "pip"]
Row = dict[str, Any]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

CELL, MARGIN, FONT = 448, 40, 36  # pixels of the collage, make_data_pingtu_v1.ipynb
SHARE = 0.7  # of the host's width and height, make_data_pics_in_pics.ipynb
GRIDS = MappingProxyType({2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)})  # images -> rows, columns
# How many images a sample has, by weight: the authors' counts for COCO.
COUNTS = MappingProxyType(
    {
        "sequence": {2: 20000, 3: 6000, 4: 6000, 5: 4410},
        "grid": {2: 18000, 3: 5000, 4: 5000, 6: 4000, 9: 4410},
        "pip": {2: 1},
    }
)
# The attention ratio below which an answer is taken to be about the wrong image: make_data_duotu.py:339-387 (where the
# bound itself counts too), make_data_ping.py:409-473, make_data_pip.py:348.
THRESHOLDS = MappingProxyType(
    {
        "sequence": {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6},
        "grid": {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3},
        "pip": {2: 0.8},
    }
)
NOISE = MappingProxyType({"grid": 225.0, "pip": 49.0})  # standard deviation, of 255; a sequence gets none
_CENTRE = (
    "In the picture at the centre, ",
    "Looking at the inner image only, ",
    "For the smaller image in the middle, ",
    "About the image that lies on top of the other, ",
)
_COORDINATES = re.compile(r"\[\s*[\d.]+\s*(?:,\s*[\d.]+\s*){3}\]")


class Single(NamedTuple):
    """One picture with a question and its answer. source: the folder it is in; others are drawn from the same one."""

    path: Path
    question: str
    answer: str
    source: str


class Answer(NamedTuple):
    """What a model says to a row, greedily. ratio: attention on the target; ppl: perplexity of its own tokens."""

    text: str
    ratio: float
    ppl: float


def singles(samples: Iterable[Any]) -> list[Single]:
    """The samples that have one image and an answer; the first of each is used. Bad rows are left out."""
    found = []
    for sample in samples:
        if isinstance(sample, Sample) and [item.kind for item in sample.media] == ["image"] and sample.responses:
            path, question = sample.media[0].path, PLACEHOLDER.sub("", sample.question).strip()
            found.append(Single(path, question, sample.responses[0].text, str(path.parent)))
    return found


def build(rows: Sequence[Single], kind: Kind, folder: Path, *, seed: int = 0) -> list[Row]:
    """One row of several images for each single one, in order; collages are written to folder as PNG.

    A row: id, image (absolute paths), prompt, chosen (the answer), kind, count (of images), target (from 1). The others
    are distinct pictures of the same source; where there are too few, the row has fewer images, and none at all is left
    out. For grid and pip, rows that speak of box coordinates are left out too, since the picture's scale changes.
    """
    sources: dict[str, list[Path]] = {}
    for row in rows:
        sources.setdefault(row.source, []).append(row.path)
    sources = {name: list(dict.fromkeys(paths)) for name, paths in sources.items()}
    made = []
    for number, row in enumerate(rows):
        if kind != "sequence" and _COORDINATES.search(row.question + row.answer):
            continue
        draw = random.Random(f"{seed}:{kind}:{number}")
        known = sources[row.source]
        fitting = {n: weight for n, weight in COUNTS[kind].items() if n <= len(known)}
        if not fitting:
            continue
        (count,) = draw.choices([*fitting], [*fitting.values()])
        others = [path for path in draw.sample(known, count) if path != row.path][: count - 1]
        made.append(_combined(row, others, kind, folder / f"{kind}-{number}.png", draw))
    return made


def _combined(row: Single, others: Sequence[Path], kind: Kind, path: Path, draw: random.Random) -> Row:
    count = len(others) + 1
    target = draw.randrange(count) + 1 if kind != "pip" else 2  # in a picture in a picture, the inner one
    paths = [*others[: target - 1], row.path, *others[target - 1 :]]
    asked = row.question[:1].lower() + row.question[1:]
    if kind == "sequence":
        shown = "".join(f"Image{n}:<image>\n" for n in range(1, count + 1))
        images, prompt = paths, f"{shown}In Image{target}, {asked}"
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = [_opened(item) for item in paths]
        (collage(pictures) if kind == "grid" else picture_in_picture(*pictures)).save(path)
        lead = f"In Image{target}, " if kind == "grid" else draw.choice(_CENTRE)
        images, prompt = [path], f"<image>\n{lead}{asked}"
    return {
        "id": path.stem,
        "image": [str(item.resolve()) for item in images],
        "prompt": prompt,
        "chosen": row.answer,
        "kind": kind,
        "count": count,
        "target": target,
    }


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from error


def cell(count: int, target: int) -> Box:
    """The cell of image `target` (from 1) in a collage of `count`."""
    row, column = divmod(target - 1, GRIDS[count][1])
    left, top = MARGIN + column * (CELL + MARGIN), MARGIN + row * (CELL + MARGIN)
    return left, top, left + CELL, top + CELL


def collage(pictures: Sequence[Image.Image]) -> Image.Image:
    """2, 3, 4, 6 or 9 pictures in a grid, each as large as fits its cell, top left on white, "ImageK" above it."""
    rows, columns = GRIDS[len(pictures)]
    size = tuple(MARGIN + n * (CELL + MARGIN) for n in (columns, rows))
    canvas = Image.new("RGB", (size[0], size[1]), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=FONT)
    for number, picture in enumerate(pictures, start=1):
        left, top, _, _ = cell(len(pictures), number)
        canvas.paste(_fitted(picture, CELL, CELL), (left, top))
        pen.text((left, top - 2), f"Image{number}", fill="black", font=font, anchor="ls")
    return canvas


def picture_in_picture(host: Image.Image, inner: Image.Image) -> Image.Image:
    """The inner picture at the centre of the host, as large as fits 0.7 of its width and height."""
    fitted = _fitted(inner, max(1, int(host.width * SHARE)), max(1, int(host.height * SHARE)))
    made = host.copy()
    made.paste(fitted, ((host.width - fitted.width) // 2, (host.height - fitted.height) // 2))
    return made


def corrupted(picture: Image.Image, row: Row, *, seed: int = 0) -> Image.Image:
    """What the model sees when it is to answer badly: Gaussian noise on the target cell (grid) or everywhere (pip).

    The authors' pip noise is cast to bytes before it is added, so that it wraps around (make_data_pip.py:329); here the
    sum is cut to [0, 255]. A sequence stays as it is.
    """
    if row["kind"] not in NOISE:
        return picture
    box = cell(row["count"], row["target"]) if row["kind"] == "grid" else (0, 0, *picture.size)
    part = picture.crop(box).convert("RGB")
    pixels = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8).to(torch.float32)
    draw = torch.Generator().manual_seed(random.Random(f"{seed}:{row['id']}").getrandbits(63))
    noisy = (pixels + NOISE[row["kind"]] * torch.randn(pixels.shape, generator=draw)).round().clamp(0, 255)
    made = picture.copy()
    made.paste(Image.frombytes("RGB", part.size, noisy.to(torch.uint8).numpy().tobytes()), box[:2])
    return made


def image_means(attention: Tensor, starts: Sequence[int], tokens: int) -> Tensor:
    """[K] float64: mean attention per patch on each of K images.

    attention: [n, heads, L], the rows of generated tokens 2..n of one layer (16 in the authors' LLaVA-1.5), over what
    they can see. starts: column of each image's first patch. tokens: patches of an image. make_data_duotu.py:192-253.
    """
    row = attention.to(torch.float64).mean((0, 1))
    return torch.stack([row[start : start + tokens].mean() for start in starts])


def sequence_ratio(means: Tensor, target: int) -> float:
    """Share of the target (from 1) in the sum of image_means."""
    return float(means[target - 1] / means.sum())


def grid_ratio(attention: Tensor, count: int, target: int) -> float:
    """Share of the target's block in an attention map [h, w] of `count` images in a grid (make_data_ping.py:266-302).

    The map is split evenly into the collage's rows and columns; what is left over goes to the first ones.
    """
    rows, columns = GRIDS[count]
    row, column = divmod(target - 1, columns)
    part = attention.to(torch.float64).tensor_split(rows, 0)[row].tensor_split(columns, 1)[column]
    return float(part.sum() / attention.to(torch.float64).sum())


def centre_ratio(attention: Tensor) -> float:
    """Share of the central two thirds of an attention map [h, w], 16 of 24 each way (make_data_pip.py:255-276)."""
    whole = attention.to(torch.float64)
    high, wide = whole.shape[0] // 6, whole.shape[1] // 6
    return float(whole[high : whole.shape[0] - high, wide : whole.shape[1] - wide].sum() / whole.sum())


def perplexity(logits: Tensor) -> float:
    """exp of the mean negative log-likelihood of the likeliest token, logits [n, V] (make_data_duotu.py:272-287)."""
    return math.exp(-float(logits.to(torch.float64).log_softmax(-1).amax(-1).mean()))


def looks_away(kind: Kind, images: int, ratio: float) -> bool:
    """Whether the attention ratio is low enough for the answer to be about the wrong image."""
    threshold = THRESHOLDS[kind][images]
    return ratio <= threshold if kind == "sequence" else ratio < threshold


def refusal(
    row: Row,
    answer: Answer,
    *,
    min_ppl: float = 1.1,
    longest: int = 512,
    length_ratio: float = 5.0,
    edits: float = 0.1,
) -> str | None:
    """Why the model's answer is no rejected answer for the row, in a word or two; None: it is one.

    Authors' rules: neither text is empty, the dataset's answer has fewer than `longest` characters, the answer differs
    from it, its perplexity is above min_ppl, and the attention ratio is low. Rules of their README that its code lacks,
    with bounds of our own: the longer text has at most length_ratio times the characters of the shorter, and the edit
    distance is at least `edits` of the longer.
    """
    chosen, given = row["chosen"].strip(), answer.text.strip()
    if not chosen or not given:
        return "empty"
    if len(chosen) >= longest:
        return "long"
    if chosen == given:
        return "equal"
    if not answer.ppl > min_ppl:
        return "perplexity"
    if not looks_away(row["kind"], row["count"], answer.ratio):
        return "attention"
    shorter, longer = sorted((len(chosen), len(given)))
    if longer > length_ratio * shorter:
        return "length ratio"
    if edit_distance(chosen, given) < edits * longer:
        return "edit distance"
    return None


def mine(rows: Iterable[Row], answer: Callable[[Row], Answer], **bounds: float) -> tuple[list[Row], Counter[str]]:
    """The rows with the model's answer as rejected, where `refusal` (bounds: its options) has none, and the refusals.

    answer: runs the model on the row's prompt and images, `corrupted` first.
    """
    kept, refused = [], Counter()
    for row in rows:
        given = answer(row)
        reason = refusal(row, given, **bounds)  # pyright: ignore[reportArgumentType]
        if reason is None:
            kept.append({**row, "rejected": given.text, "gt": row["chosen"]})
        else:
            refused[reason] += 1
    return kept, refused


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """As large as fits, same proportions, at least one pixel each way."""
    scale = min(width / picture.width, height / picture.height)
    return picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.data.mia", description="Several images from single ones.")
    parser.add_argument("rows", help="json, jsonl or parquet file, or a data set of the hub")
    parser.add_argument("--format", default="llava", help="of the rows, by default llava")
    parser.add_argument("--media-root", type=Path, default=Path("."))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=[*COUNTS], default=[*COUNTS])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        read = formats.samples(Source(name=given.format, path=given.rows), given.media_root)
        usable = singles(read)
        if not usable:
            raise ValueError(f"{given.rows}: none of {len(read)} rows has one image and an answer")
        made = [row for kind in given.kinds for row in build(usable, kind, given.out / "images", seed=given.seed)]
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "mia.json").write_text(json.dumps(made, indent=1, ensure_ascii=False), encoding="utf-8")
    counts = ", ".join(f"{number} {kind}" for kind, number in Counter(row["kind"] for row in made).items())
    used = f"{len(usable)} of {len(read)} rows have an image and an answer"
    print(f"{given.out / 'mia.json'}: {counts or 'no rows'}; {used}")


if __name__ == "__main__":
    main()
