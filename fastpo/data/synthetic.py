"""The built-in demo: clips of moving shapes with preferences in RRPO's format, and a tiny LLaVA-Video-type model.

    python -m fastpo.data.synthetic OUT --seed S

A row and the next one are twins: same question, answer and pred exchanged, two different clips. So every ordered
pair of texts occurs as often as its reverse in either file, and a predictor that does not see the clip is right on half
of the rows, whatever it knows about the text.
"""

import argparse
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    TokenizersBackend,
)

FRAMES, SIZE, FPS = 16, 64, 8
BUILT = "built.json"  # in a folder that was written here: with which numbers
COLOURS = {"red": (240, 30, 30), "green": (25, 195, 50), "blue": (40, 50, 240), "yellow": (245, 230, 20)}
SHAPES = ("square", "pole", "plank")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
QUESTIONS = {
    "colour": "What colour is the moving shape?",
    "shape": "Which shape moves in the video?",
    "direction": "In which direction does the shape move?",
    "order": "In which order do the shapes appear?",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One shape that crosses the frame. What an answer can be about."""

    colour: str
    shape: str
    direction: str


Scene = tuple[Event, ...]  # one event, or two one after the other


def write(out: Path, seed: int, *, train: int = 640, test: int = 128) -> None:
    """Writes out/model/, out/train.json, out/test.json and out/videos/, all of it a function of seed, train and test.

    train, test: rows, even numbers (rows come in twins). media_path is relative to out. The folder appears whole or not
    at all. Raises ValueError where out is there already or a number is odd.
    """
    for name, rows in (("train", train), ("test", test)):
        if rows < 2 or rows % 2:
            raise ValueError(f"{name}={rows}: rows come in twins, expected an even number of at least 2")
    with whole(out, seed=seed, train=train, test=test) as unfinished:
        (unfinished / "videos").mkdir()
        for name, rows, first in (("train", train, 0), ("test", test, train)):
            table = list(_rows(unfinished, random.Random(f"{name} {seed}"), range(first, first + rows)))
            (unfinished / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        write_model(unfinished / "model", seed)


def built(out: Path, **facts: int) -> bool:
    """Whether `out` is there. Raises ValueError where it was not built with these facts: seed, numbers of rows."""
    if not out.exists():
        return False
    file = out / BUILT
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wrong = [
        f"{name} {found.get(name, 'unknown')}, not {value}" for name, value in facts.items() if found.get(name) != value
    ]
    if wrong:
        raise ValueError(f"{out}: built with {', '.join(wrong)}; remove the folder or name another one")
    return True


@contextmanager
def whole(out: Path, **facts: int) -> Iterator[Path]:
    """A folder to fill that becomes `out` at the end, or is removed. Raises ValueError where out is there already.

    facts: what it is built with, for `built`.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already there; remove it or name another folder")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        (unfinished / BUILT).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def _rows(folder: Path, rng: random.Random, ids: range) -> Iterator[dict[str, Any]]:
    """Yields the rows with these sample_ids, in pairs of twins whose kinds take turns, and writes their clips."""
    for twins in range(len(ids) // 2):
        kind = list(QUESTIONS)[twins % len(QUESTIONS)]
        scene, other = _scenes(rng, kind)
        for sample_id, (shown, wrong) in zip(ids[2 * twins :], ((scene, other), (other, scene)), strict=False):
            media_path = f"videos/{sample_id:04d}.mp4"
            encode(folder / media_path, render(shown, rng))
            answer, pred = describe(kind, shown), describe(kind, wrong)
            yield {
                "sample_id": sample_id,
                "media_path": media_path,
                "question": f"<image>\n{QUESTIONS[kind]}",
                "src": kind,
                "answer": _untagged(answer),
                "pred": _untagged(pred),
                "answer_masked": answer,
                "pred_masked": pred,
            }


def _scenes(rng: random.Random, kind: str) -> tuple[Scene, Scene]:
    """Two scenes that differ in what a question of this kind asks for, and in nothing else."""
    colours, shapes, directions = (rng.sample(list(x), 2) for x in (COLOURS, SHAPES, DIRECTIONS))
    first, second = (Event(colour=c, shape=s, direction=d) for c, s, d in zip(colours, shapes, directions, strict=True))
    if kind == "order":
        return (first, second), (second, first)
    return (first,), (replace(first, **{kind: getattr(second, kind)}),)


def describe(kind: str, scene: Scene) -> str:
    """The tagged answer to a question of this kind."""
    (first, *rest) = scene
    match kind:
        case "colour":
            return f"The {first.shape} that moves {first.direction} is <MASK> {first.colour} </MASK>."
        case "shape":
            return f"The {first.colour} shape that moves {first.direction} is a <MASK> {first.shape} </MASK>."
        case "direction":
            return f"The {first.colour} {first.shape} moves <MASK> {first.direction} </MASK>."
        case _:
            names = [f"<MASK> {event.colour} {event.shape} </MASK>" for event in (first, *rest)]
            return f"The {names[0]} appears before the {names[1]}."


def _untagged(tagged: str) -> str:
    return tagged.replace("<MASK> ", "").replace(" </MASK>", "")


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """[FRAMES, SIZE, SIZE, 3] uint8. Events share the length; place, size, speed and background are drawn."""
    grey = rng.uniform(112, 144)
    frames = np.tile([grey + rng.uniform(-10, 10) for _ in range(3)], (FRAMES, SIZE, SIZE, 1))
    length = FRAMES // len(scene)
    for number, event in enumerate(scene):
        dx, dy = DIRECTIONS[event.direction]
        radius, start = rng.uniform(15, 17), rng.uniform(0, 3)
        travel, aside = rng.uniform(20, 25), rng.uniform(-4, 4)
        colour = np.array(COLOURS[event.colour]) + [rng.uniform(-12, 12) for _ in range(3)]
        for step in range(length):
            along = start + travel * step / (length - 1)
            x, y = SIZE / 2 + along * dx + aside * dy, SIZE / 2 + along * dy + aside * dx
            cover = _cover(event.shape, x, y, radius)[..., None]
            frame = frames[number * length + step]
            frame += cover * (colour - frame)
    return frames.round().clip(0, 255).astype(np.uint8)


def _cover(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """[SIZE, SIZE] share of each pixel that the shape covers, from the distance to its outline."""
    u, v = np.arange(0.5, SIZE)[None, :] - x, np.arange(0.5, SIZE)[:, None] - y
    distance = {
        "square": lambda: np.maximum(abs(u), abs(v)) - 0.9 * radius,
        "pole": lambda: np.maximum(abs(u) - 0.35 * radius, abs(v) - 1.1 * radius),
        "plank": lambda: np.maximum(abs(u) - 1.1 * radius, abs(v) - 0.35 * radius),
    }[shape]()
    return np.clip(0.5 - distance, 0, 1)


# The same bytes every time: one thread, no time stamps or version marks, and none of the look-ahead of x264's slower
# presets: encoded 30 times each, 9 of 20 clips came out in several versions with veryfast and none with these options.
X264 = {
    "preset": "ultrafast",
    "crf": "18",
    "threads": "1",
    "flags": "+bitexact",
    "x264-params": "cpu-independent=1",
}


def encode(path: Path, frames: np.ndarray) -> None:
    """Writes [F, h, w, 3] uint8 as H.264, reproducibly."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=X264)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
VISION_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # Qwen-VL's
# Qwen2's ChatML, with its default system message.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# LLaVA-1.5's, in the typed form of the llava-hf folders.
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
Family = Literal["llava", "llava_onevision", "qwen2_vl"]
VISION: dict[str, Any] = dict(
    model_type="siglip_vision_model",
    image_size=40,
    patch_size=8,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vision_use_head=False,
)
TEXT: dict[str, Any] = dict(
    model_type="qwen2",
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.1,
    tie_word_embeddings=False,
)


def write_model(folder: Path, seed: int, texts: Sequence[str] = (), family: Family = "llava_onevision") -> None:
    """An untrained model and its tokenizer as an ordinary Hugging Face folder, float32. texts: see make_tokenizer.

    llava_onevision: also for llava_video, whose folders look alike.
    """
    tokenizer = make_tokenizer(texts, VISION_MARKS if family == "qwen2_vl" else ())
    config = _config(family, tokenizer.get_vocab())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        if family == "llava_onevision":
            _lay_out_positions(model.model.vision_tower.embeddings.position_embedding.weight.data)
    model.save_pretrained(folder)
    tokenizer.chat_template = VICUNA if family == "llava" else CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    side = dict(height=VISION["image_size"], width=VISION["image_size"])
    settings: dict[str, Any] = {
        "llava": dict(
            image_processor_type="CLIPImageProcessor", size=dict(shortest_edge=VISION["image_size"]), crop_size=side
        ),
        "llava_onevision": dict(
            image_processor_type="LlavaOnevisionImageProcessor",
            image_grid_pinpoints=getattr(config, "image_grid_pinpoints", None),
            size=side,
        ),
        "qwen2_vl": dict(
            image_processor_type="Qwen2VLImageProcessor",
            size=dict(shortest_edge=1024, longest_edge=16384),  # pixels of an image
            patch_size=VISION["patch_size"],
        ),
    }[family]
    settings |= dict(do_convert_rgb=True, do_resize=True, resample=3, do_rescale=True, rescale_factor=1 / 255)
    settings |= dict(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _config(family: Family, ids: dict[str, int]) -> PreTrainedConfig:
    ends = dict(bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    text = TEXT | ends | dict(vocab_size=len(ids))
    if family == "qwen2_vl":
        axes = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 4, 4])  # half of a head's 24
        names = (f"{name}_token_id" for name in ("vision_start", "vision_end", "image", "video"))
        marks: dict[str, Any] = {name: ids[mark] for name, mark in zip(names, VISION_MARKS, strict=True)}
        return Qwen2VLConfig(
            text_config=text | dict(model_type="qwen2_vl_text", rope_parameters=axes),
            vision_config=dict(
                depth=2, embed_dim=64, hidden_size=TEXT["hidden_size"], mlp_ratio=2, num_heads=4, patch_size=8
            ),
            tie_word_embeddings=False,
            **marks,
        )
    if family == "llava":
        return LlavaConfig(
            vision_config=VISION | dict(model_type="clip_vision_model", projection_dim=64),
            text_config=text | dict(model_type="llama"),
            image_token_index=ids["<image>"],
            tie_word_embeddings=False,
        )
    return LlavaOnevisionConfig(
        vision_config=VISION,
        text_config=text,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[VISION["image_size"]] * 2],
        tie_word_embeddings=False,
    )


def _lay_out_positions(weight: torch.Tensor) -> None:
    """Adds one random direction for the row and one for the column to [g * g, hidden] position embeddings, in place.

    Pretrained SigLIP knows where a patch is; from scratch that alone takes longer than the rest of the demo.
    """
    side = math.isqrt(len(weight))
    place = torch.linspace(-1, 1, side)
    weight += torch.cartesian_prod(place, place) @ torch.randn(2, weight.shape[1]).mul(2)


def make_tokenizer(texts: Sequence[str] = (), specials: Sequence[str] = ()) -> TokenizersBackend:
    """Byte-level BPE in which every word of the demo and of `texts` is one token; anything else is pieces or bytes."""
    sentences = [*texts, *QUESTIONS.values(), "system\nYou are a helpful assistant.\n", "user\n", "assistant\n"]
    for colour in COLOURS:
        for shape in SHAPES:
            event = [Event(colour=colour, shape=shape, direction=direction) for direction in DIRECTIONS]
            sentences += [_untagged(describe(kind, (e, e))) for kind in QUESTIONS for e in event]
    blank = Qwen2Tokenizer(eos_token="<|im_end|>", model_max_length=TEXT["max_position_embeddings"])
    # Words are finite, so merging ends on its own far below this size.
    tokenizer = blank.train_new_from_iterator(
        sentences,
        vocab_size=4096,
        new_special_tokens=[*SPECIALS, *specials],
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastpo.data.synthetic", description="Writes the demo's data and model."
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=640, help="rows of train.json, an even number")
    parser.add_argument("--test", type=int, default=128, help="rows of test.json, an even number")
    args = parser.parse_args()
    try:
        write(args.out, args.seed, train=args.train, test=args.test)
    except ValueError as error:
        parser.error(str(error))
    clips = args.train + args.test
    print(f"{args.out}: model/, train.json ({args.train} rows), test.json ({args.test} rows), videos/ ({clips} clips)")


if __name__ == "__main__":
    main()
