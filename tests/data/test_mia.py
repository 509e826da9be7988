"""MIA-DPO's samples and selection: recorded ratios, hand-computed geometry, filters, the command."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastpo.data import formats, mia
from fastpo.data.mia import Answer, Single

GOLDEN = Path(__file__).parents[1] / "golden/mia_select"
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "mia_select.safetensors")
COLOURS = ("red", "lime", "blue", "yellow", "purple", "cyan", "orange", "navy", "pink", "black")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_ratio_perplexity_and_decision_are_the_recorded_ones(case):
    stored = {name: TENSORS[f"{case['id']}/{name}"] for name in case["tensors"]}
    kind = {"pic_in_pic": "pip"}.get(case["kind"], case["kind"])
    if kind == "sequence":
        means = mia.image_means(stored["attn_rows"], stored["image_starts"].tolist(), case["tokens_per_image"])
        torch.testing.assert_close(means, stored["image_means"], rtol=1e-6, atol=0)
        images, ratio = case["n_images"], mia.sequence_ratio(means, case["target"])
        assert mia.perplexity(stored["logits"]) == pytest.approx(case["ppl"], rel=1e-6)
    elif kind == "grid":
        images = math.prod(case["grid"])
        assert mia.GRIDS[images] == tuple(case["grid"])
        ratio = mia.grid_ratio(stored["attn_map"], images, case["target"])
    else:
        images, ratio = 2, mia.centre_ratio(stored["attn_map"])
    assert ratio == pytest.approx(case["ratio"], rel=1e-6)
    assert mia.THRESHOLDS[kind][images] == case["threshold"]
    assert mia.looks_away(kind, images, ratio) == case.get("keep", case.get("keep_by_ratio"))


def test_grid_blocks_take_what_is_left_over_first():
    attention = torch.arange(35, dtype=torch.float64).reshape(5, 7)
    expected = [attention[:3, :3], attention[:3, 3:5], attention[:3, 5:], attention[3:, :3]]
    for target, block in enumerate(expected, start=1):
        assert mia.grid_ratio(attention, 6, target) == pytest.approx(float(block.sum() / attention.sum()), abs=1e-12)
    assert sum(mia.grid_ratio(attention, 6, n) for n in range(1, 7)) == pytest.approx(1.0)


def test_the_bound_counts_for_sequences_only():
    assert mia.looks_away("sequence", 2, 0.8) and not mia.looks_away("sequence", 2, 0.8001)
    assert mia.looks_away("grid", 9, 0.2999) and not mia.looks_away("grid", 9, 0.3)
    assert not mia.looks_away("pip", 2, 0.8)


def test_a_collage_shows_each_picture_in_its_cell():
    pictures = [Image.new("RGB", (100 + 10 * n, 50), COLOURS[n]) for n in range(6)]
    made = mia.collage(pictures)
    assert made.size == (40 + 3 * 488, 40 + 2 * 488)
    for n, picture in enumerate(pictures, start=1):
        left, top, right, bottom = mia.cell(6, n)
        assert (left, top) == (40 + 488 * ((n - 1) % 3), 40 + 488 * ((n - 1) // 3)) and right - left == 448
        height = round(50 * 448 / picture.width)
        assert (
            made.getpixel((left + 1, top + 1))
            == made.getpixel((right - 1, top + height - 1))
            == picture.getpixel((0, 0))
        )
        assert made.getpixel((left + 1, top + height + 2)) == made.getpixel((right + 1, top + 5)) == (255, 255, 255)
        label = np.asarray(made.crop((left, top - 40, left + 200, top)))
        assert (label < 128).any() and (label[:, -30:] == 255).all()


def test_a_picture_in_a_picture_covers_seven_tenths():
    host = Image.new("RGB", (200, 100), "red")
    made = np.asarray(mia.picture_in_picture(host, Image.new("RGB", (30, 60), "blue")))
    rows, columns = np.nonzero((made == (0, 0, 255)).all(-1))
    assert (rows.min(), rows.max()) == (15, 84) and (columns.min(), columns.max()) == (82, 116)  # 70 by 35, centred
    assert (made[0] == (255, 0, 0)).all() and host.getpixel((100, 50)) == (255, 0, 0)


def test_noise_falls_on_the_target_only():
    picture = mia.collage([Image.new("RGB", (448, 448), "gray")] * 4)
    row = {"id": "grid-3", "kind": "grid", "count": 4, "target": 3}
    before, after = np.asarray(picture), np.asarray(mia.corrupted(picture, row, seed=1))
    left, top, right, bottom = mia.cell(4, 3)
    inside = np.zeros(before.shape, bool)
    inside[top:bottom, left:right] = True
    assert (before[~inside] == after[~inside]).all()
    clipped = (after[inside] == 0).mean()  # P(128 + 225 z < 0.5) for a gray of 128
    assert clipped == pytest.approx(0.5 * math.erfc(127.5 / 225 / math.sqrt(2)), abs=0.003)
    assert (after == np.asarray(mia.corrupted(picture, row, seed=1))).all()
    assert (after != np.asarray(mia.corrupted(picture, row, seed=2))).any()
    whole = np.asarray(mia.corrupted(picture, row | {"kind": "pip", "count": 2}))
    assert (whole[:30] != before[:30]).any()
    assert mia.corrupted(picture, row | {"kind": "sequence"}) is picture


@pytest.fixture
def rows(tmp_path) -> list[Single]:
    found = []
    for n, colour in enumerate(COLOURS):
        folder = tmp_path / ("coco" if n < 6 else "gqa" if n < 9 else "alone")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (40 + n, 30), colour).save(folder / f"{n}.png")
        found.append(Single(folder / f"{n}.png", f"What colour is {n}?", colour, str(folder)))
    return found


def test_sequences_ask_for_the_target(rows, tmp_path):
    made = mia.build(rows, "sequence", tmp_path / "images", seed=3)
    assert [row["chosen"] for row in made] == list(COLOURS[:9])  # the last has no other picture in its source
    for row, single in zip(made, rows, strict=False):
        count, target = row["count"], row["target"]
        assert len(set(row["image"])) == len(row["image"]) == count and row["image"][target - 1] == str(single.path)
        assert {Path(path).parent for path in row["image"]} == {single.path.parent}
        shown = "".join(f"Image{n}:<image>\n" for n in range(1, count + 1))
        assert row["prompt"] == f"{shown}In Image{target}, w{single.question[1:]}"
    assert made == mia.build(rows, "sequence", tmp_path / "images", seed=3)
    assert made != mia.build(rows, "sequence", tmp_path / "images", seed=4)
    assert not (tmp_path / "images").exists()


def test_counts_follow_the_authors_mix(tmp_path):
    rows = [Single(tmp_path / f"{n}.png", "Q?", "A", "s") for n in range(1000)]
    made = mia.build(rows, "sequence", tmp_path)
    share = Counter(row["count"] for row in made)[2] / len(made)
    assert share == pytest.approx(20000 / 36410, abs=0.06)  # standard deviation 0.016
    targets = Counter(row["target"] for row in made if row["count"] == 2)
    assert targets[1] / (targets[1] + targets[2]) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("kind", ["grid", "pip"])
def test_combined_pictures_hold_the_target(rows, tmp_path, kind):
    boxed = rows[0]._replace(question="What is at [0.1, 0.2, 0.3, 0.45]?")
    made = mia.build([boxed, *rows[1:]], kind, tmp_path / "images")
    assert [row["id"] for row in made] == [f"{kind}-{n}" for n in range(1, 9)]
    for row, single in zip(made, rows[1:], strict=False):
        (path,) = row["image"]
        with Image.open(path) as picture:
            if kind == "grid":
                left, top, _, _ = mia.cell(row["count"], row["target"])
                seen = picture.getpixel((left + 5, top + 5))
                assert row["prompt"].startswith(f"<image>\nIn Image{row['target']}, what")
            else:
                seen = picture.getpixel((picture.width // 2, picture.height // 2))
                assert row["prompt"].partition("\n")[2].endswith(", w" + single.question[1:])
        assert seen == Image.new("RGB", (1, 1), single.answer).getpixel((0, 0))


def test_pictures_that_cannot_be_read_are_named(rows, tmp_path):
    rows[1].path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"coco/1.png: "):
        mia.build(rows[:2], "pip", tmp_path / "images")


ROW = {"id": "grid-1", "kind": "grid", "count": 4, "target": 2, "chosen": "A red car on the road."}


@pytest.mark.parametrize(
    ("answer", "changes", "reason"),
    [
        (Answer("A dog at the beach.", 0.4, 1.5), {}, None),
        (Answer(" ", 0.4, 1.5), {}, "empty"),
        (Answer("A dog.", 0.4, 1.5), {"chosen": ""}, "empty"),
        (Answer("A dog.", 0.4, 1.5), {"chosen": "x" * 512}, "long"),
        (Answer(" A red car on the road.", 0.4, 1.5), {}, "equal"),
        (Answer("A dog at the beach.", 0.4, 1.1), {}, "perplexity"),
        (Answer("A dog at the beach.", 0.4, math.nan), {}, "perplexity"),
        (Answer("A dog at the beach.", 0.5, 1.5), {}, "attention"),
        (Answer("A dog at the beach.", math.nan, 1.5), {}, "attention"),
        (Answer("Dog.", 0.4, 1.5), {}, "length ratio"),  # 22 against 4 characters
        (Answer("A red car on the roads.", 0.4, 1.5), {}, "edit distance"),  # 1 of 23
        (Answer("A red car on a road.", 0.4, 1.5), {}, None),  # 3 of 22
    ],
)
def test_which_answers_become_rejected(answer, changes, reason):
    assert mia.refusal(ROW | changes, answer) == reason


def test_mining_keeps_rows_and_counts_refusals(tmp_path):
    said = {"a": Answer("A dog at the beach.", 0.4, 1.5), "b": Answer("Dog.", 0.4, 1.5), "c": Answer("", 0.4, 1.5)}
    rows = [ROW | {"id": name} for name in said]
    kept, refused = mia.mine(rows, lambda row: said[row["id"]])
    assert kept == [ROW | {"id": "a", "rejected": "A dog at the beach.", "gt": ROW["chosen"]}]
    assert refused == {"length ratio": 1, "empty": 1}
    assert len(mia.mine(rows, lambda row: said[row["id"]], length_ratio=6)[0]) == 2


def test_the_command_writes_rows_that_the_format_reads(rows, tmp_path, capsys):
    said = [
        {
            "image": str(row.path.relative_to(tmp_path)),
            "conversations": [
                {"from": "human", "value": f"<image>\n{row.question}"},
                {"from": "gpt", "value": row.answer},
            ],
        }
        for row in rows
    ]
    (tmp_path / "rows.json").write_text(json.dumps([*said, {"image": None}]))
    mia.main([str(tmp_path / "rows.json"), "--media-root", str(tmp_path), "--out", str(tmp_path / "made")])
    made = json.loads((tmp_path / "made/mia.json").read_text())
    assert Counter(row["kind"] for row in made) == {"sequence": 9, "grid": 9, "pip": 9}
    assert "9 sequence, 9 grid, 9 pip; 10 of 11 rows have an image" in capsys.readouterr().out
    for row in random.Random(0).sample(made, 9):
        sample = formats.mia(row | {"rejected": "Something else."}, "mia.json:0", tmp_path)
        assert len(sample.media) == len(row["image"]) and sample.question == row["prompt"]


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    (tmp_path / "rows.json").write_text('[{"image": null}]')
    for path, reason in (("gone.json", "gone.json: no such file"), ("rows.json", "none of 1 rows has one image")):
        with pytest.raises(SystemExit, match="1"):
            mia.main([str(tmp_path / path), "--out", str(tmp_path / "made")])
        assert reason in capsys.readouterr().err
