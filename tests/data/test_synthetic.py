"""The demo's data: the same bytes for a seed, nothing to learn from the text, clips that show what the answers say."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from fastpo.data import synthetic

ROWS = {"train": 16, "test": 8}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "demo"
    synthetic.write(out, 7, **ROWS)
    return out


@pytest.fixture(scope="module")
def rows(demo: Path) -> dict[str, list[dict]]:
    return {name: json.loads((demo / f"{name}.json").read_text()) for name in ROWS}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def shown(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of the shape, [h, w] bool, and their median colour. The background is nearly grey."""
    mask = np.ptp(frame.astype(int), axis=-1) > 100
    return mask, np.median(frame[mask], axis=0)


def nearest_colour(frame: np.ndarray) -> str:
    colour = shown(frame)[1]
    return min(synthetic.COLOURS, key=lambda name: np.abs(synthetic.COLOURS[name] - colour).sum())


def test_one_seed_gives_the_same_bytes_in_any_process_and_folder(demo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastpo.data.synthetic", str(tmp_path / "elsewhere" / "again"), "--seed", "7"]
    command += [f"--{name}={count}" for name, count in ROWS.items()]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "123"})
    again = digests(tmp_path / "elsewhere" / "again")
    assert again == digests(demo)
    assert len([name for name in again if name.startswith("videos/")]) == sum(ROWS.values())
    assert len({again[name] for name in again if name.startswith("videos/")}) == sum(ROWS.values())


def test_another_seed_gives_other_clips_and_weights(demo: Path, tmp_path: Path) -> None:
    synthetic.write(tmp_path / "other", 8, train=2, test=2)
    other, mine = digests(tmp_path / "other"), digests(demo)
    assert other["videos/0000.mp4"] != mine["videos/0000.mp4"]
    assert other["model/model.safetensors"] != mine["model/model.safetensors"]
    assert other["model/tokenizer.json"] == mine["model/tokenizer.json"]


