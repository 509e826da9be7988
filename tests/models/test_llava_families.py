"""LLaVA-1.5, -NeXT and -OneVision: inputs against Hugging Face's processors, packed rows against its plain models."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from fastpo.config import Lora, Model
from fastpo.data.pack import pack
from fastpo.models import FAMILIES, images, llava, trainable
from fastpo.models.policy import Policy
from fastpo.sample import BadSample, Media, Response, Sample, Sampling
from tests import tiny_families
from tests.models.test_llava_video import compare_gradients, relative

NAMES = ("llava", "llava_next", "llava_onevision")
SAMPLING = Sampling(frames=3)
SIZES = {"wide": (23, 61), "tall": (97, 34), "tiny": (7, 9), "large": (150, 131), "square": (33, 33)}
pytestmark = pytest.mark.usefixtures("columns_first")
LIMIT = 2e-6  # of normalized pixels; one grey level is 0.014


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder per family, and images and a film of odd sizes."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("families")
    generator = np.random.default_rng(0)
    for name in NAMES:
        tiny_families.write(root / name, name)
    for name, (h, w) in SIZES.items():
        Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root / f"{name}.png")
    film = [Image.fromarray(generator.integers(0, 256, (31, 44, 3), dtype=np.uint8)) for _ in range(7)]
    film[0].save(root / "film.gif", save_all=True, append_images=film[1:])
    return root


def sample(root, key, text, *names):
    """Placeholders stand in the text; a name that ends in .gif is a video."""
    media = tuple(Media(kind="video" if n.endswith(".gif") else "image", path=root / n) for n in names)
    answers = (Response(text="a cat", score=1.0), Response(text="some dogs", score=0.0))
    return Sample(key=key, question=text, media=media, responses=answers)


def samples(root, name):
    """One image, several between words, text alone; for LLaVA-OneVision also a video, alone and with an image."""
    found = [
        sample(root, "wide", "<image>\nWhat?", "wide.png"),
        sample(root, "large", "<image>\nHow many?", "large.png"),
        sample(root, "several", "A <image> b <image>, <image> c?", "tall.png", "square.png", "tiny.png"),
        sample(root, "text", "Why?"),
    ]
    if name == "llava_onevision":
        found += [
            sample(root, "film", "<video>\nWhen?", "film.gif"),
            sample(root, "both", "<video> and <image>", "film.gif", "tall.png"),
        ]
    return found


def pictures(item):
    """The frames that are read of a file, in Pillow."""
    image: Any = Image.open(item.path)
    if item.kind == "image":
        return [image.convert("RGB")]
    found = []
    for k in range(SAMPLING.frames):
        image.seek(k * image.n_frames // SAMPLING.frames)
        found.append(image.convert("RGB"))
    return found


@cache
def theirs(folder, name, s):
    """Hugging Face's inputs for a sample: input_ids [n] and what else the model takes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixel = images.processor(folder)
    turn = {"role": "user", "content": [{"type": "text", "text": s.question}]}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    stills = [x for m in s.media if m.kind == "image" for x in pictures(m)]
    if name != "llava_onevision":
        kind = {"llava": LlavaProcessor, "llava_next": LlavaNextProcessor}[name]
        made: Any = kind(
            pixel,
            tokenizer,
            patch_size=tiny_families.PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        found = dict(made(images=stills or None, text=text, return_tensors="pt"))
        found.pop("attention_mask")
        return found.pop("input_ids")[0], found
    # its processor cannot be built without torchvision; the counts are its own functions'
    facts: Any = SimpleNamespace(
        image_processor=pixel,
        num_image_tokens=(tiny_families.SIDE // tiny_families.PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_token="<image>",
        video_token="<video>",
    )
    for method in ("_get_number_of_features", "_get_unpadded_features"):
        setattr(facts, method, getattr(LlavaOnevisionProcessor, method).__get__(facts))
    extra: dict[str, Any] = {}
    if stills:
        extra |= pixel([stills], return_tensors="pt")
        tokens = iter([LlavaOnevisionProcessor.replace_image_token(facts, extra, i) for i in range(len(stills))])
        text = "".join(next(tokens) if part == "<image>" else part for part in _split(text, "<image>"))
    for item in (m for m in s.media if m.kind == "video"):
        plain = SiglipImageProcessorPil(size=dict(pixel.size), image_mean=pixel.image_mean, image_std=pixel.image_std)
        extra["pixel_values_videos"] = plain(pictures(item), return_tensors="pt")["pixel_values"][None]
        text = text.replace("<video>", LlavaOnevisionProcessor.replace_video_token(facts, extra, 0))
    return tokenizer(text, return_tensors="pt").input_ids[0], extra


def _split(text, mark):
    first, *rest = text.split(mark)
    return [first, *(piece for part in rest for piece in (mark, part))]


def ours(root, name, chosen):
    family: Any = FAMILIES[name]
    p = family.processor(Model(path=str(root / name)))
    found = [replace(family.encode(p, s, SAMPLING), pixels=family.pixels(p, s, SAMPLING), weights=None) for s in chosen]
    return family, p, found


@pytest.mark.parametrize("name", NAMES)
def test_inputs_equal_the_processors(root, name):
    chosen = samples(root, name)
    _, p, found = ours(root, name, chosen)
    for s, e in zip(chosen, found, strict=True):
        ids, extra = theirs(root / name, name, s)
        assert torch.equal(e.prompt, ids), s.key
        wanted = []
        if "pixel_values" in extra:
            stacked = extra["pixel_values"]
            tiles = stacked.flatten(0, 1) if stacked.ndim == 5 else stacked
            wanted += [x for x in tiles if x.any()]  # theirs is filled up with zeros to the most tiles
        if "pixel_values_videos" in extra:
            wanted = [*extra["pixel_values_videos"][0], *wanted]  # in both samples the video comes first
        assert (e.pixels is None) == (not wanted)
        if e.pixels is not None:
            got = images.normalized(e.pixels, p.images.mean, p.images.std)
            assert got.shape == torch.stack(wanted).shape
            assert float((got - torch.stack(wanted)).abs().max()) < LIMIT, s.key
            assert e.patches == len(wanted) * p.patches**2


def test_padding_to_a_square(root, tmp_path):
    pads = dict(image_processor_type="LlavaImageProcessor", do_pad=True, do_center_crop=False)
    folder = tiny_families.write(tmp_path, "llava", **pads, size=dict(height=20, width=20))
    s = sample(root, "", "<image><image>", "wide.png", "tall.png")
    p = llava.processor(Model(path=str(folder)))
    pixels = llava.pixels(p, s, SAMPLING)
    assert pixels is not None
    got = images.normalized(pixels, p.images.mean, p.images.std)
    pixel = images.processor(folder)
    want = pixel([pictures(m)[0] for m in s.media], return_tensors="pt")["pixel_values"]
    assert float((got - want).abs().max()) < LIMIT


def plain_logps(model, root, name, chosen, encoded):
    """[N] log-probs: each prompt with each response alone through the plain model, pixels and all."""
    found = []
    for s, e in zip(chosen, encoded, strict=True):
        ids, extra = theirs(root / name, name, s)
        for response in e.responses:
            row = torch.cat([ids, response])[None]
            logits = model(input_ids=row, use_cache=False, **extra).logits[0, len(ids) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
    return torch.cat(found)


def load(root, name):
    path = root / name
    packed = FAMILIES[name].load(Model(path=str(path), dtype="float32"))
    return packed, AutoModelForImageTextToText.from_pretrained(path, attn_implementation="sdpa", dtype=torch.float32)


def score(logp, responses):
    """Any loss: DPO's without a reference."""
    sums = torch.stack([x.sum() for x in logp.split([len(r) for r in responses])])
    return -F.logsigmoid(0.3 * (sums[0::2] - sums[1::2])).sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("only", [None, "text"])
def test_a_packed_row_equals_separate_forwards(root, name, only):
    chosen = [s for s in samples(root, name) if only in (None, s.key)]
    family, p, encoded = ours(root, name, chosen)
    packed, plain = load(root, name)
    cfg = Model(path="", lora=None, train_vision=True, train_projector=True, train_head=True)
    packed = trainable.prepare(packed, family.parts, cfg)
    policy = Policy(packed, family, p, mode="none", stats=frozenset({"logp"})).train()
    logp = policy(pack(encoded, family.blank(p))).logp
    want = plain_logps(plain.train(), root, name, chosen, encoded)
    assert relative(logp, want) < 1e-5
    responses = [r for e in encoded for r in e.responses]
    score(logp, responses).backward()
    score(want, responses).backward()
    compare_gradients(packed, plain)
    reached = {trainable.part_of(n, family.parts) for n, x in packed.named_parameters() if x.grad is not None}
    assert reached == {"vision", "projector", "language", "head"}


@pytest.mark.parametrize("name", NAMES)
def test_adapters_with_the_reference_in_the_same_model(root, name):
    chosen = [s for s in samples(root, name) if s.key in ("wide", "text", "both")]
    family, p, encoded = ours(root, name, chosen)
    cfg = Model(path="", lora=Lora(r=2, alpha=4), gradient_checkpointing=True)
    packed, plain = (trainable.prepare(m, family.parts, cfg) for m in load(root, name))
    generator = torch.Generator().manual_seed(3)
    for (n, a), (_, b) in zip(packed.named_parameters(), plain.named_parameters(), strict=True):
        if "lora_" in n:
            a.data = 0.1 * torch.randn(a.shape, generator=generator)
            b.data = a.data.clone()
    stats = frozenset({"logp", "ref_logp"})
    got = Policy(packed, family, p, mode="adapter_off", stats=stats).train()(pack(encoded, family.blank(p)))
    want = plain_logps(plain.train(), root, name, chosen, encoded)
    with torch.no_grad(), plain.disable_adapter():
        before = plain_logps(plain, root, name, chosen, encoded)
    assert relative(got.logp, want) < 1e-5 and relative(got.ref_logp, before) < 1e-5
    assert relative(want, before) > 1e-3
    responses = [r for e in encoded for r in e.responses]
    score(got.logp, responses).backward()
    score(want, responses).backward()
    compare_gradients(packed, plain)


@pytest.mark.parametrize(("family", "name"), [("llava", "film.gif"), ("llava_next", "film.gif"), ("llava", "gone.png")])
def test_what_a_family_does_not_read_is_a_bad_sample(root, family, name):
    p = FAMILIES[family].processor(Model(path=str(root / family)))
    s = sample(root, "rows.json:3", "<image>", name)
    with pytest.raises(BadSample, match=r"rows.json:3|gone.png"):
        FAMILIES[family].encode(p, s, SAMPLING)
        FAMILIES[family].pixels(p, s, SAMPLING)


def test_refused_image_settings(root, tmp_path):
    for key, value, message in [
        ("crop_size", dict(height=16, width=16), "the tower reads 20 x 20"),
        ("size", dict(shortest_edge=14), "shorter side to 14"),
        ("do_normalize", False, "normalize"),
        ("rescale_factor", 1 / 127.5, "rescale"),
    ]:
        settings = json.loads((root / "llava" / "preprocessor_config.json").read_text()) | {key: value}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            images.settings(tmp_path, tiny_families.SIDE)
    settings = json.loads((root / "llava_next" / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | dict(image_grid_pinpoints=[[30, 20]])))
    with pytest.raises(ValueError, match="no multiples of 20"):
        images.settings(tmp_path, tiny_families.SIDE)
