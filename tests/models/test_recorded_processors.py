"""Ids, grids and pixels against what Hugging Face's processors gave with torchvision: see tests/golden/processors."""

import hashlib
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastpo.config import Model
from fastpo.data import media
from fastpo.models import FAMILIES, images, qwen_vl
from fastpo.sample import Media, Sample, Sampling

GOLDEN = Path(__file__).parent.parent / "golden" / "processors"
INDEX = json.loads((GOLDEN / "index.json").read_text())
FAMILY = {folder: "llava" if folder == "llava_padded" else folder for folder in INDEX["cases"]}
CASES = [(folder, case) for folder, cases in INDEX["cases"].items() for case in cases]
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

# Pillow's weights are 32-bit integers, torch's 16-bit: a sum near a half may round the other way, in each of the two
# passes. Found: 2 levels in at most 2e-5 of the pixels, 1 level in 1.4 % (9 x 7 pixels made larger), else 0.72 %.
LEVELS, SHARE = 2, 0.015


@cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "recorded.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Of each recorded folder, which needs something that looks like weights."""
    root = tmp_path_factory.mktemp("recorded")
    found = {}
    for folder, family in FAMILY.items():
        shutil.copytree(GOLDEN / folder, root / folder)
        (root / folder / "model.safetensors").touch()
        cfg = Model(path=str(root / folder), family=family, time_instruction=False)
        found[folder] = FAMILIES[family].processor(cfg)
    return found


def sample(case: dict[str, Any], folder: Path) -> Sample:
    """The case's media, images with alpha laid on white first: fastpo drops alpha, transformers 5 lays it on white."""
    items = []
    for name in case["media"]:
        path = GOLDEN / "media" / name
        if name == "rgba.png":
            image = Image.open(path)
            white = Image.new("RGBA", image.size, "white")
            path = folder / name
            Image.alpha_composite(white, image).convert("RGB").save(path)
        items.append(Media(kind="video" if name.endswith(".gif") else "image", path=path))
    return Sample(key="recorded", question=case["question"], media=tuple(items), responses=())


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_ids_grids_and_pixels(processors, tmp_path, folder, name):
    family: Any = FAMILIES[FAMILY[folder]]
    p, case = processors[folder], INDEX["cases"][folder][name]
    want = {k.rsplit("/", 1)[1]: v for k, v in recorded().items() if k.startswith(f"{folder}/{name}/")}
    s, sampling = sample(case, tmp_path), Sampling(frames=case["frames"] or 1)
    encoded: Any = family.encode(p, s, sampling)
    pixels: Any = family.pixels(p, s, sampling)
    assert encoded.prompt.tolist() == want["ids"].tolist()
    if folder in QWEN and s.media:
        grids = [want[k] for k in ("video_grid_thw", "image_grid_thw") if k in want]
        assert encoded.grid.tolist() == np.concatenate(grids).tolist()
    if folder == "mllama" and s.media:
        assert encoded.grid.T.tolist() == [
            want["aspect_ratio_ids"][0].tolist(),
            want["aspect_ratio_mask"][0].sum(1).tolist(),
        ]
    if "second_per_grid_ts" in want:
        assert qwen_vl._seconds_per_patch(p, s.media[0], sampling) == pytest.approx(want["second_per_grid_ts"][0])
    if not s.media:
        assert pixels is None and "levels" not in want
        return
    ours = pixels.view(len(pixels), 3, -1) if folder in QWEN else pixels
    levels = torch.from_numpy(want["levels"])
    assert ours.shape == levels.shape
    if folder != "mllama":  # there an image counts as all its tiles
        assert encoded.patches == len(ours) * (1 if folder in QWEN else p.patches**2)
    apart = (ours.int() - levels.int()).abs()
    assert int(apart.max()) <= LEVELS and float((apart > 0).float().mean()) < SHARE
    if "pil_sha256" in case:
        assert hashlib.sha256(ours.numpy().tobytes()).hexdigest() == case["pil_sha256"]
    mean, std = (p.images.mean, p.images.std) if hasattr(p, "images") else (p.mean, p.std)
    floats = images.normalized(levels if levels.ndim == 4 else levels[..., None], mean, std)
    torch.testing.assert_close(floats.flatten()[:64], torch.from_numpy(want["floats"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", INDEX["videos"])
def test_frames_that_the_processors_sample(family):
    """By number: fastpo's floor(k * len / n) is LLaVA-OneVision's and Qwen2-VL's (an even n); Qwen3-VL takes the first
    and the last frame, InternVL the middles of n parts. By rate: n is the seconds times the rate."""
    for case in INDEX["videos"][family]["sampling"]:
        n, total = len(case["indices"]), case["total"]
        theirs = {
            "qwen3_vl": np.linspace(0, total - 1, n).round().astype(int).tolist(),
            "internvl": [int((k + 0.5) * total / n) for k in range(n)],
        }
        assert case["indices"] == theirs.get(family, media.uniform(total, n))
        asked = case["ask"].get("num_frames") or round(total / case["fps"] * case["ask"]["fps"])
        assert n == (2 * round(asked / 2) if family in QWEN[:2] else asked)


@pytest.mark.parametrize("family", QWEN)
def test_videos_under_a_cap(processors, tmp_path, family):
    cases = INDEX["videos"][family]["capped"]
    grids = []
    for i, case in enumerate(cases):
        path = tmp_path / f"{i}.gif"
        Image.new("RGB", (case["width"], case["height"])).save(path)
        p = replace(processors[family], video_tokens=case["max_video_tokens"])
        item, sampling = Media(kind="video", path=path), Sampling(frames=case["frames"])
        assert list(qwen_vl._shape(p, item, sampling)) == case["grid"]
        grids.append(list(qwen_vl._shape(processors[family], item, sampling)))
    assert grids != [case["grid"] for case in cases]


def test_settings_of_videos_are_where_transformers_looks(tmp_path):
    images_own = dict(size=dict(shortest_edge=5, longest_edge=7), image_mean=[0.5], image_std=[0.5], resample=3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images_own))
    assert qwen_vl._video_pixels(tmp_path) == (5, 7) and qwen_vl._video_tokens(tmp_path, "qwen3_vl") is None
    images.check_frames(tmp_path, side=None)
    (tmp_path / "video_preprocessor_config.json").write_text('{"cap_pixels_per_frame": true, "image_std": [0.4]}')
    assert [qwen_vl._video_tokens(tmp_path, name) for name in ("qwen2_vl", "qwen3_vl")] == [128_000, 768]
    with pytest.raises(
        ValueError, match=r"video_preprocessor_config.json: image_std of videos is \[0.4\], only \[0.5\]"
    ):
        images.check_frames(tmp_path, side=None)
    whole = dict(video_processor=dict(cap_pixels_per_frame=True, max_video_tokens=9, size=dict(height=3, width=4)))
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    assert qwen_vl._video_tokens(tmp_path, "qwen3_vl") == 9
    with pytest.raises(ValueError, match=r"processor_config.json: size of videos is .*, only .* is supported"):
        images.check_frames(tmp_path, side=3)
