"""Llama-3.2-Vision against transformers' processor and plain model, from a folder on disk."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, MllamaConfig, MllamaImageProcessorPil
from transformers.models.mllama import image_processing_pil_mllama as theirs
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from fastpo.config import Generation, Lora, Model
from fastpo.models import mllama, trainable
from fastpo.models.generate import extended, prefilled, respond
from fastpo.sample import BadSample
from tests import parity

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)


def folder(path):
    """Writes weights, tokenizer and image settings, and returns the section that points there."""
    config = MllamaConfig(
        vision_config=dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
            image_size=28, patch_size=14, max_num_tiles=4, intermediate_layers_indices=[0, 1], vision_output_dim=48,
            supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        ),
        text_config=dict(
            model_type="mllama_text_model", vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, cross_attention_layers=[1, 3],
            bos_token_id=256, eos_token_id=257, pad_token_id=257,
        ),
        image_token_index=258,
    )  # fmt: skip
    torch.manual_seed(0)
    made = parity.perturbed(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
    for name, parameter in made.named_parameters():
        if name.endswith("gate"):  # 0 at first: images would not be looked at
            parameter.data.fill_(0.7)
    made.save_pretrained(path)
    parity.tokenizer(["<|image|>"]).save_pretrained(path)
    MllamaImageProcessorPil(size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD).save_pretrained(path)
    return Model(path=str(path), family="mllama", dtype="float32", lora=None)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    path = tmp_path_factory.mktemp("mllama")
    cfg = folder(path)
    wide, tall, small = parity.image(path, 83, 41), parity.image(path, 20, 77), parity.image(path, 25, 27)
    samples = [
        parity.sample("one image", "What is <image>?", [wide], "A bar.", "Nothing at all."),
        parity.sample("text", "How are you?", [], "Well", "Bad"),
        parity.sample("apart", "<image>Left <image>\nor right?", [tall, small], "Left", "Right!", "Up"),
        parity.sample("side by side", "<image><image>?<image>", [small, tall, wide], "One.", "Two"),
    ]
    return SimpleNamespace(path=path, cfg=cfg, processor=mllama.processor(cfg), samples=samples)


def plain(setup):
    return AutoModelForImageTextToText.from_pretrained(setup.path, dtype=torch.float32, attn_implementation="sdpa")


def given(setup):
    """What the plain model takes, by transformers' own image processor and mask functions."""
    pil, media_of = MllamaImageProcessorPil.from_pretrained(setup.path), {s.key: s.media for s in setup.samples}

    def inputs(encoded, ids):
        if encoded.pixels is None:
            return {}
        found = pil([[Image.open(item.path) for item in media_of[encoded.key]]], return_tensors="pt")
        sparse = get_cross_attention_token_mask(ids.tolist(), 258)
        dense = convert_sparse_cross_attention_mask_to_dense([sparse], found.pop("num_tiles"), 4, len(ids))
        return {**found, "cross_attention_mask": torch.from_numpy(dense)}

    return inputs


def test_ids_grid_and_pixels_are_the_processors(setup):
    p, inputs = setup.processor, given(setup)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    for sample, encoded in zip(setup.samples, parity.decoded(mllama, p, setup.samples), strict=True):
        text = p.chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": sample.question.replace("<image>", "<|image|>")}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert encoded.prompt.tolist() == p.chat.tokenizer(text, add_special_tokens=False).input_ids
        if not sample.media:
            assert encoded.pixels is None and encoded.patches == 0
            continue
        want = inputs(encoded, encoded.prompt)
        assert encoded.grid[:, 0].tolist() == want["aspect_ratio_ids"][0].tolist()
        assert encoded.grid[:, 1].tolist() == want["aspect_ratio_mask"][0].sum(1).tolist()
        real = want["pixel_values"][0][want["aspect_ratio_mask"][0].bool()]
        torch.testing.assert_close((encoded.pixels / 255 - mean) / std, real, rtol=0, atol=1e-6)
        assert encoded.patches == 16 * len(sample.media)


