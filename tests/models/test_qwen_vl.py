"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers' processors and plain models, from folders on disk."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_together

from fastpo.config import Generation, Lora
from fastpo.data import media
from fastpo.models import FAMILIES, generate, images, qwen_vl, trainable
from fastpo.sample import BadSample
from tests import parity, tiny_qwen

PROCESSORS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}


@pytest.fixture(scope="module", params=tiny_qwen.KINDS)
def setup(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    cfg = tiny_qwen.folder(path, request.param)
    family = FAMILIES[request.param]
    wide, tall, clip = parity.image(path, 83, 41), parity.image(path, 60, 131), parity.video(path, 96, 64)
    samples = [
        parity.sample("one image", "What is <image>?", [wide], "A bar.", "Nothing at all."),
        parity.sample("two images", "<image>Left <image>\nor right?", [tall, wide], "Left", "Right!", "Up"),
        parity.sample("text", "How are you?", [], "Well", "Bad"),
        parity.sample("video and image", "<video> or <image>", [clip, tall], "One.", "Two"),
        parity.sample("video", "See <video>", [clip], "Yes"),
    ]
    return SimpleNamespace(
        cfg=cfg, kind=request.param, family=family, processor=family.processor(cfg), samples=samples, clip=clip
    )


def inputs(setup, p):
    """What the plain model takes: float pixels and grids of images and of videos, types and seconds."""
    by_key = {s.key: s for s in setup.samples}
    mean, std = (torch.tensor(x).view(3, 1) for x in (p.mean, p.std))

    def of(encoded, ids):
        if encoded.pixels is None:
            return {}
        media_of = by_key[encoded.key].media
        rows = ((encoded.pixels.view(len(encoded.pixels), 3, -1) / 255 - mean) / std).flatten(1)
        per_item = rows.split(encoded.grid.prod(1).tolist())
        types = (ids == p.config.image_token_id).int() + 2 * (ids == p.config.video_token_id).int()
        found = {"mm_token_type_ids": types[None]}
        names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
        for kind, (name, grid) in names.items():
            chosen = [i for i, item in enumerate(media_of) if item.kind == kind]
            if chosen:
                found |= {name: torch.cat([per_item[i] for i in chosen]), grid: encoded.grid[chosen]}
        if setup.kind == "qwen2_5_vl" and "video_grid_thw" in found:
            found["second_per_grid_ts"] = [2 / (3 / 2.4)]  # two frames, three frames in 2.4 seconds
        return found

    return of


@pytest.mark.usefixtures("columns_first")
def test_ids_grid_and_pixels_are_the_processors(setup):
    p = setup.processor
    pil = Qwen2VLImageProcessorPil.from_pretrained(setup.cfg.path)
    theirs = PROCESSORS[setup.kind]
    tools = SimpleNamespace(
        image_processor=pil, video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        image_token="<|image_pad|>", video_token="<|video_pad|>", vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )  # fmt: skip
    tools._calculate_timestamps = lambda *a: Qwen3VLProcessor._calculate_timestamps(tools, *a)
    mean, std = (torch.tensor(x).view(3, 1) for x in (p.mean, p.std))
    for sample, encoded in zip(setup.samples, parity.decoded(setup.family, p, setup.samples), strict=True):
        question, rows = sample.question, []
        for i, item in enumerate(sample.media):
            if item.kind == "image":
                found = pil(Image.open(item.path), return_tensors="pt")
                assert encoded.grid[[i]].tolist() == found.image_grid_thw.tolist()
                pads = theirs.replace_image_token(tools, found, 0)
                question = question.replace("<image>", f"<|vision_start|>{pads}<|vision_end|>", 1)
                rows.append(found.pixel_values)
                continue
            frames = media.decode(item, 3)
            t, h, w = encoded.grid[i].tolist()
            assert t == 2
            x = images.frames(frames, (h * tiny_patch(p), w * tiny_patch(p)))[None].float()
            x = (x / 255 - mean[..., None]) / std[..., None]
            patches, *grid = Qwen3VLVideoProcessor.patchify(tools, x, tiny_patch(p), 2, 2)
            assert grid == [t, h, w]
            rows.append(patches[0])
            meta = SimpleNamespace(fps=5, frames_indices=[0, 4, 8])
            pads = theirs.replace_video_token(tools, {"video_grid_thw": encoded.grid[[i]], "video_metadata": [meta]}, 0)
            question = question.replace("<video>", f"<|vision_start|>{pads}<|vision_end|>", 1)
        text = p.chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        assert encoded.prompt.tolist() == p.chat.tokenizer(text, add_special_tokens=False).input_ids
        if rows:
            ours = (encoded.pixels.view(len(encoded.pixels), 3, -1) / 255 - mean) / std
            torch.testing.assert_close(ours.flatten(1), torch.cat(rows), rtol=0, atol=1e-6)
        assert encoded.patches == (0 if encoded.pixels is None else len(encoded.pixels))


def tiny_patch(p):
    return p.config.vision_config.patch_size


def test_positions_are_the_models(setup):
    model = tiny_qwen.plain(setup.cfg)
    given = inputs(setup, setup.processor)
    for encoded in parity.decoded(setup.family, setup.processor, setup.samples):
        if encoded.positions is None:
            assert encoded.key == "text"
            continue
        known = given(encoded, encoded.prompt)
        grids = {k: v for k, v in known.items() if not k.startswith("pixel")}
        want, _ = model.model.get_rope_index(encoded.prompt[None], **grids)
        assert torch.equal(encoded.positions, want[:, 0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_row_equals_separate_forwards(setup, checkpointing):
    p = setup.processor
    samples = parity.decoded(setup.family, p, setup.samples)
    for row in [samples] if checkpointing else [samples, samples[2:3]]:
        packed = setup.family.load(setup.cfg)
        plain = tiny_qwen.plain(setup.cfg)
        parity.check(setup.family, p, packed, plain, row, inputs(setup, p), checkpointing=checkpointing)


def test_reference_without_adapters(setup):
    cfg = setup.cfg.model_copy(update={"lora": Lora(r=4, alpha=8), "gradient_checkpointing": False})
    adapted = trainable.prepare(setup.family.load(cfg), setup.family.parts, cfg)
    samples = parity.decoded(setup.family, setup.processor, setup.samples[:4])
    given = inputs(setup, setup.processor)
    parity.check_reference(setup.family, setup.processor, adapted, tiny_qwen.plain(cfg), samples, given)


def test_greedy_answers_are_those_without_a_cache(setup):
    model, plain = setup.family.load(setup.cfg).eval(), tiny_qwen.plain(setup.cfg).eval()
    given = inputs(setup, setup.processor)
    for encoded in parity.decoded(setup.family, setup.processor, setup.samples[2:4]):
        cfg = Generation(max_tokens=4, temperature=0)
        (got,) = generate.respond(model, setup.family, setup.processor, encoded, cfg, count=1, seed=0)
        full = torch.cat([encoded.prompt, got])
        with torch.no_grad():
            logits = plain(input_ids=full[None], use_cache=False, **given(encoded, full)).logits[0]
        assert got.tolist() == logits[len(encoded.prompt) - 1 : -1].argmax(-1).tolist()


def test_sizes_are_those_of_smart_resize():
    sides = [1, 13, 14, 28, 41, 63, 70, 98, 240, 333, 1080, 1921]
    for height, width in [(h, w) for h in sides for w in sides if max(h, w) <= 200 * min(h, w)]:
        for factor, low, high in [(28, 56 * 56, 28 * 28 * 1280), (32, 65536, 200_000)]:
            limits = {"factor": factor, "low": low, "high": high}
            assert qwen_vl.fitted(height, width, **limits) == smart_resize(height, width, factor, low, high)
            for frames in (2, 3, 5, 16):
                want = resize_together(frames, height, width, 2, factor, low, high)
                assert qwen_vl.fitted(height, width, **limits, frames=frames) == want


def test_max_pixels_lowers_the_checkpoints_limit(setup):
    low, high = setup.processor.image_pixels
    cfg = setup.cfg.model_copy(update={"max_pixels": high // 2})
    assert setup.family.processor(cfg).image_pixels == (low, high // 2)
    assert setup.family.processor(setup.cfg.model_copy(update={"max_pixels": 10 * high})).image_pixels == (low, high)
    with pytest.raises(ValueError, match="model.max_pixels: 1 is below"):
        setup.family.processor(setup.cfg.model_copy(update={"max_pixels": 1}))


def test_limits_of_videos_come_from_their_own_file(setup, tmp_path):
    own = tmp_path / "video_preprocessor_config.json"
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 5, "max_pixels": 7, "size": {}}')
    assert qwen_vl._video_pixels(tmp_path) == (5, 7)
    own.write_text('{"size": {"shortest_edge": 11, "longest_edge": 13}}')
    assert qwen_vl._video_pixels(tmp_path) == (11, 13)
    own.write_text("{}")
    with pytest.raises(ValueError, match=r"video_preprocessor_config\.json says neither"):
        qwen_vl._video_pixels(tmp_path)


def test_what_cannot_be_encoded_is_refused(setup, tmp_path):
    line = parity.image(tmp_path, 401, 2)
    for media_of, question, reason in [
        ([line], "<image>", "401x2.png: 401 x 2 pixels, more than 200 times"),
        ([], "What is <|image_pad|>?", "1 media placeholders for 0 media items"),
    ]:
        with pytest.raises(BadSample, match=reason):
            setup.family.encode(setup.processor, parity.sample("a:1", question, media_of, "A"), parity.SAMPLING)
    said = parity.sample("a:1", "What?", [], "Nothing", "A <|video_pad|>")
    with pytest.raises(BadSample, match=r"a:1: response 1 holds <\|video_pad\|>, which stands for pixels"):
        setup.family.encode(setup.processor, said, parity.SAMPLING)
    assert setup.family.blank(setup.processor).grid.tolist() == [[1, 2, 2]]