def test_rows_are_in_rrpos_format(demo: Path, rows: dict[str, list[dict]]) -> None:
    table = rows["train"] + rows["test"]
    assert [row["sample_id"] for row in table] == list(range(len(table)))
    keys = "sample_id media_path question src answer pred answer_masked pred_masked".split()
    for row in table:
        assert list(row) == keys
        assert (demo / row["media_path"]).is_file()
        assert row["question"].startswith("<image>\n") and row["question"].endswith("?")
        for side in ("answer", "pred"):
            tagged = row[f"{side}_masked"]
            phrases = re.findall("<MASK> (.+?) </MASK>", tagged)
            assert len(phrases) == (2 if row["src"] == "order" else 1)
            assert re.sub("<MASK> (.+?) </MASK>", r"\1", tagged) == row[side]
        outside = {re.sub("<MASK> .+? </MASK>", "_", row[key]) for key in ("answer_masked", "pred_masked")}
        assert len(outside) == 1 and row["answer"] != row["pred"]
    for name in ROWS:
        assert set(Counter(row["src"] for row in rows[name]).values()) == {ROWS[name] // 4}


def test_the_text_alone_tells_nothing(rows: dict[str, list[dict]]) -> None:
    for name in ROWS:
        pairs = Counter((row["question"], row["answer_masked"], row["pred_masked"]) for row in rows[name])
        assert all(pairs[question, pred, answer] == count for (question, answer, pred), count in pairs.items())
    # A majority vote per phrase over the training rows, on the held-out rows.
    votes = Counter()
    for row, (key, sign) in itertools.product(rows["train"], (("answer_masked", 1), ("pred_masked", -1))):
        votes.update({phrase: sign for phrase in re.findall("<MASK> (.+?) </MASK>", row[key])})
    assert votes and not any(votes.values())


def test_clips_show_what_the_answers_say(demo: Path, rows: dict[str, list[dict]]) -> None:
    for row in rows["train"] + rows["test"]:
        clip = frames(demo / row["media_path"])
        assert clip.shape == (synthetic.FRAMES, synthetic.SIZE, synthetic.SIZE, 3) and clip.dtype == np.uint8
        words = re.findall(r"\w+", row["answer"])
        colours = [word for word in words if word in synthetic.COLOURS]
        seen = [nearest_colour(frame) for frame in clip]
        half = len(clip) // 2
        if row["src"] == "order":
            assert seen == [colours[0]] * half + [colours[1]] * half
            continue
        if colours:
            assert seen == colours * len(clip)
        centres = [np.argwhere(shown(frame)[0]).mean(0) for frame in (clip[0], clip[half])]
        down, right = centres[1] - centres[0]
        axis = ("left", "right") if abs(right) > abs(down) else ("up", "down")
        assert axis[int(max(right, down, key=abs) > 0)] in words


def test_shapes_are_drawn_as_named() -> None:
    # Covered share of the square of side 2 r: .9 * .9, and .35 * 1.1 for the two oblongs.
    expected = {"square": 0.81, "pole": 0.385, "plank": 0.385}
    covers = {name: synthetic._cover(name, 32, 32, 14.0) for name in synthetic.SHAPES}
    assert {name: cover.sum() / 28**2 for name, cover in covers.items()} == pytest.approx(expected, abs=0.02)
    height = {name: int((cover[:, 32] > 0.5).sum()) for name, cover in covers.items()}
    assert height["plank"] < height["square"] < height["pole"]
    assert np.array_equal(covers["pole"], covers["plank"].T)
    for cover in covers.values():
        assert np.array_equal(cover, cover[::-1, ::-1])  # no shape points in a direction


def test_the_model_folder_is_an_ordinary_one(demo: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    config = model.config
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (config.model_type, config.text_config.model_type) == ("llava_onevision", "qwen2")
    assert config.vision_config.model_type == "siglip_vision_model" and not config.vision_config.vision_use_head
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    for name, index in (("<image>", config.image_token_id), ("<video>", config.video_token_id)):
        assert tokenizer.encode(name) == [index]
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == config.text_config.vocab_size
    pixels = torch.rand(1, 2, 3, config.vision_config.image_size, config.vision_config.image_size)
    side = -(-config.vision_config.image_size // config.vision_config.patch_size // 2)
    ids = torch.tensor([[config.video_token_id] * (2 * side * side + 1) + tokenizer.encode("What?")])
    assert model(input_ids=ids, pixel_values_videos=pixels).logits.isfinite().all()
    assert json.loads((demo / "model/preprocessor_config.json").read_text())["size"]["height"] == pixels.shape[-1]


def test_the_tokenizer_speaks_qwens_chat_and_any_text(demo: Path, rows: dict[str, list[dict]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    chat = [{"role": "user", "content": "<video>\nWhat?"}]
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == prompt
    chat = [{"role": "system", "content": "Be brief."}, *chat, {"role": "assistant", "content": "A pole."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<video>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA pole.<|im_end|>\n"
    )
    for row in rows["test"]:
        words = re.findall(r" ?\w+|[.]", row["answer"])
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(row["answer"])) == [w.replace(" ", "Ġ") for w in words]
    for text in ("Zürich, 日本 \t\n", "<MASK> red </MASK>", "<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_failed_run_leaves_nothing_and_a_folder_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    with pytest.raises(ValueError, match="train=3"):
        synthetic.write(out, 0, train=3, test=2)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "write_model", lambda folder, seed: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            synthetic.write(out, 0, train=2, test=2)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already there"):
        synthetic.write(out, 0, train=2, test=2)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_folder_says_with_what_it_was_built(demo: Path, tmp_path: Path) -> None:
    assert synthetic.built(demo, seed=7, **ROWS) and not synthetic.built(demo / "none", seed=8)
    with pytest.raises(ValueError, match=r"demo: built with seed 7, not 8, train 16, not 640; remove the folder"):
        synthetic.built(demo, seed=8, train=640)
    with pytest.raises(ValueError, match="seed unknown, not 0"):
        synthetic.built(tmp_path, seed=0)