def test_canvases_are_those_of_the_processor():
    sides = [1, 30, 100, 333, 448, 560, 896, 1200, 1920]
    for height, width, tiles in [(h, w, n) for h in sides for w in sides for n in (1, 4)]:
        rows, columns = mllama.canvas(height, width, 448, tiles)
        want = theirs.get_optimal_tiled_canvas(height, width, tiles, 448)
        assert (rows * 448, columns * 448) == want
        fitted = theirs.get_image_size_fit_to_canvas(height, width, *want, 448)
        assert mllama.fitted(height, width, rows, columns, 448) == fitted


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_row_equals_separate_forwards(setup, checkpointing):
    samples = parity.decoded(mllama, setup.processor, setup.samples)
    for row in [samples] if checkpointing else [samples, samples[1:2]]:
        packed = mllama.load(setup.cfg)
        parity.check(mllama, setup.processor, packed, plain(setup), row, given(setup), checkpointing=checkpointing)


def test_reference_without_adapters(setup):
    cfg = setup.cfg.model_copy(update={"lora": Lora(r=4, alpha=8), "gradient_checkpointing": False})
    adapted = trainable.prepare(mllama.load(cfg), mllama.parts, cfg)
    samples = parity.decoded(mllama, setup.processor, setup.samples)
    parity.check_reference(mllama, setup.processor, adapted, plain(setup), samples, given(setup))


def test_greedy_answers_are_those_of_the_plain_models_generate(setup):
    theirs: Any = plain(setup).eval()
    model, inputs = mllama.load(setup.cfg).eval(), given(setup)
    for name, parameter in (*model.named_parameters(), *theirs.named_parameters()):
        if "language_model" in name and parameter.ndim > 1:  # far from uniform, and the images matter
            parameter.data *= 20 if "cross_attn.v_proj" in name else 2
    p, cfg = setup.processor, Generation(max_tokens=12, temperature=0)
    for prompt in parity.decoded(mllama, p, setup.samples):
        answers = respond(model, mllama, p, prompt, cfg, count=3, seed=0)
        want = theirs.generate(
            prompt.prompt[None], **inputs(prompt, prompt.prompt), attention_mask=torch.ones(1, len(prompt.prompt)),
            do_sample=False, max_new_tokens=12, eos_token_id=p.chat.end_id, suppress_tokens=[258],
        )[0, len(prompt.prompt) :]  # fmt: skip
        assert [answer.tolist() for answer in answers] == [want.tolist()] * 3
        cut = 5  # of the text after the images
        start, end = prompt.prompt[:-cut], prompt.prompt[-cut:]
        cache = prefilled(model, mllama, p, replace(prompt, prompt=start))
        (again,) = respond(
            model, mllama, p, extended(replace(prompt, prompt=start), end), cfg, count=1, seed=0, cache=cache
        )
        assert again.tolist() == want.tolist()
        if prompt.pixels is not None:
            other = replace(prompt, pixels=255 - prompt.pixels)
            (differs,) = respond(model, mllama, p, other, cfg, count=1, seed=0)
            assert differs.tolist() != want.tolist()


@pytest.mark.parametrize("places", [[], [3], [0, 1], [0, 4], [1, 2, 5, 6], [0, 2, 3, 4, 8]])
def test_what_tokens_see_is_the_processors_mask(places):
    ids = [258 if i in places else 7 for i in range(10)]
    dense = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(ids, 258)], [[1] * len(places)], 1, 10
    )
    assert mllama.seen(places, 10).tolist() == dense[0, :, :, 0].astype(bool).tolist()


def test_what_cannot_be_done_is_refused(setup, tmp_path):
    p = setup.processor
    with pytest.raises(BadSample, match="a:1: family mllama takes images, not videos"):
        video = parity.video(tmp_path, 64, 48, frames=2)
        mllama.encode(p, parity.sample("a:1", "<video>", [video], "A"), parity.SAMPLING)
    with pytest.raises(BadSample, match=r"a:1: response 0 holds <\|image\|>, which stands for pixels"):
        mllama.encode(p, parity.sample("a:1", "?", [], "<|image|>"), parity.SAMPLING)
    for file in setup.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="makes up to 3 tiles of 28 pixels, but the tower reads 4 of 28"):
        mllama.processor(setup.cfg.model_copy(update={"path": str(tmp_path)}))
