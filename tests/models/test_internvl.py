"""InternVL against transformers' image processor and plain model, from a folder on disk."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, GotOcr2ImageProcessorPil, InternVLConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.internvl.processing_internvl import InternVLProcessor

from fastpo.config import Lora, Model
from fastpo.data import media
from fastpo.models import internvl, trainable
from fastpo.sample import BadSample
from tests import parity

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)


def folder(path):
    """Writes weights, tokenizer and image settings, and returns the section that points there."""
    config = InternVLConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=[28, 28],
            patch_size=[7, 7],
        ),
        text_config=dict(
            model_type="qwen2", vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
        ),
        image_token_id=260, image_seq_length=4, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    parity.perturbed(AutoModelForImageTextToText.from_config(config, dtype=torch.float32)).save_pretrained(path)
    parity.tokenizer(["<img>", "</img>", "<IMG_CONTEXT>"]).save_pretrained(path)
    GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, max_patches=4, image_mean=MEAN, image_std=STD
    ).save_pretrained(path)
    return Model(path=str(path), family="internvl", dtype="float32", lora=None)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    path = tmp_path_factory.mktemp("internvl")
    cfg = folder(path)
    wide, tall, small = parity.image(path, 83, 41), parity.image(path, 20, 77), parity.image(path, 30, 30)
    clip = parity.video(path, 96, 64)
    samples = [
        parity.sample("one image", "What is <image>?", [wide], "A bar.", "Nothing at all."),
        parity.sample("two images", "<image>Left <image>\nor right?", [tall, small], "Left", "Right!", "Up"),
        parity.sample("text", "How are you?", [], "Well", "Bad"),
        parity.sample("video and image", "<video> or <image>", [clip, tall], "One.", "Two"),
    ]
    return SimpleNamespace(path=path, cfg=cfg, processor=internvl.processor(cfg), samples=samples)


def plain(setup):
    return AutoModelForImageTextToText.from_pretrained(setup.path, dtype=torch.float32, attn_implementation="sdpa")


def floats(pixels):
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (pixels / 255 - mean) / std


def inputs(encoded, ids):
    return {} if encoded.pixels is None else {"pixel_values": floats(encoded.pixels)}


@pytest.mark.usefixtures("columns_first")
def test_ids_and_pixels_are_the_processors(setup):
    p = setup.processor
    pil = GotOcr2ImageProcessorPil.from_pretrained(setup.path)
    tools = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=4
    )
    for sample, encoded in zip(setup.samples, parity.decoded(internvl, p, setup.samples), strict=True):
        question, pixels = sample.question, []
        for item in sample.media:
            if item.kind == "image":
                found = pil(Image.open(item.path), crop_to_patches=True, return_tensors="pt")
                pads = InternVLProcessor.replace_image_token(tools, found, 0)
                pixels.append(found.pixel_values)
            else:  # its video processor needs torchvision: each frame is resized whole
                frames = [Image.fromarray(frame) for frame in media.decode(item, 3)]
                pixels.append(pil(frames, return_tensors="pt").pixel_values)
                pads = InternVLProcessor.replace_video_token(tools, {"pixel_values_videos": [pixels[-1]]}, 0)
            question = question.replace(f"<{item.kind}>", pads, 1)
        text = p.chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        assert encoded.prompt.tolist() == p.chat.tokenizer(text, add_special_tokens=False).input_ids
        if pixels:
            torch.testing.assert_close(floats(encoded.pixels), torch.cat(pixels), rtol=0, atol=1e-6)
            assert encoded.patches == 16 * len(encoded.pixels)


def test_tiles_are_those_of_the_processor():
    sides = [1, 30, 100, 333, 448, 640, 896, 1200, 1920]
    for height, width, high in [(h, w, n) for h in sides for w in sides for n in (1, 4, 12)]:
        want = get_optimal_tiled_canvas((height, width), (448, 448), 1, high)
        assert internvl.tiling(height, width, 448, 1, high) == want


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_row_equals_separate_forwards(setup, checkpointing):
    samples = parity.decoded(internvl, setup.processor, setup.samples)
    for row in [samples] if checkpointing else [samples, samples[2:3]]:
        packed = internvl.load(setup.cfg)
        parity.check(internvl, setup.processor, packed, plain(setup), row, inputs, checkpointing=checkpointing)


def test_reference_without_adapters(setup):
    cfg = setup.cfg.model_copy(update={"lora": Lora(r=4, alpha=8), "gradient_checkpointing": False})
    adapted = trainable.prepare(internvl.load(cfg), internvl.parts, cfg)
    samples = parity.decoded(internvl, setup.processor, setup.samples)
    parity.check_reference(internvl, setup.processor, adapted, plain(setup), samples, inputs)


def test_what_does_not_fit_is_refused(setup, tmp_path):
    with pytest.raises(BadSample, match="1 media placeholders for 0 media items"):
        internvl.encode(setup.processor, parity.sample("a:1", "<IMG_CONTEXT>?", [], "A"), parity.SAMPLING)
    with pytest.raises(BadSample, match="a:1: response 0 holds <IMG_CONTEXT>, which stands for pixels"):
        internvl.encode(setup.processor, parity.sample("a:1", "?", [], "<IMG_CONTEXT>"), parity.SAMPLING)
    for file in setup.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    GotOcr2ImageProcessorPil(size={"height": 28, "width": 35}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="makes tiles of 28 x 35 pixels by resample 3; expected 28 x 28"):
        internvl.processor(setup.cfg.model_copy(update={"path": str(tmp_path)}))
